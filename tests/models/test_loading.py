"""Every kind of source means the same network in every command, field of a recipe and call from Python."""

import json
from dataclasses import dataclass
from pathlib import Path

import checkpoints
import numpy as np
import pytest
import timm
import torch
from click.testing import CliRunner
from hub.server import TOKEN, Hub, connect
from lively import lively
from PIL import Image
from safetensors.torch import save

from parameternet import cli, export, prediction, weights
from parameternet.models import loading
from parameternet.training import Recipe, build, checkpoint

IDS = ["n01440764", "n01443537", "n01484850", "n01491361", "n01494475"]  # the first classes of ImageNet
DENSE = "test_resnet.r160_in1k"
SIZE = 64
KINDS = ("checkpoint", "architecture", "run", "folder", "file", "local-dir", "hf-hub", "hf-hub@", "dense")
OURS = KINDS[:-1]


@dataclass
class Shelf:
    """texts: kind -> what users write. network, dense: what they mean."""

    texts: dict
    network: torch.nn.Module
    dense: torch.nn.Module
    images: Path
    hub: Hub

    def meant(self, kind):
        return self.dense if kind == "dense" else self.network


def described(network):
    """A config for `network`, with classes of ImageNet."""
    return checkpoints.config(label_names=IDS, label_descriptions={})


def draw(folder):
    """Two images a class, of the size that the network reads."""
    rng = np.random.default_rng(0)
    for name in IDS:
        (folder / name).mkdir(parents=True)
        for number in range(2):
            pixels = rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """The same weights as every kind of source, in a working directory with folders of the same names."""
    root = tmp_path_factory.mktemp("shelf")
    network, config = checkpoints.network(), described(checkpoints.network())
    folder = checkpoints.write(root / "made" / checkpoints.NAME, network, **config)
    run = root / "run"
    run.mkdir()
    checkpoint.save_weights(run / loading.BEST, network.state_dict(), config)
    checkpoint.save_weights(root / "net.safetensors", network.state_dict(), config)
    images = draw(root / "images")
    recipe = Recipe(model="parameternet_50m", model_kwargs=checkpoints.MODEL_ARGS, train=str(images), val=str(images))
    (run / "recipe.yaml").write_text(recipe.to_yaml())
    torch.manual_seed(1)
    dense = timm.create_model("test_resnet", num_classes=1000).eval()
    other = checkpoints.network(seed=9)
    for name in (checkpoints.NAME, "parameternet_50m", DENSE, "test_resnet"):
        checkpoints.write(root / "here" / name, other)
    with pytest.MonkeyPatch.context() as patch, Hub() as hub:
        connect(hub, patch, root / "cache", token=TOKEN)
        hub.put("somebody/net", folder)
        hub.put("timm/test_resnet.r160_in1k", {weights.FILE_NAME: save(dense.state_dict())})
        checkpoints.record(patch, folder)
        patch.chdir(root / "here")
        texts = {
            "checkpoint": checkpoints.NAME,
            "architecture": "parameternet_50m",
            "run": str(run),
            "folder": str(folder),
            "file": str(root / "net.safetensors"),
            "local-dir": f"local-dir:{folder}",
            "hf-hub": "hf-hub:somebody/net",
            "hf-hub@": "hf-hub:somebody/net@main",
            "dense": DENSE,
        }
        yield Shelf(texts, network, dense, images, hub)


def command(*arguments):
    done = CliRunner().invoke(cli.main, [str(argument) for argument in arguments])
    assert done.exit_code == 0, f"{done.output}\n{done.exception!r}"
    return done.stdout


def batch(shelf, network):
    """Every image of the shelf as `network` is to see it, in the order of the classes."""
    cfg = described(network)["pretrained_cfg"] if network is shelf.network else network.pretrained_cfg
    mean, std = (torch.tensor(cfg[key])[:, None, None] for key in ("mean", "std"))
    files = sorted(shelf.images.rglob("*.png"))
    return torch.stack([(torch.tensor(np.array(Image.open(f))).permute(2, 0, 1) / 255 - mean) / std for f in files])


def expected(shelf, network):
    """Probabilities of `network` for every image of the shelf."""
    with torch.no_grad():
        return network(batch(shelf, network)).softmax(1)


def close(got, wanted, atol=1e-5):
    return torch.allclose(torch.as_tensor(got).float(), wanted, atol=atol)


def same_tensors(state, network):
    wanted = network.state_dict()
    return state.keys() == wanted.keys() and all(torch.equal(state[name], wanted[name]) for name in wanted)


# Commands ------------------------------------------------------------------------------------------------------------


def predict(text, network, shelf, folder):
    found = json.loads(command("predict", shelf.images, "--model", text, "--json"))["results"]
    by_index = [sorted(result["classes"], key=lambda c: c["index"]) for result in found]
    assert [c["label"] for c in by_index[0]] == IDS
    assert close([[c["probability"] for c in classes] for classes in by_index], expected(shelf, network))


def val(text, network, shelf, folder):
    found = json.loads(command("val", text, "--data", shelf.images, "--workers", 0, "--json"))
    assert found["images"] == 10
    if network is shelf.network:  # the dense one reads another size
        labels = torch.arange(10) // 2
        assert found["loss"] == pytest.approx(
            -expected(shelf, network)[range(10), labels].log().mean().item(), abs=1e-4
        )


def info(text, network, shelf, folder):
    found = json.loads(command("info", text, "--json"))
    assert found["num_features"] > 0
    if text != "parameternet_50m":  # an architecture is described as it is without a checkpoint
        assert found["parameters"]["total"] == sum(p.numel() for p in network.parameters())


def export_(text, network, shelf, folder):
    command("export", text, "--format", "torchscript", "--output", folder / "net.torchscript", "--batch", 2)
    x = batch(shelf, network)[:2]
    got = torch.jit.load(folder / "net.torchscript")(x).softmax(1)
    assert close(got, expected(shelf, network)[:2], atol=1e-4)
    assert export.read_metadata(folder / "net.torchscript")["class_names"] == IDS


def routing(text, network, shelf, folder):
    found = json.loads(command("routing", text, shelf.images, "--output", folder / "r.png", "--json"))
    assert found["pictures"] == 10
    seen = prediction.Predictor(shelf.texts["folder"], "cpu").model
    assert len(found["layers"]) == sum(type(m).__name__ == "DynamicConv" for m in seen.modules())


def card(text, network, shelf, folder):
    words = command("card", text)
    assert "among 5 classes" in words
    assert f"| {sum(p.numel() for p in network.parameters()):,} |" in words


def publish_(text, network, shelf, folder):
    to = f"somebody/{folder.name.replace('_', '-')}"
    assert "/commit/" in command("publish", text, "--to", to)
    (folder / weights.FILE_NAME).write_bytes(shelf.hub.files(to)[weights.FILE_NAME])
    assert same_tensors(weights.read(folder / weights.FILE_NAME), network)
    assert same_tensors(timm.create_model(f"hf-hub:{to}", pretrained=True).state_dict(), network)


def upcycle(text, network, shelf, folder):
    command("upcycle", text, "-o", folder / "out")
    made = loading.load(folder / "out").model
    x = batch(shelf, network)
    with torch.no_grad():
        assert close(made(x).softmax(1), network(x).softmax(1))


def release(text, network, shelf, folder):
    command("release", text, "parameternet_50m.x", "--data", shelf.images, "--destination", folder, "--workers", 0)
    state = weights.read(folder / "parameternet_50m.x" / weights.FILE_NAME)
    assert torch.equal(state["classifier.weight"], network.state_dict()["classifier.weight"].half())


# Fields of a recipe --------------------------------------------------------------------------------------------------


def recipe(shelf, network, **changes):
    ours = network is shelf.network
    return Recipe(
        model="parameternet_50m" if ours else "test_resnet",
        model_kwargs=checkpoints.MODEL_ARGS if ours else {},
        train=str(shelf.images),
        val=str(shelf.images),
        input_size=SIZE,
        batch_size=5,
        epochs=1,
        lr=1e-6,
        warmup_epochs=0,
        workers=0,
        threads=1,
        **changes,
    )


def train(r, folder, *overrides):
    (folder / "recipe.yaml").write_text(r.to_yaml())
    settings = [word for override in overrides for word in ("--set", override)]
    command("train", folder / "recipe.yaml", "--output", folder / "run", *settings)
    return folder / "run"


def init(text, network, shelf, folder):
    r, wanted = recipe(shelf, network), network.state_dict()
    made = weights.read(train(r, folder, f"init={text}") / loading.BEST)
    assert made.keys() == wanted.keys()
    new = "fc." if network is shelf.dense else "none"  # five classes instead of 1000
    kernels = [name for name in wanted if wanted[name].dim() > 1 and not name.startswith(new)]
    assert kernels and all(close(made[name], wanted[name], atol=1e-4) for name in kernels)


def teacher(text, network, shelf, folder):
    r = recipe(shelf, network, teacher_size=SIZE, cache="device", cache_size=SIZE)
    found = weights.read(train(r, folder, f"teacher={text}") / "teacher.safetensors")["probabilities"]
    with torch.no_grad():
        wanted = network(batch(shelf, network))[:, :5].softmax(1)
    assert close(found, wanted, atol=1e-3)


# Calls ---------------------------------------------------------------------------------------------------------------


def load(text, network, shelf, folder):
    found = loading.load(text, dense=True)
    assert same_tensors(found.model.state_dict(), network) and not found.model.training
    assert found.model.num_classes == network.num_classes
    assert found.config["label_names"][:5] == IDS
    assert loading.read_config(text)["num_classes"] == network.num_classes
    assert same_tensors(loading.read_tensors(text), network)
    assert found.verified


def predictor(text, network, shelf, folder):
    found = prediction.Predictor(text, "cpu")
    assert found.labels == IDS and same_tensors(found.model.state_dict(), network)
    assert same_tensors(prediction.load(text).state_dict(), network)


USES = (predict, val, info, export_, routing, card, publish_, upcycle, release, init, teacher, load, predictor)
OF_OURS = (predict, export_, routing, card, publish_, predictor)  # these take no network of timm


@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__.strip("_"))
@pytest.mark.parametrize("kind", KINDS)
def test_every_use_takes_every_kind_of_source(use, kind, shelf, tmp_path):
    text = shelf.texts[kind]
    if use is release and kind != "run":
        pytest.skip("a run folder alone is released")
    if use in OF_OURS and kind == "dense":
        with pytest.raises((weights.UnknownWeights, AssertionError), match="dense timm network"):
            use(text, shelf.dense, shelf, tmp_path)
        return
    use(text, shelf.meant(kind), shelf, tmp_path)


@pytest.mark.parametrize("name", ["ghostnetv3_050", "ghostnetv2_100", "tf_efficientnet_lite0"])
def test_a_dynamic_network_starts_from_a_file_of_its_dense_one(name, tmp_path):
    dense = lively(timm.create_model(name, num_classes=7)).eval()
    weights.save(dense.state_dict(), tmp_path / "dense.safetensors")
    dynamic = build.make_model(
        Recipe(model=f"dynamic_{name.removeprefix('tf_')}", init=str(tmp_path / "dense.safetensors")), 7
    )
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        wanted = dense(x)
        assert close(dynamic.eval()(x), wanted, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.skipif(weights.packaged("timm/tf_efficientnet_lite0.in1k") is None, reason="`demo` is not installed")
@pytest.mark.parametrize("start", ["dynamic_efficientnet_lite0.in1k_upcycled", "dynamic_efficientnet_lite0",
                                   "tf_efficientnet_lite0", "tf_efficientnet_lite0.in1k"])  # fmt: skip
@pytest.mark.parametrize("model", ["dynamic_efficientnet_lite0", "tf_efficientnet_lite0"])
def test_an_upcycled_checkpoint_is_a_start_like_pretrained(model, start):
    x = torch.randn(1, 3, 64, 64)
    wanted, found = (build.make_model(Recipe(model=model, init=init), 1000).eval() for init in ("pretrained", start))
    with torch.no_grad():
        assert close(found(x), wanted(x), atol=1e-5 * float(wanted(x).abs().max()))
