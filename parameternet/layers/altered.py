"""What makes a layer compute something else than its class says."""

from torch import nn

__all__ = ["alteration", "replaced_method"]

PARTS = ("weight", "bias", "output_bias")


def alteration(module: nn.Module) -> str | None:
    """Why `module` may compute something else than its class does from its tensors; None if nothing says so.

    Surgery leaves such a layer alone: hooks, a parametrization, a method replaced on the instance, a compiled call, or
    a weight of another kind (quantised, distributed, pruned, not initialised) would be lost or silently bypassed.
    """
    replaced = replaced_method(module)
    if replaced:
        return replaced
    hooked = any(value for name, value in vars(module).items() if name.endswith("_hooks"))
    if hooked or hasattr(module, "parametrizations"):
        return "carries hooks or a parametrization"
    if getattr(module, "_compiled_call_impl", None) is not None:
        return "is compiled"
    for name in PARTS:
        tensor = getattr(module, name, None)
        if tensor is not None and (type(tensor) is not nn.Parameter or name not in module._parameters):
            return f"its {name} is no torch.nn.Parameter"
        if tensor is not None and (tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None)):
            return f"its {name} carries hooks"
    return None


def replaced_method(module: nn.Module) -> str | None:
    """Which method of the class an attribute of `module` itself hides, as `layer.forward = ...` leaves it."""
    # Ultralytics writes the name of a layer's class over torch.nn.Module.type, which is never called.
    replaced = ((name, value) for name, value in vars(module).items() if callable(value))
    names = [name for name, _ in replaced if callable(getattr(type(module), name, None))]
    return f"its {names[0]} was replaced" if names else None
