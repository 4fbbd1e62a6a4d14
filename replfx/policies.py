"""Policies: from the options of `transform` to the pass that chooses the blocks."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

from replfx.errors import PlanError
from replfx.fusion import Choice
from replfx.fusion.auto import settled
from replfx.passes import SelectBlocks

__all__ = ["Choosable", "policy_of"]

Choosable: TypeAlias = str | Mapping[str, object] | Choice


def policy_of(
    every: int | None,
    fraction: float | None,
    select: str | Sequence[str] | None,
    fusion: Choosable,
    operator: Choosable,
    neighbour_gradient: float,
) -> SelectBlocks:
    """The pass that chooses blocks as these options ask: `every=2` if none says which.

    Args:
        every: like all of these, as for `replfx.transform`.
        fraction: the same.
        select: the same.
        fusion: the same.
        operator: the same.
        neighbour_gradient: the same.

    Raises:
        PlanError: an impossible selection.
        FusionError: an unknown fusion or operator.
    """
    if every is None and fraction is None and select is None:
        every = 2
    chosen, fused = settled(Choice.of(operator, "operator"), Choice.of(fusion, "fusion"))
    return SelectBlocks(
        every=every,
        fraction=fraction,
        select=_globs(select),
        fusion=fused,
        operator=chosen,
        neighbour_gradient=neighbour_gradient,
    )


def _globs(select: str | Sequence[str] | None) -> tuple[str, ...] | None:
    if select is None or isinstance(select, str):
        return None if select is None else (select,)
    if not isinstance(select, Iterable):
        raise PlanError(f"select must be a path or a glob, or a sequence of them, not {select!r}")
    return tuple(select)
