# SPDX-License-Identifier: AGPL-3.0-or-later
"""Any network of timm as the backbone of a detector: `TimmBackbone`, and `TimmStage`, which picks a feature by stride.

- [-1, 1, TimmBackbone, [parameternet_600m, {pretrained: False}]]  # 0
- [0, 1, TimmStage, [8]]  # 1
"""

from copy import deepcopy
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from torch import Tensor, nn

from parameternet import fuse
from parameternet.layers import match_routers

__all__ = ["Features", "TimmBackbone", "TimmStage", "features_of"]

# Arguments with which families with a fixed input size accept any size.
FREE_SIZES: tuple[dict[str, Any], ...] = ({}, {"strict_img_size": False}, {"dynamic_img_size": True})


@dataclass(frozen=True)
class Features:
    """The features of a timm network: channels, strides, whether channels come last, and arguments to accept any
    size."""

    channels: tuple[int, ...]
    strides: tuple[int, ...]
    channels_last: bool
    options: dict[str, Any] = field(hash=False)

    def index(self, stride: int) -> int:
        """Return the index of the feature with a stride; the last one if there are several."""
        found = [i for i, s in enumerate(self.strides) if s == stride]
        if not found:
            raise ValueError(f"no feature of stride {stride}; there are {', '.join(map(str, self.strides))}")
        return found[-1]


def features_of(name: str, in_chans: int, options: dict[str, Any]) -> Features:
    """Inspect a network without allocating its parameters or drawing random numbers.

    Raises:
        ValueError: the network is not one of timm's, or its family supports only one input size.
    """
    return cached_features(name, in_chans, tuple(sorted(options.items())))


@lru_cache
def cached_features(name: str, in_chans: int, options: tuple[tuple[str, Any], ...]) -> Features:
    if not timm.is_model(name.partition(".")[0]):
        raise ValueError(f"TimmBackbone: timm has no network {name!r}; timm.list_models() lists all")
    if any(key == "checkpoint_path" for key, _ in options):
        raise ValueError(
            f"TimmBackbone: checkpoint_path is not supported, because such files are not verified; build the detector "
            f"and load the weights of {name}, YOLO(yaml).load('model.safetensors')"
        )
    errors = []
    for more in FREE_SIZES:
        given = {**more, **dict(options)}
        try:
            with torch.device("meta"):
                net = timm.create_model(name, features_only=True, in_chans=in_chans, **given).eval()
                shapes = [[f.shape for f in net(torch.empty(1, in_chans, *size))] for size in ((64, 96), (256, 256))]
        except Exception as error:  # the network's own code may raise any error for a size
            errors.append(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            continue
        last = str(getattr(net, "output_fmt", "NCHW")).endswith("NHWC")
        channels = tuple(net.feature_info.channels())
        assert tuple(shape[-1 if last else 1] for shape in shapes[0]) == channels, (name, shapes)
        return Features(channels, tuple(net.feature_info.reduction()), last, given)
    family = timm.model_entrypoint(name.partition(".")[0]).__module__.rpartition(".")[2]
    raise ValueError(
        f"TimmBackbone: {name} (family {family}) gives no features for images of any size, which a detector needs "
        f"({errors[0]}); take another family"
    )


class TimmBatchNorm(nn.BatchNorm2d):
    """A batch norm that keeps its eps and momentum, which Ultralytics sets on plain torch.nn.BatchNorm2d."""


TimmBatchNorm.__module__ = "parameternet.yolo"

# Cached state dicts of pretrained networks: a trainer rebuilds the model, and should not ask the Hub each time, nor at
# all when it resumes from a checkpoint.
_SEEN: dict[str, dict[str, Tensor]] = {}


class TimmBackbone(nn.Module):
    """Features of a timm network, as a list. Images are 0 to 1, as in YOLO; mean and std are applied here.

    Args:
        c1: Channels of the images.
        spec: `name`, and arguments of `timm.create_model`: `pretrained` (default False), `out_indices`, ...
        channels: Channels of the features, needed by the parser only.
    """

    def __init__(self, c1: int, spec: dict[str, Any], channels: list[int] | None = None) -> None:
        super().__init__()
        self.c1, self.spec = c1, {**spec}
        self._build(bool(spec.get("pretrained")))

    def _build(self, pretrained: bool) -> None:
        options = {key: value for key, value in self.spec.items() if key not in ("name", "pretrained", "out_indices")}
        found = features_of(self.spec["name"], self.c1, options)
        seen = _SEEN.get(self._key) if pretrained else None
        net = timm.create_model(
            self.spec["name"],
            features_only=True,
            in_chans=self.c1,
            pretrained=pretrained and seen is None,
            out_indices=tuple(self.spec.get("out_indices") or range(len(found.channels))),
            **found.options,
        )
        cfg = resolve_data_config(pretrained_cfg=net.pretrained_cfg)
        if seen is not None:
            match_routers(net, seen)
            net.load_state_dict(seen)
        elif pretrained:
            _SEEN[self._key] = {name: value.clone() for name, value in net.state_dict().items()}
        for module in net.modules():
            if type(module) is nn.BatchNorm2d:
                module.__class__ = TimmBatchNorm
        self.net, self.channels_last = net, found.channels_last
        # Ultralytics counts on a small image and multiplies by area, unless it finds a layer whose cost is fixed. That
        # of squeeze-and-excitation is, but it does not look like it.
        self.fixed_cost = nn.AdaptiveAvgPool2d(1)
        for name in ("mean", "std"):
            values = cfg[name] if self.c1 == 3 else [sum(cfg[name]) / len(cfg[name])] * self.c1
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)

    @property
    def _key(self) -> str:
        return f"{self.c1} {sorted(self.spec.items(), key=str)}"

    def forward(self, x: Tensor) -> list[Tensor]:
        features = self.net((x - self.mean) / self.std)
        return [f.permute(0, 3, 1, 2).contiguous() if self.channels_last else f for f in features]

    def fold(self) -> None:
        """Fold batch normalisation, in place."""
        training = self.training
        for module in self.net.modules():
            if type(module) is TimmBatchNorm:
                module.__class__ = nn.BatchNorm2d
        fuse(self.net.eval(), inplace=True)
        self.train(training)

    # A checkpoint stores name, arguments and tensors, but no timm classes, which may move. A folded network has no
    # name, so it is pickled whole.
    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        if not any(isinstance(module, TimmBatchNorm) for module in self.net.modules()):
            return state
        state["_modules"] = {name: module for name, module in self._modules.items() if name != "net"}
        state["tensors"] = self.net.state_dict()
        state["frozen"] = [name for name, p in self.net.named_parameters() if not p.requires_grad]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        tensors, frozen = state.pop("tensors", None), state.pop("frozen", ())
        super().__setstate__(state)
        if tensors is None:
            return
        buffers = self._buffers
        self._build(False)
        match_routers(self.net, tensors)
        self.net.load_state_dict(tensors, assign=True)
        self._buffers.update(buffers)
        for name, parameter in self.net.named_parameters():
            parameter.requires_grad_(name not in frozen)
        self.net.train(self.training)
        if self.spec.get("pretrained"):
            _SEEN[self._key] = {
                name: value.float() if value.is_floating_point() else value for name, value in tensors.items()
            }

    def __deepcopy__(self, memo: dict[int, Any]) -> "TimmBackbone":
        copy = self.__class__.__new__(self.__class__)
        memo[id(self)] = copy
        copy.__dict__.update({key: deepcopy(value, memo) for key, value in self.__dict__.items()})
        return copy


class TimmStage(nn.Module):
    """Pick a feature of a `TimmBackbone`: a row `[0, 1, TimmStage, [8]]` takes the one with stride 8."""

    def __init__(self, c1: Any, index: int, c2: int) -> None:
        super().__init__()
        self.index = index

    def forward(self, x: list[Tensor]) -> Tensor:
        return x[self.index]


TimmBackbone.__module__ = TimmStage.__module__ = "parameternet.yolo"
