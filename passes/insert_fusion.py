"""insert_fusion: modules with synthesised weights in the place of the planned regions of a graph."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from replfx.live import Synthesis
from replfx.regions.graph_module import without_regions
from replfx.regions.region import Region, replace_regions

__all__ = ["InsertFusion", "Insertion"]


@dataclass(frozen=True, eq=False)
class Insertion:
    """What takes the place of one region.

    Attributes:
        region: in the captured graph.
        path: where the module is to be in the graph's own module.
        module: takes `(activation, *extras)`.
        synthesis: of its weights.
    """

    region: Region
    path: str
    module: nn.Module
    synthesis: Synthesis


@dataclass(frozen=True, eq=False)
class InsertFusion(PassBase):
    """Put modules in the place of regions of a captured graph.

    The captured model stays as it is, and the result is a fresh GraphModule that shares its parameters.

    Attributes:
        insertions: the regions that are replaced.
        blocks: all regions of the chains with the modules that stand for them, of which the syntheses read.
    """

    insertions: Sequence[Insertion]
    blocks: Sequence[tuple[Region, nn.Module]]

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Make a graph that calls a module in the place of each region."""
        replace_regions(graph_module, [(each.region, each.path, each.module) for each in self.insertions])
        fresh = without_regions(graph_module, [each.region for each in self.insertions])
        homes = self._homes()

        def home(owner: nn.Module, leaf: str) -> tuple[nn.Module, str]:
            """Where a parameter of a region is in the fresh graph; those of called modules are where they were."""
            if (id(owner), leaf) not in homes:
                return owner, leaf
            path, _, name = homes[id(owner), leaf].rpartition(".")
            return fresh.get_submodule(path), name

        for each in self.insertions:
            each.synthesis.rebind(home)
            each.synthesis.names = {**each.region.modules, **each.region.buffers, **each.region.parameters}
        return PassResult(fresh, True)

    def _homes(self) -> Mapping[tuple[int, str], str]:
        """For each parameter that a region reads itself, by owner and name in the region's module, its path."""
        homes = dict[tuple[int, str], str]()
        for region, module in self.blocks:
            for name, path in region.parameters.items():
                owner, _, leaf = name.rpartition(".")
                if owner.partition(".")[0] not in region.modules:
                    homes[id(module.get_submodule(owner)), leaf] = path
        return homes
