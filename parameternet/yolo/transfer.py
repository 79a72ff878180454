# SPDX-License-Identifier: AGPL-3.0-or-later
"""Dense weights into dynamic detectors: `YOLO("yolov8n-dynamicconv.yaml").load("yolov8n.pt")`."""

from collections import Counter

from torch import Tensor, nn
from ultralytics.utils import LOGGER

from parameternet.layers import DynamicConv
from parameternet.surgery.upcycle import upcycle_state_dict

__all__ = ["prepare"]


def prepare(model: nn.Module, source: nn.Module, verbose: bool = True) -> nn.Module | None:
    """A network whose state dict has `source`'s weights as `model` wants them; None if there is nothing to be changed.

    Where `model` has a dynamic convolution and `source` a dense one, the kernel is split among the experts so that they
    compute the same. A bare `DynamicConv` has neither normalisation nor activation: it gets the kernel with the
    normalisation's scale folded in, which is a start and not the same function.
    """
    state = source.float().state_dict()
    dense = _with_bare_kernels(state, model)
    filled = [
        conv for name, conv in _dynamic(model) if f"{name}.weight" in dense and f"{name}.routing.weight" not in dense
    ]
    if not filled:
        return None
    for conv in filled:
        nn.init.zeros_(conv.routing.weight)
        nn.init.zeros_(conv.routing.bias)
    changed = upcycle_state_dict(dense, model)
    if verbose:
        _tell(changed, state, model)
    return _Holder(changed)


def _dynamic(model: nn.Module) -> list[tuple[str, DynamicConv]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, DynamicConv)]


def _with_bare_kernels(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Kernels of Conv under the names of the bare layers in their places."""
    out = dict(state)
    for name, _ in _dynamic(model):
        dense = f"{name}.conv.weight"
        if dense in out and f"{name}.bn.weight" in out:
            kernel, norm = out.pop(dense), {k: out.pop(f"{name}.bn.{k}") for k in ("weight", "running_var")}
            scale = norm["weight"] / (norm["running_var"] + 1e-3).sqrt()
            out[f"{name}.weight"] = kernel * scale[:, None, None, None]
    return out


def _tell(changed: dict[str, Tensor], state: dict[str, Tensor], model: nn.Module) -> None:
    own = model.state_dict()
    fits = {name for name, value in changed.items() if name in own and own[name].shape == value.shape}
    upcycled = {n for n in fits if n not in state or state[n].shape != changed[n].shape}
    routers = {name for name in upcycled if ".routing." in name}
    counts = Counter(transferred=len(fits - upcycled), upcycled=len(upcycled - routers), left=len(set(own) - fits))
    LOGGER.info(
        f"parameternet: of {len(own)} tensors {counts['transferred']} transferred, {counts['upcycled']} upcycled "
        f"(and {len(routers)} of their routers neutral), {counts['left']} left as they were"
    )


class _Holder(nn.Module):
    """Has a state dict, and nothing else."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.tensors = tensors

    def float(self) -> "_Holder":
        return self

    def state_dict(self, *args, **kwargs) -> dict[str, Tensor]:
        return self.tensors
