"""Policies: which blocks are replaced, and by what, as the options of `transform` say."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypedDict, Unpack

from replfx.errors import PlanError
from replfx.fusion import Choice
from replfx.fusion.registry import AUTO
from replfx.modules.paths import as_paths
from replfx.operators.auto import resolve_auto
from replfx.plans import check_gradient

__all__ = ["RULES", "ChoiceLike", "Options", "Policy", "Rules", "policy_of"]

ChoiceLike: TypeAlias = str | Mapping[str, object] | Choice

RULES = ("every", "fraction", "select", "keep")

_AUTO = Choice(AUTO)


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
    fusion: Choice = _AUTO
    operator: Choice = _AUTO
    neighbour_gradient: float = 1.0
    split_at: tuple[str, ...] = ()
    budgeted: bool = False  # `select` is not the user's, but what a budget leaves

    def __post_init__(self) -> None:
        given = [name for name in RULES if getattr(self, name) is not None]
        if len(given) != 1:
            raise PlanError(f"give one of {', '.join(f'{n}=' for n in RULES)}, not {' and '.join(given) or 'none'}")
        if self.every is not None and (isinstance(self.every, bool) or not isinstance(self.every, int)):
            raise PlanError(f"every must be a whole number, not {self.every!r}")
        if self.every is not None and self.every < 2:
            raise PlanError(f"every={self.every}: a replaced block needs a kept one on each side, so at least 2")
        for name in ("fraction", "keep"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise PlanError(f"{name} must be a number, not {value!r}")
        if self.fraction is not None and not 0 < self.fraction <= 0.5:
            raise PlanError(f"fraction={self.fraction}: must be over 0 and at most 0.5, half of a chain's blocks")
        if isinstance(self.keep, int) and self.keep < 2:
            raise PlanError(f"keep={self.keep}: the first and the last block of a chain always stay, so at least 2")
        if isinstance(self.keep, float) and not 0 < self.keep < 1:
            raise PlanError(f"keep={self.keep}: a share of the blocks is between 0 and 1; a number of them is an int")
        check_gradient(self.neighbour_gradient)
        for name, choice in zip(("operator", "fusion"), resolve_auto(self.operator, self.fusion), strict=True):
            object.__setattr__(self, name, choice)


class Rules(TypedDict, total=False):
    """The options of `replfx.transform` that say which blocks are replaced, one instead of another."""

    every: int | None
    fraction: float | None
    keep: int | float | None
    select: str | Sequence[str] | None


class Options(Rules, total=False):
    """The options of `replfx.transform` that make a policy, as a user gives them."""

    split_at: str | Sequence[str] | None
    fusion: ChoiceLike
    operator: ChoiceLike
    neighbour_gradient: float


def policy_of(**options: Unpack[Options]) -> Policy:
    """The policy that a user's options ask for: `every=2` if none says which blocks.

    Raises:
        PlanError: an impossible selection.
        FusionError: an unknown fusion or operator.
    """
    given: dict[str, Any] = {**options}
    if all(given.get(name) is None for name in RULES):
        given["every"] = 2
    for name in ("operator", "fusion"):
        if name in given:
            given[name] = Choice.of(given[name], name)
    if given.get("select") is not None:
        given["select"] = as_paths(given["select"], "select", "a path or a glob,")
    split_at = given.pop("split_at", None)
    return Policy(
        **given, split_at=as_paths(split_at, "split_at", "a module path") if split_at not in (None, (), []) else ()
    )
