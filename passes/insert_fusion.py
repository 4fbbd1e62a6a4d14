"""insert_fusion: put fusion layers in the place of the planned blocks. The only pass that changes a model."""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import count
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.node import base_types
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from replfx.blocks import head_of, put_blocks
from replfx.building import build_layers
from replfx.errors import FusionError, ReadFromOutsideError
from replfx.fusion import FusionLayer
from replfx.passes.chains import CHAINS_KEY, chains_of
from replfx.passes.regions import replace_regions
from replfx.passes.rewritten import without_regions
from replfx.passes.select_blocks import plan_of
from replfx.passes.why_not import ancestors
from replfx.plans import has_regions
from replfx.tracing import CaptureInfo, ModuleCall, info_of, nodes_in

__all__ = ["InsertFusion"]


@dataclass(frozen=True, eq=False)
class InsertFusion(PassBase):
    """Carry out the plan in the graph's meta, on the model and on the graph.

    Where the blocks are regions of the graph, only the graph can be rewritten: then the model stays as it is, and
    the result is a fresh GraphModule that shares its parameters.

    Attributes:
        model: the model that was captured; its submodules are swapped in place.
    """

    model: nn.Module

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Swap submodules of the model, and give each a `call_module` node of the graph."""
        if has_regions(plan_of(graph_module)):
            return PassResult(_rewrite_regions(graph_module, self.model), True)
        layers = build_layers(self.model, plan_of(graph_module))
        info = info_of(graph_module)
        calls = {block.path: block.call for chain in chains_of(graph_module).chains for block in chain.blocks}
        _check_reads(graph_module.graph, layers, {path: info.nodes[c.start : c.stop] for path, c in calls.items()})
        put_blocks(self.model, layers)
        renamed: dict[fx.Node, fx.Node] = {}
        for path, layer in layers.items():
            _rewrite(graph_module, info, calls[path], layer, renamed)
        put_blocks(info.root, layers)
        graph_module.recompile()
        return PassResult(graph_module, bool(layers))


def _check_reads(graph: fx.Graph, layers: Mapping[str, FusionLayer], regions: Mapping[str, Sequence[fx.Node]]) -> None:
    """See what weights of replaced blocks the model reads itself.

    Raises:
        ReadFromOutsideError: weights that would be synthesised, but that the block could keep.
        FusionError: a weight that the layer has no place for.
    """
    inside = {node for path in layers for node in regions[path]}
    kept: dict[str, list[str]] = {}
    for node in graph.find_nodes(op="get_attr"):
        target = str(node.target)
        path = next((above for above in ancestors(target) if above in layers), None)
        if node in inside or path is None:
            continue
        name, layer = target.removeprefix(f"{path}."), layers[path]
        if name in layer.operator.vacant():
            kept.setdefault(path, []).append(name)
        elif not _has(layer, name):
            raise FusionError(
                f"`{path}`: the model reads its `{name}` itself, and {type(layer.operator).__name__} has none of it; "
                "take operator='block', or leave this block out of select="
            )
    if kept:
        raise ReadFromOutsideError(f"the model reads `{next(iter(kept))}`'s weights itself", kept)


def _has(layer: FusionLayer, name: str) -> bool:
    try:
        reduce(getattr, name.split("."), layer)
    except AttributeError:
        return False
    return True


def _rewrite_regions(graph_module: fx.GraphModule, model: nn.Module) -> fx.GraphModule:
    """A fresh graph in which fusion layers are called in the place of the planned regions."""
    plan, info = plan_of(graph_module), info_of(graph_module)
    blocks = {block.path: block for chain in chains_of(graph_module).chains for block in chain.blocks}
    layers = build_layers(model, plan, {path: block.site.block for path, block in blocks.items()})
    regions = {path: region for path in layers if (region := blocks[path].region) is not None}
    replace_regions(graph_module, [(region, head_of(model, path), layers[path]) for path, region in regions.items()])
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

    for path, layer in layers.items():
        layer.rebind(home)
        layer.names = {**regions[path].modules, **regions[path].buffers, **regions[path].parameters}
    note = f"the blocks are no modules: {type(model).__name__} has become a torch.fx.GraphModule"
    recorded = "; it was recorded, and holds for inputs of these shapes" if info.rung == "recorded" else ""
    info.notes.append(note + recorded)
    # Not the chains: they speak of nodes that are gone, and each node of its neighbours, as deep as a copy can recurse.
    fresh.meta.update({key: value for key, value in graph_module.meta.items() if key != CHAINS_KEY})
    return fresh.train(model.training)


def _rewrite(
    graph_module: fx.GraphModule,
    info: CaptureInfo,
    call: ModuleCall,
    layer: FusionLayer,
    renamed: dict[fx.Node, fx.Node],
) -> None:
    """Let one `call_module` node to the fusion layer take the place of the block's nodes."""
    graph = graph_module.graph
    region = info.nodes[call.start : call.stop]
    argument, target = _Argument(graph_module, renamed), head_of(info.root, call.path)
    with graph.inserting_before(region[0]):
        args, kwargs = (fx.node.map_aggregate(part, argument) for part in (call.args, call.kwargs))
        made = graph.call_module(target, args, kwargs)  # type: ignore[arg-type]
    made.meta.update(nodes_in(call.output)[0].meta)
    inside = set(region)
    _redirect(call.output, made, graph, inside, renamed)
    for filled in inside.intersection(call.filled.values()):  # the layer fills that itself: the graph does not show how
        filled.replace_all_uses_with(made, delete_user_cb=lambda user: user not in inside)
        renamed[filled] = made
    for node in reversed(region):
        if not node.users:
            graph.erase_node(node)
    graph_module.add_submodule(target, layer)


@dataclass(frozen=True)
class _Argument:
    """Gives an argument as it is in the graph now; what source code cannot name becomes an attribute."""

    graph_module: fx.GraphModule
    renamed: dict[fx.Node, fx.Node]

    def __call__(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            return self.renamed.get(value, value)
        if value is None or (isinstance(value, base_types) and not isinstance(value, Tensor)):
            return value
        holder = self.graph_module
        name = next(name for i in count() if not hasattr(holder, name := f"_argument_{i}"))
        if isinstance(value, Tensor):
            holder.register_buffer(name, value, persistent=False)
        else:
            setattr(holder, name, value)
        return holder.graph.create_node("get_attr", name)


def _redirect(
    output: object, made: Any, graph: fx.Graph, region: set[fx.Node], renamed: dict[fx.Node, fx.Node]
) -> None:
    """Let the users of each output node outside of the region read it from the new node."""
    if isinstance(output, fx.Node):
        if output in region:  # else it is an input that is handed through
            output.replace_all_uses_with(made, delete_user_cb=lambda user: user not in region)
            renamed[output] = made
        return
    items = (
        output.items() if isinstance(output, dict) else enumerate(output) if isinstance(output, tuple | list) else ()
    )
    for key, item in items:
        if not region.isdisjoint(nodes_in(item)):
            with graph.inserting_after(made):
                part = graph.call_function(operator.getitem, (made, key))
            part.meta.update(nodes_in(item)[0].meta)
            _redirect(item, part, graph, region, renamed)
