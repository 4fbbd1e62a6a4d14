"""traced_candidates: the calls in a graph by Dynamo that may be blocks, and blocks as regions of that graph.

Such a graph has no modules to swap. So more is asked of a call than of one in a captured graph: it gives the rest of
the graph one value, changes none of others, and what it reads is its own.
"""

from collections.abc import Mapping

from torch import fx, nn

from replfx.chains.candidates import Candidates
from replfx.regions.obstacles import unfit_to_cut
from replfx.regions.region import Region
from replfx.regions.stream import Stream
from replfx.tracing import CaptureInfo, ModuleCall, nodes_in

__all__ = ["TracedCandidates", "region_of_call"]


class TracedCandidates(Candidates):
    """Looks for candidates among the stand-ins of one graph by Dynamo."""

    def __init__(self, info: CaptureInfo, graph_module: fx.GraphModule) -> None:
        super().__init__(info)
        self._stream = Stream(graph_module)

    def _unfit(self, call: ModuleCall, module: nn.Module) -> str | None:
        """Also why the call's nodes cannot be a region of the graph."""
        if reason := super()._unfit(call, module):
            return reason
        nodes = [node for node in self.info.nodes[call.start : call.stop] if node.op != "get_attr"]
        return unfit_to_cut(self._stream, call, nodes, module)


def region_of_call(info: CaptureInfo, call: ModuleCall, output: fx.Node, names: Mapping[str, str]) -> Region:
    """The region of the graph that a call is.

    Args:
        info: of the graph.
        call: of a module or a window.
        output: which of its results is the main activation; the others go to the graph's caller alone.
        names: for the paths of the modules that make up the block, the names that they have in it.
    """
    inside = [node for node in info.nodes[call.start : call.stop] if node.op != "get_attr"]
    read = {node for each in inside for node in each.all_input_nodes if node.op == "get_attr"} - set(call.args)
    own = {str(node.target) for node in read}
    parameters, buffers = dict[str, str](), dict[str, str]()
    for path, name in names.items():
        module = info.root.get_submodule(path)
        for found, tensors in ((parameters, module.named_parameters()), (buffers, module.named_buffers())):
            targets = {f"{name}.{inner}".strip("."): f"{path}.{inner}" for inner, _ in tensors}
            found.update({inner: target for inner, target in targets.items() if target in own})
    return Region(
        nodes=(*(node for node in info.nodes if node in read), *inside),
        input=call.args[0],
        output=output,
        extras=call.args[1:],
        parameters=parameters,
        buffers=buffers,
        module=call.path,
        aside=tuple(node for node in nodes_in(call.output) if node is not output),
    )
