"""What an optimizer holds, when a model gets parameters on the way."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from replfx.errors import FusionError
from replfx.modules.structure import is_wrapped

__all__ = ["Optimizers", "checked", "given_names", "hand_over", "in_order", "name_anew"]

Optimizers: TypeAlias = Optimizer | Sequence[Optimizer] | None
"""What trains a model: often one, or one for matrices (Muon) and another for the rest."""

_Home: TypeAlias = tuple[Optimizer, dict[str, Any]]
"""An optimizer, and one of its groups."""


def checked(given: Optimizers) -> list[Optimizer]:
    """All of them, whose parameters can be exchanged.

    Raises:
        FusionError: there is none in a list, or one is no optimizer, or keeps its parameters in a second place.
    """
    if given is None:
        return []
    found = list(given) if isinstance(given, Sequence) else [given]
    if not found:
        raise FusionError("optimizer is an empty list: give what trains the model, or leave it out if nothing does yet")
    for optimizer in found:
        _check(optimizer)
    return found


def _check(optimizer: Optimizer) -> None:
    if not isinstance(getattr(optimizer, "param_groups", None), list):
        raise FusionError(
            f"optimizer must be a torch.optim.Optimizer, or several in a list, not {type(optimizer).__name__}"
        )
    inner = getattr(optimizer, "optimizer", optimizer)  # Accelerate wraps it
    if isinstance(inner, torch.optim.LBFGS):
        raise FusionError(
            "LBFGS keeps the history of all its parameters in one vector: make a new one from model.parameters() "
            "after replfx.unroll(model)"
        )
    sharded = sys.modules.get("torch.distributed.optim")  # nobody has one where it is not imported
    if sharded is not None and isinstance(inner, sharded.ZeroRedundancyOptimizer):
        raise FusionError(
            f"{type(inner).__name__} has dealt its parameters out to the ranks: make a new one from "
            "model.parameters() after replfx.unroll(model)"
        )


def hand_over(
    optimizers: Sequence[Optimizer],
    old: set[nn.Parameter],
    full: Mapping[str, nn.Parameter],
    like: Sequence[Mapping[str, Tensor]],
    *,
    copies: bool,
) -> None:
    """Let the parameters of a block at full depth take the place of those of `old` that are gone.

    Each goes to the group of a neighbour's parameter of its name (some groups have no weight decay), and to none if
    these are in none; where neighbours have no such parameter, to the group of what is gone, or else to the first with
    a parameter of as many dimensions. Its state starts as the mean of the states of the neighbours' parameters of its
    name and shape (`_state_from`).

    Args:
        optimizers: are changed.
        old: the parameters of the block until now, some of which it may have kept.
        full: those that it has now, by their names in it.
        like: each neighbour's parameters, by the same names.
        copies: whether the block is a copy of the first neighbour that has the parameter; so is its state then.
    """
    gone = old.difference(full.values())
    homes: dict[Tensor, _Home] = {
        p: (optimizer, group) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]
    }
    left = next((home for p, home in homes.items() if p in gone), None)
    first = (optimizers[0], optimizers[0].param_groups[0])
    for group in _groups(optimizers):
        group["params"] = [p for p in group["params"] if p not in gone]
    for name, parameter in full.items():
        if parameter in old:
            continue
        counterparts = [side[name] for side in like if name in side]
        sides = [p for p in counterparts if p in homes]
        if counterparts and not sides:  # nothing trains them, as in fine-tuning a head alone
            continue
        alike = (home for p, home in homes.items() if p.dim() == parameter.dim())
        optimizer, group = homes[sides[0]] if sides else left or next(alike, first)
        group["params"].append(parameter)
        states = [optimizer.state[p] for p in sides if _are_alike(p, parameter) and p in optimizer.state]
        if state := _state_from(states[:1] if copies else states):
            optimizer.state[parameter] = state
    for optimizer in optimizers:
        for parameter in gone:
            optimizer.state.pop(parameter, None)


def in_order(optimizers: Sequence[Optimizer], model: nn.Module, new: set[nn.Parameter]) -> None:
    """Put new parameters where `model.parameters()` has them, in each group whose others are in its order.

    An optimizer's state_dict counts parameters: like this it is that of an optimizer which was made for the full model.
    """
    order = {parameter: position for position, parameter in enumerate(model.parameters())}
    for group in _groups(optimizers):
        positions = [order.get(p, len(order)) for p in group["params"]]
        others = [at for at, p in zip(positions, group["params"], strict=True) if p not in new]
        if others == sorted(others):
            group["params"] = [p for _, p in sorted(zip(positions, group["params"], strict=True), key=lambda x: x[0])]


def given_names(optimizers: Sequence[Optimizer]) -> dict[nn.Parameter, str]:
    """The names of parameters in optimizers that were made of `named_parameters()`."""
    return {
        p: name for g in _groups(optimizers) for p, name in zip(g["params"], g.get("param_names", ()), strict=False)
    }


def name_anew(optimizers: Sequence[Optimizer], model: nn.Module, known: Mapping[nn.Parameter, str]) -> None:
    """Let the names go with the parameters: those that were known stay, and the others are the model's."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    for group in _groups(optimizers):
        if "param_names" in group:
            group["param_names"] = [known.get(p) or names.get(p, "") for p in group["params"]]


def _groups(optimizers: Sequence[Optimizer]) -> Iterator[dict[str, Any]]:
    return (group for optimizer in optimizers for group in optimizer.param_groups)


def _are_alike(one: Tensor, other: Tensor) -> bool:
    """Whether two parameters have one shape, and lie on the processes in the same way."""
    same = one.shape == other.shape and one.dtype == other.dtype and type(one) is type(other)
    return same and getattr(one, "placements", None) == getattr(other, "placements", None)


def _state_from(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The state of a parameter that goes on from its neighbours': means of their moments, and their count of steps.

    The parameter was a mixture of the neighbours' until now, and moved with them; a state from nothing would make its
    first steps as long as Adam's are, whatever the gradient. Nothing is carried where the neighbours' states are not
    of one form, or hold what cannot be averaged: lists of matrices, tensors in eight bits.
    """
    if not states or any(state.keys() != states[0].keys() for state in states):
        return {}
    mixed = {}
    for key, first in states[0].items():
        values = [state[key] for state in states]
        if first is None or isinstance(first, bool | int | float | str):
            mixed[key] = first
        elif any(not isinstance(v, Tensor) or is_wrapped(v) or v.shape != first.shape for v in values):
            return {}
        elif first.dim() == 0:
            mixed[key] = first.clone()
        elif not first.is_floating_point():  # moments in eight bits have a scale of their own
            return {}
        else:
            mixed[key] = sum(values[1:], first) / len(values)
    return mixed
