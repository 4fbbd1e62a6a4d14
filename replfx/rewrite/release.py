"""release: let go of a graph that has done its work."""

import gc
from dataclasses import dataclass

from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from replfx.chains.chain import CHAINS_KEY
from replfx.tracing import info_of

__all__ = ["Release"]

_MANY = 2_000  # nodes


@dataclass(frozen=True)
class Release(PassBase):
    """Drop all nodes, modules and chains: of a deep model they take more memory than verifying it does.

    Where the blocks are modules, the model itself is rewritten, and the graph is no longer needed then. What the
    capture knows without nodes stays: notes, and the shapes of the outputs.
    """

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Leave an empty graph."""
        info = info_of(graph_module)
        many = len(info.nodes) > _MANY
        info.root, info.nodes, info.calls = nn.Module(), [], []
        graph_module.meta.pop(CHAINS_KEY, None)
        graph_module._modules.clear()
        graph_module.graph = fx.Graph()
        if many:  # they refer to each other, so that only the collector frees them; of few it is not worth its time
            gc.collect()
        return PassResult(graph_module, True)
