"""hoist_syntheses: split off what is computed from parameters alone, so that it can be kept.

It is none of the passes: one graph becomes two, and what runs in between is the backend's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from replfx.dynamo.nodes import (
    epochs,
    handed_out,
    is_plain,
    is_untouched,
    made_of_parameters,
    storages,
    tensors_of,
    value_of,
)
from replfx.torch_internals.dynamo import set_source

__all__ = ["Hoisted", "hoist_syntheses"]


@dataclass(frozen=True)
class Hoisted:
    """What was split off.

    Attributes:
        graph_module: parameters → tuple of values. The graph that it was split off from takes them as further
            inputs, behind its own.
        inputs: which of that graph's inputs are the parameters.
        examples: fake tensors that stand for the values.
    """

    graph_module: fx.GraphModule
    inputs: tuple[int, ...]
    examples: tuple[Any, ...]


def hoist_syntheses(graph_module: fx.GraphModule, operation: Callable[..., Any]) -> Hoisted | None:
    """Split off syntheses, products of them and so on, as far as no gradient goes through, from Dynamo's graph.

    These values change only with the parameters: with gradients disabled, or where all that they are made of is
    frozen. Values that something writes into, or that the model hands out, stay in the graph.

    Args:
        graph_module: Dynamo's graph, which is changed in place.
        operation: the batched synthesis.

    Returns:
        What was split off; None if there was nothing.
    """
    graph = graph_module.graph
    inner = _constant(graph, operation)
    # Of a view of a parameter there is nothing to compute.
    staying = handed_out(graph) | storages(node for node in inner if node.op == "placeholder")
    taken = [node for node in inner if _leaves(node, inner) and staying.isdisjoint(storages([node]))]
    if not taken:
        return None
    hoisted = _copy_out(graph, inner, taken)
    for index, node in enumerate(taken):
        _feed(graph, node, inner, f"replfx_hoisted_{index}")
    for node in reversed(inner):
        if not node.users and node.op != "placeholder":
            graph.erase_node(node)
    graph.lint()
    graph_module.recompile()
    return hoisted


def _constant(graph: fx.Graph, operation: Callable[..., Any]) -> dict[fx.Node, bool]:
    """The plain parameters, and what is made of them alone and never changed, in order; and whether it is computed."""
    stretch, found = epochs(graph), dict[fx.Node, bool]()
    for node, computed in made_of_parameters(graph, operation).items():
        steady = all(map(is_plain, tensors_of(node))) and is_untouched(node) and stretch[node] == 0
        if steady and all(before in found for before in node.all_input_nodes):
            found[node] = computed
    return found


def _leaves(node: fx.Node, inner: dict[fx.Node, bool]) -> bool:
    """Whether it is a computed tensor, without gradient, that something outside of the part reads."""
    value = value_of(node)
    constant = isinstance(value, Tensor) and not value.requires_grad
    return inner[node] and constant and any(user not in inner for user in node.users)


def _copy_out(graph: fx.Graph, inner: dict[fx.Node, bool], taken: list[fx.Node]) -> Hoisted:
    """The part as a graph of its own, with no more than what is taken needs."""
    needed = set(taken)
    for node in reversed(inner):
        if node in needed:
            needed.update(node.all_input_nodes)
    placeholders = graph.find_nodes(op="placeholder")
    part, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in [n for n in inner if n in needed]:
        copies[node] = part.node_copy(node, copies.__getitem__)
    part.output(tuple(copies[node] for node in taken))
    inputs = tuple(index for index, node in enumerate(placeholders) if node in needed)
    examples = tuple(value_of(node) for node in taken)
    return Hoisted(fx.GraphModule({}, part), inputs, examples)


def _feed(graph: fx.Graph, node: fx.Node, inner: dict[fx.Node, bool], name: str) -> None:
    """Let everything outside of the part read `node` from a new input behind all others."""
    last = graph.find_nodes(op="placeholder")[-1]
    with graph.inserting_after(last):
        made = graph.placeholder(name)
    made.meta.update(node.meta)
    set_source(made, name)
    node.replace_all_uses_with(made, delete_user_cb=lambda user: user not in inner)
