"""Objects that hold tensors, as nodes of a graph: dataclasses, model outputs, named tuples, caches."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import Tensor

from replfx.modules.tree import parts_of, tensors_in

__all__ = ["Rebuild"]


@dataclasses.dataclass(frozen=True)
class _Slot:
    """The place of one tensor."""

    index: int


@dataclasses.dataclass(frozen=True)
class _Made:
    """An object of class `kind`, with what its container holds and with its attributes."""

    kind: type[Any]
    items: Any
    attributes: dict[str, Any]

    def make(self, fill: Callable[[Any], Any]) -> Any:
        """Put it together again, without calling its constructor."""
        items = fill(self.items)
        made = object.__new__(self.kind) if items is None else self._container(items)
        for name, value in self.attributes.items():
            object.__setattr__(made, name, fill(value))
        return made

    def _container(self, items: Any) -> Any:
        if isinstance(items, tuple):
            return tuple.__new__(self.kind, items)
        made: Any = self.kind.__new__(self.kind)  # type: ignore[call-overload]
        if isinstance(items, dict):
            plain = OrderedDict if isinstance(made, OrderedDict) else dict  # a subclass may forbid its own setters
            for key, value in items.items():
                plain.__setitem__(made, key, value)
        else:
            list.extend(made, items)
        return made


class Rebuild:
    """The target of a node that makes a copy of an object around the tensors that it is called with.

    Without tensors in it, it is a constant that source code cannot spell.
    """

    def __init__(self, value: object) -> None:
        self.tensors: list[Tensor] = []
        self._template = self._cut(value)
        self.__name__ = self.__qualname__ = f"rebuild_{type(value).__name__}"
        self.__module__ = __name__

    def forget(self) -> list[Tensor]:
        """The tensors that it was made with, in the order in which it is to be called with others."""
        tensors, self.tensors = self.tensors, []
        return tensors

    def __call__(self, *tensors: Tensor) -> Any:
        def fill(item: Any) -> Any:
            if isinstance(item, _Slot):
                return tensors[item.index]
            if isinstance(item, _Made):
                return item.make(fill)
            if type(item) in (list, tuple):
                return type(item)(fill(part) for part in item)
            if type(item) is dict:
                return {key: fill(part) for key, part in item.items()}
            if isinstance(item, slice):
                return slice(fill(item.start), fill(item.stop), fill(item.step))
            return item

        return fill(self._template)

    def _cut(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            self.tensors.append(value)
            return _Slot(len(self.tensors) - 1)
        if not tensors_in(value):
            return value
        if isinstance(value, slice):
            return slice(*(self._cut(part) for _, part in parts_of(value)))
        items: Any = None
        if isinstance(value, dict):
            items = {key: self._cut(part) for key, part in value.items()}
        elif isinstance(value, tuple | list):
            items = (tuple if isinstance(value, tuple) else list)(self._cut(part) for part in value)
        if type(value) in (dict, tuple, list):
            return items
        attributes = {key: self._cut(part) for key, part in getattr(value, "__dict__", {}).items()}
        return _Made(type(value), items, attributes)
