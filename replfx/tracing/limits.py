"""For which inputs, and in which mode, a captured graph holds: found by capturing again and comparing.

Python code sees sizes and `training` as plain values, so that a graph can go on with those that it was captured with.
Whether it does cannot be read off the model; it shows when another batch, or the other mode, gives another graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from replfx.errors import CaptureError
from replfx.modules.copying import structural_copy
from replfx.modules.structure import attribute_at
from replfx.tracing.capturing import capture_lazily
from replfx.tracing.info import info_of
from replfx.tracing.inputs import Inputs

__all__ = ["Limits", "limits_of"]


@dataclass(frozen=True)
class Limits:
    """What a graph holds for.

    Attributes:
        shapes: for each tensor among the inputs its sizes, None for those that may be others; None altogether if the
            graph is free of sizes.
        training: the only mode in which it holds; None if it holds in both.
    """

    shapes: tuple[tuple[int | None, ...], ...] | None
    training: bool | None


def limits_of(graph_module: fx.GraphModule, model: nn.Module, inputs: Inputs | None) -> Limits:
    """Find the limits of a graph that was just captured of `model` on `inputs`."""

    def same(model: nn.Module, inputs: Inputs | None) -> bool:
        try:
            other = capture_lazily(model, None if inputs is None else inputs.kwargs or inputs.args)
        except CaptureError:
            return False
        one_size = len(other.graph.nodes) == len(graph_module.graph.nodes)
        return one_size and all(map(_alike, _facts(graph_module), _facts(other)))

    other = structural_copy(model, plain=lambda tensor: tensor).train(not model.training)
    training = None if same(other, inputs) else model.training
    if inputs is None or info_of(graph_module).tracer == "symbolic":  # sizes are asked of proxies
        return Limits(None, training)
    tensors = inputs.tensors()
    free = {axis for axis in _axes(tensors) if all(same(model, _resized(inputs, axis, by)) for by in _CHANGES)}
    shapes = tuple(tuple(None if (d, n) in free else n for d, n in enumerate(tensor.shape)) for tensor in tensors)
    return Limits(shapes, training)


_CHANGES: tuple[Callable[[int], int], ...] = (lambda size: size + 1, lambda size: 2 * size)
_AXES = 8  # each costs two captures


def _axes(tensors: list[Tensor]) -> list[tuple[int, int]]:
    """Dimensions with their sizes: those that are alike in both, such as the batch's, can only change together."""
    found = dict.fromkeys((d, n) for tensor in tensors for d, n in enumerate(tensor.shape) if n)
    return list(found)[:_AXES]


def _resized(inputs: Inputs, axis: tuple[int, int], change: Callable[[int], int]) -> Inputs:
    dimension, size = axis

    def resized(tensor: Tensor) -> Tensor:
        if tensor.dim() <= dimension or tensor.shape[dimension] != size:
            return tensor
        index = torch.arange(change(size), device=tensor.device).remainder(size)
        return tensor.detach().index_select(dimension, index).requires_grad_(tensor.requires_grad)

    return inputs.map(resized)


def _facts(graph_module: fx.GraphModule) -> Iterator[tuple[Any, ...]]:
    """What each node does, free of the nodes' names; last the constant that it reads, or None."""
    root = info_of(graph_module).root
    places = {node: f"%{place}" for place, node in enumerate(graph_module.graph.nodes)}
    for node in places:
        value = attribute_at(root, str(node.target)) if node.op == "get_attr" else None
        held = value if isinstance(value, Tensor) and not isinstance(value, nn.Parameter) else None
        yield node.op, node.target, fx.node.map_arg((node.args, node.kwargs), places.__getitem__), held


def _alike(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    *facts, tensor = one
    *others, another = other
    if isinstance(tensor, Tensor) and isinstance(another, Tensor):
        return facts == others and (tensor is another or torch.equal(tensor, another))
    return facts == others and tensor is another
