"""Plans: which blocks are replaced, and how. Frozen, deterministic data, JSON both ways."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from dataclasses import fields as fields_of
from typing import Any

from replfx.errors import PlanError
from replfx.fusion.caches import Filled
from replfx.fusion.interface import Interface
from replfx.fusion.registry import Choice
from replfx.modules.paths import is_region

__all__ = ["Plan", "Replacement", "check_gradient", "has_regions", "keeping"]

_FORMAT, _VERSION = "replfx-plan", 2
_LARGEST = 64 * 1024 * 1024  # characters; a plan of 100,000 blocks is about half of it
_DEEPEST = 32


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
        top = _Fields(_parse(text), "the plan", ("format", "version", "model", "replacements"))
        if (name := top.take("format", str)) != _FORMAT:
            raise PlanError(f"this is not a replfx plan: its format is {name!r}, not {_FORMAT!r}")
        if (version := top.take("version", int)) != _VERSION:
            raise PlanError(f"the plan is of version {version}, this replfx reads version {_VERSION}; make it anew")
        replacements = tuple(
            _read_replacement(entry, f"replacement {index}")
            for index, entry in enumerate(top.take("replacements", list))
        )
        paths = [replacement.path for replacement in replacements]
        if len(set(paths)) != len(paths):
            raise PlanError("the plan replaces a block twice")
        return cls(top.take("model", str), replacements)


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


class _Fields:
    """The fields of one JSON object, each taken with its type."""

    def __init__(self, value: object, where: str, names: tuple[str, ...]) -> None:
        if not isinstance(value, dict):
            raise PlanError(f"{where} must be a JSON object, not {type(value).__name__}")
        for name in (*names, *value):
            if name not in value:
                raise PlanError(f"{where} has no field {name!r}")
            if name not in names:
                raise PlanError(f"{where} has an unknown field {name!r}")
        self.value, self.where = value, where

    def take(self, name: str, *kinds: type) -> Any:
        value = self.value[name]
        if type(value) not in kinds:
            wanted = " or ".join(kind.__name__ for kind in kinds)
            raise PlanError(f"{self.where}: field {name!r} must be {wanted}, not {type(value).__name__}")
        return value


def _read_replacement(entry: object, where: str) -> Replacement:
    fields = _Fields(entry, where, tuple(field.name for field in fields_of(Replacement)))
    gradient = fields.take("neighbour_gradient", int, float)
    if not 0 <= gradient <= 1:
        raise PlanError(f"{where}: 'neighbour_gradient' must be between 0 and 1, not {_short(gradient)}")
    return Replacement(
        path=fields.take("path", str),
        previous=fields.take("previous", str, type(None)),
        next=fields.take("next", str, type(None)),
        fusion=_read_choice(fields.take("fusion", dict), f"{where}, fusion"),
        operator=_read_choice(fields.take("operator", dict), f"{where}, operator"),
        interface=_read_interface(fields.take("interface", dict), where),
        kind=fields.take("kind", str),
        previous_kind=fields.take("previous_kind", str, type(None)),
        next_kind=fields.take("next_kind", str, type(None)),
        neighbour_gradient=float(gradient),
    )


def _read_interface(value: dict[str, object], where: str) -> Interface:
    optional = [name for name in ("fills", "effects") if name in value]  # few blocks have them
    fields = _Fields(value, f"{where}, interface", ("inputs", "output", *optional))
    inputs = fields.take("inputs", list)
    if not inputs or not all(_is_slot(slot) for slot in inputs):
        raise PlanError(f"{where}: 'inputs' must be a list of slot names")
    output = fields.value["output"]
    _check_template(output, where)
    fills = fields.take("fills", list) if "fills" in optional else []
    effects = fields.take("effects", bool) if "effects" in optional else False
    return Interface(tuple(inputs), output, tuple(_read_filled(entry, where) for entry in fills), effects)


def _read_filled(value: object, where: str) -> Filled:
    fields = _Fields(value, f"{where}, fills", ("slot", "at", "layer", "keys", "values"))
    slot, at, layer = fields.take("slot", str), fields.take("at", list), fields.take("layer", int)
    if not _is_slot(slot) or "." in slot or not all(isinstance(name, str) and _is_attribute(name) for name in at):
        raise PlanError(f"{where}: 'fills' names what is no argument of a block, or no attribute of one")
    sizes = [fields.take(name, list) for name in ("keys", "values")]
    numbers = [layer, *(number for size in sizes for number in size)]
    if any(len(size) != 2 for size in sizes) or any(type(n) is not int or n < 0 for n in numbers):
        raise PlanError(f"{where}: 'fills' must have a layer's number, and two sizes of keys and of values")
    (keys, values) = ((size[0], size[1]) for size in sizes)
    return Filled(slot, tuple(at), layer, keys, values)


def _is_attribute(name: str) -> bool:
    return name.isidentifier() and not name.startswith("_")


def _read_choice(value: object, where: str) -> Choice:
    fields = _Fields(value, where, ("name", "options"))
    options = fields.take("options", dict)
    if "name" in options:
        raise PlanError(f"{where}: its options may not hold a 'name'")
    return Choice(fields.take("name", str), options)


def _short(number: float) -> str:
    text = repr(number)
    return text if len(text) < 24 else f"{text[:20]}…"


def _is_slot(value: object) -> bool:
    return isinstance(value, str) and all(part.isdecimal() or part.isidentifier() for part in value.split("."))


def _check_template(template: object, where: str, depth: int = 0) -> None:
    if depth > _DEEPEST:
        raise PlanError(f"{where}: its output is nested deeper than {_DEEPEST}")
    if not isinstance(template, Mapping):
        if template is not None and not isinstance(template, bool | int | float | str):
            raise PlanError(f"{where}: its output holds a {type(template).__name__}")
        return
    if len(template) != 1:
        raise PlanError(f"{where}: each part of its output must have one key")
    ((key, inner),) = template.items()
    kinds = {"input": str, "computed": bool, "unread": bool, "tuple": list, "list": list, "dict": dict, "object": dict}
    wanted = kinds.get(key)
    if wanted is None or type(inner) is not wanted:
        raise PlanError(f"{where}: its output has {key!r}: {type(inner).__name__}")
    if key == "input" and not _is_slot(inner):
        raise PlanError(f"{where}: its output names the input {inner!r}, which is no slot")
    if key == "object":
        fields = _Fields(inner, f"{where}: an object of its output", ("class", "fields"))
        fields.take("class", str)
        inner = fields.take("fields", dict)
    parts = inner if isinstance(inner, list) else inner.values() if isinstance(inner, dict) else ()
    for part in parts:
        _check_template(part, where, depth + 1)
