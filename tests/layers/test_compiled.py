"""torch.compile: one graph without breaks for all batch sizes, the same numbers, the same gradients."""

import pytest
import timm
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from parameternet import DynamicConv, GhostBottleneck, ParameterNet

LAYERS = {
    "pointwise": {"kernel_size": 1},
    "pointwise-strided": {"kernel_size": 1, "stride": 2, "bias": True},
    "dense": {"kernel_size": 3, "padding": 1, "stride": 2},
    "depthwise": {"kernel_size": 3, "padding": 1, "groups": 8},
}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def layer(name):
    torch.manual_seed(0)
    return DynamicConv(8, 8, **LAYERS[name])


def gradients(function, model, x):
    model.zero_grad()
    x = x.clone().requires_grad_()
    function(x).square().sum().backward()
    return [x.grad, *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_the_operator_keeps_its_promises_to_the_compiler(name, memory_format):
    conv = layer(name)
    x = torch.randn(3, 8, 7, 9).to(memory_format=memory_format).requires_grad_()
    routing_weights = torch.rand(3, 4, requires_grad=True)
    output_bias = torch.randn(8, requires_grad=True)
    conv_params = [list(conv.stride), list(conv.padding), list(conv.dilation), conv.groups]
    given = (x, conv.weight, routing_weights, output_bias, *conv_params, None)
    torch.library.opcheck(torch.ops.parameternet.convolve, given)


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_of_a_compiled_layer(name):
    conv = layer(name)
    compiled = torch.compile(conv, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (2, 5):
        x = torch.randn(batch, 8, 7, 9)
        for got, expected in zip(gradients(compiled, conv, x), gradients(conv, conv, x), strict=True):
            assert torch.allclose(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_a_single_image_is_written_out_in_the_graph(name, dynamic):
    conv, graphs = layer(name), []
    compiled = torch.compile(
        conv, fullgraph=True, dynamic=dynamic, backend=lambda graph, _: graphs.append(graph) or graph
    )
    for batch in (1, 2):
        x = torch.randn(batch, 8, 7, 9)
        for got, expected in zip(gradients(compiled, conv, x), gradients(conv, conv, x), strict=True):
            assert torch.allclose(got, expected, rtol=1e-4, atol=1e-5)
    one, two = ("parameternet.convolve" in str(graph.code) for graph in graphs)
    assert two and not one


@pytest.mark.parametrize("training", [False, True])
def test_one_graph_of_a_network_serves_all_batch_sizes(training):
    stages = (((3, 16, 16, 0, 1),), ((5, 72, 24, 0.25, 2), (3, 72, 24, 0.25, 1)))
    model = ParameterNet(stages, width=0.5, drop_rate=0.0).train(training)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    with torch.set_grad_enabled(training):
        for batch in (2, 3, 8, 17, 64):
            x = torch.randn(batch, 3, 32, 32)
            assert torch.allclose(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


def test_inductor_computes_the_same():
    torch.manual_seed(0)
    model = nn.Sequential(DynamicConv(3, 8, 3, stride=2, padding=1), GhostBottleneck(8, 8)).eval()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for batch in (2, 5):
            x = torch.randn(batch, 3, 16, 16)
            assert torch.allclose(compiled(x), model(x), rtol=1e-4, atol=1e-5)


# Normalised routers add three nodes to each of 76 layers, and the temperature of softmax two.
@pytest.mark.parametrize(
    ("routing", "norm", "times"), [("sigmoid", "none", 2.0), ("sigmoid", "layer", 2.25), ("softmax", "layer", 2.45)]
)
@pytest.mark.parametrize("free_batch", [False, True])
def test_an_exported_program_is_small_and_serves_its_batches(free_batch, routing, norm, times):
    torch.manual_seed(0)
    ours = timm.create_model("parameternet_50m", routing=routing, routing_norm=norm).eval()
    plain = timm.create_model("ghostnet_050").eval()
    x = torch.randn(2, 3, 64, 64)

    def exported(model):
        batch = {0: torch.export.Dim("batch", min=1, max=64)} if free_batch else None
        return torch.export.export(model, (x,), dynamic_shapes=(batch,))

    program = exported(ours)
    assert len(program.graph.nodes) <= times * len(exported(plain).graph.nodes)
    with torch.no_grad():
        for batch in (1, 2, 5, 64) if free_batch else (2,):
            images = torch.randn(batch, 3, 64, 64)
            assert torch.allclose(program.module()(images), ours(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_an_exported_layer_serves_images_of_other_sizes(name):
    conv = layer(name).eval()
    free = {0: torch.export.Dim("batch"), 2: torch.export.Dim("height", min=3), 3: torch.export.Dim("width", min=3)}
    x = torch.randn(2, 8, 9, 7)
    program = torch.export.export(conv, (x,), dynamic_shapes={"x": free})
    with torch.no_grad():
        for shape in ((2, 8, 9, 7), (3, 8, 4, 12), (5, 8, 32, 5)):
            images = torch.randn(shape)
            assert torch.allclose(program.module()(images), conv(images), rtol=1e-4, atol=1e-5)
