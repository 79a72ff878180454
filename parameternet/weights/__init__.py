"""Find checkpoints, and verify them before a tensor reaches a network.

Two things are verified:

- *the file*: the SHA-256 of every recorded checkpoint is in the package's `weights.json`, and a file with one of those
  names must match, whatever its origin;
- *the tensors*: every file that `save` writes carries a digest of its tensors in the safetensors metadata.

Files from the Hub or its cache are first compared with the Hub's own digest.

A flipped bit in the payload leaves a valid safetensors file, and the Hub's client compares sizes, not content. Only
safetensors are read, because unpickling can run code.
"""

from .config_json import CONFIG_KEYS, PRETRAINED_CFG_KEYS, RESULTS_KEYS, parse_config, read_config
from .errors import UnknownWeights, WeightsDamaged, WeightsError, WeightsNotFound
from .hub_cache import hub_cause, hub_damage, hub_reason
from .registry import (
    CONFIG_NAME,
    FILE_NAME,
    PACKAGED,
    RECORDS,
    Package,
    digests,
    hub,
    known,
    packaged,
    places,
    shipped,
    unknown,
)
from .resolve import config, find, local, locate, no_weights_in, resolve
from .safetensors_io import (
    CONFIG_DIGEST,
    DIGEST,
    WRITER,
    conversion,
    metadata,
    read,
    read_all,
    save,
    tensors_digest,
    text_digest,
)

__all__ = [
    "CONFIG_DIGEST",
    "CONFIG_KEYS",
    "CONFIG_NAME",
    "DIGEST",
    "FILE_NAME",
    "PACKAGED",
    "PRETRAINED_CFG_KEYS",
    "RECORDS",
    "RESULTS_KEYS",
    "WRITER",
    "Package",
    "UnknownWeights",
    "WeightsDamaged",
    "WeightsError",
    "WeightsNotFound",
    "config",
    "conversion",
    "digests",
    "find",
    "hub",
    "hub_cause",
    "hub_damage",
    "hub_reason",
    "known",
    "local",
    "locate",
    "metadata",
    "no_weights_in",
    "packaged",
    "parse_config",
    "places",
    "read",
    "read_all",
    "read_config",
    "resolve",
    "save",
    "shipped",
    "tensors_digest",
    "text_digest",
    "unknown",
]
