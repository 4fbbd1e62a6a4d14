"""merge_syntheses: what fusion layers compute twice in one step is computed once."""

from dataclasses import dataclass

from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from replfx.passes.dynamo import epochs, in_fusion_layer, is_pure, is_untouched

__all__ = ["MergeSyntheses"]


@dataclass(frozen=True)
class MergeSyntheses(PassBase):
    """Merge equal computations of fusion layers, over Dynamo's graph.

    A fusion layer that is called twice synthesises twice, and two layers that read one neighbour scale its
    gradient twice. In the backward pass the gradients of all uses are summed first, and then go through once.
    """

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Let the first of equal nodes stand for the others."""
        first: dict[object, fx.Node] = {}
        stretch = epochs(graph_module.graph)
        merged = False
        for node in list(graph_module.graph.nodes):
            if not (is_pure(node) and in_fusion_layer(node)):
                continue
            if not all(map(is_untouched, (node, *node.all_input_nodes))):
                continue
            # A node prints as its name, and arguments that were merged before are the same by now.
            key = (node.op, node.target, repr(node.args), repr(node.kwargs), stretch[node])
            known = first.setdefault(key, node)
            if known is not node:
                node.replace_all_uses_with(known)
                graph_module.graph.erase_node(node)
                merged = True
        if merged:
            graph_module.recompile()
        return PassResult(graph_module, merged)
