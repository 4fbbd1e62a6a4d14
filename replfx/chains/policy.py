"""Policies: from the options of `transform` to the pass that chooses the blocks."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

from replfx.chains.select import SelectBlocks
from replfx.errors import PlanError
from replfx.fusion import Choice
from replfx.operators.auto import settled

__all__ = ["Choosable", "policy_of"]

Choosable: TypeAlias = str | Mapping[str, object] | Choice


def policy_of(
    every: int | None,
    fraction: float | None,
    select: str | Sequence[str] | None,
    fusion: Choosable,
    operator: Choosable,
    neighbour_gradient: float,
    split_at: str | Sequence[str] | None = None,
    keep: int | float | None = None,
) -> SelectBlocks:
    """The pass that chooses blocks as these options ask: `every=2` if none says which.

    Args:
        every: like all of these, as for `replfx.transform`.
        fraction: the same.
        select: the same.
        fusion: the same.
        operator: the same.
        neighbour_gradient: the same.
        split_at: the same.
        keep: the same.

    Raises:
        PlanError: an impossible selection.
        FusionError: an unknown fusion or operator.
    """
    if every is None and fraction is None and select is None and keep is None:
        every = 2
    chosen, fused = settled(Choice.of(operator, "operator"), Choice.of(fusion, "fusion"))
    return SelectBlocks(
        every=every,
        fraction=fraction,
        keep=keep,
        select=None if select is None else _paths(select, "select must be a path or a glob, or"),
        fusion=fused,
        operator=chosen,
        neighbour_gradient=neighbour_gradient,
        split_at=() if split_at is None else _paths(split_at, "split_at must be a module path or"),
    )


def _paths(given: str | Sequence[str], must: str) -> tuple[str, ...]:
    if isinstance(given, str):
        return (given,)
    if not isinstance(given, Iterable):
        raise PlanError(f"{must} a sequence of them, not {given!r}")
    return tuple(given)
