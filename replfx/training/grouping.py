"""Parameter groups for an optimizer: what weight decay is for, and what it is not."""

import math
from collections.abc import Iterator
from typing import Any

from torch import nn

from replfx.errors import ReplfxError
from replfx.live import syntheses_of
from replfx.modules.paths import is_named
from replfx.modules.tree import inner_path
from replfx.torch_internals import Norm
from replfx.tracing import check_has_weights

__all__ = ["parameter_groups"]

_NORMS = (
    Norm,  # batch and instance normalisation
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
)


def parameter_groups(
    model: nn.Module, weight_decay: float = 0.01, *, learning_rate: float | None = None
) -> list[dict[str, Any]]:
    """A model's trainable parameters for an optimizer: matrices with weight decay, all else without.

    Decay draws a fusion coefficient towards 0, and with it the whole block that is synthesised with it; no
    regularisation of a weight means that. So coefficients have none, nor have parameters of fewer than two
    dimensions, biases and normalisations of any shape, and what a `no_weight_decay()` of the model or of a submodule
    names, as timm's models do (names as before `transform`, wildcards too).

    Args:
        model: transformed or not; also one that another module holds or wraps (a trainer's module, DDP, a compiled
            model).
        weight_decay: of the group "decay"; 0.01 is `torch.optim.AdamW`'s own.
        learning_rate: of both groups; without it they have the optimizer's.

    Returns:
        At most two dicts, {"name": "decay" | "no_decay", "params": [nn.Parameter, …], "weight_decay": float}, and "lr"
        if a learning rate was given. Each parameter that asks for a gradient is in one of them, once, also where
        it is tied; frozen ones are in none. A group without parameters is left out.

    Raises:
        ReplfxError: there is no trainable parameter, or a number is negative or not finite.
        CaptureError: `model` is no module, or has no weights yet.

    Example:
        >>> model = replfx.transform(timm.create_model("vit_tiny_patch16_224"))
        >>> groups = replfx.parameter_groups(model, weight_decay=0.05)
        >>> [(group["name"], group["weight_decay"]) for group in groups]
        [('decay', 0.05), ('no_decay', 0.0)]
        >>> optimizer = torch.optim.AdamW(groups, lr=1e-3)
    """
    check_has_weights(model)
    for argument, value in (("weight_decay", weight_decay), ("learning_rate", learning_rate)):
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise ReplfxError(f"{argument} must be a finite number from 0 up, not {value!r}")
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ReplfxError(
            f"this {type(model).__name__} has no parameter with requires_grad=True: there is nothing to optimise"
        )
    exempt = set(_exempt(model))
    groups: list[dict[str, Any]] = [
        {"name": "decay", "params": [p for p in trained if p not in exempt], "weight_decay": float(weight_decay)},
        {"name": "no_decay", "params": [p for p in trained if p in exempt], "weight_decay": 0.0},
    ]
    rate = {} if learning_rate is None else {"lr": float(learning_rate)}
    return [{**group, **rate} for group in groups if group["params"]]


def _exempt(model: nn.Module) -> Iterator[nn.Parameter]:
    """What is to have no weight decay. A tied parameter has none if it has a reason under one of its names."""
    for layer in syntheses_of(model).values():
        if layer.fusion is not None:
            yield from layer.fusion.parameters()  # of any shape: a registered fusion may have matrices of them
    patterns = list(_named_by_the_model(model))
    for path, module in model.named_modules(remove_duplicate=False):
        for leaf, parameter in module._parameters.items():
            if parameter is None:
                continue
            name = inner_path(path, leaf)
            if (
                parameter.dim() < 2
                or isinstance(module, _NORMS)
                or _is_bias(leaf)
                or any(is_named(name, pattern) for pattern in patterns)
            ):
                yield parameter


def _is_bias(leaf: str) -> bool:
    """Also those of attention (`bias_k`) and of recurrent layers (`bias_ih_l0`)."""
    return leaf == "bias" or leaf.startswith("bias_") or leaf.endswith("_bias")


def _named_by_the_model(model: nn.Module) -> Iterator[str]:
    """What `no_weight_decay()` names, of the model or of what it wraps, by names in the model."""
    for path, module in model.named_modules():
        named = getattr(type(module), "no_weight_decay", None)  # of the class: some modules pass on what they lack
        if callable(named):
            yield from (inner_path(path, name) for name in named(module))
