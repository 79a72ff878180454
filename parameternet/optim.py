"""Parameter groups for optimizers."""

from typing import Any

from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn

from .layers import Router

__all__ = ["param_groups"]


def param_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float = 0.0,
    layer_decay: float | None = None,
    scale_router_lr: bool = True,
) -> list[dict[str, Any]]:
    """Group the trainable parameters of a network for any optimizer of torch or timm.

    Example: `torch.optim.AdamW(param_groups(model, lr=1e-3, weight_decay=0.05))`. As in timm, biases, norms and
    parameters in the model's `no_weight_decay()` get no weight decay. Routers without normalisation are trained at lr /
    sqrt(in_channels), because one step of Adam changes their logits by up to the learning rate times the sum of their
    inputs. Normalised routers, the default, need no separate group.

    Args:
        model: Any network, with or without dynamic convolutions.
        lr: Learning rate of all other parameters.
        weight_decay: Weight decay of kernels and matrices.
        layer_decay: Factor of the learning rate from each stage to the one below, as `lr_scale` of the groups, which
            timm's schedulers apply; None: no decay.
        scale_router_lr: False trains every router at `lr`.

    Returns:
        Dictionaries with `params`, `lr` and `weight_decay`.
    """
    exclude = {*model.no_weight_decay()} if hasattr(model, "no_weight_decay") else set()
    # With `layer_decay`, timm decays biases of two dimensions, as those of normalised routers.
    exclude |= {name for name, _ in model.named_parameters() if name.endswith(".bias")}
    if layer_decay is None:
        groups = param_groups_weight_decay(model, weight_decay, no_weight_decay_list=exclude)
    else:
        groups = param_groups_layer_decay(model, weight_decay, exclude, layer_decay=layer_decay)
    widths = _router_inputs(model) if scale_router_lr else {}
    out = []
    for group in groups:
        for width in sorted({widths.get(p, 1) for p in group["params"]}):
            params = [p for p in group["params"] if widths.get(p, 1) == width]
            out.append({**group, "params": params, "lr": lr / width**0.5})
    return out


def _router_inputs(model: nn.Module) -> dict[nn.Parameter, int]:
    """Return weights that read unnormalised averages, with the number of averages each reads."""
    routers = [m for m in model.modules() if isinstance(m, Router) and m.norm == "none"]
    readers = [router if router.hidden is None else router.hidden for router in routers]
    return {reader.weight: reader.in_features for reader in readers}
