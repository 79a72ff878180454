"""ParameterNet: GhostNets whose convolutions mix several expert kernels per image.

Paper: `ParameterNet: Parameters Are All You Need` - https://arxiv.org/abs/2306.14525 (CVPR 2024)
Released code: huawei-noah/Efficient-AI-Backbones, parameternet_pytorch (Apache-2.0): `parameternet_600m` is the network
of that file. The 300M network was never published; ours is a reconstruction from the parameter counts in the paper's
tables. The smaller networks are our own.

Intentional differences from the released file, with the same outputs in eval mode: stochastic depth grows per block,
not per stage; features are taken from the last block of each resolution; `forward_features` excludes pooling and the
head; timm's arguments and methods work.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import Linear, SelectAdaptivePool2d, get_act_layer, make_divisible
from timm.models import (
    checkpoint_seq,
    generate_default_cfgs,
    register_model,
    register_notrace_module,
)
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ..layers import ConvBnAct, DynamicConv, GhostBottleneck, match_routers
from ..layers.static import PooledConv, static_conv2d
from ..surgery.dilate import dilate
from .builder import build_model

__all__ = ["ParameterNet"]

register_notrace_module(DynamicConv)

# One row per block: kernel, middle width, output width, squeeze-and-excitation ratio, stride; one list per stage.
RELEASED_STAGES = (
    ((3, 16, 16, 0, 1),),
    ((3, 48, 24, 0, 2),),
    ((3, 72, 24, 0, 1),),
    ((5, 72, 40, 0.25, 2),),
    ((3, 120, 40, 0.25, 1), (3, 120, 40, 0.25, 1)),
    ((3, 240, 80, 0, 2),),
    (
        (3, 200, 80, 0, 1),
        (3, 200, 80, 0, 1),
        (3, 200, 80, 0, 1),
        (3, 480, 112, 0.25, 1),
        (3, 672, 112, 0.25, 1),
        (3, 672, 112, 0.25, 1),
    ),
    ((5, 672, 160, 0.25, 2),),
    ((3, 960, 160, 0.25, 1),) * 5,
)
GHOSTNET_STAGES = (
    ((3, 16, 16, 0, 1),),
    ((3, 48, 24, 0, 2),),
    ((3, 72, 24, 0, 1),),
    ((5, 72, 40, 0.25, 2),),
    ((5, 120, 40, 0.25, 1),),
    ((3, 240, 80, 0, 2),),
    (
        (3, 200, 80, 0, 1),
        (3, 184, 80, 0, 1),
        (3, 184, 80, 0, 1),
        (3, 480, 112, 0.25, 1),
        (3, 672, 112, 0.25, 1),
    ),
    ((5, 672, 160, 0.25, 2),),
    ((5, 960, 160, 0, 1), (5, 960, 160, 0.25, 1), (5, 960, 160, 0, 1), (5, 960, 160, 0.25, 1)),
)


class ParameterNet(nn.Module):
    """GhostNet body with dynamic convolutions. Input (B, in_chans, H, W) -> logits (B, num_classes).

    Args:
        stages: Block table, in the format of `GHOSTNET_STAGES`.
        width: Multiplier for all widths, which are rounded to multiples of 4.
        num_experts: Kernels that each dynamic convolution mixes.
        routing, routing_hidden, temperature, routing_norm: As in DynamicConv.
        dynamic: False builds the static baseline, with one kernel per convolution.
        num_classes, in_chans, global_pool, drop_rate, drop_path_rate: As in timm. Stochastic depth grows
            linearly from 0 at the first block to `drop_path_rate` at the last.
        output_stride: 8, 16 or 32; below 32 the last stages are dilated instead of strided, see `surgery.dilate`.
        act_layer: Activation, a class or timm's name for it.
    """

    def __init__(
        self,
        stages: tuple = GHOSTNET_STAGES,
        width: float = 1.0,
        num_experts: int = 4,
        routing: str = "softmax",
        routing_hidden: int | None = None,
        temperature: float = 1.0,
        dynamic: bool = True,
        num_classes: int = 1000,
        in_chans: int = 3,
        output_stride: int = 32,
        global_pool: str = "avg",
        drop_rate: float = 0.2,
        drop_path_rate: float = 0.0,
        act_layer: str | type[nn.Module] = "hard_swish",
        device=None,
        dtype=None,
        routing_norm: str | None = "layer",
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        conv_layer = static_conv2d
        if dynamic:
            conv_layer = partial(
                DynamicConv,
                num_experts=num_experts,
                routing=routing,
                routing_hidden=routing_hidden,
                temperature=temperature,
                routing_norm=routing_norm,
            )
        act_layer = get_act_layer(act_layer)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False

        chs = make_divisible(16 * width, 4)
        self.stem = ConvBnAct(in_chans, chs, 3, stride=2, act_layer=act_layer, conv_layer=conv_layer, **dd)
        block = partial(GhostBottleneck, act_layer=act_layer, conv_layer=conv_layer, **dd)
        taps = [(chs, 2, "stem")]
        drop_paths = iter(torch.linspace(0, drop_path_rate, sum(map(len, stages)), device="cpu").tolist())
        blocks = []
        reduction = 2
        for index, rows in enumerate(stages):
            stage = []
            for kernel, mid, out, se_ratio, stride in rows:
                mid, out = make_divisible(mid * width, 4), make_divisible(out * width, 4)
                stage.append(
                    block(chs, out, kernel, stride, se_ratio=se_ratio, drop_path=next(drop_paths), mid_chs=mid)
                )
                chs = out
                reduction *= stride
            # Of several stages with the same resolution, use the last.
            if taps[-1][1] == reduction:
                taps.pop()
            taps.append((chs, reduction, f"blocks.{index}"))
            blocks.append(nn.Sequential(*stage))
        blocks.append(nn.Sequential(ConvBnAct(chs, mid, 1, act_layer=act_layer, conv_layer=conv_layer, **dd)))
        self.blocks = nn.Sequential(*blocks)
        # The first stage has the stem's resolution too, but timm's features of reduction 2 are the stem's.
        if taps[0][2] != "stem":
            taps[0] = (self.stem.conv.out_channels, 2, "stem")
        self.feature_info = [{"num_chs": c, "reduction": r, "module": m} for c, r, m in taps]
        self.stage_ends = [-1] + [int(m.split(".")[1]) for _, _, m in taps[1:]]

        self.num_features = mid
        self.head_hidden_size = 1280
        self.global_pool = SelectAdaptivePool2d(pool_type=global_pool)
        self.conv_head = PooledConv(mid, self.head_hidden_size, 1, **dd)
        self.act2 = act_layer()
        self.flatten = nn.Flatten(1) if global_pool else nn.Identity()
        self.classifier = Linear(self.head_hidden_size, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self._init_weights()
        if output_stride != 32:
            dilate(self, output_stride)

    def _init_weights(self) -> None:
        """Initialise residual branches at zero and the head at unit gain; keep torch's initialisation elsewhere.

        With torch's initialisation, the network learned almost nothing from the first thousands of images of a short
        run on Tiny-ImageNet.
        """
        for block in self.modules():
            if isinstance(block, GhostBottleneck):
                nn.init.zeros_(block.ghost2.primary_conv[1].weight)
        nn.init.kaiming_normal_(self.conv_head.weight)
        nn.init.zeros_(self.conv_head.bias)
        if self.num_classes > 0:
            nn.init.normal_(self.classifier.weight, std=0.01)
            nn.init.zeros_(self.classifier.bias)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        blocks = r"^blocks\.(\d+)" if coarse else r"^blocks\.(\d+)\.(\d+)"
        return {"stem": r"^stem", "blocks": [(blocks, None), (r"conv_head", (99999,))]}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier, for `num_classes` (0: none); `global_pool` '' disables pooling, None keeps it.

        The names of the old classes are removed from `pretrained_cfg`.
        """
        self.num_classes = num_classes
        if cfg := getattr(self, "pretrained_cfg", None):
            names = ("label_names", "label_descriptions")
            self.pretrained_cfg = {key: value for key, value in cfg.items() if key not in names}
        if global_pool is not None:
            self.global_pool = SelectAdaptivePool2d(pool_type=global_pool).train(self.training)
            self.flatten = (nn.Flatten(1) if global_pool else nn.Identity()).train(self.training)
        like = next(self.parameters())
        head = nn.Identity()
        if num_classes > 0:
            head = Linear(self.head_hidden_size, num_classes, device=like.device, dtype=like.dtype)
        self.classifier = head.train(self.training)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the last features, and those of `indices` (in `feature_info`; an int: the last N; None: all).

        `norm` has no effect, because every feature is normalised already. `stop_early` skips layers after the last
        requested feature.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        take, last = feature_take_indices(len(self.stage_ends), indices)
        take = [self.stage_ends[i] + 1 for i in take]
        intermediates = []
        x = self.stem(x)
        if 0 in take:
            intermediates.append(x)
        # TorchScript cannot slice a Sequential. The final convolution belongs to the last feature.
        if torch.jit.is_scripting() or not stop_early or last == len(self.stage_ends) - 1:
            stages = self.blocks
        else:
            stages = self.blocks[: self.stage_ends[last] + 1]
        for index, stage in enumerate(stages, start=1):
            x = checkpoint_seq(stage, x) if self.grad_checkpointing and not torch.jit.is_scripting() else stage(x)
            if index in take:
                intermediates.append(x)
        if intermediates_only:
            return intermediates
        return x, intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove layers that the features of `indices` do not need; return the indices."""
        take, last = feature_take_indices(len(self.stage_ends), indices)
        whole = last == len(self.stage_ends) - 1
        if whole and not prune_norm and not prune_head:
            return take
        self.blocks = self.blocks[: self.stage_ends[last] + 1]
        self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        self.conv_head, self.act2 = nn.Identity(), nn.Identity()
        self.reset_classifier(0, "")
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        """Map (B, in_chans, H, W) to the last feature map, (B, num_features, H / 32, W / 32), rounded up."""
        x = self.stem(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.blocks, x, flatten=True)
        return self.blocks(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map a feature map to logits (B, num_classes), or with `pre_logits` to the classifier's input (B, 1280)."""
        x = self.flatten(self.act2(self.conv_head(self.global_pool(x))))
        if self.drop_rate > 0.0:
            x = F.dropout(x, p=self.drop_rate, training=self.training)
        return x if pre_logits else self.classifier(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


# Names in the released file -> ours; our first checkpoints used its stem names too. Squeeze-and-excitation is timm's.
_RENAMED = {"cond_conv.": "", "se.conv_reduce.": "se.fc1.", "se.conv_expand.": "se.fc2."}
_STEM = {"conv_stem.": "stem.conv.", "bn1.": "stem.bn1."}


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Convert a state dict of the released code or of this package for `model`, and `model`'s routers for it.

    The released code stores the experts of a convolution as a matrix with one row per expert, whose elements are in the
    same order as our (experts * out, in / groups, kh, kw).
    """
    state_dict = state_dict.get("state_dict", state_dict)
    own = model.state_dict()
    out = {}
    for name, value in state_dict.items():
        new = name.removeprefix("module.")
        for old, ours in _RENAMED.items():
            new = new.replace(old, ours)
        for old, ours in _STEM.items():
            if new.startswith(old) and new.replace(old, ours, 1) in own:
                new = new.replace(old, ours, 1)
        if "cond_conv." in name and new in own:
            # -1: the stem may have a different number of input channels.
            shape = own[new].shape
            value = value.reshape(shape[0], -1, *shape[2:]) if len(shape) == 4 else value.reshape(-1)
        out[new] = value
    _adapt_stem_router(out, model)
    match_routers(model, out)  # timm loads weights for another number of classes without `strict`
    return out


def _adapt_stem_router(state_dict: dict[str, Tensor], model: nn.Module) -> None:
    """Adapt the first router to a different number of input channels, as timm does with the first kernel."""
    reader = "stem.conv.routing.hidden.weight"
    reader = reader if reader in state_dict else "stem.conv.routing.weight"
    if reader not in state_dict:
        return
    weight, in_chans = state_dict[reader], model.in_chans
    if weight.shape[1] == in_chans:
        return
    if in_chans == 1:
        state_dict[reader] = weight.sum(1, keepdim=True)
    else:
        repeats = -(-in_chans // weight.shape[1])
        share = weight.shape[1] / in_chans
        if state_dict["stem.conv.routing.bias"].ndim == 2:  # the input has length 1 for any number of channels
            share **= 0.5
        state_dict[reader] = torch.cat([weight] * repeats, 1)[:, :in_chans] * share


def _create_parameternet(variant: str, pretrained: bool, given: dict[str, Any], **defaults: Any) -> ParameterNet:
    return build_model(
        ParameterNet,
        variant,
        pretrained,
        given,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"flatten_sequential": True},
        **{**defaults, **given},
    )


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.conv",
        "classifier": "classifier",
        "license": "apache-2.0",
        **kwargs,
    }


def _tin200(**kwargs: Any) -> dict[str, Any]:
    """Return a config for Tiny-ImageNet: 200 classes at 64 pixels."""
    return _cfg(
        num_classes=200,
        input_size=(3, 64, 64),
        pool_size=(2, 2),
        crop_pct=1.0,
        mean=(0.4802, 0.4481, 0.3978),
        std=(0.2753, 0.2679, 0.2805),
        **kwargs,
    )


default_cfgs = generate_default_cfgs(
    {
        "parameternet_50m.tin200": _tin200(hf_hub_id="parameternet/parameternet_50m.tin200"),
        "parameternet_150m.untrained": _cfg(),
        "parameternet_300m.tin200": _tin200(hf_hub_id="parameternet/parameternet_300m.tin200"),
        "parameternet_600m.tin200": _tin200(hf_hub_id="parameternet/parameternet_600m.tin200"),
    }
)


@register_model
def parameternet_50m(pretrained: bool = False, **kwargs: Any) -> ParameterNet:
    """Build our 50M network: GhostNet 1.0's stages at width 0.5, Hardswish, 4 experts."""
    return _create_parameternet("parameternet_50m", pretrained, kwargs, width=0.5)


@register_model
def parameternet_150m(pretrained: bool = False, **kwargs: Any) -> ParameterNet:
    """Build our 150M network: GhostNet 1.0's stages at width 1.0, Hardswish, 4 experts."""
    return _create_parameternet("parameternet_150m", pretrained, kwargs, width=1.0)


@register_model
def parameternet_300m(pretrained: bool = False, **kwargs: Any) -> ParameterNet:
    """Build a reconstruction of ParameterNet-300M: GhostNet 1.0's stages at width 1.45, Hardswish, 4 experts.

    It was never released. The static baseline and the network with 8 experts have the paper's 8.6 M and 25.2 M
    parameters.
    """
    return _create_parameternet("parameternet_300m", pretrained, kwargs, width=1.45)


@register_model
def parameternet_600m(pretrained: bool = False, **kwargs: Any) -> ParameterNet:
    """Build the official 600M network of the released code: its own stages at width 1.9, Hardswish, 4 experts.

    Its sigmoid routers are not normalised: clip gradients when training it.
    """
    released = {"routing": "sigmoid", "routing_norm": "none"}
    return _create_parameternet("parameternet_600m", pretrained, kwargs, stages=RELEASED_STAGES, width=1.9, **released)
