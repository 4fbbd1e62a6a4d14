"""Twins: blocks of which it is proven that whatever is measured on one holds for the other.

To run a block alone takes longer than all else in a plan, and the blocks of one model are mostly the same thing over
and over. Two are twins if nothing that a measurement sees tells them apart: what their modules are and how they are
set, what their part of the graph does, what they are given, whether they are added to it, and what their neighbours
are. Weights' values don't count, for these are drawn (`replfx.operators.probe`). Blocks of which it cannot be seen, as
of two objects that may be alike, are no twins.
"""

import hashlib
from collections.abc import Hashable, Iterator
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn

from replfx.modules.structure import signature
from replfx.modules.tree import attributes_of
from replfx.operators.base import Site
from replfx.operators.outer_sum import is_branch
from replfx.operators.probe import makers_of

__all__ = ["twin_key"]

_VALUES = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.layout, torch.Size)
_MOST = 1 << 22  # numbers in a buffer; a larger one is not worth hashing


def twin_key(site: Site) -> Hashable | None:
    """What is the same for twins and for no others; None if it can't be said of this block."""
    try:
        sides = tuple(None if side is None else tuple(signature(side).items()) for side in (site.previous, site.next))
        about = _frozen(site.interface.to_dict()), site.shape, is_branch(site)
        return *about, tuple(_modules(site.block)), _graph(site), sides
    except _Unlike:
        return None


class _Unlike(Exception):  # noqa: N818 - an answer, not an error
    """Something can't be told from its like."""


def _frozen(value: Any) -> Hashable:
    """A value as one that is equal for equal values of one type; objects are equal to themselves alone."""
    if isinstance(value, float):
        return "float", value.hex()
    if isinstance(value, _VALUES):
        return type(value), value
    if isinstance(value, tuple | list):
        return type(value), tuple(map(_frozen, value))
    if isinstance(value, set | frozenset):
        return type(value), frozenset(map(_frozen, value))
    if isinstance(value, dict):
        return type(value), tuple((_frozen(key), _frozen(item)) for key, item in value.items())
    if isinstance(value, slice):
        return slice, _frozen((value.start, value.stop, value.step))
    if isinstance(value, Tensor | nn.Module):
        raise _Unlike
    if isinstance(value, type | FunctionType | BuiltinFunctionType):
        return value
    return type(value), id(value)


# ---- the block


def _modules(block: nn.Module) -> Iterator[Hashable]:
    """What each module of it is: its class, settings, parameters and buffers."""
    seen: dict[int, int] = {}
    for path, module in block.named_modules(remove_duplicate=False):
        yield path, type(module), seen.setdefault(id(module), len(seen))
        yield tuple((name, _frozen(value)) for name, value in attributes_of(module))
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            yield name, None if tensor is None else (seen.setdefault(id(tensor), len(seen)), *_tensor(tensor))


def _tensor(tensor: Tensor) -> tuple[Hashable, ...]:
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise _Unlike
    about = type(tensor), tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device.type, tensor.requires_grad
    return about if isinstance(tensor, nn.Parameter) else (*about, _digest(tensor))


def _digest(tensor: Tensor) -> str:
    """A hash of a buffer's numbers, which are not drawn."""
    if tensor.device.type == "meta":
        return "none"
    if type(tensor) is not Tensor or tensor.device.type != "cpu" or tensor.numel() > _MOST:
        raise _Unlike
    numbers = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(numbers.numpy().tobytes()).hexdigest()


# ---- its part of the graph


def _graph(site: Site) -> Hashable:
    """What it computes, and of what: its nodes, and what is known of those outside that it reads."""
    numbers: dict[fx.Node, int] = {site.input: -1}
    facts: list[Hashable] = [_made(site), _meta(site.input)]
    for node in site.nodes:
        for term in node.all_input_nodes:
            if term not in numbers:  # it is from outside
                numbers[term] = len(numbers)
                facts.append(_outer(site, term))
        numbers[node] = len(numbers)
        facts.append((node.op, _target(site, node), _arguments(node, numbers), _meta(node)))
    return tuple(facts), numbers[site.output]


def _arguments(node: fx.Node, numbers: dict[fx.Node, int]) -> Hashable:
    return _frozen(fx.node.map_arg((node.args, node.kwargs), lambda term: _Numbered(numbers[term])))


class _Numbered(str):
    """In the place of a node: its number, as a value of a type that no model has."""

    __slots__ = ()


def _target(site: Site, node: fx.Node) -> Hashable:
    if node.op not in ("call_module", "get_attr"):
        return node.target
    target = str(node.target)
    return ("own", site.inside(node)) if site.holds(target) else ("other", target)


def _outer(site: Site, node: fx.Node) -> Hashable:
    """A value from outside: numbers of its type are drawn; of any other it must be the same node."""
    if node.op == "get_attr":
        return _target(site, node)
    known = isinstance(node.meta.get("dtype"), torch.dtype) and node.meta.get("shape") is not None
    return _meta(node) if known else node


def _meta(node: fx.Node) -> Hashable:
    return _frozen((node.meta.get("shape"), node.meta.get("dtype")))


def _made(site: Site) -> Hashable:
    """The operations without weights that made the activation, for a probe draws what they give."""
    found: list[Hashable] = []
    root = site.input.graph.owning_module
    for node in makers_of(site.input):
        what: Hashable = node.target
        if node.op == "call_module":
            assert root is not None
            what = tuple(_modules(root.get_submodule(str(node.target))))
        (before,) = node.all_input_nodes
        found.append((node.op, what, _arguments(node, {before: 0}), _meta(before)))
    return tuple(found)
