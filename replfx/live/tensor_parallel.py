"""Replaced blocks under tensor parallelism: where their synthesised weights and their activation lie.

torch's `parallelize_module` gives a kept block's layers their layouts. A replaced block owns no weights, so
`replfx.parallelize_module` notes here what they would have got. Weights are synthesised on the neighbours' shards, and
those that are wanted as the neighbours' lie stay where they are: nothing is gathered.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from replfx.dtensors import is_dtensor
from replfx.errors import FusionError
from replfx.fusion.interface import Interface, read_slot
from replfx.fusion.sharded import gather
from replfx.torch_internals.distributed import is_tensor_parallel

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Placement

__all__ = ["TensorParallel", "laid_out", "mesh_of_activation", "refuse_unprepared"]


@dataclass(frozen=True)
class TensorParallel:
    """How a replaced block runs on a one-dimensional mesh of processes that share its work."""

    mesh: "DeviceMesh"  # these processes
    # Those of synthesised weights that are used as DTensors; all others are gathered.
    layouts: Mapping[str, Sequence["Placement"]] = field(default_factory=dict)
    # The dimension of the main activation of which each process has a part; None if each has all of it.
    sequence: int | None = None

    def enter(
        self, interface: Interface, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call with its main activation as a DTensor, if each process has a part of it."""
        if self.sequence is None:
            return args, kwargs
        slot, *deeper = interface.main.split(".")
        x = read_slot(slot, args, kwargs)
        if deeper or not isinstance(x, Tensor):
            raise FusionError(
                f"its activation is inside of a {type(x).__name__}: sequence parallelism needs it as an argument of "
                "its own; leave SequenceParallel() out for this block"
            )
        if is_dtensor(x):
            return args, kwargs
        from torch.distributed.tensor import DTensor, Shard

        x = DTensor.from_local(x, self.mesh, [Shard(self.sequence)], run_check=False)
        if slot.isdigit():
            return (*args[: int(slot)], x, *args[int(slot) + 1 :]), kwargs
        return args, {**kwargs, slot: x}

    def leave(self, interface: Interface, result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the call gave, with its activation as the caller gave it: a plain part, or a DTensor."""
        if self.sequence is None or is_dtensor(interface.activation(args, kwargs)):
            return result
        from torch.distributed.tensor import Shard

        y = interface.main_of(result)
        return interface.with_main(args, kwargs, y.redistribute(placements=[Shard(self.sequence)]).to_local())


def laid_out(
    theta: Mapping[str, Tensor],
    mesh: "DeviceMesh | None",
    parallel: TensorParallel | None,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Synthesised weights as an operator wants them.

    Args:
        theta: DTensors where the neighbours are sharded.
        mesh: that of the activation; None if it is a plain tensor.
        parallel: says of some weights how they are to lie.
        dtype: what DTensors are to be in; None leaves them.
    """

    def lay_out(name: str, tensor: Tensor) -> Tensor:
        if parallel is not None and name in parallel.layouts:
            return on_mesh(tensor, parallel.mesh, parallel.layouts[name], dtype)
        return gather(tensor, dtype) if mesh is None else _beside(tensor, mesh, dtype)

    return {name: lay_out(name, tensor) for name, tensor in theta.items()}


def _beside(tensor: Tensor, mesh: "DeviceMesh", dtype: torch.dtype | None) -> Tensor:
    """A synthesised weight for an activation that is a DTensor: as it lies if that is on its mesh, else replicated."""
    from torch.distributed.tensor import Replicate

    if is_dtensor(tensor) and tensor.device_mesh == mesh:
        return on_mesh(tensor, mesh, tensor.placements, dtype)
    return on_mesh(tensor, mesh, [Replicate()] * mesh.ndim, dtype)


def on_mesh(tensor: Tensor, mesh: "DeviceMesh", placements: Sequence["Placement"], dtype: torch.dtype | None) -> Tensor:
    """`tensor`, which is the same on all processes or a DTensor, as a DTensor on `mesh`.

    A DTensor on a mesh of more dimensions (FSDP's, with tensor parallelism inside) is gathered along these. Its
    gradient there goes back as FSDP wants it, as a partial average; see `sharded`.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate

    if not is_dtensor(tensor):
        whole = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
        return whole.redistribute(placements=placements)
    outer = tensor.device_mesh
    if outer == mesh:
        return tensor.redistribute(placements=placements, forward_dtype=dtype)
    names, inner = outer.mesh_dim_names or (), mesh.mesh_dim_names or ()
    if not set(inner) <= set(names):
        return on_mesh(gather(tensor, dtype), mesh, placements, None)
    wanted = dict(zip(inner, placements, strict=True))
    kept = tensor.redistribute(placements=[wanted.get(name, Replicate()) for name in names], forward_dtype=dtype)
    local = kept.to_local(grad_placements=[wanted.get(name, Partial("avg")) for name in names])
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride())


def mesh_of_activation(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> "DeviceMesh | None":
    """The mesh of the first argument that is a DTensor; None if none is."""
    return next((value.device_mesh for value in (*args, *kwargs.values()) if is_dtensor(value)), None)


def refuse_unprepared(owners: Sequence[nn.Module]) -> None:
    """Raise if a neighbour was parallelised by torch's `parallelize_module`, and the replaced block was not by ours.

    Raises:
        FusionError: it would run on each process's part of the activation as if that were all of it, or sum
            its gradients wrongly; nobody here can know what the plan meant for this block.
    """
    for owner in owners:
        if is_tensor_parallel(owner):
            raise FusionError(
                f"a neighbour's {type(owner).__name__} is tensor parallel, and this replaced block does not know how "
                "its own activation lies: call replfx.parallelize_module(model, mesh, plan) where you call that of "
                "torch.distributed.tensor.parallel"
            )
