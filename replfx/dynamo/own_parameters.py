"""own_parameters: Dynamo's graph with its parameters as attributes, as the passes over captured graphs expect them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from replfx.dynamo.nodes import path_in_model, value_of
from replfx.dynamo.placeholder_modules import modules_of
from replfx.regions.region import put_value
from replfx.torch_internals.dynamo import source_of
from replfx.tracing import CaptureInfo

__all__ = ["Owned", "own_parameters"]


@dataclass(frozen=True, eq=False)
class Owned:
    """A graph whose parameters and buffers are attributes.

    Attributes:
        graph_module: it, with a `CaptureInfo` of a root that owns the parameters.
        paths: for each input that Dynamo's graph had the attribute that it became, or None.
    """

    graph_module: fx.GraphModule
    paths: tuple[str | None, ...]


def own_parameters(graph_module: fx.GraphModule, inputs: Sequence[object]) -> Owned:
    """Make a fresh graph in which parameters and buffers are attributes instead of inputs.

    They have the names that they have in the model (`blocks.0.norm1.weight`), as far as Dynamo's source tells. What
    `torch.func.functional_call` put in a parameter's place becomes a parameter, of the same memory. All other inputs
    stay inputs, in the same order. The given graph stays as it is.

    Args:
        graph_module: Dynamo's graph.
        inputs: what it is called with.
    """
    root = nn.Module()
    for name, module in graph_module.named_children():  # bodies of checkpoints and branches
        root.add_module(name, module)
    graph, copied, owned = fx.Graph(), dict[fx.Node, fx.Node](), list[str | None]()
    values = iter(inputs)
    for node in graph_module.graph.nodes:
        path = _put(root, node, next(values)) if node.op == "placeholder" else None
        copied[node] = graph.node_copy(node, copied.__getitem__) if path is None else graph.get_attr(path)
        if node.target is torch.sym_sum:  # which Dynamo writes down but does not read
            copied[node].target = sum
        copied[node].meta = {**node.meta, **_shape_of(node)}
        if node.op == "placeholder":
            owned.append(path)
    made = fx.GraphModule(root, graph)
    made.meta["replfx"] = CaptureInfo("dynamo", root, list(graph.nodes), modules_of(graph, root), measured=True)
    return Owned(made, tuple(owned))


def _put(root: nn.Module, node: fx.Node, value: object) -> str | None:
    """Make a parameter or a buffer an attribute of the root's, and give its path; None for any other input."""
    name = source_of(node)
    if not name or not isinstance(value, Tensor):
        return None
    if not isinstance(value, nn.Parameter):
        if "._parameters[" in name:
            value = nn.Parameter(value.detach())
        elif "._buffers[" not in name:
            return None
    *owners, leaf = path_in_model(name).split(".")
    holder, path = root, []
    for owner in (*owners, leaf):
        while owner in holder._parameters or owner in holder._buffers:  # two tensors whose names differ in signs alone
            owner += "_"
        path.append(owner)
        if len(path) <= len(owners):
            if owner not in holder._modules:
                holder.add_module(owner, nn.Module())
            holder = holder.get_submodule(owner)
    put_value(holder, path[-1], value)
    return ".".join(path)


def _shape_of(node: fx.Node) -> Mapping[str, Any]:
    value = value_of(node)
    if isinstance(value, Tensor):
        return {"shape": _sizes(value)}
    if isinstance(value, tuple | list):
        return {"shape": tuple(_sizes(item) if isinstance(item, Tensor) else None for item in value)}
    return {}


def _sizes(tensor: Tensor) -> tuple[int, ...]:
    """The sizes as they are in this call: to ask a symbolic one whether it equals another would add a guard."""
    sizes: Sequence[Any] = tensor.shape
    return tuple(size if type(size) is int else size.node.hint or 0 for size in sizes)
