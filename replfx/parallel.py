"""Tensor parallelism for transformed models: torch's `parallelize_module`, which also reaches into fusion layers."""

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from typing import TYPE_CHECKING

import torch
from torch import nn

from replfx.errors import FusionError
from replfx.fusion import FusionLayer
from replfx.fusion.operators import BlockOperator
from replfx.fusion.sharded import DTensor
from replfx.fusion.tensor_parallel import TensorParallel
from replfx.state import fusion_layers

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
    """`torch.distributed.tensor.parallel.parallelize_module`, for models with fusion layers.

    The plan is the one for the untransformed model. In a replaced block whose operator is `block` each layer gets its
    style: its synthesised weight then lies as the neighbours' lie, is used so, and is never gathered. Any other
    operator gathers its synthesised weights, and computes on every process what the block's own activation is there:
    all of it, or with a `SequenceParallel()` among the block's styles a part.

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
        FusionError: the mesh has more than one dimension, a path names nothing, or a fusion layer has been parallelised
            before: nothing is changed then. Also if a style does not fit what it names, as `ColwiseParallel` does not
            fit a normalisation; then a part of the model has its styles already. A fusion layer whose neighbours were
            parallelised by torch's function alone raises one as it runs.

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
    layers = {layer: path for path, layer in fusion_layers(module).items()}
    inside: dict[FusionLayer, dict[str, ParallelStyle]] = {layer: {} for layer in layers}
    outside: list[tuple[nn.Module, ParallelStyle]] = []
    for path, style in parallelize_plan.items():
        found = [(target, rest) for target, rest in _named(module, path) if _has(target, rest)]
        if not found:
            raise FusionError(f"parallelize_plan: `{path}` names no module of {type(module).__name__}")
        for target, rest in found:
            if isinstance(target, FusionLayer):
                inside[target][rest] = style
            else:
                outside.append((target, style))
    if again := [path for layer, path in layers.items() if layer.tensor_parallel is not None]:
        raise FusionError(f"`{again[0]}` has been parallelised before")
    for target, style in outside:
        parallel.parallelize_module(target, device_mesh, style, src_data_rank=src_data_rank)
    for layer, styles in inside.items():
        try:
            _parallelize_layer(layer, device_mesh, styles, src_data_rank)
        except NotImplementedError as error:  # torch's own, which does not say where
            raise FusionError(f"parallelize_plan: a style does not fit in `{layers[layer]}`: {error}") from error
    return module


def _named(module: nn.Module, path: str) -> Iterator[tuple[nn.Module, str]]:
    """The modules that a path with wildcards names; of a fusion layer the rest of the path is that in its block."""
    name, _, rest = path.partition(".")
    if isinstance(module, FusionLayer) or not path:
        yield module, path
        return
    for child, inner in module.named_children():
        if fnmatch(child, name):
            yield from _named(inner, rest)


def _has(target: nn.Module, rest: str) -> bool:
    """Whether the block that a fusion layer replaced has what the rest of a path names."""
    if not isinstance(target, FusionLayer):
        return True
    (block,) = target._skeleton
    if isinstance(target.operator, BlockOperator) and block is None:
        block = target.operator.block
    return block is None or any(True for _ in _named(block, rest))


def _parallelize_layer(
    layer: FusionLayer, mesh: "DeviceMesh", styles: "dict[str, ParallelStyle]", src_data_rank: int | None
) -> None:
    from torch.distributed.tensor import distribute_module, parallel

    of_layer = styles.pop("", None)
    if isinstance(layer.operator, BlockOperator):
        layer.tensor_parallel = TensorParallel(mesh, _parallelize_block(layer, mesh, styles, src_data_rank))
    else:
        parts = [style for style in styles.values() if isinstance(style, parallel.SequenceParallel)]
        if parts:  # what the operator owns now gets a part of its gradient from each process
            distribute_module(layer.operator, mesh)
        layer.tensor_parallel = TensorParallel(mesh, sequence=parts[0].sequence_sharding[0].dim if parts else None)
    if of_layer is not None:
        parallel.parallelize_module(layer, mesh, of_layer, src_data_rank=src_data_rank)


def _parallelize_block(
    layer: FusionLayer, mesh: "DeviceMesh", styles: "Mapping[str, ParallelStyle]", src_data_rank: int | None
) -> "dict[str, Sequence[Placement]]":
    """Give the layers of a replaced block their styles; gives how each synthesised weight is wanted.

    A style looks at a layer's weights, of which these have none: they get the synthesised ones until it has looked.
    """
    from torch.distributed.tensor import parallel

    assert isinstance(layer.operator, BlockOperator)
    block, slots = layer.operator.block, layer.operator.vacant()
    dropped = {block.get_submodule(path) for path in layer.operator.dropped}
    with torch.no_grad():
        theta = layer.synthesized()
    try:
        for name, (owner, leaf) in slots.items():
            owner._parameters[leaf] = nn.Parameter(theta[name])
        for path, style in styles.items():
            for target, _ in _named(block, path):
                if target not in dropped:
                    parallel.parallelize_module(target, mesh, style, src_data_rank=src_data_rank)
        given: dict[str, object] = {name: owner._parameters[leaf] for name, (owner, leaf) in slots.items()}
    finally:
        for owner, leaf in slots.values():
            owner._parameters[leaf] = None
    return {name: weight.placements for name, weight in given.items() if isinstance(weight, DTensor)}
