"""Cards: what the Hub reads of them, what people read, and that their examples run."""

import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import checkpoints
import pytest
import timm
import torch
from click.testing import CliRunner
from huggingface_hub import ModelCard, metadata_load
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from PIL import Image

from parameternet import cli, weights
from parameternet.hub import card_data, card_text, write_card
from parameternet.models.upcycled import upcycle_checkpoint

ROOT = Path(__file__).parent.parent.parent
NAME = "parameternet_50m.tin200"
SHIPPED = ROOT / "weights" / NAME
COMPARED = ["What experts are worth"]
RESULTS = {"top1": 41.5, "top5": 70.25, "data": "Five Things", "images": 1234, "parameters": 99, "macs": 5_000_000}


def facts(card):
    """The rows of the table of results."""
    return dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", card, re.MULTILINE))


def blocks(card):
    return re.findall(r"^```python\n(.*?)^```$", card, re.MULTILINE | re.DOTALL)


def test_the_shipped_card_is_what_the_command_writes(tmp_path):
    done = CliRunner().invoke(cli.main, ["card", NAME])
    assert done.exit_code == 0 and done.stdout == (SHIPPED / "README.md").read_text()
    done = CliRunner().invoke(cli.main, ["card", str(SHIPPED), "-o", str(tmp_path / "card.md")])
    assert done.exit_code == 0 and not done.stdout
    assert (tmp_path / "card.md").read_text() == (SHIPPED / "README.md").read_text()


def test_the_header_is_one_that_the_hub_reads():
    header = metadata_load(SHIPPED / "README.md")
    assert {key: header[key] for key in ("library_name", "pipeline_tag", "license", "license_name", "datasets")} == {
        "library_name": "timm",
        "pipeline_tag": "image-classification",
        "license": "other",
        "license_name": "apache-2.0-and-terms-of-the-data",
        "datasets": ["tiny-imagenet"],
    }
    assert {"timm", "parameternet"} <= set(header["tags"])
    name, figures = model_index_to_eval_results(header["model-index"])
    assert name == NAME
    assert [(f.metric_type, f.metric_value, f.dataset_name) for f in figures] == [
        ("accuracy", weights.config(NAME)["results"][key], "Tiny-ImageNet") for key in ("top1", "top5")
    ]
    card = ModelCard.load(SHIPPED / "README.md")
    assert eval_results_to_model_index(name, card.data.eval_results) == header["model-index"]


def test_the_cards_figures_are_those_of_the_config_and_the_file():
    results, table = weights.config(NAME)["results"], facts((SHIPPED / "README.md").read_text())
    model = timm.create_model(NAME)
    assert table["top-1"] == f"{results['top1']:.2f} % ± {results['top1_interval']:.2f} (95 %)"
    assert table["top-5"] == f"{results['top5']:.2f} %"
    assert table["parameters"] == f"{sum(p.numel() for p in model.parameters()):,}"
    assert table["FLOPs (multiply-adds)"] == f"{results['macs'] / 1e6:.1f} M an image"
    assert table["file"] == "5.0 MB, float16 and float32"


def test_the_sections_stand_in_order():
    headings = re.findall(r"^##+ (.*)$", (SHIPPED / "README.md").read_text(), re.MULTILINE)
    usage = ["Image Classification", "Feature Map Extraction", "Image Embeddings", "transformers", "torch.hub", "YOLO"]
    tail = ["Training", "Limits", "Data", "Citation"]
    assert headings == ["Model Details", "Results", "Experts", *COMPARED, "Model Usage", *usage, *tail]


def run_examples(card, folder, monkeypatch):
    """Run every block of Python, from the top down as a reader would; returns the names that they leave.

    YOLO's and transformers' (tests/clients) are left out.
    """
    (folder / "path" / "to").mkdir(parents=True)
    (folder / "path" / "to" / "parameternet").symlink_to(ROOT)
    Image.open(ROOT / "tests" / "photos" / "cat.jpg").save(folder / "photo.jpg")
    monkeypatch.chdir(folder)
    left = {}
    for number, block in enumerate(blocks(card)):
        if "ultralytics" not in block and "transformers" not in block:
            exec(compile(block, f"block {number}", "exec"), left)
    return left


def test_every_example_runs(tmp_path, monkeypatch, capsys):
    left = run_examples((SHIPPED / "README.md").read_text(), tmp_path, monkeypatch)
    assert left["probabilities"].shape == (1, 200) and left["images"].shape == (1, 3, 64, 64)
    assert left["reduction"] == 32 and left["embedding"].shape == (1, left["encoder"].head_hidden_size)
    assert torch.equal(left["model"].classifier.weight, timm.create_model(NAME, pretrained=True).classifier.weight)
    assert "torch.Size([1, " in capsys.readouterr().out


@pytest.mark.skipif(not importlib.util.find_spec("ultralytics"), reason="needs ultralytics")
def test_the_example_for_yolo_runs(tmp_path):
    [block] = [block for block in blocks((SHIPPED / "README.md").read_text()) if "ultralytics" in block]
    block += "import torch\ndetector.model.eval()\nprint(detector.model(torch.zeros(1, 3, 64, 96))[0].shape)\n"
    # a process of its own: ultralytics replaces PIL's and torch's functions for all who come after it
    quiet = {"YOLO_CONFIG_DIR": str(tmp_path), "YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false"}
    done = subprocess.run(
        [sys.executable, "-c", block], cwd=tmp_path, env=os.environ | quiet, capture_output=True, text=True, timeout=120
    )
    assert "torch.Size([1, 84, 126])" in done.stdout, done.stderr  # 4 coordinates and 80 classes at 8, 16 and 32 px


def test_the_examples_of_a_published_checkpoint_run(hub, tmp_path, monkeypatch):
    folder = checkpoints.write(tmp_path / "made" / "net", results=RESULTS)
    hub.put("somebody/net", folder)
    card = write_card(folder, "hf-hub:somebody/net")
    left = run_examples(card, tmp_path / "reader", monkeypatch)
    assert left["probabilities"].shape == (1, 5) and left["embedding"].shape[0] == 1
    assert "torch.hub" not in card and "YOLO" not in card, "they take names of the registry alone"
    assert "--model hf-hub:somebody/net" in card and 'model="somebody/net")' in card
    assert 'model="somebody/net", revision="v1")' in write_card(folder, "hf-hub:somebody/net@v1")


def test_card_of_a_minimal_folder_makes_no_claims(tmp_path, monkeypatch):
    folder = checkpoints.write(tmp_path / "net")
    card = write_card(folder)
    assert card.count('create_model("local-dir:net"') == 3 and card.count('model="net")') == 1
    for words in ("# net\n", "Its accuracy has not been measured.", "The recipe is not known."):
        assert words in card
    table = facts(card)
    assert "top-1" not in table and table["file"].endswith("MB, float32")
    assert table["parameters"] == f"{sum(p.numel() for p in checkpoints.network().parameters()):,}"
    assert "model-index" not in metadata_load_text(card, tmp_path)
    run_examples(card, tmp_path, monkeypatch)


def test_what_was_compared_stands_under_the_results(tmp_path):
    folder = tmp_path / NAME
    shutil.copytree(SHIPPED, folder, ignore=shutil.ignore_patterns("claim.*", "transfer.*"))
    assert "What experts are worth" not in write_card(folder)
    (folder / "claim.md").write_text("Three seeds.\n\n| | top-1 |\n| --- | --- |\n| static | 30.0 |\n")
    found = re.search(
        r"^### What experts are worth\n\n(.*?)^## Model Usage", write_card(folder), re.DOTALL | re.MULTILINE
    )
    assert found[1].split("\n\n") == [
        "Three seeds.",
        "| | top-1 |\n| --- | --- |\n| static | 30.0 |",
        "![What experts are worth](claim.png)",
        "",
    ]


def test_a_card_says_what_its_network_is_not(tmp_path):
    assert "networks trained on ImageNet-1K and -22K; this one was trained on Tiny-ImageNet." in write_card(
        NAME
    ).replace("\n", " ")
    assert "this one was trained" not in write_card("dynamic_ghostnet_100.in1k_upcycled")


def metadata_load_text(card, folder):
    (folder / "card.md").write_text(card)
    return metadata_load(folder / "card.md")


def test_an_upcycled_checkpoint_says_whose_figures_it_shows(tmp_path):
    card = write_card("dynamic_ghostnet_100.in1k_upcycled")
    header = metadata_load_text(card, tmp_path)
    assert header["base_model"] == "timm/ghostnet_100.in1k" and header["datasets"] == ["imagenet-1k"]
    _, figures = model_index_to_eval_results(header["model-index"])
    assert {f.source_name for f in figures} == {"timm/ghostnet_100.in1k"}
    assert facts(card)["top-1"] == "73.96 %" and "file" not in facts(card)
    for words in (
        "are the dense model's",
        "compute the same function",
        "None: the weights are those of",
        "research and education",
    ):
        assert words in card
    assert card.count('create_model("dynamic_ghostnet_100.in1k_upcycled"') == 3
    assert "transformers" not in card, "it has no folder"


@pytest.mark.parametrize(
    ("source", "base", "words"),
    [
        ("hf-hub:somebody/dense@v1", "somebody/dense", "[somebody/dense](https://huggingface.co/somebody/dense)"),
        ("resnet18.a1_in1k", "timm/resnet18.a1_in1k", "timm/resnet18.a1_in1k](https"),
        ("mine.safetensors", None, "mine.safetensors, for 3 classes, upcycled"),
    ],
)
def test_the_card_of_an_upcycled_folder_links_to_the_dense_one(upcycled, tmp_path, source, base, words):
    config = upcycled / "config.json"
    config.write_text(re.sub('"upcycled_from": "[^"]*"', f'"upcycled_from": "{source}"', config.read_text()))
    card = write_card(upcycled)
    assert words in card and card.count('create_model("local-dir:fresh"') == 3
    assert metadata_load_text(card, tmp_path).get("base_model") == base
    assert "The dense model's figures hold here" in card


@pytest.fixture(scope="module")
def upcycled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("upcycled")
    dense = timm.create_model("test_resnet", num_classes=3)
    weights.save(dense.state_dict(), folder / "mine.safetensors")
    upcycle_checkpoint(str(folder / "mine.safetensors"), folder / "fresh", "test_resnet")
    return folder / "fresh"


def test_what_there_is_no_card_of():
    assert (
        "no weights are recorded for parameternet_50m.tin20"
        in CliRunner().invoke(cli.main, ["card", "parameternet_50m.tin20"]).output
    )


@pytest.mark.parametrize("name", ["COMPARISONS", "describe", "write_card"])
def test_the_former_module_warns_and_gives_the_same_objects(name):
    place = card_text if name == "write_card" else card_data
    with pytest.warns(DeprecationWarning, match=rf"hub\.card\.{name} is deprecated, use {place.__name__}\.{name}"):
        assert getattr(importlib.import_module("parameternet.hub.card"), name) is getattr(place, name)


@pytest.mark.parametrize("name", sorted(weights.known()))
def test_every_shipped_card_is_what_the_command_writes(name):
    assert write_card(name) == (ROOT / "weights" / name / "README.md").read_text()
