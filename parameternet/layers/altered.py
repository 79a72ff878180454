"""Detect layers that do not compute what their class defines."""

from torch import nn

__all__ = ["alteration", "replaced_method"]

PARTS = ("weight", "bias", "output_bias")


def alteration(module: nn.Module) -> str | None:
    """Return why `module` may not compute what its class defines; None if there is no sign of it.

    Surgery skips such layers, because hooks, parametrizations, methods replaced on the instance, compiled calls and
    special weights (quantised, distributed, pruned, uninitialised) would be lost or silently bypassed.
    """
    replaced = replaced_method(module)
    if replaced:
        return replaced
    hooked = any(value for name, value in vars(module).items() if name.endswith("_hooks"))
    if hooked or hasattr(module, "parametrizations"):
        return "has hooks or a parametrization"
    if getattr(module, "_compiled_call_impl", None) is not None:
        return "is compiled"
    for name in PARTS:
        tensor = getattr(module, name, None)
        if tensor is not None and (type(tensor) is not nn.Parameter or name not in module._parameters):
            return f"its {name} is no torch.nn.Parameter"
        if tensor is not None and (tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None)):
            return f"its {name} has hooks"
    return None


def replaced_method(module: nn.Module) -> str | None:
    """Return which class method is hidden by an attribute of the instance, as after `layer.forward = ...`."""
    # Ultralytics overwrites torch.nn.Module.type, which is never called, with the layer's class name.
    replaced = ((name, value) for name, value in vars(module).items() if callable(value))
    names = [name for name, _ in replaced if callable(getattr(type(module), name, None))]
    return f"its {names[0]} was replaced" if names else None
