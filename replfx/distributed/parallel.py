"""Tensor parallelism for transformed models: torch's `parallelize_module`, which also reaches into replaced blocks."""

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import nn

from replfx.dtensors import is_dtensor
from replfx.errors import FusionError
from replfx.live import SUBMODULE, Synthesis, syntheses_of, synthesis_of
from replfx.live.blocks import owners_of
from replfx.live.classes import computed_by, links_of
from replfx.live.tensor_parallel import TensorParallel
from replfx.operators.base import BlockOperator

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Placement
    from torch.distributed.tensor.parallel import ParallelStyle

__all__ = ["parallelize_module"]


def parallelize_module(
    module: nn.Module,
    device_mesh: "DeviceMesh",
    parallelize_plan: "Mapping[str, ParallelStyle]",
    *,
    src_data_rank: int | None = 0,
) -> nn.Module:
    """`torch.distributed.tensor.parallel.parallelize_module`, for models with replaced blocks.

    The plan is the one for the untransformed model. Under operator `block` each layer of a replaced block gets its
    style: its synthesised weight then lies as the neighbours' lie, is used so, and is never gathered. Any other
    operator gathers its synthesised weights, and computes on every process what the block's own activation is there:
    all of it, or a part if a `SequenceParallel()` is among the block's styles.

    Call it after `replfx.transform` and before `fully_shard`.

    Args:
        module: a transformed model, or one of its blocks (replaced or not), changed in place.
        device_mesh: one-dimensional; of a larger mesh a slice, as `mesh["tp"]`. If there are further dimensions
            (FSDP), they have names.
        parallelize_plan: style by path in `module`, with wildcards; "" is `module` itself.
        src_data_rank: as in torch's; the process whose values all get.

    Returns:
        `module`.

    Raises:
        FusionError: the mesh has more than one dimension, a path names nothing, or a replaced block has been
            parallelised before: nothing is changed then. Also if a style does not fit what it names, as
            `ColwiseParallel` does not fit a normalisation; then a part of the model has its styles already. A replaced
            block whose neighbours were parallelised by torch's function alone raises one as it runs.

    Example:
        >>> model = replfx.transform(model, tokens, operator="block")
        >>> mesh = init_device_mesh("cuda", (8,), mesh_dim_names=("tp",))
        >>> replfx.parallelize_module(
        ...     model, mesh, {"blocks.*.mlp.fc1": ColwiseParallel(), "blocks.*.mlp.fc2": RowwiseParallel()}
        ... )
    """
    from torch.distributed.tensor import parallel

    if device_mesh.ndim != 1:
        raise FusionError(
            f"device_mesh has {device_mesh.ndim} dimensions {device_mesh.mesh_dim_names}: give one of them, "
            'as mesh["tp"]'
        )
    layers = syntheses_of(module)
    inside: dict[Synthesis, list[tuple[nn.Module, str, ParallelStyle]]] = {layer: [] for layer in layers.values()}
    outside: list[tuple[nn.Module, ParallelStyle]] = []
    for path, style in parallelize_plan.items():
        found = list(_named(module, path, None))
        if not found:
            raise FusionError(f"parallelize_plan: `{path}` names no module of {type(module).__name__}")
        for target, rest, synthesis in found:
            if synthesis is None:
                outside.append((target, style))
            else:
                inside[synthesis].append((target, rest, style))
    if again := [path for path, layer in layers.items() if layer.tensor_parallel is not None]:
        raise FusionError(f"`{again[0]}` has been parallelised before")
    for target, style in outside:
        parallel.parallelize_module(target, device_mesh, style, src_data_rank=src_data_rank)
    for path, layer in layers.items():
        try:
            _parallelize(module, layer, device_mesh, inside[layer], src_data_rank)
        except NotImplementedError as error:  # torch's own, which does not say where
            raise FusionError(f"parallelize_plan: a style does not fit in `{path}`: {error}") from error
    return module


_Found: TypeAlias = tuple[nn.Module, str, Synthesis | None]
"""A module, the rest of a path in it where it has freed what that names, and the synthesis that this belongs to."""


def _named(module: nn.Module, path: str, within: Synthesis | None) -> Iterator[_Found]:
    """The modules that a path with wildcards names."""
    own = synthesis_of(module)
    if own is not None and path and own.skeleton is not None:
        known = any(True for _ in _named(own.skeleton.module, path, None))
        there = [] if not own.operator.keeps_block else list(_inside(module, path, own))
        yield from there or ([(module, path, own)] if known else [])
        return
    if own is not None and not own.names:  # else there are further modules beside it
        within = own
    if path:
        yield from _inside(module, path, within)
    else:
        yield module, "", within or computed_by(module)


def _inside(module: nn.Module, path: str, within: Synthesis | None) -> Iterator[_Found]:
    name, _, rest = path.partition(".")
    for child, inner in module.named_children():
        if child != SUBMODULE and fnmatch(child, name):
            yield from _named(inner, rest, within)


def _parallelize(
    module: nn.Module,
    layer: Synthesis,
    mesh: "DeviceMesh",
    styles: "list[tuple[nn.Module, str, ParallelStyle]]",
    src_data_rank: int | None,
) -> None:
    from torch.distributed.tensor import distribute_module, parallel

    if layer.operator.keeps_block:
        layer.tensor_parallel = TensorParallel(mesh, _parallelize_block(module, layer, mesh, styles, src_data_rank))
        return
    parts = [style for _, rest, style in styles if rest and isinstance(style, parallel.SequenceParallel)]
    if parts:  # what the operator owns now gets a part of its gradient from each process
        distribute_module(layer.operator, mesh)
    layer.tensor_parallel = TensorParallel(mesh, sequence=parts[0].sequence_sharding[0].dim if parts else None)
    for target, rest, style in styles:
        if not rest:
            parallel.parallelize_module(target, mesh, style, src_data_rank=src_data_rank)


def _parallelize_block(
    module: nn.Module,
    layer: Synthesis,
    mesh: "DeviceMesh",
    styles: "list[tuple[nn.Module, str, ParallelStyle]]",
    src_data_rank: int | None,
) -> "dict[str, Sequence[Placement]]":
    """Give the layers of a replaced block their styles; gives how each synthesised weight is wanted.

    A style looks at a layer's weights, of which these have none: they get the synthesised ones until it has looked.
    """
    from torch.distributed.tensor import parallel

    slots = [(owner, leaf, name) for owner in owners_of(module, layer) for leaf, name in links_of(owner).items()]
    dropped = _dropped(module, layer)
    with torch.no_grad():
        theta = layer.synthesized()
    try:
        for owner, leaf, name in slots:
            owner._parameters[leaf] = nn.Parameter(theta[name])
        for target, gone, style in styles:
            if target not in dropped and not gone:
                parallel.parallelize_module(target, mesh, style, src_data_rank=src_data_rank)
        given: dict[str, object] = {name: owner._parameters[leaf] for owner, leaf, name in slots}
    finally:
        for owner, leaf, _ in slots:
            owner._parameters.pop(leaf, None)
    return {name: weight.placements for name, weight in given.items() if is_dtensor(weight)}


def _dropped(module: nn.Module, layer: Synthesis) -> set[nn.Module]:
    """What gives nothing in the place of modules that a block is without."""
    block = next(inner for inner in module.modules() if synthesis_of(inner) is layer)
    assert isinstance(layer.operator, BlockOperator)
    return {block.get_submodule(path) for path in layer.operator.dropped}
