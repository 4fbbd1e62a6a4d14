"""Templates: what a block gives, as plain JSON with its activations left open; the one way to walk through them."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from replfx.errors import PlanError

__all__ = ["fill", "leaves"]

_CONTAINERS = ("tuple", "list", "dict")
_OPEN = ("input", "computed", "unread")


def leaves(template: object, at: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], str, Any]]:
    """The leaves of a template: the keys that lead there, what it is, and its value.

    What it is: "input" with the slot for its value, "computed", "unread", or "constant".

    Example:
        >>> list(leaves({"tuple": [{"input": "0"}, {"unread": True}, 3]}))
        [((0,), 'input', '0'), ((1,), 'unread', True), ((2,), 'constant', 3)]
    """
    kind, inner = _opened(template)
    if kind not in _CONTAINERS:
        yield at, kind, inner
        return
    for key, part in inner.items() if kind == "dict" else enumerate(inner):
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
    if kind in _CONTAINERS:
        parts = [fill(part, give) for part in inner]
        return tuple(parts) if kind == "tuple" else parts
    return inner if kind == "constant" else give(kind, inner)


def _opened(template: object) -> tuple[str, Any]:
    if not isinstance(template, Mapping):
        return "constant", template
    ((kind, inner),) = template.items()
    if kind not in (*_CONTAINERS, *_OPEN):
        raise PlanError(f"the plan's output template has {template!r}, which no operator can give")
    return kind, inner
