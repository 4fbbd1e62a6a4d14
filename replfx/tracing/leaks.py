"""What a dry run leaves behind: a fake tensor or a proxy in a cache that outlives the run.

Model code fills caches of its own: `functools.lru_cache`, class attributes, dictionaries of its Python module.
A trace runs that code too, and what it would leave there is no real tensor: the user's model would break on it.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import sys
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.fx import Proxy
from torch.utils import _pytree as pytree

__all__ = ["Traces"]

_LRU: type[Any] = type(functools.lru_cache(lambda: None))
_CONTAINERS = (tuple, list, dict, set)
_CLOSED = (type, types.ModuleType, torch.Tensor, nn.Module, str, bytes, int, float, bool, type(None))
_YOUNG, _NEVER = 50_000, 2**31 - 1  # objects: circles of a trace are as large as the model's graph, if they add up
_DEPTH = 4  # containers between a cache and a tensor in it


class Traces:
    """Knows what a dry run made, and the namespaces as they were before it.

    From its making until `close`, Python's cyclic garbage collector leaves old objects alone, so that what was made
    meanwhile stays young and can be asked for without the rest.

    Args:
        model: the classes of its modules are looked after.
    """

    def __init__(self, model: nn.Module) -> None:
        self._thresholds = gc.get_threshold()
        gc.set_threshold(_YOUNG, _NEVER, _NEVER)
        self._made: list[weakref.ref[Any]] = []
        self._namespaces: list[tuple[Any, dict[str, Any]]] = []
        for cls in {base for module in model.modules() for base in type(module).__mro__}:
            if not cls.__module__.startswith(("torch.", "builtins")):
                self._namespaces.append((cls, dict(vars(cls))))
        for name, module in list(sys.modules.items()):
            if isinstance(module, types.ModuleType) and not name.startswith("torch."):
                self._namespaces.append((module, dict(vars(module))))

    def close(self) -> None:
        """Clear, and let the garbage collector run again."""
        try:
            self.clear()
        finally:
            gc.set_threshold(*self._thresholds)

    def note(self, value: object) -> None:
        """The dry run made it."""
        for leaf in (value,) if isinstance(value, torch.Tensor | Proxy) else pytree.tree_leaves(value):
            if isinstance(leaf, torch.Tensor | Proxy):
                self._made.append(weakref.ref(leaf))

    def _alive(self) -> list[Any]:
        return [value for ref in self._made if (value := ref()) is not None]

    def clear(self) -> bool:
        """Take out of the caches what the dry run left there; gives whether all of it is gone.

        The caller must hold nothing of the dry run any more.
        """
        # Circles among what was made during the dry run are in the first two generations.
        for step in (functools.partial(gc.collect, 1), self._clean, gc.collect):
            if not self._alive():
                break
            step()
        left = self._alive()
        self._made = [weakref.ref(value) for value in left]
        return not left

    def _clean(self) -> None:
        """Look into every cache for what was left; to ask for its holders would go through every object."""
        left = {id(value) for value in self._alive()}
        for cache in [thing for thing in gc.get_objects() if type(thing) is _LRU]:
            if cache.cache_info().currsize and _reaches(cache, left):
                cache.cache_clear()
        left = {id(value) for value in self._alive()}
        seen: set[int] = set()
        for owner, before in self._namespaces if left else ():
            for key, value in list(vars(owner).items()):
                if id(value) not in left:
                    _purge(value, left, seen)
                elif key in before:
                    setattr(owner, key, before[key])
                else:
                    delattr(owner, key)


def _reaches(cache: object, left: set[int]) -> bool:
    """Whether what an `lru_cache` keeps, in containers at most `_DEPTH` deep, is among what was left."""
    level, seen = [cache], {id(cache)}
    for _ in range(_DEPTH):
        below = [part for part in gc.get_referents(*level) if id(part) not in seen]
        if any(id(part) in left for part in below):
            return True
        level = [part for part in below if isinstance(part, _CONTAINERS) or _is_link(part)]
        seen.update(map(id, level))
    return False


def _purge(value: Any, left: set[int], seen: set[int], depth: int = 0) -> bool:
    """Take what was left out of a container, a closure or an object's attributes; whether `value` has to go itself.

    Runs no code of the objects: some load a whole library when they are iterated.
    """
    if id(value) in left:
        return True
    if depth > _DEPTH or id(value) in seen or isinstance(value, _CLOSED):
        return False
    seen.add(id(value))

    def gone(item: Any) -> bool:
        return _purge(item, left, seen, depth + 1)

    if isinstance(value, dict):
        for key in [k for k, item in list(dict.items(value)) if gone(item)]:
            dict.__delitem__(value, key)
    elif type(value) in (list, set):
        for item in [item for item in value if gone(item)]:
            value.remove(item) if type(value) is set else _remove(value, item)
    elif isinstance(value, tuple):
        return sum(gone(item) for item in tuple.__iter__(value)) > 0  # a sum, so that every item is looked into
    else:
        _purge_attributes(value, gone)
    return False


def _remove(values: list[Any], gone: object) -> None:
    values[:] = [item for item in values if item is not gone]  # `remove` would compare tensors


def _purge_attributes(value: Any, gone: Callable[[Any], bool]) -> None:
    if isinstance(value, types.FunctionType):
        for cell in value.__closure__ or ():
            with contextlib.suppress(ValueError):  # an empty cell
                if gone(cell.cell_contents):
                    cell.cell_contents = None
    with contextlib.suppress(AttributeError, TypeError):
        attributes = object.__getattribute__(value, "__dict__")
        for name in [n for n, item in list(attributes.items()) if gone(item)]:
            attributes[name] = None


def _is_link(value: object) -> bool:
    """Part of the list that a bounded `lru_cache` is; it goes with its cache."""
    return type(value).__name__ == "_lru_list_elem"
