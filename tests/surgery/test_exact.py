"""Surgery is exact or leaves a layer alone and says why, however a network uses its layers."""

import copy
import types

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from timm.layers import BatchNormAct2d, CondConv2d
from torch import nn
from torch.utils.checkpoint import checkpoint

from parameternet import DynamicConv
from parameternet.surgery import collapse, convert_condconv, dilate, fuse, measure_routing, upcycle


def lived_in(model):
    """Random statistics and scales, in float64, in evaluation mode."""
    torch.manual_seed(0)
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            module.running_mean.normal_(0, 0.5)
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.normal_(module.weight, 1, 0.3)
                nn.init.normal_(module.bias, 0, 0.3)
    return model.double().eval()


def image(seed=0):
    return torch.randn(2, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def assert_same(got, expected, *inputs):
    inputs = inputs or (image(),)
    wanted = expected(*inputs)
    assert (got(*inputs) - wanted).abs().max() <= 1e-12 * wanted.abs().max()


class Block(nn.Module):
    """`way` says how the layers are used."""

    def __init__(self, way, conv=None):
        super().__init__()
        self.conv, self.norm = conv or nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.other = nn.Conv2d(4, 4, 1)
        self.way = types.MethodType(way, self)

    def forward(self, x):
        return self.way(x)


def reads_weight(self, x):
    return self.norm(self.conv(x)) + self.conv.weight.mean()


def reads_weight_by_parameters(self, x):
    return self.norm(self.conv(x)) + sum(p.sum() for p in self.parameters())


def reads_weight_with_numbers(self, x):
    scale = self.conv.weight.abs().max().item()
    return self.norm(self.conv(x)) * scale


def reads_missing_bias(self, x):
    y = self.norm(self.conv(x))
    return y if self.conv.bias is None else y + 1


def reads_norm_weight(self, x):
    return self.norm(self.conv(x)) * self.norm.weight[None, :, None, None]


def reads_statistics(self, x):
    return self.norm(self.conv(x)) + self.norm.running_mean.sum()


def uses_statistics_only(self, x):
    norm = self.norm
    return F.batch_norm(self.conv(x), norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.1, norm.eps)


def uses_output_twice(self, x):
    y = self.conv(x)
    return self.norm(y) + y


def uses_changed_output(self, x):
    y = self.conv(x)
    return self.norm(y.relu_())


def uses_functional_conv(self, x):
    return self.norm(self.conv(x)) + F.conv2d(x, self.conv.weight, padding=1)


def calls_conv_forward(self, x):
    return self.norm(self.conv(x)) + self.conv.forward(2 * x)


def calls_twice(self, x):
    return self.norm(self.conv(self.norm(self.conv(x))))


def calls_conv_alone(self, x):
    return self.norm(self.conv(x)) + self.conv(2 * x)


def calls_norm_alone(self, x):
    return self.norm(self.conv(x)) + self.norm(x)


def decides_whether_to_read(self, x):
    y = self.norm(self.conv(x))
    return y if x.sum() > 0 else y + self.conv.weight.mean()


def decides_whether_to_normalise(self, x):
    y = self.conv(x)
    return self.norm(y) if float(x.mean()) > 0 else y


def decides_and_takes_fx_for_no_tensor(self, x):
    y = self.norm(self.conv(x if x.sum() > 0 else -x))
    return y + self.conv.weight.mean() if isinstance(x, torch.Tensor) else y


def takes_fx_for_no_tensor(self, x):
    y = self.norm(self.conv(x))
    return y + self.conv.weight.mean() if isinstance(x, torch.Tensor) else y


NOT_FUSED = [
    reads_weight,
    reads_weight_by_parameters,
    reads_weight_with_numbers,
    reads_missing_bias,
    reads_norm_weight,
    reads_statistics,
    uses_statistics_only,
    uses_output_twice,
    uses_changed_output,
    uses_functional_conv,
    calls_conv_forward,
    calls_twice,
    calls_conv_alone,
    calls_norm_alone,
    decides_whether_to_read,
    decides_whether_to_normalise,
    decides_and_takes_fx_for_no_tensor,
    takes_fx_for_no_tensor,
]


def not_fused(model):
    """Names of the batch norms that `fuse` left, after the function was compared."""
    fused = fuse(model)
    for x in (image(), image(1), image().abs(), -image().abs()):
        assert_same(fused, model, x)
        assert_same(fuse(fused), model, x)
    assert all(layer.left for layer in fused.fusing.left)
    left = [layer.norm for layer in fused.fusing.left]
    assert left == [name for name, m in fused.named_modules() if isinstance(m, nn.BatchNorm2d)]
    return left


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("way", NOT_FUSED, ids=lambda way: way.__name__)
def test_fuse_leaves_a_pair_whose_tensors_or_calls_are_used_otherwise(way, dynamic):
    model = lived_in(Block(way, DynamicConv(4, 4, 3) if dynamic else None))
    if dynamic and way in (reads_missing_bias, uses_functional_conv):  # whose kernel and bias are other ones
        pytest.skip("nothing to leave")
    assert not_fused(model) == ["norm"]
    assert not_fused(nn.Sequential(model, nn.ReLU(), nn.Conv2d(4, 4, 1).double(), nn.Identity()).eval()) == ["0.norm"]


def reads_dtype(self, x):
    return self.norm(self.conv(x.to(self.conv.weight.dtype).to(self.conv.weight.device)))


def reads_shape(self, x):
    return self.norm(self.conv(x)) * self.conv.weight.shape[0]


def reads_numbers_of_the_norm(self, x):
    return self.norm(self.conv(x)) * self.norm.num_features + self.norm.eps


def checkpoints(self, x):
    return checkpoint(lambda x: self.norm(self.conv(x)), x, use_reentrant=False)


def decides(self, x):
    y = self.norm(self.conv(x))
    return y if x.sum() > 0 else -y


KINDLY = [reads_dtype, reads_shape, reads_numbers_of_the_norm, decides]


@pytest.mark.parametrize("way", KINDLY, ids=lambda way: way.__name__)
def test_fuse_folds_where_only_the_kind_of_a_tensor_is_read(way):
    assert not_fused(lived_in(Block(way))) == []


def test_fuse_of_a_checkpointed_pair_is_exact():
    not_fused(lived_in(Block(checkpoints)))


class Caller(nn.Module):
    """A network that torch.fx cannot trace, around a part that it can."""

    def __init__(self, way):
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.way = types.MethodType(way, self)

    def forward(self, x):
        return sum(self.way(x[i : i + 1]) for i in range(len(list(x)))) * torch.ones(len(x), 1, 1, 1).to(x)


def calls_block(self, x):
    return self.block(x)


def calls_checkpointed_block(self, x):
    return checkpoint(self.block, x, use_reentrant=True)


def indexes_block(self, x):
    return self.block(x) + self.block[0](x)


def reads_block(self, x):
    return self.block(x) + self.block[0].weight.mean()


def loops_over_block(self, x):
    for layer in self.block:
        x = layer(x)
    return x


def depends_on_numbers(self, x):
    return self.block(x) if float(x.sum()) > 0 else self.block[0](x)


def uses_functional_block(self, x):
    return F.relu(self.block[1](F.conv2d(x, self.block[0].weight, self.block[0].bias, padding=1)))


@pytest.mark.parametrize(
    ("way", "left", "why"),
    [
        (calls_block, [], ""),
        (calls_checkpointed_block, [], ""),
        (indexes_block, ["block.1"], "runs outside of block"),
        (reads_block, ["block.1"], "the weight of block.0 is read elsewhere"),
        (loops_over_block, ["block.1"], "runs outside of block"),
        (uses_functional_block, ["block.1"], "read elsewhere"),
        (depends_on_numbers, ["block.1"], "give fuse a probe"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_fuse_folds_traceable_parts_of_an_untraceable_network(way, left, why):
    model = lived_in(Caller(way))
    assert not_fused(model) == left
    assert all(why in layer.left for layer in fuse(model).fusing.left)


class Two(nn.Module):
    """Reads two tensors, and its way through them cannot be traced."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))

    def forward(self, x, y):
        for _ in range(len(list(y))):
            x = x + self.block(x)
        return x


def test_fuse_without_a_forward_pass_leaves_the_parts_and_asks_for_a_probe():
    model, inputs = lived_in(Two()), (image(), image())
    (layer,) = fuse(model).fusing.left
    assert "give fuse a probe, an input of the network" in layer.left
    fused = fuse(model, probe=inputs)
    assert not fused.fusing.left and [(f.conv, f.norm) for f in fused.fusing.folded] == [("block.0", "block.1")]
    assert_same(fused, model, *inputs)


# Layers that are not what their class says ------------------------------------------------------------------------


def replaced_forward(layer):
    original = layer.forward
    layer.forward = lambda x: 2 * original(x)


def replaced_method(layer):
    def forward(self, x):
        return type(self).forward(self, 2 * x)

    layer.forward = types.MethodType(forward, layer)


def replaced_inner_method(layer):
    def inner(self, x, weight, bias):
        return F.conv2d(x, weight.sigmoid(), bias)

    layer._conv_forward = types.MethodType(inner, layer)


def forward_hook(layer):
    layer.register_forward_hook(lambda module, inputs, output: 2 * output)


def pre_hook(layer):
    layer.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))


def keyword_hook(layer):
    layer.register_forward_pre_hook(lambda module, args, kwargs: ((args[0] + 1,), kwargs), with_kwargs=True)


def backward_hook(layer):
    layer.register_full_backward_hook(lambda module, grad_input, grad_output: None)


def weight_norm(layer):
    nn.utils.parametrizations.weight_norm(layer)


def old_weight_norm(layer):
    nn.utils.weight_norm(layer)


def spectral_norm(layer):
    nn.utils.parametrizations.spectral_norm(layer)


def old_spectral_norm(layer):
    nn.utils.spectral_norm(layer)


def pruned(layer):
    nn.utils.prune.random_unstructured(layer, "weight", 0.5)


def compiled(layer):
    layer.compile(backend="eager")


def buffer(layer):
    weight = layer.weight.detach()
    del layer.weight
    layer.register_buffer("weight", weight)


ALTERED = [
    replaced_forward,
    replaced_method,
    replaced_inner_method,
    forward_hook,
    pre_hook,
    keyword_hook,
    backward_hook,
    weight_norm,
    old_weight_norm,
    spectral_norm,
    old_spectral_norm,
    pruned,
    buffer,
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("alter", ALTERED, ids=lambda alter: alter.__name__)
def test_an_altered_convolution_is_left_alone(alter):
    conv = nn.Conv2d(4, 4, 1)
    alter(conv)
    model = nn.Sequential(nn.Conv2d(4, 4, 1), conv, nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    model = lived_in(model)
    with torch.no_grad():
        model(image())  # the weight of old parametrizations is then no part of a graph, and can be copied
    fused = fuse(model)
    assert [layer.norm for layer in fused.fusing.left] == ["2"]
    assert fused.fusing.left[0].left.startswith("the convolution: ")
    assert_same(fused, model)
    dynamic = upcycle(model)
    left = {layer.name: layer.left for layer in dynamic.upcycling.layers}
    assert left["1"] and left["3"] is None
    assert_same(dynamic, model)


def gradient_hook(layer):
    layer.weight.register_hook(lambda grad: 2 * grad)


@pytest.mark.parametrize("alter", [compiled, gradient_hook])
def test_what_a_copy_loses_is_left_alone_in_place(alter):
    model = lived_in(nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    alter(model[1])
    assert fuse(model, inplace=True).fusing.left[0].left.startswith("the convolution: ")
    with pytest.raises(ValueError, match=r"no layer of this Sequential can be converted .*1: "):
        upcycle(model, inplace=True)


@pytest.mark.parametrize("alter", [replaced_forward, replaced_method, forward_hook, pre_hook])
def test_an_altered_norm_is_left_alone(alter):
    norm = nn.BatchNorm2d(4)
    alter(norm)
    model = lived_in(nn.Sequential(nn.Conv2d(4, 4, 1), norm))
    fused = fuse(model)
    assert "the norm: " in fused.fusing.left[0].left
    assert_same(fused, model)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("alter", [replaced_forward, forward_hook, pre_hook, weight_norm])
def test_an_altered_dynamic_convolution_is_not_collapsed(alter):
    conv = DynamicConv(4, 4, 1)
    nn.init.zeros_(conv.routing.weight)
    model = nn.Sequential(conv, copy.deepcopy(conv)).double().eval()
    alter(model[0])
    folded, variations = collapse(model, [image()])
    assert [v.left is None for v in variations] == [False, True]
    assert max(v.error for v in variations) < 1e-9
    assert isinstance(folded[0], DynamicConv) and not isinstance(folded[1], DynamicConv)
    assert_same(folded, model)


def test_an_altered_condconv_is_not_converted():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = CondConv2d(4, 4, 3), CondConv2d(4, 4, 3)

        def forward(self, x):
            r = x.mean((2, 3)).sigmoid()
            return self.b(self.a(x, r), r)

    model = Net().double().eval()
    original = model.a.forward
    model.a.forward = lambda x, r: 2 * original(x, r)
    converted = convert_condconv(model)
    assert converted.converting == {"a": "its forward was replaced", "b": None}
    assert_same(converted, model)
    model.b.register_forward_hook(lambda module, inputs, output: 2 * output)
    with pytest.raises(ValueError, match=r"can be converted \(a: its forward was replaced; b: "):
        convert_condconv(model)


def test_a_replaced_method_is_not_dilated():
    model = nn.Sequential(*[nn.Conv2d(4, 4, 3, stride=2, padding=1) for _ in range(5)]).eval()
    replaced_forward(model[4])
    with pytest.raises(ValueError, match=r"output_stride=16: 4 may not do what its class does: its forward"):
        dilate(model, 16)
    assert model[4].stride == (2, 2)


# What else holds a layer or a tensor ------------------------------------------------------------------------------


class Listed(nn.Module):
    """The layers are called from a plain list, too."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.pairs = [(self.conv, self.norm)]

    def forward(self, x):
        for conv, norm in self.pairs:
            x = norm(conv(x))
        return x


class Aliased(nn.Module):
    """The two convolutions will share memory, not parameters."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.b(self.norm(self.a(x)))


class SharedStatistics(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.norm, self.twin = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.twin(self.b(self.norm(self.a(x))))


class Kept(nn.Module):
    """Keeps its tensors in attributes."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), None

    def forward(self, x):
        self.last = self.norm(self.conv(x))
        return self.last


@pytest.mark.parametrize(
    ("model", "left"),
    [(Listed(), ["norm"]), (Aliased(), []), (SharedStatistics(), ["norm", "twin"]), (Kept(), [])],
    ids=["in a list", "one memory", "shared statistics", "kept output"],
)
@pytest.mark.parametrize("inplace", [False, True])
def test_other_holders_of_layers_and_tensors(model, left, inplace):
    model = lived_in(copy.deepcopy(model))
    if isinstance(model, Aliased):
        model.b.weight = nn.Parameter(model.a.weight.data)
    if isinstance(model, SharedStatistics):
        model.twin.running_mean = model.norm.running_mean
    before = copy.deepcopy(model)
    fused = fuse(model, inplace=inplace)
    assert [layer.norm for layer in fused.fusing.left] == left
    assert_same(fused, before)
    assert_same(copy.deepcopy(fused), before)
    again = fuse(before)
    again.load_state_dict(fused.state_dict())
    assert_same(again, before)


def test_the_activation_of_a_norm_that_is_called_alone():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 1), BatchNormAct2d(4)

        def forward(self, x):
            return self.norm.act(self.norm(self.conv(x)) - 0.5)

    fused = fuse(model := lived_in(Net()))
    assert "norm.act is called elsewhere" in fused.fusing.left[0].left
    assert_same(fused, model)


def test_a_replaced_forward_of_the_network():
    model = lived_in(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))

    def forward(self, x):
        return self[1](self[0](x)) + self[0].weight.mean()

    model.forward = types.MethodType(forward, model)
    assert [layer.norm for layer in fuse(model).fusing.left] == ["1"]
    assert_same(fuse(model), model)


def test_a_scale_that_the_dtype_cannot_hold_is_not_folded():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).half().eval()
    model[1].float().running_var.fill_(1e-12)
    model[1].eps = 1e-12
    assert "does not fit torch.float16" in fuse(model).fusing.left[0].left


def test_fuse_skips_other_norms_and_transposed_convolutions():
    model = lived_in(nn.Sequential(nn.ConvTranspose2d(4, 4, 1), nn.BatchNorm2d(4), nn.Flatten(2), nn.BatchNorm1d(4)))
    fused = fuse(model)
    assert [layer.norm for layer in fused.fusing.left] == ["1", "3"]
    assert_same(fused, model)


@pytest.mark.filterwarnings("ignore")
def test_wrapped_networks():
    inner = lived_in(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    for model in (torch.compile(inner, backend="eager"), nn.DataParallel(inner), nn.Sequential(torch.compile(inner))):
        with torch.compiler.set_stance("force_eager"):
            assert_same(fuse(model.eval()), inner)


def test_a_network_in_distributed_data_parallel_is_refused(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Conv2d(4, 4, 1), DynamicConv(4, 4, 1)))
        for convert in (upcycle, lambda m: fuse(m.eval()), lambda m: collapse(m, [image().float()])):
            with pytest.raises(
                ValueError, match=r"the parameters that it was built with: convert its `\.module`, and wrap the result"
            ):
                convert(model)
    finally:
        torch.distributed.destroy_process_group()


# Upcycle ----------------------------------------------------------------------------------------------------------


def in_keyword(self, x):
    return self.norm(self.conv(input=x))


def without_batch(self, x):
    return torch.stack([self.norm(self.conv(one)[None])[0] for one in x])


@pytest.mark.parametrize(
    ("way", "why"),
    [
        (reads_weight, "its weight is read elsewhere"),
        (reads_weight_by_parameters, "its weight is read elsewhere"),
        (reads_weight_with_numbers, "its weight is read elsewhere"),
        (reads_shape, "its weight is read elsewhere"),
        (uses_functional_conv, "its weight is read elsewhere"),
        (calls_conv_forward, "its weight is read elsewhere"),
        (in_keyword, "is called with keyword arguments"),
        (without_batch, "reads tensors without a batch dimension"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_upcycle_leaves_convolutions_that_are_used_otherwise(way, why):
    model = lived_in(nn.Sequential(nn.Conv2d(4, 4, 1), Block(way), nn.Conv2d(4, 4, 3)))
    dynamic = upcycle(model)
    left = {layer.name: layer.left for layer in dynamic.upcycling.layers}
    assert left["1.conv"] == why and left["2"] is None
    assert_same(dynamic, model)


def test_upcycle_sees_what_training_reads():
    def reads_in_training(self, x):
        y = self.norm(self.conv(x))
        return y + self.conv.weight.mean() if self.training else y

    model = lived_in(nn.Sequential(nn.Conv2d(4, 4, 1), Block(reads_in_training), nn.Conv2d(4, 4, 3)))
    left = {layer.name: layer.left for layer in upcycle(model).upcycling.layers}
    assert left["1.conv"] == "its weight is read elsewhere"


def test_upcycle_of_a_network_that_cannot_be_run_asks_for_a_probe():
    model = lived_in(Two())
    model.block.insert(0, nn.Conv2d(4, 4, 1).double())
    with pytest.raises(ValueError, match=r"no layer of this Two can be converted .*give a probe"):
        upcycle(model)
    dynamic = upcycle(model, probe=(image(), image()))
    assert [layer.name for layer in dynamic.upcycling.converted] == ["block.1"]
    assert_same(dynamic, model, image(), image())


def test_attributes_of_a_layer_stay():
    model = lived_in(nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    for layer in model:
        layer.i = 7
    assert [layer.i for layer in fuse(upcycle(model, stem=True))] == [7, 7, 7]
    assert collapse(upcycle(model, stem=True), [image()])[0][0].i == 7


def frozen(model, *names):
    for name, parameter in model.named_parameters():
        if any(name.startswith(n) for n in names):
            parameter.requires_grad_(False)
    return model


def test_constants_and_frozen_stages_stay():
    def build():
        return lived_in(nn.Sequential(*[nn.Conv2d(4, 4, 1) for _ in range(4)]))

    model = frozen(build(), "1.")
    left = [layer.left for layer in upcycle(model).upcycling.layers]
    assert left == ["the stem", "frozen: a constant, or a stage that is not trained", None, None]
    assert [layer.left for layer in upcycle(model, frozen=True).upcycling.layers] == ["the stem", None, None, None]
    # A network that is frozen as a whole, as one for inference, has no constants but fixed tables.
    model = frozen(build(), "")
    nn.init.zeros_(model[3].weight)
    with torch.no_grad():
        model[1].weight.copy_(torch.arange(16.0).reshape(4, 4, 1, 1))
    left = [layer.left for layer in upcycle(model).upcycling.layers]
    assert left == ["the stem", "a fixed table of whole numbers", None, None]


# Collapse ---------------------------------------------------------------------------------------------------------


class Routed(nn.Module):
    """Hands on routing weights as `way` says."""

    def __init__(self, way, routing="sigmoid"):
        super().__init__()
        torch.manual_seed(0)
        self.router = nn.Linear(4, 4)
        self.a, self.b = DynamicConv(4, 4, 3, routing=routing), DynamicConv(4, 4, 3, routing=routing, padding="same")
        self.c = DynamicConv(4, 4, 1, routing=self.a.routing if routing else None)
        nn.init.zeros_(self.router.weight)
        if routing:
            nn.init.zeros_(self.a.routing.weight)
            nn.init.zeros_(self.b.routing.weight)
        self.way = types.MethodType(way, self)

    def forward(self, x):
        return self.way(x)


def by_keyword(self, x):
    r = self.router(x.mean((2, 3))).sigmoid()
    return self.c(self.b(self.a(x, routing_weights=r), routing_weights=r), routing_weights=r)


def by_position(self, x):
    r = self.router(x.mean((2, 3))).sigmoid()
    return self.c(self.b(self.a(x, r), r), r)


def all_by_keyword(self, x):
    r = self.router(x.mean((2, 3))).sigmoid()
    return self.c(x=self.b(routing_weights=r, x=self.a(x=x, routing_weights=r)), routing_weights=r)


def from_a_layers_router(self, x):
    r = self.a.routing(x)
    return self.c(self.b(self.a(x, routing_weights=r), r), r)


def with_none(self, x):
    return self.c(self.b(self.a(x, None), routing_weights=None))


def several_times(self, x):
    return self.c(self.b(self.a(self.a(x))))


@pytest.mark.parametrize(
    ("way", "routing"),
    [
        (by_keyword, "sigmoid"),
        (by_keyword, None),
        (by_position, "sigmoid"),
        (by_position, None),
        (all_by_keyword, "sigmoid"),
        (from_a_layers_router, "sigmoid"),
        (with_none, "sigmoid"),
        (several_times, "sigmoid"),
    ],
)
def test_collapse_measures_what_reaches_the_layers(way, routing):
    model = Routed(way, routing).double().eval()
    folded, variations = collapse(model, [image()], tolerance=1e-9)
    assert [v.name for v in variations] == ["a", "b", "c"] and max(v.error for v in variations) < 1e-9
    assert not any(isinstance(m, DynamicConv) for m in folded.modules())
    assert_same(folded, model)
    assert_same(fuse(folded), model)
    # And routing weights that differ from the router's are those that count.
    if way in (by_keyword, by_position, all_by_keyword):
        nn.init.normal_(model.router.weight)
        assert min(v.error for v in measure_routing(model, [image()])) > 0.01


def test_collapse_skips_unused_layers_and_layers_whose_weights_are_read():
    def way(self, x):
        return self.b(self.a(x)) + self.b.weight.mean()

    model = Routed(way).double().eval()
    folded, variations = collapse(model, [image()])
    assert [(v.name, v.left) for v in variations] == [("a", None), ("b", "its weight is read elsewhere")]
    assert isinstance(folded.b, DynamicConv) and isinstance(folded.c, DynamicConv)
    assert_same(folded, model)


def test_measuring_keeps_the_mode_of_every_module():
    model = Routed(several_times).double().train()
    model.b.eval()
    measure_routing(model, [image()])
    assert model.training and model.a.training and not model.b.training
