"""The card of a checkpoint: its figures, how it came about, what it is not for."""

from __future__ import annotations

from typing import Any

from parameternet.training.recipe import Recipe

_CARD = """\
---
library_name: timm
pipeline_tag: image-classification
license: {license}
tags: [image-classification, timm, parameternet, dynamic-convolution]
---
# {name}

`{architecture}` for {classes} classes{of_data}.

| | |
| --- | --- |
| top-1 | {top1:.2f} % ± {interval:.2f} (95 %) |
| top-5 | {top5:.2f} % |
| measured on | {images:,} validation images, each once{unreadable} |
| input | {size} px, {interpolation}, crop {crop_pct:g} |
| parameters | {parameters:,} |{macs}
| file | {megabytes:.1f} MB, float16; batch statistics in float32 |

The figures are of this very file, measured by `parameternet val {name} --data VAL` when it was released.

## Use

```python
import timm
import parameternet  # registers the networks with timm

model = timm.create_model("{name}", pretrained=True).eval()
```

or `parameternet predict PHOTO --model {name}`. Sizes, means and class names are in `config.json`.

## Training

{training}

`recipe.yaml` is the whole recipe, `history.csv` and `curves.png` show the run. Again:
`parameternet train recipe.yaml --set train=TRAIN --set val=VAL`.

## Limits

It knows {classes} classes and answers every picture with one of them. Photographs unlike those it was trained on (other
subjects, drawings, other sizes than {size} px) get answers that mean little, and its probabilities were not calibrated.
It was measured on one validation set, on which its best epoch was chosen too. Not for decisions about people.
{terms}"""


def write_card(
    name: str, recipe: Recipe, config: dict[str, Any], found: dict[str, Any], rows: list[dict[str, str]], size: int
) -> str:
    """A checkpoint's card in Markdown.

    Args:
        name: `<architecture>.<tag>`.
        recipe: of the run.
        config: timm's Hub config of the checkpoint.
        found: what `validate` found on the file.
        rows: lines of history.csv.
        size: of the file, bytes.
    """
    unreadable = f"; {len(found['unreadable'])} could not be read" if found["unreadable"] else ""
    return _CARD.format(
        name=name,
        license=recipe.license,
        architecture=config["architecture"],
        classes=config["num_classes"],
        of_data=f" of {recipe.data_name}" if recipe.data_name else "",
        top1=found["top1"],
        top5=found["top5"],
        interval=found["top1_interval"],
        images=found["images"],
        unreadable=unreadable,
        size=found["input_size"][-1],
        interpolation=found["interpolation"],
        crop_pct=found["crop_pct"],
        parameters=found["parameters"],
        macs=_macs(found),
        megabytes=size / 1e6,
        training=_training(recipe, rows),
        terms=f"\n## Data\n\n{recipe.data_terms}\n" if recipe.data_terms else "",
    )


def _macs(found: dict[str, Any]) -> str:
    macs = found.get("macs")
    return f"\n| multiply-adds | {macs / 1e6:.1f} M an image |" if macs else ""


def _training(r: Recipe, rows: list[dict[str, str]]) -> str:
    hours = sum(float(row["seconds"]) for row in rows) / 3600
    start = f"from {r.init}" if r.init else "from random weights"
    rate = f"{r.opt}, learning rate {r.lr:g} ({r.sched}, {r.warmup_epochs:g} epochs of warm-up)"
    parts = [
        f"{len(rows)} epochs ({int(rows[-1]['updates']):,} updates) {start} in {hours:.1f} hours",
        f"{rate}, weight decay {r.weight_decay:g}, {r.batch_size * r.accumulate} images an update",
        f"images of {_sizes(r)} px; {_augmentation(r)}",
    ]
    if r.ema_decay:
        parts.append(f"the weights are an average over updates (decay {r.ema_decay:g})")
    return "\n".join(f"- {part}" for part in parts)


def _sizes(r: Recipe) -> str:
    return ", then ".join(str(size) for size in [*(s["input_size"] for s in r.resolution_schedule), r.input_size])


def _augmentation(r: Recipe) -> str:
    if r.no_aug:
        return "no augmentation"
    used = [f"crops of {r.scale[0]:g} to {r.scale[1]:g} of the area", "flips" if r.hflip else ""]
    used += [f"{word} {value}" for word, value in _strengths(r) if value]
    return ", ".join(filter(None, used))


def _strengths(r: Recipe) -> list[tuple[str, Any]]:
    return [
        ("colour jitter", r.color_jitter),
        ("", r.auto_augment),
        ("erasing", r.reprob),
        ("mixup", r.mixup),
        ("cutmix", r.cutmix),
        ("label smoothing", r.smoothing),
    ]
