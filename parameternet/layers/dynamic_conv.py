"""DynamicConv: a convolution whose kernel is mixed per sample from several experts."""

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..deprecation import renamed
from .dispatch import check_strategy, convolve
from .functional import pair
from .router import Router, set_temperature
from .strategies import ConvParams

__all__ = ["DynamicConv", "Router", "set_temperature"]


class DynamicConv(nn.Module):
    """Convolution whose kernel is mixed per sample from `num_experts` kernels.

    Input (B, in_channels, H, W) -> output (B, out_channels, H', W'). `weight` is (E * out_channels, in_channels /
    groups, kh, kw): the stacked kernels of E static convolutions. Sigmoid routing weights need not sum to one.
    `output_bias` (out_channels,) is added to every sample's output; it is None until batch normalisation is folded.

    Args:
        in_channels, out_channels, kernel_size, stride, dilation, groups, bias: As in torch.nn.Conv2d, but the default
            is a 1 x 1 kernel without bias; pairs are (h, w). Biases are mixed like kernels.
        padding: As in timm: '' is symmetric, half of (stride - 1) + dilation * (kernel - 1); 'same' is TensorFlow's
            (the output has ceil(size / stride) positions, the odd zero comes last); 'valid' is none; or a number or a
            pair.
        num_experts: Number of kernels to mix.
        routing: 'softmax', 'sigmoid', or a `Router` shared with other convolutions that read the same tensor; None: no
            router, every call takes routing weights.
        routing_hidden, temperature, routing_norm: As in `Router`; a shared router has its own.
        strategy: A name in `STRATEGIES`; None: the fastest for each input. The attribute can be changed later.

    Raises:
        ValueError: Inconsistent arguments; the message shows them.

    To route once for several convolutions, pass the routing weights: `r = router(x); a(x, r) + b(x, r)`.
    Cost: E times the parameters of the static convolution, and E more multiply-adds per sample for each of its
    parameters. Source: ParameterNet, arXiv:2306.14525, with softmax over the experts; the released code has sigmoid.
    """

    if TYPE_CHECKING:
        routing: Router | None
        output_bias: nn.Parameter | None

    # TorchScript would compile the property and read it while looking for methods, which warns.
    __jit_unused_properties__ = ("shift",)
    __jit_ignored_attributes__ = ("shift",)
    shift = renamed("shift", "output_bias")
    transposed = False
    output_padding = (0, 0)
    padding_mode = "zeros"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...] = 1,
        stride: int | tuple[int, ...] = 1,
        padding: str | int | tuple[int, ...] = "",
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = False,
        num_experts: int = 4,
        routing: str | Router | None = "softmax",
        routing_hidden: int | None = None,
        temperature: float = 1.0,
        strategy: str | None = None,
        device=None,
        dtype=None,
        routing_norm: str | None = "layer",
    ) -> None:
        super().__init__()
        self.strategy: str | None = strategy
        if min(in_channels, out_channels, groups) < 1 or in_channels % groups or out_channels % groups:
            raise ValueError(
                f"in_channels={in_channels} and out_channels={out_channels} must be positive and divisible by "
                f"groups={groups}"
            )
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride, self.dilation = _positive(
            kernel_size=kernel_size, stride=stride, dilation=dilation
        )
        self.pad_same, self.padding = _resolve_padding(padding, self.kernel_size, self.stride, self.dilation)
        if routing is None:
            self.routing = None
        elif isinstance(routing, Router):
            self.routing = _shared(routing, in_channels, num_experts, routing_hidden)
        else:
            self.routing = Router(
                in_channels, num_experts, routing, routing_hidden, temperature, device, dtype, routing_norm
            )
        self.num_experts = num_experts
        shape = (num_experts * out_channels, in_channels // groups, *self.kernel_size)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        if strategy is not None:
            check_strategy(strategy, self.weight, self.padding, groups, num_experts)
        self.bias = nn.Parameter(torch.empty(shape[0], device=device, dtype=dtype)) if bias else None
        self.register_parameter("output_bias", None)
        self.reset_parameters()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickle; in 0.1.0 the output bias was called `shift`."""
        super().__setstate__(state)
        if "shift" in self._parameters:
            self.register_parameter("output_bias", self._parameters.pop("shift"))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if f"{prefix}shift" in state_dict:
            state_dict[f"{prefix}output_bias"] = state_dict.pop(f"{prefix}shift")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def reset_parameters(self) -> None:
        """Initialise every expert like torch.nn.Conv2d. The router is not changed, because it may be shared."""
        for kernel in self.expert_kernels():
            nn.init.kaiming_uniform_(kernel, a=5**0.5)
        if self.bias is not None:
            bound = (self.weight[0].numel()) ** -0.5
            nn.init.uniform_(self.bias, -bound, bound)

    @torch.jit.ignore
    def expert_kernels(self) -> list[Tensor]:
        """Return views of the kernels, each (out_channels, in_channels / groups, kh, kw), for initialisers."""
        return list(self.weight.detach().chunk(self.num_experts))

    @torch.jit.unused
    def _check(self, x: Tensor, routing_weights: Tensor | None) -> None:
        if torch.jit.is_tracing():
            return  # in which sizes are tensors, not numbers
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"expected x of shape (batch, {self.in_channels}, height, width), got {tuple(x.shape)}")
        if routing_weights is not None and routing_weights.shape != (x.shape[0], self.num_experts):
            raise ValueError(
                f"expected routing_weights of shape (batch, num_experts) = ({x.shape[0]}, {self.num_experts}), got "
                f"{tuple(routing_weights.shape)}"
            )

    def forward(self, x: Tensor, routing_weights: Tensor | None = None) -> Tensor:
        if not torch.jit.is_scripting():
            self._check(x, routing_weights)
        if routing_weights is None:
            if self.routing is None:
                raise ValueError("this convolution has no router: pass routing_weights (batch, experts) with x")
            routing_weights = self.routing(x)
        if self.pad_same:
            x = pad_same(x, self.kernel_size, self.stride, self.dilation)
        conv_params = ConvParams(self.stride, self.padding, self.dilation, self.groups)
        return convolve(x, self.weight, routing_weights, self.bias, conv_params, self.strategy, self.output_bias)

    def extra_repr(self) -> str:
        padding = "'same'" if self.pad_same else self.padding
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={padding}, dilation={self.dilation}, groups={self.groups}, bias={self.bias is not None}, "
            f"num_experts={self.num_experts}" + ("" if self.strategy is None else f", strategy={self.strategy!r}")
        )


def _positive(**pairs: int | tuple[int, ...]) -> list[tuple[int, int]]:
    for name, value in pairs.items():
        if min(pair(value)) < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    return [pair(value) for value in pairs.values()]


def _shared(router: Router, in_channels: int, num_experts: int, hidden: int | None) -> Router:
    reads = router.in_features if router.hidden is None else router.hidden.in_features
    if (reads, router.num_experts) != (in_channels, num_experts):
        raise ValueError(
            f"the shared router reads {reads} channels and weighs {router.num_experts} experts, this convolution has "
            f"in_channels={in_channels} and num_experts={num_experts}"
        )
    if hidden is not None:
        raise ValueError(f"routing_hidden={hidden} has no effect with a shared router: pass hidden to the Router")
    return router


def _resolve_padding(
    padding: str | int | tuple[int, ...],
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
) -> tuple[bool, tuple[int, int]]:
    """Return (whether to pad by the input's size on every call, fixed padding)."""
    if not isinstance(padding, str):
        if min(pair(padding)) < 0:
            raise ValueError(f"padding must not be negative, got {padding}")
        return False, pair(padding)
    if padding not in ("", "same", "valid"):
        raise ValueError(f"padding must be '', 'same', 'valid', a number or a pair, got {padding!r}")
    if padding == "valid":
        return False, (0, 0)
    spans = [d * (k - 1) for k, d in zip(kernel_size, dilation, strict=True)]
    if padding == "same" and (stride != (1, 1) or any(s % 2 for s in spans)):
        return True, (0, 0)
    return False, ((stride[0] - 1 + spans[0]) // 2, (stride[1] - 1 + spans[1]) // 2)


def pad_same(x: Tensor, kernel_size: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]) -> Tensor:
    """Pad x with zeros so that a convolution has ceil(size / stride) positions; an odd zero comes last."""
    height = same_padding(x.shape[2], kernel_size[0], stride[0], dilation[0])
    width = same_padding(x.shape[3], kernel_size[1], stride[1], dilation[1])
    return F.pad(x, [width // 2, width - width // 2, height // 2, height - height // 2])


def same_padding(size: int, kernel: int, stride: int, dilation: int) -> int:
    """Return the zeros that a dimension of `size` needs for ceil(size / stride) positions.

    torch.export takes minutes for a few layers of the usual formula, max((ceil(size / stride) - 1) * stride + span -
    size, 0), where the size is free: each layer has the size of the one before three times, in a maximum.
    """
    span = dilation * (kernel - 1) + 1
    total = -size % stride + span - stride
    return total if span >= stride else max(total, 0)
