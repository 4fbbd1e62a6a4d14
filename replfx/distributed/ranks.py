"""Ranks that train one model have to replace the same blocks of it."""

import hashlib
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import torch.distributed as dist
from torch import nn

from replfx.dtensors import is_distributed
from replfx.errors import PlanError
from replfx.plans import Plan, Replacement
from replfx.rewrite.state import plans_in

__all__ = ["check_ranks"]


def check_ranks(model: nn.Module, group: "dist.ProcessGroup | None" = None) -> None:
    """Make sure that all ranks have transformed the model by the same plan; call it on every rank.

    DistributedDataParallel compares the shapes of parameters alone: ranks that deleted different blocks, or let other
    parts of the gradient through, would train, and mix up their weights. This compares the plans, whatever wraps the
    model. One rank alone, or no process group at all, is always in agreement.

    Args:
        model: transformed or not, wrapped (DDP, FSDP, torch.compile) or not yet.
        group: the ranks that are to agree; all by default. A rank outside of it checks nothing.

    Raises:
        PlanError: on every rank of the group: the ranks that differ from the first one, and where their plans do.

    Example:
        >>> model = replfx.transform(build_model())
        >>> replfx.check_ranks(model)
        >>> model = DistributedDataParallel(model)
    """
    if not is_distributed() or dist.get_rank(group) < 0:
        return
    # Something else than a module is a difference too: a rank that raised before the others know would hang them.
    plans: list[Plan] | None = plans_in(model) if isinstance(model, nn.Module) else None
    text = repr(None if plans is None else [plan.to_json() for plan in plans])
    ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
    digests = _gathered(hashlib.sha256(text.encode()).hexdigest(), group, len(ranks))
    unlike = [index for index, digest in enumerate(digests) if digest != digests[0]]
    if plans is None and not unlike:
        raise PlanError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    if not unlike:
        return
    everywhere = _gathered(plans, group, len(ranks))  # only now: plans may be long
    other, names = unlike[0], ", ".join(str(ranks[index]) for index in unlike)
    difference = _difference(everywhere[other], everywhere[0], f"rank {ranks[other]}", f"rank {ranks[0]}")
    raise PlanError(
        f"the ranks would train different models: {'rank' if len(unlike) == 1 else 'ranks'} {names} not as rank "
        f"{ranks[0]}: {difference}. Transform with the same options everywhere, or send one rank's plan to the others "
        "(Plan.to_json, Plan.from_json) and use replfx.apply"
    )


def _gathered(mine: Any, group: "dist.ProcessGroup | None", count: int) -> list[Any]:
    everywhere = [None] * count
    dist.all_gather_object(everywhere, mine, group)
    return everywhere


def _difference(one: Sequence[Plan] | None, other: Sequence[Plan] | None, mine: str, theirs: str) -> str:
    """Where two ranks' plans first differ."""
    for plans, rank in ((one, mine), (other, theirs)):
        if not plans:
            return f"{rank} has {'no torch.nn.Module' if plans is None else 'a model that is not transformed'}"
    assert one is not None
    assert other is not None
    for here, there in zip(one, other, strict=False):
        for left, right in zip_longest(here.replacements, there.replacements):
            if left != right:
                return f"{mine} replaces {_described(left, right)}, {theirs} {_described(right, left)}"
        if here.model != there.model:
            return f"the plan of {mine} is for {here.model}, that of {theirs} for {there.model}"
    return f"{mine} has {len(one)} transformed models in it, {theirs} {len(other)}"


def _described(entry: Replacement | None, other: Replacement | None) -> str:
    """A replacement as far as it is told from another."""
    if entry is None:
        return "nothing there"
    if other is None or entry.path != other.path:
        return f"`{entry.path}`"
    fields = {name: value for name, value in entry.to_dict().items() if value != other.to_dict()[name]}
    return f"`{entry.path}` with {', '.join(f'{name} {_short(value)}' for name, value in fields.items())}"


def _short(value: object) -> str:
    name = value.get("name") if isinstance(value, dict) else None
    options = f" {value['options']}" if isinstance(value, dict) and value.get("options") else ""
    return f"{name}{options}" if name else str(value)
