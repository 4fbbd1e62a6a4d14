"""Writes: which values a node changes in place, and whether a piece of a graph changes more than its own."""

import inspect
import re
import types
from collections.abc import Iterator
from functools import cache

from torch import Tensor, fx, nn

from replfx.regions.flat_graph import FlatGraph
from replfx.torch_internals import Dropout
from replfx.tracing import name_of

__all__ = ["written_outside"]

# What gives (or may give) its first argument's memory, so that a change of one is a change of the other.
_VIEWS = re.compile(
    "(feature_)?(alpha_)?dropout[123]?d?|broadcast_to|chunk|contiguous|detach|diagonal|expand|expand_as|flatten|float|"
    "getattr|getitem|movedim|narrow|permute|ravel|reshape|select|split|squeeze|swapaxes|swapdims|t|tensor_split|to|"
    "transpose|type_as|unbind|unflatten|unsqueeze|view|view_as"
)
_WRITES = re.compile("_*(setitem|i(add|and|floordiv|lshift|matmul|mod|mul|or|pow|rshift|sub|truediv|xor))_*")
_VIEW_MODULES = (nn.Identity, nn.Flatten, nn.Unflatten, Dropout)


def written_outside(stream: FlatGraph, start: int, stop: int, source: fx.Node) -> fx.Node | None:
    """The node in `[start, stop)` that changes a value from outside, if there is one.

    `source`, the main activation, may be changed if nothing outside reads it (`x += f(x)` in a layer), unless it
    is an input of the model. So may a buffer that nothing outside reads.
    """
    for position in range(start, stop):
        for value in _written(stream, stream.nodes[position]):
            base = value
            while stream.position.get(base, -1) >= start and (viewed := _viewed(stream, base)) is not None:
                base = viewed
            if stream.position.get(base, -1) >= start or _is_own_buffer(stream, base, start, stop):
                continue
            spent = base is source and base.op not in ("placeholder", "get_attr")
            if not spent or stream.last[stream.position[base]] >= stop:
                return stream.nodes[position]
    return None


def _is_own_buffer(stream: FlatGraph, node: fx.Node, start: int, stop: int) -> bool:
    value = stream.values.get(node)
    if not isinstance(value, Tensor) or isinstance(value, nn.Parameter):
        return False
    return stream.reads_only_in(value, start, stop)


def _written(stream: FlatGraph, node: fx.Node) -> Iterator[fx.Node]:
    """The values that the node itself changes."""
    out = node.kwargs.get("out")
    if isinstance(out, fx.Node):
        yield out
    first = _first(node)
    if first is not None and _changes_first(stream, node):
        yield first


def _changes_first(stream: FlatGraph, node: fx.Node) -> bool:
    if node.op == "call_module":
        return bool(getattr(stream.module(node), "inplace", False))
    name = name_of(node)
    if _WRITES.fullmatch(name):
        return True
    if getattr(node.target, "__module__", "") == "_operator":
        return False  # and_, or_ and not_ are no writes
    return (name.endswith("_") and not name.endswith("__")) or _asks_for_it(node)


def _asks_for_it(node: fx.Node) -> bool:
    """Whether the call gives `inplace=True`, by name or by position."""
    if node.kwargs.get("inplace"):
        return True
    place = _place_of_inplace(node.target) if isinstance(node.target, types.FunctionType) else None
    return place is not None and place < len(node.args) and bool(node.args[place])


@cache
def _place_of_inplace(function: types.FunctionType) -> int | None:
    names = list(inspect.signature(function).parameters)
    return names.index("inplace") if "inplace" in names else None


def _viewed(stream: FlatGraph, node: fx.Node) -> fx.Node | None:
    """The value whose memory the node's result may be."""
    called = node.op == "call_module"
    view = isinstance(stream.module(node), _VIEW_MODULES) if called else _VIEWS.fullmatch(name_of(node))
    return _first(node) if view or _changes_first(stream, node) else None


def _first(node: fx.Node) -> fx.Node | None:
    value = node.args[0] if node.args else node.kwargs.get("input")
    return value if isinstance(value, fx.Node) else None
