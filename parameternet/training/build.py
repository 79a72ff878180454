"""Build the network, optimizer, schedule and loss of a recipe with timm."""

from __future__ import annotations

import fnmatch
import inspect
import re
from collections.abc import Iterable
from copy import deepcopy
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn

from parameternet import weights
from parameternet.layers import match_routers
from parameternet.models import catalogue, dynamic_timm, loading
from parameternet.models.builder import check_routers, forget_tensors
from parameternet.optim import param_groups
from parameternet.surgery import upcycle_state_dict
from parameternet.training.errors import CheckpointError, RecipeError, missing_model, nearest
from parameternet.training.randomness import INIT, mix, seed_all
from parameternet.training.recipe import Recipe

# Arguments of timm's create_model, and the recipe field that sets each; None: the argument changes the return type.
_OWN_FIELD = {
    "num_classes": "num_classes",
    "drop_rate": "drop_rate",
    "drop_path_rate": "drop_path_rate",
    "model_name": "model",
    "pretrained": "init",
    "checkpoint_path": "init",
    "pretrained_cfg": "init",
    "pretrained_cfg_overlay": "init",
    "cache_dir": "init",
    "pretrained_strict": "init",
    "features_only": None,
    "out_indices": None,
    "feature_cls": None,
}


def make_model(r: Recipe, num_classes: int, *, start: bool = True) -> nn.Module:
    """Build the recipe's network, with weights from `init` or random ones from the seed.

    Args:
        num_classes: outputs of the network.
        start: False when resuming: the checkpoint has the weights, and `init` may no longer exist.

    Raises:
        RecipeError: timm does not have the model, or the network does not accept `model_kwargs`.
        CheckpointError: the weights of `init` do not fit the network.
    """
    if not timm.is_model(r.model):
        raise RecipeError(f"model: unknown model {r.model!r}{nearest(r.model.split('.')[0], timm.list_models())}")
    seed_all(mix(INIT, r.seed))
    _check_model_kwargs(r)
    arguments = dict(num_classes=num_classes, drop_rate=r.drop_rate, **r.model_kwargs)
    if r.drop_path_rate:
        arguments["drop_path_rate"] = r.drop_path_rate
    pretrained = start and r.init == "pretrained"
    if pretrained and not catalogue.is_ours(r.model):  # timm would read unverified files
        with missing_model("init"):
            arguments["pretrained_cfg_overlay"] = {"state_dict": loading.read_tensors(r.model), "source": ""}
    try:
        model = timm.create_model(r.model, pretrained=pretrained, **arguments)
    except (weights.WeightsError, OSError):
        raise
    except Exception as error:  # constructors raise all kinds of errors for unexpected values
        if not r.model_kwargs and not isinstance(error, TypeError):
            raise
        raise RecipeError(_unbuilt(r, error)) from error
    forget_tensors(model, None)
    if start and r.init and r.init != "pretrained":
        with missing_model("init"):
            state = loading.read_tensors(r.init)
        try:
            load_for_finetuning(model, state, r.init)
        except CheckpointError as error:
            raise CheckpointError(f"init: {error}") from error
        try:
            check_routers(model, r.model_kwargs, r.init)
        except ValueError as error:
            raise RecipeError(f"model_kwargs: {error}") from error
    return model


def _check_model_kwargs(r: Recipe) -> None:
    for name, value in r.model_kwargs.items():
        if name in _OWN_FIELD:
            field = _OWN_FIELD[name]
            hint = f"set the field {field} instead" if field else "only classifiers are trained"
            raise RecipeError(f"model_kwargs: {name} is not an argument of the network: {hint}, got {value!r}")
        if name == "in_chans" and value != 3:
            raise RecipeError(f"model_kwargs: in_chans must be 3, got {value!r}: every image is read as RGB")

    empty = [name for name, value in r.model_kwargs.items() if value is None]
    known = _arguments(r.model) if empty else {}
    for name in empty:  # timm drops None, so a misspelt name or an unwanted default would go unnoticed
        if name not in known:
            raise RecipeError(_unknown(r, name, known))
        if known[name] not in (None, inspect.Parameter.empty):
            raise RecipeError(
                f"model_kwargs: {name} is null, which timm replaces with the default {known[name]!r}: set or remove it"
            )


def _unknown(r: Recipe, name: str, known: Iterable[str]) -> str:
    field = name if name == "drop_path_rate" and name not in r.model_kwargs else "model_kwargs"
    return f"{field}: {r.model} has no argument {name!r}{nearest(name, known, n=1)}"


def _unbuilt(r: Recipe, error: Exception) -> str:
    wrong = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    if not wrong:
        return f"model_kwargs: {r.model} cannot be built with {r.model_kwargs}: {type(error).__name__}: {error}"
    return _unknown(r, wrong.group(1), _arguments(r.model))


def _arguments(model: str) -> dict[str, Any]:
    """Return the arguments that a network's class accepts, with their defaults."""
    with torch.device("meta"):
        kind = type(timm.create_model(model))
    own = ("self", "args", "kwargs", *_OWN_FIELD)
    found = [p for base in reversed(kind.__mro__) for p in inspect.signature(base.__init__).parameters.values()]
    experts = dynamic_timm.Experts._field_defaults if model.startswith("dynamic_") else {}
    return {**{p.name: p.default for p in found if p.name not in own}, **experts}


@torch.no_grad()
def check_sizes(r: Recipe, model: nn.Module, num_classes: int, device: torch.device, share: int) -> None:
    """Check that `model` accepts images of every size in the recipe, without changing it.

    Args:
        share: images per step and process.

    Raises:
        RecipeError: the network does not accept images of a size, does not return (B, num_classes), or cannot compute
            batch norm on a single image.
    """
    training = model.training
    sides = {stage["input_size"]: "resolution_schedule" for stage in r.resolution_schedule}
    sides |= {r.test_size: "test_input_size" if r.test_input_size else "input_size", r.input_size: "input_size"}
    model.eval()
    for side, field in sides.items():
        try:
            answer = model(torch.zeros(1, 3, side, side, device=device))
        except Exception as error:
            given = f" with model_kwargs {r.model_kwargs}" if r.model_kwargs else ""
            raise RecipeError(
                f"{field}: {r.model}{given} does not accept images of {side} x {side}: {type(error).__name__}: {error}"
            ) from error
        if getattr(answer, "shape", None) != (1, num_classes):
            raise RecipeError(
                f"model_kwargs: {r.model} with {r.model_kwargs} does not return {num_classes} logits per image"
            )
        if share == 1 and field != "test_input_size":
            _check_one_image(model, torch.zeros(1, 3, side, side, device=device))
    model.train(training)


def _check_one_image(model: nn.Module, image: Tensor) -> None:
    try:
        deepcopy(model).train()(image)
    except ValueError as error:  # batch norm of a 1 x 1 feature map
        raise RecipeError(f"batch_size: one image per process is too few for this network: {error}") from error


def load_for_finetuning(model: nn.Module, state: dict[str, Tensor], where: str | Path) -> None:
    """Load `state` into `model`, except for a classifier of a different size.

    Dense kernels are upcycled, so dynamic layers start with the same outputs as the dense ones (`surgery.upcycle`).

    Raises:
        CheckpointError: tensors other than the classifier's do not fit; the message names them.
    """
    architecture = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    state = upcycle_state_dict(dynamic_timm.filtered(state, model, architecture), model, neutral=True)
    match_routers(model, state)
    mine, heads = model.state_dict(), _classifier_names(model)
    wrong = [name for name in mine if name in state and state[name].shape != mine[name].shape]
    new_head = any(name.startswith(heads) for name in wrong)
    kept = {name: value for name, value in state.items() if not (new_head and name.startswith(heads))}
    unfit = [n for n in mine if n not in kept or kept[n].shape != mine[n].shape]
    unfit = [n for n in unfit if not (new_head and n.startswith(heads)) and not n.endswith("num_batches_tracked")]
    unknown = [name for name in kept if name not in mine]
    if unfit or unknown:
        raise CheckpointError(
            f"{where} does not fit this {type(model).__name__}: {len(unfit)} tensors are missing or differ in shape "
            f"{unfit[:3]}, {len(unknown)} are unknown {unknown[:3]}; check model and model_kwargs"
        )
    model.load_state_dict(kept, strict=False)


def _classifier_names(model: nn.Module) -> tuple[str, ...]:
    names = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    return tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names))


def freeze(model: nn.Module, patterns: list[str]) -> list[nn.Module]:
    """Freeze parts of a network, and return the modules that must stay in evaluation mode.

    Args:
        patterns: names of modules or parameters, or shell-style patterns; submodules are included. Frozen batch norms
            keep their statistics.

    Raises:
        RecipeError: a pattern matches nothing.
    """
    modules = dict(model.named_modules())
    frozen = []
    for pattern in patterns:
        found = [name for name in modules if name and fnmatch.fnmatch(name, pattern)]
        parameters = [p for name, p in model.named_parameters() if fnmatch.fnmatch(name, pattern)]
        if not found and not parameters:
            raise RecipeError(f"freeze: {pattern!r} matches no part of the network{nearest(pattern, modules)}")
        frozen += [modules[name] for name in found]
        for parameter in [*parameters, *(p for name in found for p in modules[name].parameters())]:
            parameter.requires_grad_(False)
    return frozen


def make_optimizer(r: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """Create timm's optimizer for all parameters that are not frozen.

    Raises:
        RecipeError: unknown name, wrong arguments, or every parameter is frozen.
    """
    if not any(p.requires_grad for p in model.parameters()):
        raise RecipeError(f"freeze: {r.freeze} leaves nothing to train")
    try:
        return create_optimizer_v2(
            param_groups(model, r.lr, r.weight_decay, r.layer_decay, r.scale_router_lr),
            opt=r.opt,
            lr=r.lr,
            weight_decay=r.weight_decay,
            momentum=r.momentum,
            **_tuples(r.opt_kwargs),
        )
    except Exception as error:  # optimizers raise all kinds of errors for unexpected arguments
        given = f" with opt_kwargs {r.opt_kwargs}" if r.opt_kwargs else nearest(r.opt, list_optimizers())
        raise RecipeError(f"opt: optimizer {r.opt!r}: {error}{given}") from error


def _tuples(arguments: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in arguments.items()}


def make_scheduler(r: Recipe, optimizer: torch.optim.Optimizer, updates_per_epoch: int) -> Any:
    """Create timm's learning rate schedule; return None for `sched: none`.

    The learning rate depends only on the argument of `step_update(updates)`.

    Raises:
        RecipeError: unknown name, or wrong arguments.
    """
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
    except Exception as error:
        given = f" with sched_kwargs {r.sched_kwargs}" if r.sched_kwargs else ""
        raise RecipeError(f"sched: schedule {r.sched!r}{given}: {error}; {_SCHEDULES}") from error
    if scheduler is None and r.sched != "none":  # older versions of timm ignore unknown names
        raise RecipeError(f"sched: unknown schedule {r.sched!r}; {_SCHEDULES}")
    return scheduler


_SCHEDULES = "timm has cosine, tanh, step, multistep, poly, and none"


def make_mixup(r: Recipe, num_classes: int) -> Mixup | None:
    """Create timm's `Mixup` for mixup and cutmix; return None if the recipe uses neither."""
    if not r.mixes:
        return None
    return Mixup(r.mixup, r.cutmix, prob=r.mixup_prob, label_smoothing=r.smoothing, num_classes=num_classes)


def make_loss(r: Recipe) -> nn.Module:
    """Create the loss for the recipe's targets: soft (mixup, cutmix or a teacher), smoothed or plain labels."""
    soft = r.mixes or r.teacher is not None
    if r.bce:
        return BinaryCrossEntropy(smoothing=0.0 if soft else r.smoothing)
    if soft:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(r.smoothing) if r.smoothing else nn.CrossEntropyLoss()
