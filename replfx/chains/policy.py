"""Policies: which blocks are replaced, and by what, as the options of `transform` say."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias, TypedDict, Unpack

from replfx.errors import PlanError
from replfx.fusion import Choice, fusions
from replfx.fusion.registry import AUTO
from replfx.operators.auto import resolve_auto
from replfx.operators.base import operators

__all__ = ["RULES", "Choosable", "Options", "Policy", "Rules", "policy_of"]

Choosable: TypeAlias = str | Mapping[str, object] | Choice

RULES = ("every", "fraction", "select", "keep")


@dataclass(frozen=True)
class Policy:
    """Which blocks of each chain are replaced, and by what: the options of `replfx.transform`, checked.

    Exactly one of `every`, `fraction`, `select` and `keep` is given. A replaced block is made from the nearest kept
    block on each side.
    """

    every: int | None = None
    fraction: float | None = None
    select: tuple[str, ...] | None = None
    keep: int | float | None = None
    fusion: Choice = field(default_factory=lambda: Choice("scalar"))
    operator: Choice = field(default_factory=lambda: Choice("block"))
    neighbour_gradient: float = 1.0
    split_at: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        given = [name for name in RULES if getattr(self, name) is not None]
        if len(given) != 1:
            raise PlanError(f"give one of {', '.join(f'{n}=' for n in RULES)}, not {' and '.join(given) or 'none'}")
        if self.every is not None and (isinstance(self.every, bool) or not isinstance(self.every, int)):
            raise PlanError(f"every must be a whole number, not {self.every!r}")
        if self.every is not None and self.every < 2:
            raise PlanError(f"every={self.every}: a replaced block needs a kept one on each side, so at least 2")
        for name in ("fraction", "keep", "neighbour_gradient"):
            value = getattr(self, name)
            said = value is not None or name == "neighbour_gradient"
            if said and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise PlanError(f"{name} must be a number, not {value!r}")
        if self.fraction is not None and not 0 < self.fraction <= 0.5:
            raise PlanError(f"fraction={self.fraction}: must be over 0 and at most 0.5, half of a chain's blocks")
        if isinstance(self.keep, int) and self.keep < 2:
            raise PlanError(f"keep={self.keep}: the first and the last block of a chain always stay, so at least 2")
        if isinstance(self.keep, float) and not 0 < self.keep < 1:
            raise PlanError(f"keep={self.keep}: a share of the blocks is between 0 and 1; a number of them is an int")
        if not 0 <= self.neighbour_gradient <= 1:
            raise PlanError(f"neighbour_gradient={self.neighbour_gradient}: must be between 0 and 1")
        if not all(isinstance(path, str) for path in self.split_at):
            raise PlanError(f"split_at must be a module path or a sequence of them, not {self.split_at!r}")
        fusions[self.fusion.name], operators[self.operator.name]  # an unknown name raises here


class Rules(TypedDict, total=False):
    """The options of `replfx.transform` that say which blocks are replaced, one instead of another."""

    every: int | None
    fraction: float | None
    keep: int | float | None
    select: str | Sequence[str] | None


class Options(Rules, total=False):
    """The options of `replfx.transform` that make a policy, as a user gives them."""

    split_at: str | Sequence[str] | None
    fusion: Choosable
    operator: Choosable
    neighbour_gradient: float


def policy_of(**options: Unpack[Options]) -> Policy:
    """The policy that a user's options ask for: `every=2` if none says which blocks.

    Raises:
        PlanError: an impossible selection.
        FusionError: an unknown fusion or operator.
    """
    select, split_at = options.get("select"), options.get("split_at")
    rules = {name: options.get(name) for name in RULES}
    chosen, fused = resolve_auto(
        Choice.of(options.get("operator", AUTO), "operator"), Choice.of(options.get("fusion", AUTO), "fusion")
    )
    return Policy(
        every=2 if all(value is None for value in rules.values()) else options.get("every"),
        fraction=options.get("fraction"),
        keep=options.get("keep"),
        select=None if select is None else _paths(select, "select must be a path or a glob, or"),
        fusion=fused,
        operator=chosen,
        neighbour_gradient=options.get("neighbour_gradient", 1.0),
        split_at=() if split_at is None else _paths(split_at, "split_at must be a module path or"),
    )


def _paths(given: str | Sequence[str], must: str) -> tuple[str, ...]:
    if isinstance(given, str):
        return (given,)
    if not isinstance(given, Iterable):
        raise PlanError(f"{must} a sequence of them, not {given!r}")
    return tuple(given)
