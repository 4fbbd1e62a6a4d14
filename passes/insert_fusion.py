"""insert_fusion: replace the regions of a graph that were planned."""

from dataclasses import dataclass

from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from replfx.chains.chain import CHAINS_KEY, chains_of
from replfx.chains.select import plan_of
from replfx.modules.paths import head_of
from replfx.regions.graph_module import without_regions
from replfx.regions.region import replace_regions
from replfx.rewrite.build import build, stand_for_region
from replfx.tracing import info_of

__all__ = ["InsertFusion"]


@dataclass(frozen=True, eq=False)
class InsertFusion(PassBase):
    """Carry out the plan in the graph's meta on the graph, where the blocks are regions of it.

    The model stays as it is, and the result is a fresh GraphModule that shares its parameters.

    Attributes:
        model: the model that was captured.
    """

    model: nn.Module

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Make a graph that calls a module in the place of each planned region."""
        return PassResult(_rewrite_regions(graph_module, self.model), True)


def _rewrite_regions(graph_module: fx.GraphModule, model: nn.Module) -> fx.GraphModule:
    """A fresh graph in which modules with synthesised weights are called in the place of the planned regions."""
    plan, info = plan_of(graph_module), info_of(graph_module)
    blocks = {block.path: block for chain in chains_of(graph_module).chains for block in chain.blocks}
    built = {each.path: each for each in build(model, plan, {path: b.site.block for path, b in blocks.items()})}
    regions = {path: region for path in built if (region := blocks[path].region) is not None}
    stands = {path: stand_for_region(each) for path, each in built.items()}
    replace_regions(graph_module, [(region, head_of(model, path), stands[path]) for path, region in regions.items()])
    fresh = without_regions(graph_module, list(regions.values()))
    homes = dict[tuple[int, str], str]()
    for module, region in ((b.site.block, b.region) for b in blocks.values() if b.region is not None):
        for name, path in region.parameters.items():
            owner, _, leaf = name.rpartition(".")
            if owner.partition(".")[0] not in region.modules:
                homes[id(module.get_submodule(owner)), leaf] = path

    def home(owner: nn.Module, leaf: str) -> tuple[nn.Module, str]:
        """Where a parameter of a region is in the fresh graph; those of called modules are where they were."""
        if (id(owner), leaf) not in homes:
            return owner, leaf
        path, _, name = homes[id(owner), leaf].rpartition(".")
        return fresh.get_submodule(path), name

    for path, each in built.items():
        each.synthesis.rebind(home)
        each.synthesis.names = {**regions[path].modules, **regions[path].buffers, **regions[path].parameters}
    note = f"the blocks are no modules: {type(model).__name__} has become a torch.fx.GraphModule"
    recorded = "; it was recorded, and holds for inputs of these shapes" if info.rung == "recorded" else ""
    info.notes.append(note + recorded)
    # Not the chains: they speak of nodes that are gone, and each node of its neighbours, as deep as a copy can recurse.
    fresh.meta.update({key: value for key, value in graph_module.meta.items() if key != CHAINS_KEY})
    return fresh.train(model.training)
