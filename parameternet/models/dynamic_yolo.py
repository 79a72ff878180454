"""YOLOv8 backbones with dynamic convolutions, as classifiers and as timm feature extractors.

These are the networks that `parameternet.yolo` builds for `yolov8n-dynamicconv.yaml` and so on, but without
Ultralytics. Rows 0 to 9 are modules `model.0` to `model.9` in both, so a classifier trained here can initialise the
backbone of a detector. The rows, the widths and the depths are YOLOv8's (Jocher et al., 2023); the code is ours.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead
from timm.models import checkpoint_seq, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ..layers import DynamicConv, GhostModule
from .builder import build_model

__all__ = ["YoloBackbone"]


class Scale(NamedTuple):
    """Multipliers for depth and width, and the largest width before multiplication."""

    depth: float
    width: float
    max_channels: int


SCALES = {
    "n": Scale(0.33, 0.25, 1024),
    "s": Scale(0.33, 0.50, 1024),
    "m": Scale(0.67, 0.75, 768),
    "l": Scale(1.00, 1.00, 512),
    "x": Scale(1.00, 1.25, 512),
}
WIDTHS, REPEATS = (64, 128, 256, 512, 1024), (3, 6, 6, 3)
ConvLayer = Callable[..., nn.Module]


class ConvNormAct(nn.Module):
    """Apply convolution, batch norm and SiLU. Input (B, c1, H, W) -> output (B, c2, H / s, W / s)."""

    def __init__(
        self, c1: int, c2: int, k: int = 1, s: int = 1, conv_layer: ConvLayer = nn.Conv2d, device=None, dtype=None
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv = conv_layer(c1, c2, k, stride=s, padding=k // 2, bias=False, **dd)
        self.bn = nn.BatchNorm2d(c2, eps=1e-3, momentum=0.03, **dd)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class Bottleneck(nn.Module):
    """Two 3 x 3 convolutions with a shortcut; the second may be dynamic."""

    def __init__(self, channels: int, conv_layer: ConvLayer, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.cv1 = ConvNormAct(channels, channels, 3, **dd)
        self.cv2 = ConvNormAct(channels, channels, 3, conv_layer=conv_layer, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.cv2(self.cv1(x))


class C2f(nn.Module):
    """Pass half of the channels through `repeats` blocks in sequence, and concatenate all outputs."""

    def __init__(
        self, c1: int, c2: int, repeats: int, block: Callable[..., nn.Module], device=None, dtype=None
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.hidden = c2 // 2
        self.cv1 = ConvNormAct(c1, 2 * self.hidden, **dd)
        self.cv2 = ConvNormAct((2 + repeats) * self.hidden, c2, **dd)
        self.m = nn.ModuleList(block(self.hidden, **dd) for _ in range(repeats))

    def forward(self, x: Tensor) -> Tensor:
        first, last = self.cv1(x).chunk(2, 1)
        parts = [first, last]
        for block in self.m:
            last = block(last)
            parts.append(last)
        return self.cv2(torch.cat(parts, 1))


class SPPF(nn.Module):
    """Concatenate a feature map with its max-pooled versions over growing windows."""

    def __init__(self, c1: int, c2: int, k: int = 5, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.cv1 = ConvNormAct(c1, c1 // 2, **dd)
        self.cv2 = ConvNormAct(4 * (c1 // 2), c2, **dd)
        self.m = nn.MaxPool2d(k, stride=1, padding=k // 2)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.cv1(x)]
        for _ in range(3):
            parts.append(self.m(parts[-1]))
        return self.cv2(torch.cat(parts, 1))


def _ghost(channels: int, conv_layer: ConvLayer, device=None, dtype=None) -> nn.Module:
    return GhostModule(channels, channels, conv_layer=conv_layer, device=device, dtype=dtype)


class YoloBackbone(nn.Module):
    """Rows 0 to 9 of YOLOv8 and a linear classifier. Input (B, in_chans, H, W) -> logits (B, num_classes).

    Args:
        scale: Multipliers for depth and width.
        kind: Which layers are dynamic: 'dynamicconv' (all strided convolutions but the first, without norm and
            activation), 'c2f_dynamicconv' (the second convolution of each bottleneck) or 'c2f_ghost_dynamicconv' (Ghost
            modules instead of bottlenecks).
        num_experts, routing: As in DynamicConv.
        dynamic: False uses static convolutions instead.
        num_classes, in_chans, global_pool, drop_rate: As in timm.
        output_stride: 32; the pyramid pooling of the last row cannot be dilated.
    """

    def __init__(
        self,
        scale: Scale = SCALES["n"],
        kind: str = "dynamicconv",
        num_experts: int = 4,
        routing: str = "softmax",
        dynamic: bool = True,
        num_classes: int = 1000,
        in_chans: int = 3,
        output_stride: int = 32,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if output_stride != 32:
            raise ValueError(f"output_stride must be 32, got {output_stride}: dilated stages are not supported")
        dd = {"device": device, "dtype": dtype}
        conv = partial(DynamicConv, num_experts=num_experts, routing=routing) if dynamic else nn.Conv2d
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        self.grad_checkpointing = False
        widths = [_divisible(min(width, scale.max_channels) * scale.width) for width in WIDTHS]
        repeats = [max(round(number * scale.depth), 1) for number in REPEATS]
        block = partial(_ghost if "ghost" in kind else Bottleneck, conv_layer=conv)
        if kind != "dynamicconv":
            down = partial(ConvNormAct, **dd)
        else:
            block, down = partial(Bottleneck, conv_layer=nn.Conv2d), partial(_bare, conv, **dd)
        rows: list[nn.Module] = [ConvNormAct(in_chans, widths[0], 3, 2, **dd)]
        for stage in range(4):
            c1, c2 = widths[stage], widths[stage + 1]
            rows += [down(c1, c2, 3, 2), C2f(c2, c2, repeats[stage], block, **dd)]
        rows.append(SPPF(widths[4], widths[4], **dd))
        self.model = nn.Sequential(*rows)
        self.stage_ends = [0, 2, 4, 6, 9]
        self.feature_info = [
            {"num_chs": chs, "reduction": 2 << i, "module": f"model.{end}"}
            for i, (chs, end) in enumerate(zip(widths, self.stage_ends, strict=True))
        ]
        self.num_features = self.head_hidden_size = widths[4]
        self.head = ClassifierHead(self.num_features, num_classes, global_pool, drop_rate, **dd)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {"stem": r"^model\.0", "blocks": [(r"^model\.(\d+)", None)]}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier, for `num_classes` (0: none); `global_pool` '' disables pooling, None keeps it."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)
        like = next(self.model.parameters())
        self.head.to(like.device, like.dtype).train(self.training)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the last features, and those of `indices` (in `feature_info`; an int: the last N; None: all)."""
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        take, last = feature_take_indices(len(self.stage_ends), indices)
        ends = [self.stage_ends[i] for i in take]
        intermediates = []
        # TorchScript cannot slice a Sequential.
        rows = self.model
        if not torch.jit.is_scripting() and stop_early:
            rows = self.model[: self.stage_ends[last] + 1]
        for index, row in enumerate(rows):
            x = checkpoint_seq([row], x) if self.grad_checkpointing and not torch.jit.is_scripting() else row(x)
            if index in ends:
                intermediates.append(x)
        if intermediates_only:
            return intermediates
        return x, intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove layers that the features of `indices` do not need; return the indices."""
        take, last = feature_take_indices(len(self.stage_ends), indices)
        self.model = self.model[: self.stage_ends[last] + 1]
        if prune_head:
            self.reset_classifier(0, "")
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        """Map (B, in_chans, H, W) to the last feature map, (B, num_features, H / 32, W / 32), rounded up."""
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.model, x)
        return self.model(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map a feature map to logits (B, num_classes), or with `pre_logits` to the classifier's input."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _bare(conv: ConvLayer, c1: int, c2: int, k: int, s: int, device=None, dtype=None) -> nn.Module:
    return conv(c1, c2, k, stride=s, padding=k // 2, bias=False, device=device, dtype=dtype)


def _divisible(width: float) -> int:
    """Round up to a multiple of 8, as YOLOv8 does with its widths."""
    return int(-(-width // 8) * 8)


VARIANTS = ("dynamicconv", "c2f_dynamicconv", "c2f_ghost_dynamicconv")


def _cfg() -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "model.0.conv",
        "classifier": "head.fc",
        "license": "apache-2.0",
    }


default_cfgs = generate_default_cfgs(
    {f"yolov8{scale}_{variant}.untrained": _cfg() for scale in SCALES for variant in VARIANTS}
)


def _entrypoint(scale: str, variant: str) -> Callable[..., YoloBackbone]:
    def create(pretrained: bool = False, **kwargs: Any) -> YoloBackbone:
        arguments = dict({"scale": SCALES[scale], "kind": variant}, **kwargs)
        return build_model(
            YoloBackbone, create.__name__, pretrained, kwargs, feature_cfg={"flatten_sequential": True}, **arguments
        )

    create.__name__ = create.__qualname__ = f"yolov8{scale}_{variant}"
    create.__module__ = __name__
    create.__doc__ = f"YOLOv8{scale}'s backbone, {variant}: `num_experts`, `routing`, `dynamic`."
    return create


for _scale in SCALES:
    for _variant in VARIANTS:
        _create = _entrypoint(_scale, _variant)
        globals()[_create.__name__] = register_model(_create)
        __all__.append(_create.__name__)
