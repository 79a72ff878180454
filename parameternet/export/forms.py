"""DynamicConv as a file holds it: the same sum, written down so that runtimes make the best of it.

========  ===============================================  ============================================================
form      the kernels in the file                          for
========  ===============================================  ============================================================
computed  mixed for each image, then convolved with once   runtimes that convolve with kernels computed in the graph:
                                                           onnxruntime, OpenVINO, PyTorch
constant  every expert's convolves with the image times    TensorRT and mobile runtimes, which take only constant
          that expert's weight; the results are added      kernels; E times the products
========  ===============================================  ============================================================

A convolution of one kernel an image exists in no file format, so a computed graph is one of a single image; a loop
around it frees the batch (`onnx.py`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parameternet.export.plan import Plan
from parameternet.layers import DynamicConv
from parameternet.layers.dynamic_conv import pad_same
from parameternet.layers.replacing import replace_layer

__all__ = ["FORMS", "has_dynamic_convolutions", "write_computed", "write_constant", "write_for_torch"]

FORMS = ("computed", "constant")
# onnxruntime convolves depthwise several times faster in its blocked layout, which wants constant kernels and whole
# blocks of 8 channels. On small maps four such convolutions cost less than one with a computed kernel: half as much at
# 7 x 7, as much again at 28 x 28 (onnxruntime 1.32, AVX2, one thread).
GATED_POSITIONS = 256
BLOCK = 8


class _Written(nn.Module):
    """What the forms of a DynamicConv have in common. Input and output are that layer's."""

    def __init__(self, conv: DynamicConv) -> None:
        super().__init__()
        self.routing, self.num_experts, self.out_channels = conv.routing, conv.num_experts, conv.out_channels
        self.kernel_size, self.stride, self.dilation = conv.kernel_size, conv.stride, conv.dilation
        self.pad_same, self.padding, self.groups = conv.pad_same, conv.padding, conv.groups
        self.bias, self.output_bias = conv.bias, conv.output_bias

    def forward(self, x: Tensor, routing_weights: Tensor | None = None) -> Tensor:
        if routing_weights is None:
            routing_weights = self.routing(x)
        if self.pad_same:
            x = pad_same(x, self.kernel_size, self.stride, self.dilation)
        if routing_weights.dtype != x.dtype:  # routers answer in at least 32 bits
            routing_weights = routing_weights.to(x.dtype)
        y = self._convolve(x, routing_weights)
        if self.bias is not None:
            mixed = routing_weights @ self.bias.reshape(self.num_experts, self.out_channels)
            y = y + mixed[:, :, None, None]
        return y

    def _convolve(self, x: Tensor, routing_weights: Tensor) -> Tensor:
        raise NotImplementedError


class _OneImage(_Written):
    """The kernel of one image, mixed in the graph: batch 1 only.

    With `mix_by_conv` the experts are the input that a 1 x 1 convolution mixes. onnxruntime repacks the constant side
    of a matrix product into panels, which for a single row takes 1.7 times as long as reading it in place.
    OpenVINO is the other way round: its convolution with a computed kernel is slow for such a wide input.
    """

    def __init__(self, conv: DynamicConv, mix_by_conv: bool) -> None:
        super().__init__(conv)
        self.mix_by_conv = mix_by_conv
        self.shape = (conv.out_channels, *conv.weight.shape[1:])
        experts = (1, conv.num_experts, conv.out_channels, -1) if mix_by_conv else (conv.num_experts, -1)
        self.weight = nn.Parameter(conv.weight.detach().reshape(experts), requires_grad=False)

    def _convolve(self, x: Tensor, routing_weights: Tensor) -> Tensor:
        if self.mix_by_conv:
            kernel = F.conv2d(self.weight, routing_weights.reshape(1, self.num_experts, 1, 1))
        else:
            kernel = routing_weights @ self.weight
        kernel = kernel.reshape(self.shape)
        return F.conv2d(x, kernel, self.output_bias, self.stride, self.padding, self.dilation, self.groups)


class _GatedSum(_Written):
    """sum_e W_e * (alpha_e x): constant kernels, any batch, E times the products."""

    def __init__(self, conv: DynamicConv) -> None:
        super().__init__(conv)
        depthwise = conv.groups == conv.in_channels == conv.out_channels
        self.surplus = -conv.out_channels % BLOCK if depthwise else 0
        self.groups = conv.groups + self.surplus
        kernels = [_with_empty_kernels(kernel, self.surplus) for kernel in conv.expert_kernels()]
        self.kernels = nn.ParameterList([nn.Parameter(kernel, requires_grad=False) for kernel in kernels])
        if conv.output_bias is not None:
            bias = _with_empty_kernels(conv.output_bias.detach(), self.surplus)
            self.output_bias = nn.Parameter(bias, requires_grad=False)

    def _convolve(self, x: Tensor, routing_weights: Tensor) -> Tensor:
        if self.surplus:
            x = F.pad(x, [0, 0, 0, 0, 0, self.surplus])
        gates = routing_weights[:, :, None, None].split(1, dim=1)
        y = self._expert(x * gates[0], self.kernels[0], self.output_bias)
        for expert in range(1, self.num_experts):
            y = y + self._expert(x * gates[expert], self.kernels[expert], None)
        return y[:, : self.out_channels] if self.surplus else y

    def _expert(self, x: Tensor, kernel: Tensor, output_bias: Tensor | None) -> Tensor:
        return F.conv2d(x, kernel, output_bias, self.stride, self.padding, self.dilation, self.groups)


def _with_empty_kernels(tensor: Tensor, number: int) -> Tensor:
    return torch.cat([tensor, tensor.new_zeros(number, *tensor.shape[1:])]).contiguous()


def has_dynamic_convolutions(model: nn.Module) -> bool:
    return any(isinstance(module, DynamicConv) for module in model.modules())


def write_constant(model: nn.Module) -> nn.Module:
    """Put the constant form in the place of every DynamicConv, in `model` itself. Any batch, height and width."""
    return _replace(model, {name: _GatedSum for name in _dynamic(model)})


def write_computed(model: nn.Module, size: tuple[int, int, int], mix_by_conv: bool) -> nn.Module:
    """Put the computed form of one image in the place of every DynamicConv, in `model` itself.

    Args:
        model: A network in evaluation mode.
        size: Channels, height and width of its input; kernels are mixed where that is the faster way at this size.
        mix_by_conv: How kernels are mixed and small depthwise maps convolved: as onnxruntime likes it best, or as
            OpenVINO does.
    """

    def one_image(conv: DynamicConv) -> nn.Module:
        return _OneImage(conv, mix_by_conv)

    positions = _positions(model, size) if mix_by_conv else {}
    forms = {name: one_image for name in _dynamic(model)}
    for name, conv in _dynamic(model).items():
        depthwise = conv.groups == conv.in_channels == conv.out_channels
        if depthwise and positions.get(name, GATED_POSITIONS + 1) <= GATED_POSITIONS:
            forms[name] = _GatedSum
    return _replace(model, forms)


def write_for_torch(model: nn.Module, plan: Plan) -> nn.Module:
    """Put the form that `plan` asks for in the place of every DynamicConv, for runtimes of PyTorch.

    They take every strategy of the layer, which chooses one without the batch in it while it is recorded.
    """
    if plan.form == "constant":
        return write_constant(model)
    if plan.batch == 1:
        return write_computed(model, plan.size, mix_by_conv=False)
    for conv in _dynamic(model).values():
        conv.strategy = None  # one that was set may write the batch down
    return model


def _dynamic(model: nn.Module) -> dict[str, DynamicConv]:
    return {name: module for name, module in model.named_modules() if isinstance(module, DynamicConv)}


def _replace(model: nn.Module, forms: dict) -> nn.Module:
    for name, form in forms.items():
        written = form(model.get_submodule(name)).eval()
        if not name:
            return written
        replace_layer(model, name, written)
    return model


@torch.no_grad()
def _positions(model: nn.Module, size: tuple[int, int, int]) -> dict[str, int]:
    """How many positions the output of each DynamicConv has."""
    seen: dict[str, int] = {}
    hooks = [
        conv.register_forward_hook(lambda conv, x, y, name=name: seen.__setitem__(name, y.shape[2] * y.shape[3]))
        for name, conv in _dynamic(model).items()
    ]
    first = next(model.parameters())
    model(torch.zeros(1, *size, device=first.device, dtype=first.dtype))
    for hook in hooks:
        hook.remove()
    return seen
