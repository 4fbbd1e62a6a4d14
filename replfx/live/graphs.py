"""Blocks that are graphs: their synthesised parameters are calls of the synthesis, in the place of attributes."""

from collections.abc import Collection, Mapping

from torch import fx, nn

from replfx.live.classes import SUBMODULE

__all__ = ["bring_to_life", "calls_synthesis", "settle_graph"]


def bring_to_life(graph_module: fx.GraphModule, names: Collection[str]) -> None:
    """Let the graph ask its submodule `replfx` for these parameters, where it had attributes.

    Args:
        graph_module: changed in place; the parameters are none of its own any more.
        names: of parameters that the graph reads itself.
    """
    graph = graph_module.graph
    for node in [node for node in graph.nodes if node.op == "get_attr" and node.target in names]:
        with graph.inserting_before(node):
            made = graph.call_module(SUBMODULE, (node.target,))
        made.meta.update(node.meta)
        node.replace_all_uses_with(made)
        graph.erase_node(node)
    for name in names:
        path, _, leaf = name.rpartition(".")
        graph_module.get_submodule(path)._parameters.pop(leaf, None)
    graph_module.recompile()


def calls_synthesis(node: fx.Node) -> bool:
    """Whether the node stands for a synthesised parameter."""
    return node.op == "call_module" and node.target == SUBMODULE


def settle_graph(graph_module: fx.GraphModule, values: Mapping[str, nn.Parameter]) -> None:
    """Let the graph read attributes again; the other way round."""
    graph = graph_module.graph
    for name, value in values.items():
        path, _, leaf = name.rpartition(".")
        graph_module.get_submodule(path)._parameters[leaf] = value
    for node in [node for node in graph.nodes if calls_synthesis(node)]:
        with graph.inserting_before(node):
            made = graph.get_attr(str(node.args[0]))
        made.meta.update(node.meta)
        node.replace_all_uses_with(made)
        graph.erase_node(node)
    graph_module.recompile()
