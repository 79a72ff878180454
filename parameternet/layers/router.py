"""Router: compute routing weights from an image's features."""

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import native
from .autocast import autocast_dtype, without_autocast
from .channel_sums import channel_sums
from .compiled import records_a_graph, runs_eagerly

__all__ = ["Router", "match_routers", "set_temperature"]

ROUTING = ("sigmoid", "softmax")
NORMS = ("layer", "none")
KEYS = ("weight", "bias", "temperature")


class _Affine(nn.Module):
    """Weight (out, in) and bias (out,) of an affine map of pooled vectors.

    Not a torch.nn.Linear: tools that replace, quantise or adapt every Linear of a network expect it to be called like
    one, but a router reads the weight directly.
    """

    def __init__(self, in_features: int, out_features: int, device=None, dtype=None) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Initialise weight and bias like torch.nn.Linear."""
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        bound = self.in_features**-0.5 if self.in_features > 0 else 0.0
        nn.init.uniform_(self.bias, -bound, bound)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class Router(_Affine):
    """Map each image to its routing weights: global average -> linear -> softmax or sigmoid.

    Input (B, in_channels, H, W) -> output (B, num_experts) in float32 (float64 for float64 input), also under autocast:
    a saturated half-precision sigmoid has no gradient.

    Args:
        in_channels: Channels of the input.
        num_experts: Number of routing weights per image.
        activation: 'softmax' (the weights sum to one) or 'sigmoid' (they are independent, as in the released code).
        hidden: None for a single linear layer; a width for a two-layer perceptron with a ReLU in between.
        temperature: Divides the logits of softmax. A float buffer, so that EMA and checkpoints include it; anneal it
            with `set_temperature`. A sigmoid router has no buffer.
        norm: 'layer' scales the averages of each image to mean 0 and length 1 (layer normalisation divided by
            sqrt(in_channels)) and starts the last layer at zero, so that every image has the same routing weights at
            first. With in_channels=1, the normalised average is constant, so all images keep the same routing weights.
            'none' is the router of the released code. The wider the layer, the further an optimizer step moves its
            logits, until routers saturate (benchmarks/router_dynamics.py). Write 'none', not None:
            timm.create_model drops arguments that are None.

    `bias` is (1, num_experts) with normalisation and (num_experts,) without, as in 0.1.0; only a softmax router has a
    `temperature`. Loading a state dict switches the router to the kind that its tensors show. Images do not depend on
    each other, so training with a batch of one works.
    Source: ParameterNet, arXiv:2306.14525; the normalisation is ours.
    """

    if TYPE_CHECKING:
        temperature: Tensor | None
        hidden: _Affine | None

    def __init__(
        self,
        in_channels: int,
        num_experts: int = 4,
        activation: str = "softmax",
        hidden: int | None = None,
        temperature: float = 1.0,
        device=None,
        dtype=None,
        norm: str | None = "layer",
    ) -> None:
        norm = norm or "none"
        if num_experts < 1:
            raise ValueError(f"num_experts must be at least 1, got {num_experts}")
        if activation not in ROUTING:
            raise ValueError(f"routing must be one of {', '.join(ROUTING)}, got {activation!r}")
        if hidden is not None and hidden < 1:
            raise ValueError(f"routing_hidden must be None or at least 1, got {hidden}")
        if norm not in NORMS:
            raise ValueError(f"routing_norm must be one of {', '.join(NORMS)}, got {norm!r}")
        _check_temperature(temperature)
        super().__init__(in_channels if hidden is None else hidden, num_experts, device=device, dtype=dtype)
        self.hidden = None if hidden is None else _Affine(in_channels, hidden, device=device, dtype=dtype)
        self.softmax = activation == "softmax"
        self.num_experts = num_experts
        temperatures = torch.tensor(float(temperature), device=device) if self.softmax else None
        self.register_buffer("temperature", temperatures)
        if norm == "layer":
            self.bias = nn.Parameter(self.bias.detach()[None])
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the layers like torch.nn.Linear; with normalisation, the last one starts at zero."""
        super().reset_parameters()
        if self.hidden is not None:
            self.hidden.reset_parameters()
        if self.norm == "layer":
            nn.init.zeros_(self.weight)
            nn.init.zeros_(self.bias)

    __jit_unused_properties__ = ("norm", "activation")

    @property
    def norm(self) -> str:
        """Return 'layer' or 'none'."""
        return "layer" if self.bias.ndim == 2 else "none"

    @property
    def activation(self) -> str:
        """Return 'softmax' or 'sigmoid'."""
        return "softmax" if self.softmax else "sigmoid"

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickle; in 0.1.0 the hidden layer was a torch.nn.Linear, and sigmoid routers had a temperature."""
        super().__setstate__(state)
        if not self.softmax:
            self._buffers["temperature"] = None
            self._non_persistent_buffers_set.discard("temperature")
        if isinstance(self.hidden, nn.Linear):
            linear = self.hidden
            self.hidden = _Affine(linear.in_features, linear.out_features, device="meta").train(linear.training)
            self.hidden.weight, self.hidden.bias = linear.weight, linear.bias

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        found = _of_router(state_dict, prefix)
        if "weight" in found and "bias" not in found:
            # A filter by shape drops a bias of the other kind but keeps the weight, which would be misinterpreted.
            raise RuntimeError(
                f"{prefix}weight comes without {prefix}bias, whose shape says whether the router normalises: load both"
            )
        was_softmax = self.softmax
        self.match(found)
        if was_softmax and not self.softmax:
            warnings.warn(
                "a router's state dict has no temperature, so it is loaded as a sigmoid router. Build the network with "
                "routing='sigmoid' if it is one; if not, its buffers were not saved",
                stacklevel=2,
            )
        super()._load_from_state_dict(state_dict, prefix, *args)
        if "weight" in found and found["weight"].shape != self.weight.shape:
            # `match` left the kind alone; what is wrong is the shape, which torch reports.
            for keys in args[2:4]:  # missing, unexpected
                keys[:] = [key for key in keys if key != f"{prefix}temperature"]

    @torch.jit.ignore
    def match(self, state_dict: Mapping[str, Tensor]) -> None:
        """Switch to the kind of router that has this state dict, in place: optimizers keep the parameters."""
        weight, bias = state_dict.get("weight"), state_dict.get("bias")
        if bias is None or (weight is not None and weight.shape != self.weight.shape):
            return  # they will not be loaded
        if bias.ndim != self.bias.ndim:
            self.bias.data = self.bias.data.flatten() if bias.ndim == 1 else self.bias.data[None]
        softmax = "temperature" in state_dict
        if softmax != self.softmax and weight is not None:
            self.softmax = softmax
            self.temperature = torch.ones((), device=self.bias.device) if softmax else None

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self._route(x)
        if runs_eagerly(x.device.type):
            return self._route_eagerly(x)
        if autocast_dtype(x.device.type) is None:
            return self._route(x)
        return self._route_outside_autocast(x)

    @torch.jit.unused
    def _route_outside_autocast(self, x: Tensor) -> Tensor:
        with without_autocast(x.device.type):
            return self._route(x) if records_a_graph() else self._route_eagerly(x)

    @torch.jit.unused
    def _route_eagerly(self, x: Tensor) -> Tensor:
        """Compute `_route` in fewer operations; each costs as much as its arithmetic at batch 1.

        A graph must divide by the size of its actual input, not of the example that it was recorded with.
        """
        hidden, temperature, last_bias = self.hidden, self.temperature, self.bias
        readable = hidden is None and not self._needs_gradients(x) and native.ready(x, self.weight, last_bias)
        if readable and x.shape[1] == self.weight.shape[1] and last_bias.numel() == len(self.weight):
            divisor = 1.0 if temperature is None else float(temperature)
            return native.route(x, self.weight, last_bias, last_bias.ndim == 2, self.softmax, divisor)
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        first = self if hidden is None else hidden
        weight, bias = _cast(first.weight, dtype), _cast(last_bias if hidden is None else hidden.bias, dtype)
        positions = x.shape[2] * x.shape[3]
        pooled = channel_sums(x, dtype)
        if last_bias.ndim == 1:
            logits = torch.addmm(bias, pooled, weight.t(), alpha=1 / positions)
        else:
            width = pooled.shape[1]
            pooled = torch.layer_norm(pooled, [width], eps=1e-6 * positions**2)
            logits = torch.addmm(bias, pooled, weight.t(), alpha=width**-0.5)
        if hidden is not None:
            logits = torch.addmm(_cast(last_bias, dtype), F.relu(logits), _cast(self.weight, dtype).t())
        if temperature is not None:
            return torch.softmax(logits / _cast(temperature, dtype), dim=1)
        return torch.sigmoid(logits)

    def _needs_gradients(self, x: Tensor) -> bool:
        return torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad or self.bias.requires_grad)

    def _route(self, x: Tensor) -> Tensor:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        hidden = self.hidden
        weight, bias, width = _cast(self.weight, dtype), _cast(self.bias, dtype), self.in_features
        if hidden is not None:
            weight, bias, width = _cast(hidden.weight, dtype), _cast(hidden.bias, dtype), hidden.in_features
        if self.bias.ndim == 1:
            logits = F.linear(_mean(x, dtype), weight, bias)
        else:
            # Not addmm with alpha, one node less: pnnx converts it to something else.
            pooled = F.layer_norm(_mean(x, dtype), [width], eps=1e-6) * width**-0.5
            logits = F.linear(pooled, weight, bias.flatten())
        if hidden is not None:
            logits = F.linear(F.relu(logits), _cast(self.weight, dtype), _cast(self.bias, dtype).flatten())
        temperature = self.temperature
        if temperature is not None:
            return torch.softmax(logits / _cast(temperature, dtype), dim=1)
        return torch.sigmoid(logits)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation}" + (
            "" if self.norm == "layer" else ", norm='none'"
        )


def _cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `value.to(dtype)`, without a node in the graph if it is a no-op."""
    return value if value.dtype == dtype else value.to(dtype)


def _mean(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `x.mean((2, 3), dtype=dtype)`; litert-torch cannot convert a mean with a dtype."""
    return x.mean((2, 3)) if x.dtype == dtype else x.mean((2, 3), dtype=dtype)


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")


def set_temperature(model: nn.Module, temperature: float) -> int:
    """Set the temperature of every softmax router in `model` (for annealing); return their number."""
    _check_temperature(temperature)
    routers = [m for m in model.modules() if isinstance(m, Router) and m.softmax]
    for router in routers:
        assert router.temperature is not None
        router.temperature.fill_(temperature)
    return len(routers)


def match_routers(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Switch each router of `model` to its kind in `state_dict`, as loading would.

    For callers that compare shapes before they load.
    """
    for name, router in model.named_modules():
        if isinstance(router, Router):
            router.match(_of_router(state_dict, f"{name}."))


def _of_router(state_dict: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key: state_dict[prefix + key] for key in KEYS if prefix + key in state_dict}
