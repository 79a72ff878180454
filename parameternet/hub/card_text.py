"""The wording of a checkpoint's card: Markdown under a header that the Hub reads."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from parameternet.hub.card_data import CardData, Comparison, Dense, Run, gather
from parameternet.text import printable_lines
from parameternet.training.recipe import Recipe

__all__ = ["render", "write_card"]

_CARD = """\
# {card.name}

{intro}

## Model Details

- **Task:** image classification among {card.num_classes} classes; feature maps and embeddings
- **Network:** `{card.architecture}`, whose convolutions mix their kernels per image, after
  [ParameterNet](https://arxiv.org/abs/2306.14525)
- **Software:** timm, and the package `parameternet`, which registers the network and verifies every file it loads
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

The network assigns every image to one of its {card.num_classes} classes. Predictions for images unlike its training
data (other subjects, drawings, other sizes than {card.usage.size} px) mean little, and its probabilities are not
calibrated. {validation}{paper}Not for decisions about people.
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

# heading -> text; a test runs every block of Python in this order
_USAGE = {
    "Image Classification": """\
```python
import timm
import torch
from PIL import Image

import parameternet  # registers the networks with timm

model = timm.create_model("{usage.reference}", pretrained=True).eval()
config = timm.data.resolve_model_data_config(model, use_test_size=True)
transform = timm.data.create_transform(**config, is_training=False)
images = transform(Image.open("photo.jpg").convert("RGB"))[None]  # (1, 3, {usage.size}, {usage.size})

with torch.inference_mode():
    probabilities = model(images).softmax(-1)
print(probabilities.topk(5))
```

`parameternet predict photo.jpg --model {spoken}` prints the names of the classes, which are in `config.json`.
""",
    "Feature Map Extraction": """\
With `images` from above:

```python
backbone = timm.create_model("{usage.reference}", pretrained=True, features_only=True).eval()
for features, reduction in zip(backbone(images), backbone.feature_info.reduction()):
    print(features.shape, reduction)  # (1, channels, {usage.size} / reduction, {usage.size} / reduction)
```
""",
    "Image Embeddings": """\
```python
encoder = timm.create_model("{usage.reference}", pretrained=True, num_classes=0).eval()
embedding = encoder(images)  # one vector per image
print(embedding.shape)
```
""",
}
_TRANSFORMERS = """\
The folder loads in transformers as well, which reads the weights without verifying their digest:

```python
from transformers import pipeline

import parameternet  # registers the network with timm, from which transformers takes it

classify = pipeline("image-classification", model="{folder}"{revision})
print(classify("photo.jpg"))
```

`AutoModelForImageClassification.from_pretrained` takes the same, for `Trainer`.
"""
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

import parameternet.yolo  # registers the network with Ultralytics
from ultralytics import YOLO

Path("detector.yaml").write_text(\"\"\"
nc: 80
backbone:
  - [-1, 1, TimmBackbone, [{usage.reference}, {{pretrained: True}}]]
  - [0, 1, TimmStage, [8]]
  - [0, 1, TimmStage, [16]]
  - [0, 1, TimmStage, [32]]
head:
  - [[1, 2, 3], 1, Detect, [nc]]
\"\"\")
detector = YOLO("detector.yaml")  # the head is untrained: detector.train(data="coco8.yaml")
```
"""

_TERMS = {
    "ImageNet-1k": "ImageNet's terms of access allow non-commercial research and education only; use weights trained "
    "on its images accordingly.",
}


def write_card(source: str | Path, reference: str | None = None) -> str:
    """Write the card of a checkpoint.

    Args:
        source, reference: As for `parameternet.hub.card_data.gather`.

    Raises:
        WeightsNotFound, WeightsDamaged: no such checkpoint, or its config or weights are not as they should be.
    """
    return render(gather(source, reference))


def render(card: CardData) -> str:
    """The Markdown of a card, under its header."""
    text = _CARD.format(
        card=card,
        intro=_intro(card),
        details=_licence(card),
        results="\n".join(f"| {key} | {value} |" for key, value in _table(card).items()),
        measured=_measured(card),
        routing=_routing(card),
        comparisons="".join(map(_comparison, card.comparisons)),
        usage=_usage(card),
        training=_training(card),
        validation=_validation(card.recipe),
        paper=_paper(card),
        terms=_terms(card),
    )
    return printable_lines(str(ModelCard(f"---\n{_header(card).to_yaml()}\n---\n{text}")))


def _licence(card: CardData) -> str:
    if not card.license:
        return ""
    terms = ", and the terms of the training data (see Data)" if _terms(card) else ""
    return f"- **Licence of the weights:** {card.license}{terms}\n"


# The header ----------------------------------------------------------------------------------------------------------


def _header(card: CardData) -> ModelCardData:
    data, figures = card.results.data, _figures(card)
    return ModelCardData(
        library_name="timm",
        pipeline_tag="image-classification",
        **_header_licence(card),
        base_model=card.dense and card.dense.repository,
        datasets=[_identifier(data)] if data else None,
        tags=["image-classification", "timm", "parameternet", "dynamic-convolution"],
        model_name=card.name if figures else None,
        eval_results=figures or None,
    )


def _header_licence(card: CardData) -> dict[str, str | None]:
    """The Hub knows 'other' as the licence of what has further terms."""
    if card.license and _terms(card):
        return {"license": "other", "license_name": f"{card.license}-and-terms-of-the-data"}
    return {"license": card.license}


def _identifier(data: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", data.lower()).strip("-")


def _figures(card: CardData) -> list[EvalResult]:
    results, repository = card.results, card.dense and card.dense.repository
    if not results.data:
        return []
    return [
        EvalResult(
            task_type="image-classification",
            task_name="Image Classification",
            dataset_type=_identifier(results.data),
            dataset_name=results.data,
            dataset_split="validation",
            metric_type="accuracy",
            metric_name=f"{title} accuracy (%)",
            metric_value=value,
            source_name=repository,
            source_url=f"https://huggingface.co/{repository}" if repository else None,
        )
        for value, title in ((results.top1, "Top-1"), (results.top5, "Top-5"))
        if value is not None
    ]


# Results -------------------------------------------------------------------------------------------------------------


def _intro(card: CardData) -> str:
    data = card.results.data
    classes = f"for {card.num_classes} classes" + (f" of {data}" if data else "")
    if card.dense is None:
        use = " A start for fine-tuning and for experiments." if data else ""
        return f"`{card.architecture}` {classes}.{use}"
    return (
        f"{_link(card.dense)}, {classes}, upcycled: dynamic convolutions replace the dense ones and compute the same "
        "function. A start for further training, in which the experts become different."
    )


def _link(dense: Dense) -> str:
    return f"[{dense.repository}](https://huggingface.co/{dense.repository})" if dense.repository else dense.name


def _table(card: CardData) -> dict[str, str]:
    results, usage = card.results, card.usage
    spread = "" if results.top1_interval is None else f" ± {results.top1_interval:.2f} (95 %)"
    bad = f"; {results.unreadable} could not be read" if results.unreadable else ""
    rows = {
        "top-1": None if results.top1 is None else f"{results.top1:.2f} %{spread}",
        "top-5": None if results.top5 is None else f"{results.top5:.2f} %",
        "measured on": None if results.images is None else f"{results.images:,} validation images, each once{bad}",
        "input": f"{usage.size} px, {usage.interpolation}, crop {usage.crop_pct:g}",
        "parameters": f"{results.parameters:,}",
        "FLOPs (multiply-adds)": f"{results.macs / 1e6:.1f} M an image",
        "file": card.file and f"{card.file.bytes / 1e6:.1f} MB, {' and '.join(card.file.dtypes)}",
    }
    return {key: value for key, value in rows.items() if value}


def _measured(card: CardData) -> str:
    top1 = card.results.top1
    exact = (
        "upcycling is exact: the untrained router mixes the experts to the dense kernel, so both networks compute the "
        "same function. After further training they no longer hold."
    )
    if card.dense and top1 is not None:
        dense = _link(card.dense)
        return f"Top-1 and top-5 are the dense model's, {dense}, as timm publishes them. They hold here because {exact}"
    if card.dense:
        return f"The dense model's figures hold here, {_link(card.dense)}, because {exact}"
    if top1 is not None:
        return f"`parameternet val {card.name} --data VAL` measured these figures on the released file."
    return "Its accuracy has not been measured."


def _routing(card: CardData) -> str:
    found = card.results.routing
    if not found:
        return ""
    return (
        f"\n### Experts\n\nAveraged over {found['images']:,} validation images, a layer uses "
        f"{found['experts_in_use']:.2f} of {found['num_experts']} experts (effective number, mean of {found['layers']} "
        f"layers). A single image uses {found['experts_in_use_by_an_image']:.2f} in the layer that chooses most, "
        f"`{found['chooses_most']}`; {found['num_experts']} would mean the same mix for every image.\n\n"
        "![Routing weights by layer and class](routing.png)\n\n"
        f"Plotted by `parameternet routing {card.name} VAL`.\n" + _ablation(card)
    )


def _ablation(card: CardData) -> str:
    """Top-1 without the choice of experts, without the gain per image, and without both."""
    found = card.results.ablation
    if not found:
        return ""
    rows = "\n".join(f"| {_ABLATED[name]} | {found[name]:.2f} |" for name in _ABLATED if name in found)
    return (
        "\nTop-1 with the routing weights of every layer replaced, measured by "
        f"`parameternet routing {card.name} VAL --ablate`:\n\n| routing weights | top-1 |\n| --- | --- |\n{rows}\n"
    )


_ABLATED = {
    "own": "the image's own",
    "mean shares": "average choice among experts, the image's own scale",
    "mean sum": "the image's own choice, average scale",
    "mean weights": "average of both: a static network",
}


def _comparison(comparison: Comparison) -> str:
    heading = comparison.heading
    return f"\n### {heading}\n\n{comparison.text}\n\n![{heading}]({comparison.image})\n"


def _usage(card: CardData) -> str:
    sections = dict(_USAGE)
    if card.usage.transformers:
        sections["transformers"] = _TRANSFORMERS
    if card.usage.by_name:  # these two take registered names only
        sections |= {"torch.hub": _TORCH_HUB, "YOLO": _YOLO}
    folder, revision = card.usage.transformers or ("", None)
    words = {
        "usage": card.usage,
        "folder": folder,
        "revision": f', revision="{revision}"' if revision else "",
        "spoken": card.usage.reference.removeprefix("local-dir:"),
        "architecture": card.architecture,
        "tag": card.name.partition(".")[2],
    }
    return "\n".join(f"### {heading}\n\n{text.format_map(words)}" for heading, text in sections.items())


# Training ------------------------------------------------------------------------------------------------------------


def _training(card: CardData) -> str:
    if not card.runs:
        return _origin(card.dense)
    again = (
        "`recipe.yaml` has every setting of this run; `history.csv` and `curves.png` show it. To repeat it:\n"
        "`parameternet train recipe.yaml --set train=TRAIN --set val=VAL --set class_names=NAMES`.\n"
        "A run that starts from another one (`init`) needs that one first, or `--set init=...`."
    )
    if len(card.runs) == 1:
        return f"{_run(card.runs[0])}\n\n{again}"
    before, own = card.runs
    if before.recipe.model_kwargs.get("dynamic") is False:
        first = "its static baseline, with one kernel per convolution"
        then = "whose experts started as parts of those kernels, with the same function"
    else:
        first, then = f"`{before.recipe.model}`", "from those weights"
    order = "The run before, of" if before.recipe.init else "First"
    heading = f"{order} {first} (`init_recipe.yaml`, `init_history.csv`):"
    return "\n\n".join((heading, _run(before), f"Then this network, {then}:", _run(own), again))


def _origin(dense: Dense | None) -> str:
    if dense:
        return f"None: the weights are those of {_link(dense)}; see its card."
    return "The recipe is not known."


def _run(run: Run) -> str:
    r = run.recipe
    epochs = "1 epoch" if r.epochs == 1 else f"{r.epochs} epochs"
    if run.epochs < r.epochs:
        epochs = f"the first {run.epochs} of {epochs}"
    start = f"from {r.init}" if r.init else "from random weights"
    rate = f"{r.opt}, learning rate {r.lr:g} ({r.sched}, warmup of {r.warmup_epochs:g} epochs)"
    parts = [
        f"{epochs} ({run.updates:,} updates) {start} in {run.hours:.1f} hours",
        f"{rate}, weight decay {r.weight_decay:g}, batch size {r.batch_size * r.accumulate}",
        f"images of {_sizes(r)} px; {_augmentation(r)}",
    ]
    if r.teacher:
        size = f" at {r.teacher_size} px" if r.teacher_size else ""
        parts.append(
            f"distillation: the targets are {r.teacher_share:.0%} the probabilities of `{r.teacher}`, computed once "
            f"per whole image{size}, and {1 - r.teacher_share:.0%} the labels"
        )
    if r.amp:
        parts.append(f"mixed precision, {r.amp}")
    if r.ema_decay:
        parts.append(f"EMA of the weights, decay {r.ema_decay:g}")
    return "\n".join(f"- {part}" for part in parts)


def _sizes(r: Recipe) -> str:
    return ", then ".join(str(size) for size in [*(s["input_size"] for s in r.resolution_schedule), r.input_size])


def _augmentation(r: Recipe) -> str:
    if r.no_aug:
        return "no augmentation"
    strengths = {
        "color jitter": r.color_jitter,
        "": r.auto_augment,
        "erasing": r.reprob,
        "mixup": r.mixup,
        "cutmix": r.cutmix,
        "label smoothing": r.smoothing,
    }
    used = [f"crops of {r.scale[0]:g} to {r.scale[1]:g} of the area", "flips" if r.hflip else ""]
    used += [f"{word} {value}" for word, value in strengths.items() if value]
    return ", ".join(filter(None, used))


# Limits --------------------------------------------------------------------------------------------------------------


def _validation(recipe: Recipe | None) -> str:
    if recipe is None:
        return ""
    words = "It was measured on one validation set, which also selected its best epoch. "
    if recipe.teacher:
        words += "Its teacher was trained on other data, which may hold these validation images. "
    return words


def _paper(card: CardData) -> str:
    """The difference from the paper's networks of the same architecture."""
    data = card.results.data
    if not data or data.startswith("ImageNet") or not card.architecture.startswith("parameternet_"):
        return ""
    theirs = "The paper's accuracies are those of networks trained on ImageNet-1K and -22K"
    return f"{theirs}; this one was trained on {data}. "


def _terms(card: CardData) -> str:
    terms = card.data_terms or _TERMS.get(card.results.data or "")
    return f"\n## Data\n\n{terms}\n" if terms else ""
