"""What a dry run leaves behind: a fake tensor or a proxy in a cache that outlives the run.

Model code fills caches of its own: `functools.lru_cache`, class attributes, dictionaries of its Python module.
A trace runs that code too, and what it would leave there is no real tensor: the user's model would break on it.
"""

from __future__ import annotations

import functools
import gc
import sys
import types
import weakref
from typing import Any

import torch
from torch import nn
from torch.fx import Proxy
from torch.utils import _pytree as pytree

__all__ = ["Traces"]

_LRU: type[Any] = type(functools.lru_cache(lambda: None))
_CONTAINERS = (tuple, list, dict, set)
_DEPTH = 4  # containers between a cache and a tensor in it


class Traces:
    """Knows what a dry run made, and the namespaces as they were before it.

    From its making until `close`, Python's cyclic garbage collector is off.

    Args:
        model: the classes of its modules are looked after.
    """

    def __init__(self, model: nn.Module) -> None:
        self._collecting = gc.isenabled()
        gc.disable()
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
            if self._collecting:
                gc.enable()

    def note(self, value: object) -> None:
        """The dry run made it."""
        for leaf in (value,) if isinstance(value, torch.Tensor | Proxy) else pytree.tree_leaves(value):
            if isinstance(leaf, torch.Tensor | Proxy):
                self._made.append(weakref.ref(leaf))

    def _alive(self) -> list[Any]:
        return [value for ref in self._made if (value := ref()) is not None]

    def clear(self) -> bool:
        """Take out of the caches what the dry run left there; whether all of it is gone.

        To be called when nothing of the dry run is referred to any more.
        """
        for step in (_collect_young, self._clear_lru_caches, self._restore_namespaces, self._release_all, gc.collect):
            if not self._alive():
                break
            step()
        left = self._alive()
        self._made = [weakref.ref(value) for value in left]
        return not left

    def _clear_lru_caches(self) -> None:
        values: list[Any] = self._alive()
        seen = {id(values), id(self.__dict__)}
        for _ in range(_DEPTH):
            holders = [holder for holder in gc.get_referrers(*values) if id(holder) not in seen]
            for holder in holders:
                if isinstance(holder, _LRU):
                    holder.cache_clear()
            values = [h for h in holders if isinstance(h, _CONTAINERS) or _is_link(h)]
            seen.update(map(id, (holders, values, *values)))
            if not values:
                break

    def _release_all(self) -> None:
        left = self._alive()
        for _ in range(_DEPTH):
            left = self._release(left)
            if not left:
                break

    def _restore_namespaces(self) -> None:
        left = {id(value) for value in self._alive()}
        for owner, before in self._namespaces:
            for key, value in list(vars(owner).items()):
                if id(value) in left and before.get(key) is not value:
                    if key in before:
                        setattr(owner, key, before[key])
                    else:
                        delattr(owner, key)

    def _release(self, values: list[Any]) -> list[Any]:
        """Take `values` out of what holds them; gives the holders that have to be taken out themselves."""
        ids = {id(value) for value in values}
        upwards: list[Any] = []
        for holder in gc.get_referrers(*values):  # goes through all objects there are, so once for all values
            if holder is values or holder is self.__dict__:
                continue
            if isinstance(holder, types.CellType):
                holder.cell_contents = None
            elif isinstance(holder, dict):
                for key in [key for key, item in holder.items() if id(item) in ids and not _is_link(item)]:
                    del holder[key]
            elif isinstance(holder, list):
                holder[:] = [item for item in holder if id(item) not in ids]
            elif isinstance(holder, set):
                holder.difference_update([item for item in holder if id(item) in ids])
            elif isinstance(holder, tuple) or _is_link(holder):
                upwards.append(holder)
        return upwards


def _collect_young() -> None:
    """Circles among what was made during the dry run: the collector was off, so all of it is young."""
    gc.collect(0)


def _is_link(value: object) -> bool:
    """Part of the list that a bounded `lru_cache` is; it goes with its cache."""
    return type(value).__name__ == "_lru_list_elem"
