"""Plans: which blocks are replaced, and how. Frozen, deterministic data, JSON both ways."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from replfx.errors import PlanError
from replfx.fusion.interface import Interface
from replfx.fusion.registry import Choice
from replfx.fusion.templates import check
from replfx.modules.paths import is_region
from replfx.plain_data import read_dataclass

__all__ = ["Plan", "Replacement", "check_gradient", "has_regions", "keeping"]

_FORMAT, _VERSION = "replfx-plan", 2
_LARGEST = 64 * 1024 * 1024  # characters; a plan of 100,000 blocks is about half of it


@dataclass(frozen=True)
class Replacement:
    """One block to be replaced.

    Attributes:
        path: the block.
        previous, next: its kept neighbours; None where there is none, which suits an operator that needs none.
        fusion, operator: what takes its place.
        interface: how the block is called.
        kind, previous_kind, next_kind: digests of the structure of the block and of its neighbours, by which `apply`
            knows a plan that was made for another model.
        neighbour_gradient: factor on the gradient into the neighbours.
    """

    path: str
    previous: str | None
    next: str | None
    fusion: Choice
    operator: Choice
    interface: Interface
    kind: str
    previous_kind: str | None = None
    next_kind: str | None = None
    neighbour_gradient: float = 1.0

    def __post_init__(self) -> None:
        check_gradient(self.neighbour_gradient)
        object.__setattr__(self, "neighbour_gradient", float(self.neighbour_gradient))

    def to_dict(self) -> dict[str, object]:
        """As plain JSON values."""
        choices = {"fusion": asdict(self.fusion), "operator": asdict(self.operator)}
        return {**vars(self), **choices, "interface": self.interface.to_dict()}


@dataclass(frozen=True)
class Plan:
    """Which blocks of a model are replaced.

    Attributes:
        model: name of the model's class, for people.
        replacements: in the order in which the blocks run.

    Example:
        >>> plan = replfx.plan(model, every=2)
        >>> Path("plan.json").write_text(plan.to_json())
        >>> model = replfx.apply(build_model(), Plan.from_json(Path("plan.json").read_text()))
    """

    model: str
    replacements: tuple[Replacement, ...] = ()

    def to_json(self) -> str:
        """A JSON document with a format name and a version; the same plan always gives the same text."""
        document = {
            "format": _FORMAT,
            "version": _VERSION,
            "model": self.model,
            "replacements": [replacement.to_dict() for replacement in self.replacements],
        }
        return json.dumps(document, indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Read what `to_json` wrote. Nothing in a plan is executed: it is checked field by field.

        Raises:
            PlanError: truncated, malformed, of another format or version, or with unknown fields.
        """
        top = read_dataclass(_Document, _parse(text), "the plan")
        if top.format != _FORMAT:
            raise PlanError(f"this is not a replfx plan: its format is {top.format!r}, not {_FORMAT!r}")
        if top.version != _VERSION:
            raise PlanError(f"the plan is of version {top.version}, this replfx reads version {_VERSION}; make it anew")
        replacements = []
        for index, entry in enumerate(top.replacements):
            replacements.append(read_dataclass(Replacement, entry, f"replacement {index}", whole=True))
            try:
                check(replacements[-1].interface.output)
            except PlanError as error:
                raise PlanError(f"replacement {index}: {error}") from error
        paths = [replacement.path for replacement in replacements]
        if len(set(paths)) != len(paths):
            raise PlanError("the plan replaces a block twice")
        return cls(top.model, tuple(replacements))


@dataclass(frozen=True)
class _Document:
    """A plan's JSON."""

    format: str
    version: int
    model: str
    replacements: tuple[object, ...]  # to be read when the version is known


def check_gradient(factor: object) -> None:
    """Raise a PlanError if it is no factor on the gradient into neighbours."""
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 <= factor <= 1:
        raise PlanError(f"neighbour_gradient must be a number between 0 and 1, not {factor!r:.24}")


def has_regions(plan: Plan) -> bool:
    """Whether the plan replaces regions of a graph, which are no modules."""
    return any(is_region(replacement.path) for replacement in plan.replacements)


def keeping(plan: Plan, names: Mapping[str, Sequence[str]]) -> Plan:
    """The plan under which replaced blocks keep parameters as their own.

    Args:
        plan: with operator `block`.
        names: path of a replaced block → names in it; all blocks of its kind keep them.
    """
    kept: dict[str | None, set[str]] = {}
    for replacement in plan.replacements:
        kept.setdefault(replacement.kind, set()).update(names.get(replacement.path, ()))
    changed = []
    for replacement in plan.replacements:
        given = replacement.operator.options.get("keep", ())
        assert isinstance(given, Iterable)
        keep = sorted({*given, *kept[replacement.kind]})
        options = {**replacement.operator.options, **({"keep": keep} if keep else {})}
        changed.append(replace(replacement, operator=Choice(replacement.operator.name, options)))
    return Plan(plan.model, tuple(changed))


def _parse(text: object) -> object:
    if not isinstance(text, str):
        raise PlanError(f"a plan is JSON text, not {type(text).__name__}")
    if len(text) > _LARGEST:
        raise PlanError(f"the plan has {len(text):,} characters, more than any plan needs")

    def refuse(token: str) -> object:
        raise PlanError(f"the plan has the number {token}")

    def finite(token: str) -> float:
        number = float(token)
        return number if math.isfinite(number) else refuse(token)  # type: ignore[return-value]

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        keys = [key for key, _ in pairs]
        if len(set(keys)) != len(keys):
            raise PlanError(f"the plan has a field twice: {max(keys, key=keys.count)!r}")
        return dict(pairs)

    try:
        return json.loads(text, parse_constant=refuse, parse_float=finite, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise PlanError(f"the plan is not whole JSON ({error}); was the file cut short?") from error
