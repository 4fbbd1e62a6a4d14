"""Templates: what a block gives, as plain JSON with its activations left open; the one way to walk through them."""

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from operator import attrgetter
from typing import Any

from replfx.errors import PlanError

__all__ = ["Field", "check", "fill", "is_slot", "leaves", "name_of_class"]

_CONTAINERS = {"tuple": list, "list": list, "dict": dict, "object": dict}
_KINDS = {**_CONTAINERS, "input": str, "computed": bool, "unread": bool}
_DEEPEST = 32


class Field(str):
    """A key that leads to an attribute."""


def leaves(template: object, at: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], str, Any]]:
    """The leaves of a template: the keys that lead there, what it is, and its value.

    What it is: "input" with the slot for its value, "computed", "unread", or "constant".

    Example:
        >>> list(leaves({"tuple": [{"input": "0"}, {"unread": True}, 3]}))
        [((0,), 'input', '0'), ((1,), 'unread', True), ((2,), 'constant', 3)]
    """
    if len(at) > _DEEPEST:
        raise PlanError(f"its output is nested deeper than {_DEEPEST}")
    kind, inner = _opened(template)
    if kind not in _CONTAINERS:
        yield at, kind, inner
        return
    parts: Any = enumerate(inner)
    if kind == "dict":
        parts = inner.items()
    elif kind == "object":
        parts = ((Field(name), part) for name, part in inner["fields"].items())
    for key, part in parts:
        yield from leaves(part, (*at, key))


def fill(template: object, give: Callable[[str, Any], Any]) -> Any:
    """The value that a template stands for, with `give(what it is, value)` for each of its leaves but constants.

    Example:
        >>> fill({"tuple": [{"input": "0"}, {"unread": True}, 3]}, lambda kind, value: f"{kind} {value}")
        ('input 0', 'unread True', 3)
    """
    kind, inner = _opened(template)
    if kind == "dict":
        return {key: fill(part, give) for key, part in inner.items()}
    if kind == "object":
        return _class_named(inner["class"])(**{name: fill(part, give) for name, part in inner["fields"].items()})
    if kind in _CONTAINERS:
        parts = [fill(part, give) for part in inner]
        return tuple(parts) if kind == "tuple" else parts
    return inner if kind == "constant" else give(kind, inner)


def name_of_class(kind: type, held: Mapping[str, object]) -> str | None:
    """What a template calls a dataclass or a class of named tuples; None if it cannot be made of these fields alone."""
    name = f"{kind.__module__}:{kind.__qualname__}"
    taken = {field.name for field in fields(kind) if field.init} if is_dataclass(kind) else set(held)
    try:
        return name if _class_named(name) is kind and taken == set(held) else None
    except PlanError:
        return None


def _class_named(name: str) -> Any:
    module, _, path = name.partition(":")
    try:
        return attrgetter(path)(sys.modules[module])
    except (KeyError, AttributeError) as error:
        raise PlanError(f"a block gives a {name}, and there is no such class: import what defines it first") from error


def check(template: object) -> None:
    """Raise a PlanError if it is no template, as JSON may have it."""
    for _, kind, value in leaves(template):
        if kind == "input" and not is_slot(value):
            raise PlanError(f"its output names the input {value!r}, which is no slot")
        if kind == "constant" and value is not None and not isinstance(value, bool | int | float | str):
            raise PlanError(f"its output holds a {type(value).__name__}")


def is_slot(value: object) -> bool:
    """Whether a string, or anything else, names an input of a call."""
    return isinstance(value, str) and all(part.isdecimal() or part.isidentifier() for part in value.split("."))


def _opened(template: object) -> tuple[str, Any]:
    if not isinstance(template, Mapping):
        return "constant", template
    if len(template) != 1:
        raise PlanError("each part of its output must have one key")
    ((kind, inner),) = template.items()
    held = type(inner)
    if held is not _KINDS.get(kind):
        raise PlanError(f"its output has {kind!r}: {held.__name__}")
    if kind == "object" and (len(inner) != 2 or [type(inner.get(name)) for name in ("class", "fields")] != [str, dict]):
        raise PlanError(f"an object of its output must have a class and fields, not {inner!r:.60}")
    return kind, inner
