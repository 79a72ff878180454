"""From a recipe to a network, its optimiser, schedule and loss: all of timm's making."""

from __future__ import annotations

import fnmatch
import sys
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn

from parameternet.surgery import upcycle_state_dict
from parameternet.training.checkpoint import read_weights
from parameternet.training.errors import CheckpointError, RecipeError, nearest
from parameternet.training.randomness import INIT, mix, seed_all
from parameternet.training.recipe import Recipe


def make_model(r: Recipe, num_classes: int) -> nn.Module:
    """The recipe's network with `num_classes` outputs, weights from its seed or from `init`.

    Raises:
        RecipeError: timm does not know the name, or the network not one of its arguments.
        CheckpointError: `init` does not fit.
    """
    if not timm.is_model(r.model):
        raise RecipeError(f"unknown model {r.model!r}{nearest(r.model.split('.')[0], timm.list_models())}")
    seed_all(mix(INIT, r.seed))
    arguments = dict(num_classes=num_classes, drop_rate=r.drop_rate, **r.model_kwargs)
    if r.drop_path_rate:
        arguments["drop_path_rate"] = r.drop_path_rate
    try:
        model = timm.create_model(r.model, pretrained=r.init == "pretrained", **arguments)
    except TypeError as error:
        raise RecipeError(f"{r.model} does not take one of {arguments}: {error}") from error
    if r.init and r.init != "pretrained":
        load_for_finetuning(model, read_weights(r.init), r.init)
    return model


def load_for_finetuning(model: nn.Module, state: dict[str, Tensor], where: str | Path) -> None:
    """Load `state` into `model`; a classifier of another size is left as it was initialised.

    Dense kernels are split among the experts of dynamic layers, which then compute the same (`surgery.upcycle`).

    Raises:
        CheckpointError: tensors other than the classifier's do not fit, with their names.
    """
    prepare = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    state = prepare(dict(state), model) if prepare else dict(state)
    state = upcycle_state_dict(state, model, neutral=True)
    mine, heads = model.state_dict(), _classifier_names(model)
    wrong = [name for name in mine if name in state and state[name].shape != mine[name].shape]
    new_head = any(name.startswith(heads) for name in wrong)
    kept = {name: value for name, value in state.items() if not (new_head and name.startswith(heads))}
    unfit = [n for n in mine if n not in kept or kept[n].shape != mine[n].shape]
    unfit = [n for n in unfit if not (new_head and n.startswith(heads)) and not n.endswith("num_batches_tracked")]
    unknown = [name for name in kept if name not in mine]
    if unfit or unknown:
        raise CheckpointError(
            f"{where} is of another network than this {type(model).__name__}: {len(unfit)} tensors missing or of "
            f"another shape {unfit[:3]}, {len(unknown)} unknown {unknown[:3]}; check model and model_kwargs"
        )
    model.load_state_dict(kept, strict=False)


def _classifier_names(model: nn.Module) -> tuple[str, ...]:
    names = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    return tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names))


def freeze(model: nn.Module, patterns: list[str]) -> list[nn.Module]:
    """Stop training what `patterns` name, and return the modules that must stay in evaluation mode.

    A pattern is the name of a module or parameter, or a shell pattern over such names; it takes what lies below with
    it. Batch norms inside keep their statistics.

    Raises:
        RecipeError: a pattern that names nothing.
    """
    modules = dict(model.named_modules())
    frozen = []
    for pattern in patterns:
        found = [name for name in modules if name and fnmatch.fnmatch(name, pattern)]
        parameters = [p for name, p in model.named_parameters() if fnmatch.fnmatch(name, pattern)]
        if not found and not parameters:
            raise RecipeError(f"freeze: {pattern!r} names no part of the network{nearest(pattern, modules)}")
        frozen += [modules[name] for name in found]
        for parameter in [*parameters, *(p for name in found for p in modules[name].parameters())]:
            parameter.requires_grad_(False)
    return frozen


def make_optimizer(r: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """timm's optimiser of that name; frozen parameters are left out.

    Raises:
        RecipeError: unknown name, wrong arguments, or nothing left to train.
    """
    if not any(p.requires_grad for p in model.parameters()):
        raise RecipeError(f"freeze: {r.freeze} leaves nothing to train")
    try:
        return create_optimizer_v2(
            model,
            opt=r.opt,
            lr=r.lr,
            weight_decay=r.weight_decay,
            momentum=r.momentum,
            layer_decay=r.layer_decay,
            **_tuples(r.opt_kwargs),
        )
    except (ValueError, AssertionError, TypeError) as error:
        raise RecipeError(f"optimiser {r.opt!r}: {error}{nearest(r.opt, list_optimizers())}") from error


def _tuples(arguments: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in arguments.items()}


def make_scheduler(r: Recipe, optimizer: torch.optim.Optimizer, updates_per_epoch: int) -> Any:
    """timm's schedule, in updates. It has no state but the number of updates, which `step_update` is told."""
    try:
        scheduler, _ = create_scheduler_v2(
            optimizer,
            sched=r.sched,
            num_epochs=r.epochs,
            warmup_epochs=r.warmup_epochs,
            warmup_lr=r.warmup_lr,
            min_lr=r.min_lr,
            step_on_epochs=False,
            updates_per_epoch=updates_per_epoch,
            **r.sched_kwargs,
        )
    except (ValueError, TypeError) as error:
        raise RecipeError(f"schedule {r.sched!r}: {error}; {_SCHEDULES}") from error
    if scheduler is None and r.sched != "none":  # older versions of timm pass over a name that they do not know
        raise RecipeError(f"unknown schedule {r.sched!r}; {_SCHEDULES}")
    return scheduler


_SCHEDULES = "timm has cosine, tanh, step, multistep, poly, and none"


def make_mixup(r: Recipe, num_classes: int) -> Mixup | None:
    """timm's mixup and cutmix, or None when the recipe has neither."""
    if not r.mixes:
        return None
    return Mixup(r.mixup, r.cutmix, prob=r.mixup_prob, label_smoothing=r.smoothing, num_classes=num_classes)


def make_loss(r: Recipe) -> nn.Module:
    """timm's loss for the recipe's targets: soft where images are mixed or a teacher speaks, smoothed, or plain."""
    soft = r.mixes or r.teacher is not None
    if r.bce:
        return BinaryCrossEntropy(smoothing=0.0 if soft else r.smoothing)
    if soft:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(r.smoothing) if r.smoothing else nn.CrossEntropyLoss()
