"""Reading plain data, as JSON has it, into frozen dataclasses: their annotations say what each field may hold.

`Annotated[kind, Rule(be, holds)]` narrows a field. One with a default value may be left out; one with a default
factory may not. Nothing in the data is executed.
"""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from replfx.errors import PlanError

__all__ = ["Rule", "read_dataclass"]

T = TypeVar("T")


@dataclass(frozen=True)
class Rule:
    """What the value of a field must be besides its type, and whether it is."""

    be: str
    holds: Callable[[Any], bool]


def read_dataclass(cls: type[T], value: object, where: str, *, whole: bool = False) -> T:
    """Read an object of plain data, and what it holds.

    Args:
        cls: a dataclass.
        value: as `json.loads` gives it.
        where: what the value is, for messages.
        whole: its own fields with a default value must be there too.

    Raises:
        PlanError: a field is lacking, unknown, or not what it must be.
    """
    if not isinstance(value, Mapping):
        raise PlanError(f"{where} must be a JSON object, not {type(value).__name__}")
    known = _fields(cls)  # type: ignore[arg-type]
    for name in (*known, *value):
        if name not in known:
            raise PlanError(f"{where} has an unknown field {name!r}")
        if name not in value and (whole or known[name][1]):
            raise PlanError(f"{where} has no field {name!r}")
    read = {name: _read(known[name][0], held, f"{where}, {name!r}") for name, held in value.items()}
    try:
        return cls(**read)
    except PlanError as error:
        raise PlanError(f"{where}: {error}") from error


@cache
def _fields(cls: type) -> dict[str, tuple[Any, bool]]:
    """What each field may hold, and whether it must be there."""
    kinds = get_type_hints(cls, include_extras=True)
    return {field.name: (kinds[field.name], field.default is MISSING) for field in fields(cls)}


def _read(kind: Any, value: object, where: str) -> Any:
    """A value as its annotation has it."""
    if kind is object:
        return value
    if get_origin(kind) is Annotated:
        kind, rule = get_args(kind)
        read = _read(kind, value, where)
        if not rule.holds(read):
            raise PlanError(f"{where} must be {rule.be}, not {value!r:.60}")
        return read
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    chosen = next((each for each in kinds if type(value) in _plain(each)), None)
    if chosen is None:
        wanted = " or ".join(dict.fromkeys(_plain(each)[0].__name__ for each in kinds))
        raise PlanError(f"{where} must be {wanted}, not {type(value).__name__}")
    if chosen is not kind:
        return _read(chosen, value, where)
    if isinstance(kind, type) and is_dataclass(kind):
        return read_dataclass(kind, value, where)
    if not isinstance(value, list):
        return value
    items = get_args(kind)
    if items[-1] is ...:
        items = items[:1] * len(value)
    if len(items) != len(value):
        raise PlanError(f"{where} must have {len(items)} items, not {len(value)}")
    return tuple(
        _read(item, each, f"{where}, item {i}") for i, (item, each) in enumerate(zip(items, value, strict=True))
    )


def _plain(kind: Any) -> tuple[type, ...]:
    """The types that plain data has for an annotation."""
    if get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    if get_origin(kind) is tuple:
        return (list,)
    if get_origin(kind) is not None or is_dataclass(kind):
        return (dict,)
    return (float, int) if kind is float else (kind,)
