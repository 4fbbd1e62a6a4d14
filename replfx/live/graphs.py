"""Blocks that are graphs: their synthesised parameters are calls of the synthesis, in the place of attributes."""

from collections.abc import Collection, Mapping

from torch import fx, nn

from replfx.live.classes import SUBMODULE

__all__ = ["make_graph_computed", "make_graph_plain"]


def make_graph_computed(graph_module: fx.GraphModule, names: Collection[str]) -> None:
    """Let the graph ask its submodule `replfx` for these parameters, which are none of its own any more."""
    graph = graph_module.graph
    for node in [node for node in graph.find_nodes(op="get_attr") if node.target in names]:
        with graph.inserting_before(node):
            made = graph.call_module(SUBMODULE, (node.target,))
        node.replace_all_uses_with(made, propagate_meta=True)
        graph.erase_node(node)
    for name in names:
        path, _, leaf = name.rpartition(".")
        graph_module.get_submodule(path)._parameters.pop(leaf, None)
    graph_module.recompile()


def make_graph_plain(graph_module: fx.GraphModule, values: Mapping[str, nn.Parameter]) -> None:
    """Undo `make_graph_computed`, with these values for the parameters by name."""
    graph = graph_module.graph
    for node in graph.find_nodes(op="call_module", target=SUBMODULE):
        name = str(node.args[0])
        path, _, leaf = name.rpartition(".")
        graph_module.get_submodule(path)._parameters[leaf] = values[name]
        with graph.inserting_before(node):
            made = graph.get_attr(name)
        node.replace_all_uses_with(made, propagate_meta=True)
        graph.erase_node(node)
    graph_module.recompile()
