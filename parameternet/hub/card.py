"""The card of a checkpoint: what it is, what was measured, how to use it, how it came about, what it is not for."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import timm
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from timm.data import resolve_data_config
from timm.models import is_model_pretrained

from parameternet import weights
from parameternet.flops import count_flops
from parameternet.models import catalogue, loading
from parameternet.models.builder import model_arguments, public_config
from parameternet.text import printable_lines, without_local_paths

__all__ = ["describe", "write_card"]

_CARD = """\
# {name}

{intro}

## Model Details

- **Task:** image classification among {classes} classes; feature maps and embeddings
- **Network:** `{architecture}`, whose convolutions mix their kernels anew for each picture, after
  [ParameterNet](https://arxiv.org/abs/2306.14525)
- **Software:** timm, and the package `parameternet`, which registers the network and checks every file that it loads
{details}
## Results

| | |
| --- | --- |
{results}

{measured}
{routing}{comparisons}
## Model Usage

{usage}
## Training

{training}

## Limits

It knows {classes} classes and answers every picture with one of them. Photographs unlike those it was trained on (other
subjects, drawings, other sizes than {size} px) get answers that mean little, and its probabilities were not calibrated.
{validation}{paper}Not for decisions about people.
{terms}
## Citation

```bibtex
@inproceedings{{han2024parameternet,
  title = {{ParameterNet: Parameters Are All You Need}},
  author = {{Han, Kai and Wang, Yunhe and Guo, Jianyuan and Wu, Enhua}},
  booktitle = {{Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition}},
  year = {{2024}}
}}
```
"""

# heading -> what stands under it; a test runs every block of Python, from the top down
_USAGE = {
    "Image Classification": """\
```python
import timm
import torch
from PIL import Image

import parameternet  # registers the networks with timm

model = timm.create_model("{reference}", pretrained=True).eval()
config = timm.data.resolve_model_data_config(model, use_test_size=True)
transform = timm.data.create_transform(**config, is_training=False)
images = transform(Image.open("photo.jpg").convert("RGB"))[None]  # (1, 3, {size}, {size})

with torch.inference_mode():
    probabilities = model(images).softmax(-1)
print(probabilities.topk(5))
```

`parameternet predict photo.jpg --model {spoken}` prints the names of the classes, which are in `config.json`.
""",
    "Feature Map Extraction": """\
With `images` from above:

```python
backbone = timm.create_model("{reference}", pretrained=True, features_only=True).eval()
for features, reduction in zip(backbone(images), backbone.feature_info.reduction()):
    print(features.shape, reduction)  # (1, channels, {size} / reduction, {size} / reduction)
```
""",
    "Image Embeddings": """\
```python
encoder = timm.create_model("{reference}", pretrained=True, num_classes=0).eval()
embedding = encoder(images)  # one vector for each image
print(embedding.shape)
```
""",
}
_TORCH_HUB = """\
From a checkout of the repository, without installing it:

```python
import torch

model = torch.hub.load(
    "path/to/parameternet", "{architecture}", source="local", pretrained=True, pretrained_cfg="{tag}"
)
```
"""

_YOLO = """\
As the backbone of a detector, with the package `ultralytics` (both it and `parameternet.yolo` are under AGPL-3.0):

```python
from pathlib import Path

import parameternet.yolo  # teaches Ultralytics the network
from ultralytics import YOLO

Path("detector.yaml").write_text(\"\"\"
nc: 80
backbone:
  - [-1, 1, TimmBackbone, [{reference}, {{pretrained: True}}]]
  - [0, 1, TimmStage, [8]]
  - [0, 1, TimmStage, [16]]
  - [0, 1, TimmStage, [32]]
head:
  - [[1, 2, 3], 1, Detect, [nc]]
\"\"\")
detector = YOLO("detector.yaml")  # its head is untrained: detector.train(data="coco8.yaml")
```
"""

# `<name>.md` and `<name>.png` in a checkpoint's folder, both from benchmarks/compare.py, and their heading
COMPARISONS = {"claim": "What experts are worth", "transfer": "Transfer"}

_TERMS = {
    "ImageNet-1k": "The pictures of ImageNet are for non-commercial research and education only by its terms of "
    "access; use weights trained on them accordingly.",
}


def write_card(source: str | Path, reference: str | None = None) -> str:
    """The card of a checkpoint in Markdown, under a header that the Hub reads.

    Args:
        source: As for `parameternet.models.loading.parse_source`. A folder is described with what there is of
            recipe.yaml and history.csv in it.
        reference: What its examples load the checkpoint by, in timm's form: `hf-hub:ORG/NAME`. None: its name, where
            the registry knows it, or else its folder.

    Raises:
        WeightsNotFound, WeightsDamaged: no such checkpoint, or its config or weights are not as they should be.
    """
    name, config, folder = describe(source)
    recipe, history = _recipe(folder), _history(folder)
    before = _recipe(folder, "init_"), _history(folder, "init_")
    reference = reference or _reference(source, name)
    results = _results(config)
    table = _table(config, results, _weights_file(source))
    words = _words(name, config, results, recipe) | {
        "results": "\n".join(f"| {key} | {value} |" for key, value in table.items()),
        "usage": _usage(name, config, reference),
        "training": _training(recipe, history, *before) if recipe and history else _origin(config),
        "comparisons": "".join(_comparison(folder, name) for name in COMPARISONS),
    }
    header = _header(name, config, results, recipe)
    return printable_lines(str(ModelCard(f"---\n{header.to_yaml()}\n---\n{_CARD.format_map(words)}")))


def describe(source: str | Path) -> tuple[str, dict[str, Any], Path | None]:
    """(name, config, folder) of a checkpoint; no folder if it is none that holds one checkpoint alone.

    Raises:
        WeightsNotFound, WeightsDamaged: as `write_card`.
    """
    found = loading.parse_source(source)
    loading.refuse_dense(found)
    if found.kind == "architecture":
        raise weights.UnknownWeights(weights.unknown(found.name, catalogue.checkpoints()))
    config = public_config(loading.read_config(found))
    cfg, architecture = config["pretrained_cfg"], config["architecture"]
    config = {"num_classes": cfg.get("num_classes", 1000), **config}
    if found.kind == "checkpoint":
        return found.name, config, weights.find(found.name).parent if found.name in weights.known() else None
    says_little = not cfg.get("tag") or architecture == "dynamic_timm"  # which may be any network
    tagged = f"{architecture}.{cfg.get('tag')}"
    if found.kind == "hub":
        return found.name.partition("@")[0].rpartition("/")[2] if says_little else tagged, config, None
    folder = found.path.parent if found.path.name in (weights.FILE_NAME, loading.BEST) else None
    name = found.path.resolve().parent.name if folder else found.path.stem
    return name if says_little else tagged, config, folder


def _reference(source: str | Path, name: str) -> str:
    """What examples load a checkpoint by."""
    found = loading.parse_source(source)
    if found.kind == "hub":
        return f"hf-hub:{found.name}"
    return name if is_model_pretrained(name) else f"local-dir:{name}"


def _weights_file(source: str | Path) -> Path | None:
    """The weights file of a checkpoint that has one on this machine."""
    found = loading.parse_source(source)
    return weights.local(found.name) if found.name in weights.known() else found.path


def _recipe(folder: Path | None, prefix: str = "") -> dict[str, Any]:
    path = folder and folder / f"{prefix}recipe.yaml"
    return without_local_paths(yaml.safe_load(path.read_text("utf-8"))) if path and path.is_file() else {}


def _history(folder: Path | None, prefix: str = "") -> list[dict[str, str]]:
    path = folder and folder / f"{prefix}history.csv"
    return list(csv.DictReader(path.read_text("utf-8").splitlines())) if path and path.is_file() else []


def _results(config: dict[str, Any]) -> dict[str, Any]:
    """The recorded figures; parameters and multiply-adds are counted where they are missing."""
    results = dict(config.get("results") or {})
    if not {"parameters", "macs"} <= results.keys():
        network = timm.create_model(config["architecture"], **model_arguments(config))
        results["parameters"] = sum(p.numel() for p in network.parameters())
        results["macs"] = count_flops(network, _data_config(config)["input_size"]).total
    return results


def _data_config(config: dict[str, Any]) -> dict[str, Any]:
    return resolve_data_config(pretrained_cfg=config["pretrained_cfg"], use_test_size=True)


# The header ----------------------------------------------------------------------------------------------------------


def _header(name: str, config: dict[str, Any], results: dict[str, Any], recipe: dict[str, Any]) -> ModelCardData:
    data, figures = results.get("data"), _figures(config, results)
    return ModelCardData(
        library_name="timm",
        pipeline_tag="image-classification",
        license=_license(config, recipe),
        base_model=_dense_repository(config),
        datasets=[_identifier(data)] if data else None,
        tags=["image-classification", "timm", "parameternet", "dynamic-convolution"],
        model_name=name if figures else None,
        eval_results=figures or None,
    )


def _license(config: dict[str, Any], recipe: dict[str, Any]) -> str | None:
    return recipe.get("license") or config["pretrained_cfg"].get("license")


def _identifier(data: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", data.lower()).strip("-")


def _figures(config: dict[str, Any], results: dict[str, Any]) -> list[EvalResult]:
    data, dense = results.get("data"), _dense_repository(config)
    if not data:
        return []
    return [
        EvalResult(
            task_type="image-classification",
            task_name="Image Classification",
            dataset_type=_identifier(data),
            dataset_name=data,
            dataset_split="validation",
            metric_type="accuracy",
            metric_name=f"{title} accuracy (%)",
            metric_value=results[key],
            source_name=dense,
            source_url=f"https://huggingface.co/{dense}" if dense else None,
        )
        for key, title in (("top1", "Top-1"), ("top5", "Top-5"))
        if results.get(key) is not None
    ]


# The text ------------------------------------------------------------------------------------------------------------


def _words(name: str, config: dict[str, Any], results: dict[str, Any], recipe: dict[str, Any]) -> dict[str, Any]:
    data, dense, license_ = results.get("data"), _dense(config), _license(config, recipe)
    terms = recipe.get("data_terms") or _TERMS.get(data)
    own_choice = "It was measured on one validation set, on which its best epoch was chosen too. "
    if recipe.get("teacher"):
        own_choice += "Its teacher was trained on data of its own, which may hold these validation images. "
    return {
        "name": name,
        "architecture": config["architecture"],
        "classes": config["num_classes"],
        "size": _data_config(config)["input_size"][-1],
        "intro": _intro(config, data, dense),
        "details": f"- **Licence of the weights:** {license_}\n" if license_ else "",
        "measured": _measured(name, results, dense),
        "routing": _routing(name, results.get("routing")),
        "validation": own_choice if recipe else "",
        "paper": _paper(config, data),
        "terms": f"\n## Data\n\n{terms}\n" if terms else "",
    }


def _dense(config: dict[str, Any]) -> str | None:
    """The dense checkpoint that an upcycled one was made of, with a link where there is one."""
    repository = _dense_repository(config)
    return f"[{repository}](https://huggingface.co/{repository})" if repository else config.get("upcycled_from")


def _dense_repository(config: dict[str, Any]) -> str | None:
    """Its repository on the Hub; None if it is a file of somebody's, or the checkpoint is no upcycled one."""
    source = (config.get("upcycled_from") or "").removeprefix("hf-hub:").partition("@")[0]
    if source.count("/") == 1:
        return source
    return timm.get_pretrained_cfg(source).hf_hub_id if timm.is_model(source.partition(".")[0]) else None


def _intro(config: dict[str, Any], data: str | None, dense: str | None) -> str:
    classes = f"for {config['num_classes']} classes" + (f" of {data}" if data else "")
    if dense is None:
        use = " Good as a start for fine-tuning, and for trying things out." if data else ""
        return f"`{config['architecture']}` {classes}.{use}"
    return (
        f"{dense}, {classes}, upcycled: dynamic convolutions stand where the dense ones stood, and compute the same "
        "function. A start for further training, which is what makes the experts differ."
    )


def _measured(name: str, results: dict[str, Any], dense: str | None) -> str:
    exact = (
        "upcycling is exact: what an untrained router mixes from the experts is the dense kernel, so both networks "
        "compute the same function. After further training they hold no more."
    )
    if dense and "top1" in results:
        return f"Top-1 and top-5 are the dense model's, {dense}, as timm publishes them. They hold here because {exact}"
    if dense:
        return f"The dense model's figures hold here, {dense}, because {exact}"
    if "top1" in results:
        return f"The figures are of this file, measured by `parameternet val {name} --data VAL` when it was released."
    return "Its accuracy has not been measured."


def _routing(name: str, found: dict[str, Any] | None) -> str:
    if not found:
        return ""
    return (
        f"\n### Experts\n\nOver {found['images']:,} validation images, a layer uses {found['experts_in_use']:.2f} of "
        f"{found['num_experts']} experts (the effective number, mean of {found['layers']} layers). The choice depends "
        f"most on the image in `{found['chooses_most']}`, where one image's kernel is mixed of "
        f"{found['experts_in_use_by_an_image']:.2f} experts.\n\n"
        "![Shares of the experts by layer and class](routing.png)\n\n"
        f"Drawn by `parameternet routing {name} VAL`.\n"
    )


def _comparison(folder: Path | None, name: str) -> str:
    path = folder and folder / f"{name}.md"
    if not path or not path.is_file():
        return ""
    heading = COMPARISONS[name]
    return f"\n### {heading}\n\n{path.read_text('utf-8').strip()}\n\n![{heading}]({name}.png)\n"


def _paper(config: dict[str, Any], data: str | None) -> str:
    """What a network of the paper's architecture is not."""
    if not data or data.startswith("ImageNet") or not config["architecture"].startswith("parameternet_"):
        return ""
    theirs = "The paper's accuracies are those of networks trained on ImageNet-1K and -22K"
    return f"{theirs}; this one was trained on {data}. "


def _table(config: dict[str, Any], results: dict[str, Any], file: Path | None) -> dict[str, str]:
    data = _data_config(config)
    spread = f" ± {results['top1_interval']:.2f} (95 %)" if "top1_interval" in results else ""
    bad = f"; {results['unreadable']} could not be read" if results.get("unreadable") else ""
    rows = {
        "top-1": f"{results['top1']:.2f} %{spread}" if "top1" in results else None,
        "top-5": f"{results['top5']:.2f} %" if "top5" in results else None,
        "measured on": f"{results['images']:,} validation images, each once{bad}" if "images" in results else None,
        "input": f"{data['input_size'][-1]} px, {data['interpolation']}, crop {data['crop_pct']:g}",
        "parameters": f"{results['parameters']:,}",
        "FLOPs (multiply-adds)": f"{results['macs'] / 1e6:.1f} M an image",
        "file": _file(file) if file else None,
    }
    return {key: value for key, value in rows.items() if value}


def _file(path: Path) -> str | None:
    from safetensors import safe_open

    if not path.is_file():
        return None
    names = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
    with safe_open(path, "pt") as file:
        kinds = {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118  it is no mapping
    return f"{path.stat().st_size / 1e6:.1f} MB, {' and '.join(names[kind] for kind in names if kind in kinds)}"


def _usage(name: str, config: dict[str, Any], reference: str) -> str:
    sections = dict(_USAGE)
    if reference == name:  # these two take names alone
        sections |= {"torch.hub": _TORCH_HUB, "YOLO": _YOLO}
    words = {
        "reference": reference,
        "spoken": reference.removeprefix("local-dir:"),
        "size": _data_config(config)["input_size"][-1],
        "architecture": config["architecture"],
        "tag": name.partition(".")[2],
    }
    return "\n".join(f"### {heading}\n\n{text.format_map(words)}" for heading, text in sections.items())


def _origin(config: dict[str, Any]) -> str:
    dense = _dense(config)
    if dense:
        return f"None of its own: the weights are those of {dense}, whose card tells of theirs."
    return "No recipe stands beside these weights."


def _training(r: dict[str, Any], rows: list[dict[str, str]], before: dict[str, Any], old: list[dict[str, str]]) -> str:
    """A run, and the one that it started from, if that is known."""
    again = (
        "`recipe.yaml` is the whole recipe, `history.csv` and `curves.png` show the run. Again:\n"
        "`parameternet train recipe.yaml --set train=TRAIN --set val=VAL`."
    )
    if not (before and old):
        return f"{_run(r, rows)}\n\n{again}"
    if before["model_kwargs"].get("dynamic") is False:
        first = "its static twin, with one kernel in each convolution"
        then = "whose experts started as parts of those kernels, with the same function"
    else:
        first, then = f"`{before['model']}`", "from those weights"
    heading = f"First {first} (`init_recipe.yaml`, `init_history.csv`):"
    return "\n\n".join((heading, _run(before, old), f"Then this network, {then}:", _run(r, rows), again))


def _run(r: dict[str, Any], rows: list[dict[str, str]]) -> str:
    hours = sum(float(row["seconds"]) for row in rows) / 3600
    epochs = "1 epoch" if r["epochs"] == 1 else f"{r['epochs']} epochs"
    if len(rows) < r["epochs"]:
        epochs = f"the first {len(rows)} of {epochs}"
    start = f"from {r['init']}" if r.get("init") else "from random weights"
    rate = f"{r['opt']}, learning rate {r['lr']:g} ({r['sched']}, {r['warmup_epochs']:g} epochs of warm-up)"
    parts = [
        f"{epochs} ({int(rows[-1]['updates']):,} updates) {start} in {hours:.1f} hours",
        f"{rate}, weight decay {r['weight_decay']:g}, {r['batch_size'] * r['accumulate']} images an update",
        f"images of {_sizes(r)} px; {_augmentation(r)}",
    ]
    if r.get("teacher"):
        size = f" at {r['teacher_size']} px" if r["teacher_size"] else ""
        teacher = f"`{r['teacher']}`, asked once for each whole image{size}"
        parts.append(f"taught to {r['teacher_share']:.0%} what {teacher}, answered, and the labels otherwise")
    if r.get("amp"):
        parts.append(f"mixed precision, {r['amp']}")
    if r.get("ema_decay"):
        parts.append(f"the weights are an average over updates (decay {r['ema_decay']:g})")
    return "\n".join(f"- {part}" for part in parts)


def _sizes(r: dict[str, Any]) -> str:
    return ", then ".join(str(size) for size in [*(s["input_size"] for s in r["resolution_schedule"]), r["input_size"]])


def _augmentation(r: dict[str, Any]) -> str:
    if r["no_aug"]:
        return "no augmentation"
    strengths = {
        "colour jitter": r["color_jitter"],
        "": r["auto_augment"],
        "erasing": r["reprob"],
        "mixup": r["mixup"],
        "cutmix": r["cutmix"],
        "label smoothing": r["smoothing"],
    }
    used = [f"crops of {r['scale'][0]:g} to {r['scale'][1]:g} of the area", "flips" if r["hflip"] else ""]
    used += [f"{word} {value}" for word, value in strengths.items() if value]
    return ", ".join(filter(None, used))
