"""The ways to write a dynamic convolution for any batch, by latency: the ground for `parameternet.export.forms`.

    python benchmarks/export_layers.py            every layer in onnxruntime and OpenVINO: 10 minutes

Each layer lies between two static pointwise convolutions, as in a network, since layouts matter. One thread; the ways
take turns. `looped` is the loop over the images that the others do without.
"""

import argparse
import statistics
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from _timing import interleave
from export import on_one_thread
from torch import Tensor, nn

from parameternet.export import forms, onnx, openvino
from parameternet.export.plan import Plan
from parameternet.layers import DynamicConv
from parameternet.layers.strategies import ConvParams, shifted, wide

LAYERS = {
    "80 -> 480, 14 x 14": (14, dict(in_channels=80, out_channels=480)),
    "1152 -> 192, 7 x 7": (7, dict(in_channels=1152, out_channels=192)),
    "depthwise 3 x 3, 144, 56 x 56": (56, dict(in_channels=144, out_channels=144, groups=144, kernel_size=3)),
    "depthwise 3 x 3 s2, 96, 112 x 112": (
        112,
        dict(in_channels=96, out_channels=96, groups=96, kernel_size=3, stride=2),
    ),
    "depthwise 5 x 5, 672, 14 x 14": (14, dict(in_channels=672, out_channels=672, groups=672, kernel_size=5)),
    "3 x 3 s2, 3 -> 16, 224 x 224": (224, dict(in_channels=3, out_channels=16, kernel_size=3, stride=2)),
    "3 x 3, 128 -> 128, 20 x 20": (20, dict(in_channels=128, out_channels=128, kernel_size=3)),
}


class Layer(nn.Module):
    """A strategy of the layer itself, written down as it is."""

    def __init__(self, conv: DynamicConv, strategy) -> None:
        super().__init__()
        self.conv, self.strategy = conv, strategy

    def forward(self, x: Tensor) -> Tensor:
        conv = self.conv
        params = ConvParams(conv.stride, conv.padding, conv.dilation, conv.groups)
        return self.strategy(x, conv.weight, conv.routing(x), conv.output_bias, params)


def ways(conv: DynamicConv) -> dict[str, forms.Form]:
    found: dict[str, forms.Form] = {
        "gated inputs": forms._GatedSum,
        "gated outputs": partial(forms._GatedSum, gate_outputs=True),
        "all experts at once": partial(Layer, strategy=wide),
    }
    if conv.groups > 1:
        return found | {"shifted sums": partial(Layer, strategy=shifted)}
    product = conv.kernel_size == (1, 1)
    return found | {"product": forms._MixedProduct} if product else found | {"columns": forms._MixedColumns}


class Between(nn.Module):
    def __init__(self, layer: nn.Module, conv: DynamicConv) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.before = nn.Conv2d(conv.in_channels, conv.in_channels, 1)
        self.layer = layer
        self.after = nn.Conv2d(conv.out_channels, conv.out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(F.relu(self.layer(F.relu(self.before(x)))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for title, (size, arguments) in LAYERS.items():
        for runtime, writer in (("onnxruntime", onnx), ("openvino", openvino)):
            with tempfile.TemporaryDirectory() as folder:
                runs = {}
                for name in ["looped", *ways(DynamicConv(**arguments))]:
                    torch.manual_seed(0)
                    conv = DynamicConv(**arguments).eval().requires_grad_(False)
                    conv.output_bias = nn.Parameter(torch.zeros(conv.out_channels), requires_grad=False)
                    layer = conv if name == "looped" else ways(conv)[name](conv)
                    model = Between(layer, conv).eval()
                    path = Path(folder) / f"{name}{writer.SUFFIX}"
                    form = "looped" if name == "looped" else "computed"
                    writer.write(model, path, Plan(form, None, (conv.in_channels, size, size)))
                    runs[name] = on_one_thread(runtime, path)
                for batch in (1, 8):
                    x = np.random.default_rng(0).standard_normal((batch, arguments["in_channels"], size, size))
                    calls = {name: partial(run, x.astype(np.float32)) for name, run in runs.items()}
                    times = interleave(calls, options.rounds, "cpu")
                    words = "  ".join(f"{name} {1e3 * statistics.median(t):.2f}" for name, t in times.items())
                    print(f"{title}, {runtime}, batch {batch}, ms: {words}", flush=True)


if __name__ == "__main__":
    main()
