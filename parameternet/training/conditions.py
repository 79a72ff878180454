"""Constraints between the fields of a recipe."""

from __future__ import annotations

from typing import Any

from parameternet.training.errors import RecipeError
from parameternet.training.fields import SIZE


def check_together(r: Any) -> None:
    """Check the constraints between the fields of a `Recipe`.

    Raises:
        RecipeError: a constraint is violated; the message names the fields and their values.
    """
    epochs = f"epochs is {r.epochs}"
    conditions = [  # (condition, message if it is false)
        (r.scale[0] <= r.scale[1], f"scale must be [from, to] with from <= to, got {r.scale}"),
        (r.ratio[0] <= r.ratio[1], f"ratio must be [from, to] with from <= to, got {r.ratio}"),
        (
            r.scale[1] <= 1 or r.crop_mode not in (None, "rrc"),
            f"scale must be at most 1 with crop_mode rrc, which crops a fraction of the area, got {r.scale}",
        ),
        (r.warmup_epochs <= r.epochs, f"warmup_epochs must be at most epochs, got {r.warmup_epochs:g}, and {epochs}"),
        (
            not r.warmup_epochs or r.warmup_lr <= r.lr,
            f"warmup_lr must be at most lr, got {r.warmup_lr:g}, and lr is {r.lr:g}",
        ),
        (r.min_lr <= r.lr, f"min_lr must be at most lr, got {r.min_lr:g}, and lr is {r.lr:g}"),
        (
            r.sched != "none" or not r.warmup_epochs,
            f"sched: none has a constant learning rate and no warmup: set warmup_epochs=0, got {r.warmup_epochs:g}",
        ),
        (
            r.sched != "plateau",
            "sched: plateau is not supported, because it steps once per epoch on a metric; use another schedule",
        ),
        (
            r.mixup_off_epoch <= r.epochs,
            f"mixup_off_epoch must be at most epochs, got {r.mixup_off_epoch}, and {epochs}",
        ),
        (
            not r.teacher or (r.cache == "device" and not r.mixes),
            "teacher needs cache=device, mixup=0 and cutmix=0: it predicts once, on whole images",
        ),
        (
            not r.cuda_graph or (r.accumulate == 1 and r.amp != "float16" and not r.compile),
            "cuda_graph needs accumulate=1, compile=false and amp=bfloat16 or null, got "
            f"accumulate={r.accumulate}, compile={r.compile}, amp={r.amp}",
        ),
        (
            not r.mixes or r.batch_size % 2 == 0,
            f"mixup and cutmix pair images: batch_size must be even, got {r.batch_size}",
        ),
        (
            r.clip_mode != "agc" or r.clip_grad is None or r.clip_grad <= 1,
            f"clip_grad must be at most 1 with clip_mode agc, as a fraction of the weight norm, got {r.clip_grad}",
        ),
    ]
    for holds, sentence in conditions:
        if not holds:
            raise RecipeError(sentence)
    _check_schedule(r.resolution_schedule, r.epochs)


def _check_schedule(stages: list[dict], epochs: int) -> None:
    ends = []
    for stage in stages:
        if set(stage) != {"until_epoch", "input_size"} or any(type(value) is not int for value in stage.values()):
            raise RecipeError(
                f"a stage of resolution_schedule must look like {{until_epoch: 10, input_size: 48}}, got {stage}"
            )
        if not SIZE.holds(stage["input_size"]):
            raise RecipeError(f"resolution_schedule: input_size must be {SIZE.words}, got {stage}")
        ends.append(stage["until_epoch"])
    if ends != sorted(set(ends)) or min(ends, default=1) < 1 or max(ends, default=1) > epochs:
        raise RecipeError(
            f"until_epoch in resolution_schedule must increase and be between 1 and epochs ({epochs}), got {ends}"
        )
