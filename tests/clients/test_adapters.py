"""peft's adapters and quantisers either see an ordinary Linear or leave the routers alone."""

import copy

import pytest
import timm
import torch
from torch import nn

import parameternet
from parameternet import Router
from parameternet.export import export

ARGUMENTS = ({}, {"routing_hidden": 8}, {"routing": "sigmoid"})


def network(**arguments):
    return timm.create_model("parameternet_50m", num_classes=10, drop_rate=0.0, **arguments).eval()


def routers(model):
    return [name for name, module in model.named_modules() if isinstance(module, Router)]


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
@pytest.mark.parametrize("targets", ["all-linear", ["classifier"], r".*\.(fc1|fc2)|conv_head|classifier"], ids=str)
def test_lora_trains_what_it_is_asked_to(targets, arguments, images):
    peft = pytest.importorskip("peft")
    model = network(**arguments)
    expected = model(images)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets))
    assert torch.allclose(adapted(images), expected, atol=1e-5)
    adapted(images).square().sum().backward()
    trainable = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(trainable) >= 2 and all(p.grad is not None for p in adapted.parameters() if p.requires_grad)
    assert not any(".routing." in name for name in trainable)


def test_lora_adapts_the_weights_of_routers(images):
    peft = pytest.importorskip("peft")
    if "target_parameters" not in peft.LoraConfig.__dataclass_fields__:
        pytest.skip("this peft adapts no single parameters")
    config = peft.LoraConfig(r=2, target_modules=["classifier"], target_parameters=["stem.conv.routing.weight"])
    adapted = peft.get_peft_model(network(), config)
    adapted(images).square().sum().backward()
    grads = {name: p.grad for name, p in adapted.named_parameters() if p.requires_grad and ".routing." in name}
    assert len(grads) == 2 and all(g is not None for g in grads.values())


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_lora_on_classifier_routers_and_static_convolutions_merges(arguments, images):
    peft = pytest.importorskip("peft")
    model = network(**arguments).train()
    with torch.no_grad():
        for _ in range(30):  # statistics of batch norm, without which an untrained network gives hardly anything
            model(images)
    names, before = set(model.eval().state_dict()), model(images)
    config = peft.LoraConfig(
        r=2, target_modules=r"classifier|conv_head|.*\.se\.fc[12]",
        target_parameters=[f"{name}.weight" for name in routers(model)],
    )  # fmt: skip
    adapted = peft.get_peft_model(model, config)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        nn.functional.cross_entropy(adapted(images), torch.tensor([1, 2])).backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = adapted(images)
    assert (expected - before).abs().max() > 0.01
    merged = adapted.merge_and_unload()
    assert set(merged.state_dict()) == names
    assert torch.allclose(merged(images), expected, rtol=1e-4, atol=1e-5)


def test_lora_takes_no_experts():
    peft = pytest.importorskip("peft")
    with pytest.raises(ValueError, match="4 dimensional"):
        peft.get_peft_model(network(), peft.LoraConfig(target_modules=[], target_parameters=["stem.conv.weight"]))


@torch.no_grad()
@pytest.mark.parametrize("parameters", [None, ["stem.conv.routing.weight"]], ids=str)
def test_a_network_with_adapters_is_exported_merged(parameters, images, tmp_path):
    peft = pytest.importorskip("peft")
    if parameters and "target_parameters" not in peft.LoraConfig.__dataclass_fields__:
        pytest.skip("this peft adapts no single parameters")
    targets = {"target_parameters": parameters} if parameters else {}
    adapted = peft.get_peft_model(network(), peft.LoraConfig(r=2, target_modules=["classifier"], **targets)).eval()
    for name, parameter in adapted.named_parameters():
        if "lora" in name:
            nn.init.normal_(parameter)
    names = list(adapted.state_dict())
    export(adapted, tmp_path / "net.torchscript", "torchscript", size=64)
    assert list(adapted.state_dict()) == names, "the network itself keeps its adapters"
    x = torch.randn(2, 3, 64, 64)
    assert torch.allclose(torch.jit.load(str(tmp_path / "net.torchscript"))(x), adapted(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_torchao_quantises_linear_layers(arguments, images):
    quantization = pytest.importorskip("torchao.quantization")
    model = network(**arguments)
    quantised = copy.deepcopy(model)
    quantization.quantize_(quantised, quantization.Int8WeightOnlyConfig())
    expected = model(images)
    assert not torch.equal(quantised(images), expected)
    assert (quantised(images) - expected).abs().max() <= 0.03 * expected.abs().max()
    for name in routers(model):
        assert type(quantised.get_submodule(name).weight) is nn.Parameter


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_torchs_dynamic_quantisation_leaves_routers_alone(arguments, images):
    model = nn.Sequential(network(**arguments), nn.Linear(10, 10)).eval()
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    expected = model(images)
    assert type(quantised[1]) is not nn.Linear and len(routers(quantised)) == len(routers(model))
    assert (quantised(images) - expected).abs().max() <= 0.05 * expected.abs().max()


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_opacus_computes_the_gradient_of_each_image(kernel):
    opacus = pytest.importorskip("opacus")
    groups = 1 if kernel == 1 else 4
    layer = parameternet.DynamicConv(4, 4, kernel, groups=groups, routing="sigmoid", routing_hidden=3)
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(4 * 36, 3))
    assert not opacus.validators.ModuleValidator.validate(model, strict=False)
    x = torch.randn(3, 4, 6, 6)
    expected = []
    for image in x:
        model.zero_grad()
        model(image[None]).square().sum().backward()
        expected.append([p.grad.clone() for p in model.parameters()])
    watched = opacus.GradSampleModule(copy.deepcopy(model), loss_reduction="sum")
    watched(x).square().sum().backward()
    for parameter, grads in zip(watched.parameters(), zip(*expected, strict=True), strict=True):
        assert torch.allclose(parameter.grad_sample, torch.stack(grads), rtol=1e-3, atol=1e-4)
