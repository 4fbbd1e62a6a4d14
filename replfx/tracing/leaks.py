"""What a dry run leaves behind: a fake tensor or a proxy in a cache that outlives the run.

Model code fills caches of its own: `functools.lru_cache`, class attributes, dictionaries of its Python module.
A trace runs that code too, and what it would leave there is no real tensor: the user's model would break on it. So
it is taken out again, and what was in its place before comes back.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import sys
import sysconfig
import types
import weakref
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.fx import Proxy

from replfx.torch_internals import pytree

__all__ = ["Traces"]

_LRU: type[Any] = type(functools.lru_cache(lambda: None))
_CONTAINERS = (tuple, list, dict, set)
_CLOSED = (type, types.ModuleType, torch.Tensor, nn.Module, str, bytes, int, float, bool, type(None))
_YOUNG, _NEVER = 50_000, 2**31 - 1  # objects: circles of a trace are as large as the model's graph, if they add up
_DEPTH = 4  # containers between a cache and a tensor in it
_WIDE, _MANY = 1_000, 20_000  # items of a container, and objects, that are remembered: a user may hold a data set
_STANDARD = sysconfig.get_path("stdlib")

_Known: TypeAlias = dict[int, tuple[object, Any]]
"""By its id: something that holds others, and a copy of what it held before."""


class Traces:
    """Knows what a dry run made, and the namespaces as they were before it.

    From its making until `close`, Python's cyclic garbage collector leaves old objects alone, so that what was made
    meanwhile stays young and can be asked for without the rest.

    Args:
        model: the classes of its modules are looked after, and the Python modules. In classes, in their modules, and in
            those that are not installed but the user's own, also what is held by containers, closures and objects comes
            back; objects of other libraries get None in its place.
    """

    def __init__(self, model: nn.Module) -> None:
        self._thresholds = gc.get_threshold()
        gc.set_threshold(_YOUNG, _NEVER, _NEVER)
        self._made: list[weakref.ref[Any]] = []
        self._namespaces: list[tuple[Any, dict[str, Any]]] = []
        self._known: _Known = {}
        homes = {"__main__"}
        for cls in {base for module in model.modules() for base in type(module).__mro__}:
            if not cls.__module__.startswith(("torch.", "builtins")):
                self._namespaces.append((cls, dict(vars(cls))))
                homes.add(cls.__module__)
                _remember(dict(vars(cls)), self._known)
        for name, module in list(sys.modules.items()):
            if isinstance(module, types.ModuleType) and not name.startswith("torch."):
                self._namespaces.append((module, dict(vars(module))))
                if name in homes or _is_the_users(module):
                    _remember(dict(vars(module)), self._known)

    def __enter__(self) -> Traces:
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        self.close(failed=kind is not None)

    def close(self, failed: bool = False) -> None:
        """Clear, and let the garbage collector run again, which frees nothing of what has `failed`."""
        try:
            if failed:
                self._clean()
            else:
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
                    _purge(value, left, self._known, seen)
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


def _is_the_users(module: types.ModuleType) -> bool:
    """Whether a Python module comes from the user, and not with Python, from an installed package or from replfx."""
    file = getattr(module, "__file__", None) or _STANDARD
    return not file.startswith(_STANDARD) and "-packages" not in file and not module.__name__.startswith("replfx")


def _remember(value: Any, known: _Known, depth: int = 0) -> None:
    """Note what containers, closures and objects hold that `_purge` may look into; of many or large ones only some."""
    if depth > _DEPTH or id(value) in known or isinstance(value, _CLOSED) or len(known) > _MANY:
        return
    if depth and isinstance(value, _CONTAINERS) and len(value) > _WIDE:
        return
    named = not isinstance(value, tuple) and type(value) not in (list, set)
    held: Any = dict(_table(value)) if named else list(tuple.__iter__(value) if isinstance(value, tuple) else value)
    known[id(value)] = value, held
    parts = list(held.values()) if named else list(held)
    for cell in _cells(value):
        known[id(cell)] = cell, _contents(cell)
        parts += _contents(cell)
    for part in parts:
        _remember(part, known, depth + 1)


def _purge(value: Any, left: set[int], known: _Known, seen: set[int], depth: int = 0) -> bool:
    """Take what was left out of a container, a closure or an object's attributes; whether `value` has to go itself.

    What was there before is put back, if that is known. Runs no code of the objects: some load a whole library when
    they are iterated.
    """
    if id(value) in left:
        return True
    if depth > _DEPTH or id(value) in seen or isinstance(value, _CLOSED):
        return False
    seen.add(id(value))

    def gone(item: Any) -> bool:
        return _purge(item, left, known, seen, depth + 1)

    if isinstance(value, tuple):
        return sum(gone(item) for item in tuple.__iter__(value)) > 0  # a sum, so that every item is looked into
    if type(value) in (list, set):
        taken = {id(item) for item in value if gone(item)}
        _, before = known.get(id(value), (value, None))
        if taken:
            stays = [item for item in value if id(item) not in taken] if before is None else before
            value.clear()
            value.extend(stays) if type(value) is list else value.update(stays)
    else:
        _purge_names(value, gone, known)
    return False


def _purge_names(value: Any, gone: Callable[[Any], bool], known: _Known) -> None:
    """The same for what has names: keys, attributes, variables of a closure."""
    table, (_, before) = _table(value), known.get(id(value), (value, None))
    names = [name for name, item in list(dict.items(table)) if gone(item)]
    if before is None:  # an attribute may be asked whether it is None
        before = {} if table is value else dict.fromkeys(names)
    for name in names:
        if name in before:
            dict.__setitem__(table, name, before[name])
        else:
            dict.__delitem__(table, name)
    for cell in _cells(value):
        if any(map(gone, _contents(cell))):
            _, contents = known.get(id(cell), (cell, ()))
            cell.cell_contents = contents[0] if contents else None


def _table(value: Any) -> dict[Any, Any]:
    """A dictionary itself, or that of an object's attributes; an empty one if it has none."""
    if isinstance(value, dict):
        return value
    with contextlib.suppress(AttributeError, TypeError):
        attributes = object.__getattribute__(value, "__dict__")
        return attributes if isinstance(attributes, dict) else {}
    return {}


def _cells(value: Any) -> tuple[types.CellType, ...]:
    return (value.__closure__ or ()) if isinstance(value, types.FunctionType) else ()


def _contents(cell: types.CellType) -> list[Any]:
    with contextlib.suppress(ValueError):  # an empty one
        return [cell.cell_contents]
    return []


def _is_link(value: object) -> bool:
    """Part of the list that a bounded `lru_cache` is; it goes with its cache."""
    return type(value).__name__ == "_lru_list_elem"
