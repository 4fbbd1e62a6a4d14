"""traced_candidates: the calls in a graph by Dynamo that may be blocks, and blocks as regions of that graph.

Such a graph has no modules to swap. So more is asked of a call than of one in a captured graph: it gives the rest of
the graph one value, changes none of others, and what it reads is its own.
"""

from collections.abc import Mapping
from dataclasses import replace

from torch import fx, nn

from replfx.chains.candidates import Candidates
from replfx.chains.chain import Block
from replfx.modules.paths import region_path
from replfx.regions.flat_graph import FlatGraph
from replfx.regions.obstacles import unfit_to_cut
from replfx.regions.region import Region, region_module
from replfx.tracing import CaptureInfo, ModuleCall, nodes_in

__all__ = ["TracedCandidates"]


class TracedCandidates(Candidates):
    """Looks for candidates among the placeholder modules of one graph by Dynamo."""

    def __init__(self, info: CaptureInfo, graph_module: fx.GraphModule) -> None:
        super().__init__(info)
        self._stream = FlatGraph(graph_module)

    def path(self, of: str) -> str:
        """That of a region."""
        return region_path(of)

    def placed(self, block: Block) -> Block:
        """A block of placeholder modules as a region of the graph."""
        if block.region is not None:
            return block
        region = self._region(block.call, block.site.output, block.site.names)
        module = region_module(region, self.info.root, block.site.block)
        path = region_path(region.name)
        site = replace(block.site, path=path, block=module, nodes=region.nodes, names={})
        if region.aside:
            aside: list[object] = [{"computed": True} for _ in region.aside]
            output = {"tuple": [{"input": site.interface.main}, *aside]}
            site = replace(site, interface=replace(site.interface, output=output))
        return replace(block, call=replace(block.call, path=path), site=site, region=region)

    def _unfit(self, call: ModuleCall, module: nn.Module) -> str | None:
        """Also why the call's nodes cannot be a region of the graph."""
        return super()._unfit(call, module) or unfit_to_cut(self._stream, call, self._inside(call), module)

    def _region(self, call: ModuleCall, output: fx.Node, names: Mapping[str, str]) -> Region:
        """The region that a call is, `output` its main activation; what else it gives goes to the caller alone."""
        inside = self._inside(call)
        read = {node for each in inside for node in each.all_input_nodes if node.op == "get_attr"} - set(call.args)
        own = {str(node.target) for node in read}
        parameters, buffers = dict[str, str](), dict[str, str]()
        for path, name in names.items():
            module = self.info.root.get_submodule(path)
            for found, tensors in ((parameters, module.named_parameters()), (buffers, module.named_buffers())):
                targets = {f"{name}.{inner}".strip("."): f"{path}.{inner}" for inner, _ in tensors}
                found.update({inner: target for inner, target in targets.items() if target in own})
        return Region(
            nodes=(*(node for node in self.info.nodes if node in read), *inside),
            input=call.args[0],
            output=output,
            extras=call.args[1:],
            parameters=parameters,
            buffers=buffers,
            module=call.path,
            aside=tuple(node for node in nodes_in(call.output) if node is not output),
        )

    def _inside(self, call: ModuleCall) -> list[fx.Node]:
        return [node for node in self.info.nodes[call.start : call.stop] if node.op != "get_attr"]
