"""Rewrite DynamicConv for exported files: the same sum, in operators that runtimes execute efficiently.

========  ===============================================  ============================================================
form      kernels in the file                              for
========  ===============================================  ============================================================
computed  mixed per image, then applied once where         onnxruntime, OpenVINO, PyTorch, mobile runtimes. A graph
          possible                                         without loops: with batch 1 every kernel is mixed; with a
                                                           free batch depthwise kernels are not, and dense ones are
                                                           applied to columns (im2col)
looped    mixed per image, in a loop over the images       onnxruntime and OpenVINO on CPUs: less work than 'computed'
                                                           for several large images; other runtimes may lack loops
constant  one per expert, each applied to the image times  TensorRT and others that accept only constant kernels; E
          its routing weight; the results are added        times the multiplications
========  ===============================================  ============================================================

No file format has a convolution with one kernel per image, but matrix products with one matrix per image exist.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parameternet.export.plan import Plan
from parameternet.layers import DynamicConv
from parameternet.layers.dynamic_conv import pad_same
from parameternet.layers.replacing import replace_layer

__all__ = ["FORMS", "has_dynamic_convolutions", "write_computed", "write_constant", "write_for_torch"]

FORMS = ("computed", "constant", "looped")
# onnxruntime runs depthwise convolutions several times faster in its blocked layout, which requires constant kernels
# and whole blocks of 8 channels. On small feature maps, four such convolutions cost less than one with a computed
# kernel: half as much at 7 x 7, but twice as much at 28 x 28 (onnxruntime 1.32, AVX2, one thread).
GATED_POSITIONS = 256
BLOCK = 8
# With fewer input channels, convolving with each expert separately is faster than using columns.
COLUMN_CHANNELS = 16

Form = Callable[[DynamicConv], nn.Module]


class _Written(nn.Module):
    """Base class of the forms of DynamicConv, with the same inputs and output as that layer."""

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
        if routing_weights.dtype != x.dtype:  # routers return at least 32 bits
            routing_weights = routing_weights.to(x.dtype)
        y = self._convolve(x, routing_weights)
        if self.bias is not None:
            mixed = routing_weights @ self.bias.reshape(self.num_experts, self.out_channels)
            y = y + mixed[:, :, None, None]
        return y

    def _convolve(self, x: Tensor, routing_weights: Tensor) -> Tensor:
        raise NotImplementedError


class _OneImage(_Written):
    """A convolution whose kernel is mixed in the graph, for batch 1 only.

    With `mix_by_conv`, a 1 x 1 convolution mixes the experts, which are its input. onnxruntime repacks the constant
    operand of a matrix product into panels, which for a single row takes 1.7 times as long as reading it in place. In
    OpenVINO it is the opposite: a convolution with a computed kernel is slow for such a wide input.
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
    """A sum of E convolutions with constant kernels, for any batch; it costs E times the multiplications.

    It computes sum_e W_e * (alpha_e x) or, with `gate_outputs`, sum_e alpha_e (W_e * x). It is cheaper to gate
    the smaller of input and output. Gated outputs suit int8 better, because the input is then quantised once for all
    experts.
    """

    def __init__(self, conv: DynamicConv, gate_outputs: bool = False) -> None:
        super().__init__(conv)
        self.gate_outputs = gate_outputs
        self.surplus = -conv.out_channels % BLOCK if _is_depthwise(conv) else 0
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
        y = self._sum_of_outputs(x, gates) if self.gate_outputs else self._sum_of_inputs(x, gates)
        return y[:, : self.out_channels] if self.surplus else y

    def _sum_of_inputs(self, x: Tensor, gates: Sequence[Tensor]) -> Tensor:
        y = self._expert(x * gates[0], self.kernels[0], self.output_bias)
        for expert in range(1, self.num_experts):
            y = y + self._expert(x * gates[expert], self.kernels[expert], None)
        return y

    def _sum_of_outputs(self, x: Tensor, gates: Sequence[Tensor]) -> Tensor:
        y = self._expert(x, self.kernels[0], None) * gates[0]
        for expert in range(1, self.num_experts):
            y = y + self._expert(x, self.kernels[expert], None) * gates[expert]
        return y if self.output_bias is None else y + self.output_bias[:, None, None]

    def _expert(self, x: Tensor, kernel: Tensor, output_bias: Tensor | None) -> Tensor:
        return F.conv2d(x, kernel, output_bias, self.stride, self.padding, self.dilation, self.groups)


class _MixedProduct(_Written):
    """A pointwise convolution for any batch: one product mixes the kernels of all images, another applies them."""

    def __init__(self, conv: DynamicConv) -> None:
        super().__init__(conv)
        experts = conv.weight.detach().reshape(conv.num_experts, -1)
        self.weight = nn.Parameter(experts, requires_grad=False)

    def _convolve(self, x: Tensor, routing_weights: Tensor) -> Tensor:
        if max(self.stride) > 1:
            x = x[:, :, :: self.stride[0], :: self.stride[1]]
        batch, channels, height, width = x.shape
        kernels = (routing_weights @ self.weight).reshape(batch, self.out_channels, channels)
        y = torch.matmul(kernels, x.reshape(batch, channels, height * width))
        if self.output_bias is not None:
            y = y + self.output_bias[:, None]
        return y.reshape(batch, self.out_channels, height, width)


class _MixedColumns(_Written):
    """Like `_MixedProduct`, for larger kernels: mixed kernels times columns (stacked shifted copies of x, im2col)."""

    def __init__(self, conv: DynamicConv) -> None:
        super().__init__(conv)
        # Experts (E, out, taps * in): sorted by tap and then by channel, as the copies of x are.
        experts = conv.weight.detach().flatten(2).transpose(1, 2).reshape(conv.num_experts, -1)
        self.weight = nn.Parameter(experts.contiguous(), requires_grad=False)

    def _convolve(self, x: Tensor, routing_weights: Tensor) -> Tensor:
        (height, width), (down, right) = self.kernel_size, self.dilation
        x = F.pad(x, [self.padding[1], self.padding[1], self.padding[0], self.padding[0]])
        taps = [
            x[:, :, _seen(i, height, down, self.stride[0]), _seen(j, width, right, self.stride[1])]
            for i in range(height)
            for j in range(width)
        ]
        batch, _, rows, columns = taps[0].shape
        stacked = torch.cat(taps, 1).flatten(2)
        kernels = (routing_weights @ self.weight).reshape(batch, self.out_channels, stacked.shape[1])
        y = torch.matmul(kernels, stacked)
        if self.output_bias is not None:
            y = y + self.output_bias[:, None]
        return y.reshape(batch, self.out_channels, rows, columns)


def _seen(tap: int, taps: int, dilation: int, stride: int) -> slice:
    """Return the rows or columns that one of the `taps` of a kernel reads."""
    # Counting from the end avoids computing sizes in the graph.
    return slice(tap * dilation, (tap + 1 - taps) * dilation or None, stride)


def _with_empty_kernels(tensor: Tensor, number: int) -> Tensor:
    return torch.cat([tensor, tensor.new_zeros(number, *tensor.shape[1:])]).contiguous()


def has_dynamic_convolutions(model: nn.Module) -> bool:
    return any(isinstance(module, DynamicConv) for module in model.modules())


def write_constant(model: nn.Module, gate_outputs: bool = False) -> nn.Module:
    """Replace every DynamicConv in `model` with its constant form, in place; for any batch, height and width."""
    return _replace(model, {name: partial(_GatedSum, gate_outputs=gate_outputs) for name in _dynamic(model)})


def write_computed(model: nn.Module, size: tuple[int, int, int], mix_by_conv: bool) -> nn.Module:
    """Replace every DynamicConv in `model` with its computed form for batch 1, in place.

    Args:
        model: A network in evaluation mode.
        size: Channels, height and width of its input; kernels are mixed where that is faster at this size.
        mix_by_conv: Mix kernels and convolve small depthwise maps in the way that is fastest in onnxruntime (True) or
            in OpenVINO (False).
    """
    one_image = partial(_OneImage, mix_by_conv=mix_by_conv)
    positions = _positions(model, size) if mix_by_conv else {}
    forms: dict[str, Form] = {name: one_image for name in _dynamic(model)}
    for name, conv in _dynamic(model).items():
        small = _is_depthwise(conv) and positions.get(name, GATED_POSITIONS + 1) <= GATED_POSITIONS
        if small or conv.num_experts == 1:  # one expert is a constant kernel
            forms[name] = _GatedSum
    return _replace(model, forms)


def write_batched(model: nn.Module, gate_outputs: bool = False) -> nn.Module:
    """Replace every DynamicConv in `model` with its computed form for any batch, in place; the graph has no loops.

    Each kind of layer is computed in the fastest way measured that needs no loop, in ms for 1 and 8 images:

    ==================  ========================  ===============================================================
    layer               onnxruntime               OpenVINO
    ==================  ========================  ===============================================================
    80 -> 480, 14 x 14  product 1.9, 13 (gated    product 2.0, 14 (gated 1.8, 18; all experts at once 2.6, 29)
                        1.6, 20; all experts at
                        once 4.0, 27)
    depthwise 3 x 3,    gated 4.0, 57 (at once    gated 9.2, 73 (at once 13, 124; shifted sums 11, 94)
    144, 56 x 56        9.2, 69; shifted sums
                        9.2, 87)
    128 -> 128, 3 x 3,  columns 2.1, 25 (gated    columns 2.5, 24 (gated 7.0, 52; at once 8.0, 57)
    20 x 20             8.8, 52; at once 9.2, 52)
    3 -> 16, 3 x 3, s2  gated 1.4, 17 (columns    gated 3.1, 32 (columns 4.6, 27; at once 2.5, 29)
    224 x 224           1.8, 20; at once 3.1, 26)
    ==================  ========================  ===============================================================

    (benchmarks/export_layers.py; onnxruntime 1.32, OpenVINO 2026.4.1, AVX-512, one thread of a busy machine, so
    differences below a fifth are noise.) `gate_outputs` is for int8, see `_GatedSum`.
    """
    return _replace(model, {name: _batched(conv, gate_outputs) for name, conv in _dynamic(model).items()})


def _batched(conv: DynamicConv, gate_outputs: bool) -> Form:
    if conv.num_experts == 1:
        return partial(_GatedSum, gate_outputs=gate_outputs)
    if conv.groups == 1 and conv.kernel_size == (1, 1) and conv.padding == (0, 0):
        return _MixedProduct
    if conv.groups == 1 and conv.in_channels >= COLUMN_CHANNELS:
        return _MixedColumns
    return partial(_GatedSum, gate_outputs=gate_outputs or (_is_depthwise(conv) and max(conv.stride) > 1))


def _is_depthwise(conv: DynamicConv) -> bool:
    return conv.groups == conv.in_channels == conv.out_channels


def write_for_torch(model: nn.Module, plan: Plan) -> nn.Module:
    """Replace every DynamicConv with the form that `plan` asks for, for PyTorch's runtimes.

    These support every strategy of the layer. While it is traced, the layer chooses one that does not fix the batch.
    """
    if plan.form == "constant":
        return write_constant(model)
    if plan.batch == 1:
        return write_computed(model, plan.size, mix_by_conv=False)
    for conv in _dynamic(model).values():
        conv.strategy = None  # a strategy that was set may fix the batch
    return model


def _dynamic(model: nn.Module) -> dict[str, DynamicConv]:
    return {name: module for name, module in model.named_modules() if isinstance(module, DynamicConv)}


def _replace(model: nn.Module, forms: dict[str, Form]) -> nn.Module:
    for name, form in forms.items():
        written = form(model.get_submodule(name)).eval()
        if not name:
            return written
        replace_layer(model, name, written)
    return model


@torch.no_grad()
def _positions(model: nn.Module, size: tuple[int, int, int]) -> dict[str, int]:
    """Return the number of output positions of each DynamicConv."""
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
