"""Names, configs and files from elsewhere: none steers a terminal, loads something else, or ends in a traceback."""

import json
import unicodedata
from dataclasses import asdict

import checkpoints
import pytest
import timm
import torch
import yaml
from click.testing import CliRunner
from hub.server import TOKEN, Hub, connect
from PIL import Image

from parameternet import cli, weights
from parameternet.models import loading
from parameternet.training import Recipe, checkpoint

EVIL = "cat\x1b[2K\r\x9b31m\u202e\u2028\x07forged"
SIZE = 64


def run(*arguments):
    return CliRunner().invoke(cli.main, [str(argument) for argument in arguments])


def assert_harmless(text):
    odd = {c for c in text if c != "\n" and unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp", "Cs")}
    assert not odd, f"{odd} in {text!r}"


def draw(folder, names=("n1", "n2")):
    for name in names:
        (folder / name).mkdir(parents=True)
        Image.new("RGB", (SIZE, SIZE), (90, 60, 30)).save(folder / name / f"{name}.png")
    return folder


# Terminals -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evil(tmp_path_factory):
    """A run folder in which every name and every text that is not checked is hostile; with images to match."""
    root = tmp_path_factory.mktemp("evil")
    names = [f"{EVIL}{number}" for number in range(5)]
    config = checkpoints.config(
        label_names=names,
        label_descriptions={name: f"{name} in words" for name in names},
        results={"top1": 40.0, "data": EVIL, "images": 5},
        upcycled_from=EVIL,
    )
    config["pretrained_cfg"]["license"] = EVIL
    run_folder = root / f"{EVIL}run"
    run_folder.mkdir(parents=True)
    checkpoint.save_weights(run_folder / loading.BEST, checkpoints.network().state_dict(), config)
    (run_folder / weights.CONFIG_NAME).write_text(json.dumps(config))
    recipe = asdict(Recipe(model="parameternet_50m", model_kwargs=checkpoints.MODEL_ARGS))
    recipe |= dict.fromkeys(("data_name", "data_terms", "license", "train", "val", "init", "teacher"), EVIL)
    (run_folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (run_folder / "history.csv").write_text("epoch,updates,seconds\n1,5,2\n")
    draw(root / "images", names)
    (root / "images" / f"{EVIL}stray").write_text("no image")
    (root / "images" / names[0] / f"{EVIL}bad.png").write_bytes(b"no image")
    return root, run_folder, root / "images"


COMMANDS = {
    "predict": ("predict", "IMAGES", "--model", "MODEL"),
    "predict an image that is not there": ("predict", f"{EVIL}.png", "--model", "MODEL"),
    "val": ("val", "MODEL", "--data", "IMAGES", "--workers", "0"),
    "info": ("info", "MODEL"),
    "export": ("export", "MODEL", "--format", "torchscript", "--batch", "1", "--output", "OUT.torchscript"),
    "routing": ("routing", "MODEL", "IMAGES", "--output", "OUT.svg"),
    "card": ("card", "MODEL"),
    "publish": ("publish", "MODEL", "--to", "somebody/net", "--dry-run"),
    "publish to a bad name": ("publish", "MODEL", "--to", EVIL),
    "upcycle": ("upcycle", "MODEL", "-o", "OUT", "--layers"),
    "release": ("release", "MODEL", "parameternet_50m.x", "--data", "IMAGES", "--destination", "OUT", "--workers", "0"),
    "release under a bad name": ("release", "MODEL", EVIL, "--data", "IMAGES"),
    "list": ("list", EVIL),
    "train": ("train", "RECIPE", "--output", "OUT"),
    "train with a bad field": ("train", "RECIPE", "--set", f"{EVIL}=1"),
    "train with a bad value": ("train", "RECIPE", "--set", f"opt={json.dumps(EVIL)}", "--output", "OUT"),
    "an unknown command": (EVIL,),
    "an unknown option": ("predict", f"--{EVIL}"),
}
WRONG_NAMES = {
    f"{words[0]} {kind}": tuple(text if word == "MODEL" else word for word in words)
    for words in (
        COMMANDS[name] for name in ("predict", "val", "info", "export", "routing", "card", "publish", "upcycle")
    )
    for kind, text in {
        "name": EVIL,
        "file": f"/{EVIL}.safetensors",
        "folder": f"local-dir:/{EVIL}",
        "repository": f"hf-hub:{EVIL}/{EVIL}",
        "other file": f"./{EVIL}.pth",
    }.items()
}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with Hub() as server:
        connect(server, monkeypatch, tmp_path / "cache", token=TOKEN)
        yield server


def called(words, evil, tmp_path, recipe):
    _, model, images = evil
    out = str(tmp_path / "out")
    values = {"MODEL": str(model), "IMAGES": str(images), "RECIPE": str(recipe)}
    return run(*(values.get(word, word.replace("OUT", out) if word.startswith("OUT") else word) for word in words))


@pytest.mark.parametrize("name", COMMANDS)
def test_hostile_names_are_printed_escaped(name, evil, tmp_path, hub):
    recipe = tmp_path / f"{EVIL}.yaml"
    fields = dict(model="test_efficientnet", input_size=32, batch_size=2, epochs=1, workers=0, threads=1)
    recipe.write_text(yaml.safe_dump({**fields, "train": str(evil[2]), "val": str(evil[2])}))
    done = called(COMMANDS[name], evil, tmp_path, recipe)
    assert isinstance(done.exception, SystemExit | None), done.exc_info
    assert_harmless(done.output)
    if len(name.split()) == 1 and name not in ("list", "publish"):
        assert done.exit_code == 0 or "bad.png" in done.output, done.output
        assert "\\x1b" in done.output or name in ("export", "upcycle")


@pytest.mark.parametrize("name", WRONG_NAMES)
def test_names_of_nothing_are_printed_escaped(name, evil, tmp_path, hub):
    done = called(WRONG_NAMES[name], evil, tmp_path, "")
    assert isinstance(done.exception, SystemExit) and done.exit_code != 0, done.exc_info
    assert_harmless(done.output)


def test_json_keeps_hostile_names_and_prints_them_escaped(evil, tmp_path):
    _, model, images = evil
    for words in (("predict", images, "--model", model), ("routing", model, images, "--output", tmp_path / "r.png")):
        done = run(*words, "--json")
        assert_harmless(done.output)
        assert any(EVIL in text for text in texts(json.loads(done.stdout)))


def texts(value):
    if isinstance(value, str):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for item in items for text in texts(item)]


def test_plots_show_hostile_names_escaped(evil, tmp_path, monkeypatch):
    from matplotlib.text import Text
    from PIL import ImageDraw

    _, model, images = evil
    drawn = []
    with monkeypatch.context() as patch:
        set_text, draw_text = Text.set_text, ImageDraw.ImageDraw.text
        patch.setattr(Text, "set_text", lambda self, s: drawn.append(str(s)) or set_text(self, s))
        patch.setattr(
            ImageDraw.ImageDraw,
            "text",
            lambda self, xy, text, *rest, **k: drawn.append(text) or draw_text(self, xy, text, *rest, **k),
        )
        run("predict", images, "--model", model, "--save", tmp_path / "p.png")
        run("routing", model, images, "--output", tmp_path / "r.png")
    assert (tmp_path / "p.png").is_file() and (tmp_path / "r.png").is_file()
    assert any("\\x1b" in text for text in drawn)
    for text in drawn:
        assert_harmless(text)


# Configs -------------------------------------------------------------------------------------------------------------

BAD = {
    "architecture of the Hub": {"architecture": "hf-hub:somebody/net"},
    "architecture of a folder": {"architecture": "local-dir:OTHER"},
    "architecture that is not registered": {"architecture": "no_such_net"},
    "architecture of another type": {"architecture": 5},
    "pretrained_cfg of another type": {"pretrained_cfg": []},
    "label_names of another type": {"label_names": 5},
    "label_names of other items": {"label_names": [1, 2, 3, 4, 5]},
    "label_descriptions of another type": {"label_descriptions": ["a"]},
    "too few label_names": {"label_names": ["a"]},
    "model_args of another type": {"model_args": ["width"]},
    "unknown model_args": {"model_args": {"nonsense": 1}},
    "model_args of a wrong type": {"model_args": {"width": "wide"}},
    "checkpoint_path": {"model_args": {"width": 0.2, "checkpoint_path": "OTHER/x.pth"}},
    "features_only": {"model_args": {"width": 0.2, "features_only": True}},
    "pretrained_cfg_overlay": {"model_args": {"width": 0.2, "pretrained_cfg_overlay": {"file": "OTHER/x.pth"}}},
    "contradicting num_classes": {"model_args": {"width": 0.2, "num_classes": 7}},
    "other num_classes": {"num_classes": 7},
    "huge num_classes": {"num_classes": 10**12},
    "num_classes of another type": {"num_classes": "5"},
    "results of another type": {"results": 5},
    "results of other items": {"results": {"top1": "good"}},
    "tag with code": {"pretrained_cfg": {"tag": '"); import os; ("', "input_size": [3, 64, 64]}},
    "input_size of two numbers": {"pretrained_cfg": {"input_size": [64, 64]}},
    "input_size below 1": {"pretrained_cfg": {"input_size": [3, 0, 64]}},
    "interpolation": {"pretrained_cfg": {"interpolation": "magic", "input_size": [3, 64, 64]}},
    "std of zero": {"pretrained_cfg": {"std": [0, 1, 1], "input_size": [3, 64, 64]}},
    "mean of two": {"pretrained_cfg": {"mean": [0.5, 0.5], "input_size": [3, 64, 64]}},
    "source that is not registered": {"architecture": "dynamic_timm", "model_args": {"source": "hf-hub:somebody/net"}},
    "recipe of another type": {"architecture": "dynamic_timm", "model_args": {"source": "test_resnet", "recipe": [5]}},
    "a list": None,
}
READERS = {
    "predict": ("predict", "IMAGES", "--model", "MODEL"),
    "val": ("val", "MODEL", "--data", "IMAGES", "--workers", "0"),
    "info": ("info", "MODEL"),
    "routing": ("routing", "MODEL", "IMAGES", "--output", "OUT.png"),
    "card": ("card", "MODEL"),
    "publish": ("publish", "MODEL", "--to", "somebody/new", "--dry-run"),
    "upcycle": ("upcycle", "MODEL", "-o", "OUT"),
    "export": ("export", "MODEL", "--format", "torchscript", "--output", "OUT.torchscript"),
}
# Faults that only show when a network is built with weights, fed, or asked for names: commands that do not do so.
UNSEEN = {
    "other num_classes": ("info", "card"),
    "too few label_names": ("info", "card", "upcycle"),
}


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Weights of somebody else, as a pickle that tells when it is opened and as a folder."""
    folder = checkpoints.write(tmp_path_factory.mktemp("other"), checkpoints.network(seed=9))
    torch.save(checkpoints.network(seed=9).state_dict(), folder / "x.pth")
    return folder


@pytest.mark.parametrize("place", ["beside", "header", "Hub"])
@pytest.mark.parametrize("name", BAD)
def test_a_bad_config_is_refused_by_every_command(name, place, other, hub, tmp_path):
    changes = BAD[name]
    config = (
        [] if changes is None else checkpoints.config(**json.loads(json.dumps(changes).replace("OTHER", str(other))))
    )
    folder = checkpoints.write(tmp_path / "net")
    text = str(folder)
    if place == "header":
        checkpoint.save_weights(tmp_path / "net.safetensors", checkpoints.network().state_dict(), config)
        text = str(tmp_path / "net.safetensors")
    else:
        (folder / weights.CONFIG_NAME).write_text(json.dumps(config))
    if place == "Hub":
        hub.put("somebody/bad", folder)
        text = "hf-hub:somebody/bad"
    hub.put("somebody/net", other)
    images = draw(tmp_path / "images")
    before = len(hub.requests)
    for command, words in READERS.items():
        values = {"MODEL": text, "IMAGES": str(images)}
        done = run(
            *(values.get(w, w.replace("OUT", str(tmp_path / "out"), 1) if w.startswith("OUT") else w) for w in words)
        )
        assert isinstance(done.exception, SystemExit | None), (command, done.exc_info)
        assert_harmless(done.output)
        assert (done.exit_code == 0) == (command in UNSEEN.get(name, ())), (command, done.output)
    if place != "Hub":
        asked = [path for method, path, _ in hub.requests[before:] if "somebody/net" in path]
        assert not asked, asked


@pytest.mark.parametrize("place", ["beside", "header", "Hub"])
def test_a_config_does_not_say_where_weights_are(place, other, hub, tmp_path):
    places = {
        "url": f"{hub.address}/somebody/net/resolve/main/model.safetensors",
        "file": str(other / weights.FILE_NAME),
        "hf_hub_id": "somebody/net",
        "hf_hub_filename": weights.FILE_NAME,
        "source": "hf-hub",
        "custom_load": True,
        "state_dict": {"a": [1]},
    }
    config = checkpoints.config()
    config["pretrained_cfg"] |= places
    wanted = checkpoints.network().state_dict()
    folder = checkpoints.write(tmp_path / "net")
    (folder / weights.CONFIG_NAME).write_text(json.dumps(config))
    checkpoint.save_weights(tmp_path / "net.safetensors", wanted, config)
    hub.put("somebody/bad", folder)
    hub.put("somebody/net", other)
    text = {"beside": str(folder), "header": str(tmp_path / "net.safetensors"), "Hub": "hf-hub:somebody/bad"}[place]
    models = [loading.load(text).model]
    if place != "header":
        name = text if place == "Hub" else f"local-dir:{text}"
        models.append(timm.create_model(name, pretrained=True))
    for model in models:
        assert all(torch.equal(value, wanted[key]) for key, value in model.state_dict().items())
    assert not [path for _, path, _ in hub.requests if "somebody/net" in path]


@pytest.mark.parametrize(
    "name", ["checkpoint_path", "features_only", "pretrained_cfg_overlay", "contradicting num_classes"]
)
def test_timm_refuses_what_a_folder_must_not_ask_for(name, other, tmp_path):
    folder = checkpoints.write(tmp_path / "net", **json.loads(json.dumps(BAD[name]).replace("OTHER", str(other))))
    with pytest.raises((weights.WeightsDamaged, TypeError)):
        timm.create_model(f"local-dir:{folder}", pretrained=True)
