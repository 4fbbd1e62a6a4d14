"""insert_fusion: put fusion layers in the place of the planned blocks. The only pass that changes a model."""

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import base_types
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from replfx.errors import FusionError, PlanError
from replfx.fusion import Fusion, FusionLayer, Operator, fusions, operators
from replfx.fusion.operators import Source
from replfx.passes.find_chains import chains_of
from replfx.passes.select_blocks import plan_of
from replfx.plans import Plan, Replacement
from replfx.state import fusion_layers
from replfx.structure import block_digest, set_submodule
from replfx.tracing import CaptureInfo, ModuleCall, info_of, nodes_in

__all__ = ["InsertFusion", "build_layers", "insert"]


def build_layers(model: nn.Module, plan: Plan) -> dict[str, FusionLayer]:
    """Make the fusion layers of `plan` for `model`, without putting them there.

    Raises:
        PlanError: the plan was made for another model, or the model is transformed already.
        FusionError: an unknown fusion or operator, options that it does not have, non-finite weights.
    """
    for path in fusion_layers(model):
        raise PlanError(
            f"the model is transformed already: `{path}` is a fusion layer; "
            "transform the original model, or call replfx.materialize or replfx.unroll first"
        )
    replaced = {replacement.path for replacement in plan.replacements}
    return {r.path: _build(model, r, replaced, plan.model) for r in plan.replacements}


def insert(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Put each layer in its block's place in `model`."""
    for path, layer in layers.items():
        set_submodule(model, path, layer)


def _build(model: nn.Module, replacement: Replacement, replaced: set[str], made_for: str) -> FusionLayer:
    path = replacement.path
    block = _block(model, replacement, path, made_for)
    made = _operator(replacement, block)
    if not made.sources:
        return FusionLayer(made, None, None, replaced=block)
    if replacement.previous is None or replacement.next is None:
        raise PlanError(f"`{path}`: operator {replacement.operator.name!r} needs two neighbours, the plan has none")
    for side in (replacement.previous, replacement.next):
        if side in replaced:
            raise PlanError(f"`{path}`: its neighbour `{side}` is replaced in the same plan")
    previous = _block(model, replacement, replacement.previous, made_for)
    next = _block(model, replacement, replacement.next, made_for)
    _check_finite(((replacement.previous, previous), (path, block), (replacement.next, next)))
    if not 0 <= replacement.neighbour_gradient <= 1:
        raise PlanError(f"`{path}`: neighbour_gradient={replacement.neighbour_gradient} is not between 0 and 1")
    return FusionLayer(
        made,
        _fusion(replacement, made, previous),
        (previous, next),
        neighbour_gradient=replacement.neighbour_gradient,
        replaced=block,
    )


def _block(model: nn.Module, replacement: Replacement, path: str, made_for: str) -> nn.Module:
    """The block at `path`, which must be of the kind that the plan was made for."""
    name = type(model).__name__
    advice = f"the plan was made for {made_for}; make one for this model with replfx.plan"
    try:
        block = model.get_submodule(path) if path else None
    except AttributeError:
        block = None
    if block is None:
        raise PlanError(f"{name} has no module `{path}`: {advice}")
    if block_digest(block) != replacement.kind:
        raise PlanError(f"`{path}` of {name} has other parameters than the plan's: {advice}")
    return block


def _operator(replacement: Replacement, block: nn.Module) -> Operator:
    choice = replacement.operator
    try:
        return operators[choice.name](block, replacement.interface, **choice.options)
    except (TypeError, AttributeError, ValueError) as error:
        raise FusionError(
            f"`{replacement.path}`: operator {choice.name!r} does not take the options {dict(choice.options)}: {error}"
        ) from error


def _fusion(replacement: Replacement, made: Operator, neighbour: nn.Module) -> Fusion:
    choice = replacement.fusion
    like = next(neighbour.parameters())
    try:
        shapes = {name: _shape(neighbour, source) for name, source in made.sources.items()}
    except AttributeError as error:
        raise FusionError(f"`{replacement.path}`: its neighbours lack what the operator reads: {error}") from error
    try:
        return fusions[choice.name](shapes, dtype=like.dtype, device=like.device, **choice.options)
    except TypeError as error:
        raise FusionError(
            f"`{replacement.path}`: fusion {choice.name!r} does not take the options {dict(choice.options)}: {error}"
        ) from error


def _shape(block: nn.Module, source: Source) -> torch.Size:
    shape = block.get_parameter(source.path).shape
    return shape if source.rows is None else torch.Size((source.rows[1] - source.rows[0], *shape[1:]))


def _check_finite(blocks: tuple[tuple[str, nn.Module], ...]) -> None:
    for path, block in blocks:
        for name, parameter in block.named_parameters():
            if not torch.isfinite(parameter).all():
                raise FusionError(
                    f"`{path}.{name}` has weights that are not finite; a fusion would spread them: load sound ones"
                )


@dataclass(frozen=True, eq=False)
class InsertFusion(PassBase):
    """Carry out the plan in the graph's meta, on the model and on the graph.

    Attributes:
        model: the model that was captured; its submodules are swapped in place.
    """

    model: nn.Module

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Swap submodules of the model, and give each a `call_module` node of the graph."""
        layers = build_layers(self.model, plan_of(graph_module))
        insert(self.model, layers)
        info = info_of(graph_module)
        calls = {call.path: call for chain in chains_of(graph_module).chains for call in chain.calls}
        renamed: dict[fx.Node, fx.Node] = {}
        for path, layer in layers.items():
            _rewrite(graph_module, info, calls[path], layer, renamed)
        graph_module.recompile()
        return PassResult(graph_module, bool(layers))


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
    argument = _Argument(graph_module, renamed)
    with graph.inserting_before(region[0]):
        args, kwargs = (fx.node.map_aggregate(part, argument) for part in (call.args, call.kwargs))
        made = graph.call_module(call.path, args, kwargs)  # type: ignore[arg-type]
    made.meta.update(nodes_in(call.output)[0].meta)
    _redirect(call.output, made, graph, set(region), renamed)
    for node in reversed(region):
        if not node.users:
            graph.erase_node(node)
    graph_module.add_submodule(call.path, layer)
    set_submodule(info.root, call.path, layer)


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
