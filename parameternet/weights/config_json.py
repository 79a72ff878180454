"""Read a checkpoint's `config.json`, and check every key before it is used."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import WeightsDamaged, WeightsNotFound, mend

__all__ = ["CONFIG_KEYS", "PRETRAINED_CFG_KEYS", "RESULTS_KEYS", "parse_config", "read_config"]


# The config keys that are read, and their types.
CONFIG_KEYS = {
    "architecture": str,
    "pretrained_cfg": dict,
    "num_classes": int,
    "model_args": dict,
    "label_names": list,
    "label_descriptions": dict,
    "results": dict,
    "upcycled_from": str,
}
RESULTS_KEYS = {
    "top1": float,
    "top5": float,
    "top1_interval": float,
    "loss": float,
    "images": int,
    "unreadable": int,
    "parameters": int,
    "macs": int,
    "data": str,
    "routing": dict,
}
PRETRAINED_CFG_KEYS = {
    "architecture": str,
    "tag": str,
    "num_classes": int,
    "input_size": list,
    "test_input_size": list,
    "mean": list,
    "std": list,
    "crop_pct": float,
    "test_crop_pct": float,
    "crop_mode": str,
    "interpolation": str,
    "license": str,
    "hf_hub_id": str,
    "label_names": list,
    "label_descriptions": dict,
}
_ITEMS = {
    "label_names": str,
    "label_descriptions": str,
    "input_size": int,
    "test_input_size": int,
    "mean": float,
    "std": float,
}


def _one_of(*names: str) -> tuple[str, Callable[[Any], bool]]:
    return f" among {', '.join(names)}", names.__contains__


_SIZE = " with three numbers from 1 to 65536", lambda size: len(size) == 3 and all(1 <= n <= 65536 for n in size)
_SHARES = " with one finite number per channel", lambda found: bool(found) and all(map(math.isfinite, found))
_CROP = " above 0 and at most 10", lambda share: 0 < share <= 10
# Additional checks of values: a description for messages, and the check.
_RANGES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "tag": (" of letters, digits and _ . + -", lambda tag: re.fullmatch(r"[\w.+-]*", tag) is not None),
    "num_classes": (" from 0 to 10 million", lambda number: 0 <= number <= 10_000_000),
    "input_size": _SIZE,
    "test_input_size": _SIZE,
    "mean": _SHARES,
    "std": (" with one finite number above 0 per channel", lambda found: _SHARES[1](found) and min(found) > 0),
    "interpolation": _one_of("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"),
    "crop_mode": _one_of("center", "squash", "border"),
    "crop_pct": _CROP,
    "test_crop_pct": _CROP,
}


def read_config(path: Path) -> dict[str, Any]:
    """Read and check a `config.json`.

    Raises:
        WeightsNotFound: no such file.
        WeightsDamaged: not JSON, or a key is missing or has a bad value; the message names the key.
    """
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise WeightsNotFound(
            f"there is no {path}, which describes the weights next to it and names the classes. "
            "Copy the whole checkpoint folder, not only the weights"
        ) from None
    return parse_config(data, str(path))


def parse_config(data: str | bytes, where: str) -> dict[str, Any]:
    """Parse and check a config in timm's Hub layout; `where` names the JSON text in errors.

    Raises:
        WeightsDamaged: not JSON, or a key is missing or has a bad value; the message names the key.
    """
    try:
        found = json.loads(data if isinstance(data, str) else data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise WeightsDamaged(f"{where} is not valid JSON ({error}): copy it again from its source") from None
    _check_config(where, found)
    return found


def _check_config(where: str, found: Any) -> None:
    missing = [key for key in ("architecture", "pretrained_cfg") if not (isinstance(found, dict) and key in found)]
    if missing:
        raise WeightsDamaged(f"{where} lacks {' and '.join(missing)}: expected the layout of timm's config.json")
    _check_values(where, found, CONFIG_KEYS)
    _check_values(where, found["pretrained_cfg"], PRETRAINED_CFG_KEYS, "pretrained_cfg.")
    _check_values(where, found.get("results") or {}, RESULTS_KEYS, "results.")
    _check_channels(where, found["pretrained_cfg"])


def _check_channels(where: str, cfg: dict[str, Any]) -> None:
    channels = (cfg.get("input_size") or [3])[0]
    for key in ("mean", "std"):
        if cfg.get(key) and len(cfg[key]) not in (1, 3, channels):
            raise WeightsDamaged(
                f"{where}: pretrained_cfg.{key} has {len(cfg[key])} numbers, but images have {channels} channels: give "
                "one number per channel"
            )


def _check_values(where: str, values: dict[str, Any], kinds: dict[str, type], prefix: str = "") -> None:
    for key, kind in kinds.items():
        value = values.get(key)
        required = not prefix and key in ("architecture", "pretrained_cfg")
        if value is None and not required:
            continue
        words, holds = _RANGES.get(key, ("", lambda _: True))
        fits = _is_a(value, kind) and all(_is_a(item, _ITEMS[key]) for item in _items(key, value))
        if not fits or not holds(value):
            expected = f"{kind.__name__} of {_ITEMS[key].__name__}" if key in _ITEMS else kind.__name__
            text = repr(value)
            raise WeightsDamaged(
                f"{where}: {prefix}{key} must be a JSON {expected}{words}, "
                f"got {text[:60]}{'…' if len(text) > 60 else ''}. {mend(Path(where))}"
            )


def _items(key: str, value: Any) -> list[Any]:
    if key not in _ITEMS:
        return []
    return list(value.values() if isinstance(value, dict) else value)


def _is_a(value: Any, kind: type) -> bool:
    if isinstance(value, bool):  # a subclass of int
        return False
    return isinstance(value, (int, float) if kind is float else kind)
