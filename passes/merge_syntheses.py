"""merge_syntheses: what is made of parameters twice in one step is made once."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from replfx.dynamo.nodes import epochs, handed_out, is_untouched, made_of_parameters, storages
from replfx.passes import Rewrite

__all__ = ["MergeSyntheses"]


@dataclass(frozen=True)
class MergeSyntheses(Rewrite[tuple[fx.Node, fx.Node]]):
    """Merge equal computations from parameters alone, over Dynamo's graph.

    A block that is called twice, or reads a weight twice, synthesises twice, and two blocks that read one neighbour
    scale its gradient twice. In the backward pass the gradients of all uses are summed first, and then go through
    once. What the model hands out stays: the caller may write into one of two equal results.
    """

    def find(self, graph: fx.Graph) -> Iterator[tuple[fx.Node, fx.Node]]:
        """Nodes with the first that is equal to them."""
        first: dict[object, fx.Node] = {}
        stretch, kept = epochs(graph), handed_out(graph)
        for node in made_of_parameters(graph):
            if node.op == "placeholder" or not kept.isdisjoint(storages([node])):
                continue
            if not all(map(is_untouched, (node, *node.all_input_nodes))):
                continue
            # A node prints as its name, and arguments that were merged before are the same by now.
            key = (node.op, node.target, repr(node.args), repr(node.kwargs), stretch[node])
            known = first.setdefault(key, node)
            if known is not node:
                yield node, known

    def rewrite(self, graph: fx.Graph, candidate: tuple[fx.Node, fx.Node]) -> None:
        """Let the first of equal nodes stand for another."""
        node, known = candidate
        node.replace_all_uses_with(known)
        graph.erase_node(node)
