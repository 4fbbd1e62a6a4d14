"""Names for fusions and operators: one registry each, so that a user adds one in a few lines."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Generic, TypeVar

from replfx.errors import FusionError
from replfx.plain_data import Rule

__all__ = ["AUTO", "Choice", "Registry"]

AUTO = "auto"
"""The name that leaves the choice to the evidence (`replfx.operators.auto`); nothing is registered under it."""

T = TypeVar("T")


@dataclass(frozen=True)
class Choice:
    """A name out of a registry with its options: `Choice("channel", {"initial": 0.7})`."""

    name: str
    options: Annotated[Mapping[str, object], Rule("without a 'name'", lambda options: "name" not in options)] = field(
        default_factory=dict
    )

    def __post_init__(self) -> None:
        # As JSON gives them back, so that a plan equals the one that comes out of its own text.
        object.__setattr__(self, "options", {key: _as_json(value) for key, value in self.options.items()})

    @classmethod
    def of(cls, given: "str | Mapping[str, object] | Choice", what: str) -> "Choice":
        """Read a name, a `{"name": ..., **options}` dict, or a Choice.

        Raises:
            FusionError: none of the three, or options that JSON cannot hold.
        """
        if isinstance(given, Choice):
            return given
        if isinstance(given, str):
            return cls(given)
        if isinstance(given, Mapping) and isinstance(given.get("name"), str):
            options = {key: value for key, value in given.items() if key != "name"}
            try:
                json.dumps(options)
            except TypeError as error:
                raise FusionError(f"the options of {what} {given['name']!r} must be plain JSON: {error}") from error
            return cls(str(given["name"]), options)
        raise FusionError(f"{what} must be a name or a dict with a 'name', not {given!r}")


def _as_json(value: object) -> object:
    if isinstance(value, tuple | list):
        return [_as_json(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _as_json(item) for key, item in value.items()}
    return value


class Registry(Generic[T]):
    """Classes by name.

    Args:
        what: what is registered, for messages: "fusion" or "operator".
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self._entries: dict[str, type[T]] = {}

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Class decorator: `@register_fusion("mean")`.

        Raises:
            FusionError: the name is taken by another class, or means something else.
        """

        def enter(cls: type[T]) -> type[T]:
            if name == AUTO:
                raise FusionError(f"the {self.what} name {name!r} stands for a choice among the others; take another")
            taken = self._entries.get(name)
            if taken is not None and taken.__qualname__ != cls.__qualname__:
                raise FusionError(f"the {self.what} name {name!r} is taken by {taken.__qualname__}")
            self._entries[name] = cls
            return cls

        return enter

    def __getitem__(self, name: str) -> type[T]:
        try:
            return self._entries[name]
        except KeyError:
            raise FusionError(f"unknown {self.what} {name!r}; there are: {', '.join(self)}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))
