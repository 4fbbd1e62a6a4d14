"""Synthesis from sharded neighbours: under FSDP2 a neighbour's parameters are DTensors outside its forward.

The fusion runs on the shards (it is elementwise), and only its result is gathered. The gradient of the
gathered weight differs from rank to rank, because each saw its own part of the batch, and FSDP averages
gradients: so it goes back as a partial average. With that left out the gradients are wrong and nothing fails.
Where one neighbour is sharded and the other is whole for now (it stays so after its forward pass, or belongs
to a group that is), the sharded one is gathered first, with the same gradient.

With FSDP2's mixed precision the shards are of the full precision, and the layer's own parameters, its coefficients
too, are of the lower one while it runs. Its weights are synthesised in the full precision, gathered in the lower one,
and their gradients are averaged in float32 at least: nothing here knows FSDP's `reduce_dtype`, and an average in
bfloat16 would be silently coarser than one that was asked for in float32.
"""

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from replfx.dtensors import is_dtensor
from replfx.torch_internals import disable_dynamo
from replfx.torch_internals.distributed import is_managed_by_fsdp, reshard

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = [
    "any_sharded",
    "as_sharded",
    "gather",
    "gathered",
    "linear",
    "lower_precision",
    "reshard_stale",
    "synthesize_sharded",
]

# Owner and name of each parameter.
Parameters: TypeAlias = Collection[tuple[nn.Module, str]]


def as_sharded(theta: Tensor) -> Tensor:
    """`theta` itself; its gradient comes back sharded as it is, however the operations on it laid that out.

    FSDP adds its own gradient to the one that it finds, shard to shard. A shard that FSDP keeps on the CPU comes to
    where the processes compute, and its gradient goes back.
    """
    if not is_dtensor(theta):
        return theta
    here, placements = theta.device_mesh.device_type, theta.placements
    if theta.device.type not in (here, "meta"):
        theta = theta.to(here)
        assert is_dtensor(theta)
    return theta.redistribute(placements=placements)


def any_sharded(theta: Mapping[str, Tensor]) -> bool:
    """Whether any of the tensors is a DTensor."""
    return any(is_dtensor(tensor) for tensor in theta.values())


def synthesize_sharded(
    fusion: nn.Module, previous: Mapping[str, Tensor], next: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What the fusion makes of neighbours some of which are DTensors.

    DTensors where it ran on the shards; plain tensors where it could not: it is not elementwise, or not all that it
    reads lies on the same processes.
    """
    mesh, *others = {t.device_mesh if is_dtensor(t) else None for t in (*previous.values(), *next.values())}
    made: dict[str, Tensor]
    on_shards = getattr(fusion, "elementwise", False) and mesh is not None and not others
    widest = max((t.dtype for t in (*previous.values(), *next.values())), key=lambda dtype: dtype.itemsize)
    coefficients = {n: p if p.itemsize >= widest.itemsize else p.to(widest) for n, p in fusion.named_parameters()}
    if on_shards:
        assert mesh is not None
        coefficients = {name: _replicated(coefficient, mesh) for name, coefficient in coefficients.items()}
    else:
        coefficients, previous, next = gathered(coefficients), gathered(previous), gathered(next)
    made = torch.func.functional_call(fusion, coefficients, (previous, next), tie_weights=False)
    dtype = None if on_shards else lower_precision(fusion, made)
    return made if dtype is None else {name: tensor.to(dtype) for name, tensor in made.items()}


def lower_precision(fusion: nn.Module, theta: Mapping[str, Tensor]) -> torch.dtype | None:
    """What FSDP's mixed precision has made of the coefficients, if that is lower than the synthesised weights'."""
    found = {p.dtype for p in fusion.parameters() if not is_dtensor(p)}
    if len(found) != 1 or not theta:
        return None
    (dtype,) = found
    return dtype if dtype.itemsize < max(tensor.itemsize for tensor in theta.values()) else None


def _replicated(coefficient: Tensor, mesh: "DeviceMesh") -> Tensor:
    """A coefficient as a DTensor that is the same on every process; its gradient then is the sum over all shards."""
    from torch.distributed.tensor import DTensor, Replicate

    if is_dtensor(coefficient) and coefficient.device_mesh == mesh:
        return coefficient
    return DTensor.from_local(gather(coefficient), mesh, [Replicate()] * mesh.ndim, run_check=False)


def gathered(theta: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each DTensor as a whole plain tensor on every rank; see the module's docstring for its gradient."""
    return {name: gather(tensor) for name, tensor in theta.items()}


def gather(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The same for one tensor; in `dtype` if one is given. Its gradient is reduced in float32 at least."""
    if not is_dtensor(tensor):
        return tensor if dtype is None else tensor.to(dtype)
    from torch.distributed.tensor import Partial, Replicate

    ndim = tensor.device_mesh.ndim
    wide = torch.promote_types(tensor.dtype, torch.float32)
    whole = tensor.redistribute(placements=[Replicate()] * ndim, forward_dtype=dtype, backward_dtype=wide)
    local: Tensor = whole.to_local(grad_placements=[Partial("avg")] * ndim)
    return local


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`, also for a DTensor of three dimensions whose second one is sharded.

    torch 2.11 cannot flatten the first two of these. With the sharded one first it can.
    """
    if is_dtensor(x) and x.dim() == 3 and any(placement.is_shard(1) for placement in x.placements):
        return F.linear(x.transpose(0, 1), weight, bias).transpose(0, 1)
    return F.linear(x, weight, bias)


def reshard_stale(before: Parameters, after: Parameters, inner: "DeviceMesh | None") -> None:
    """Reshard neighbours whose unsharded copies would lose gradients without an error.

    What is whole of the block after: FSDP was told not to reshard after the last backward pass, or a forward pass
    without one came before. That block is through with its backward pass before the layer is: FSDP has reduced its
    gradient and freed its weights then, and what the layer sends there would be lost. Only a group that is at work
    now, because it holds the layer too, waits for it.

    And what `reshard_after_forward=2` has put on a smaller mesh: those are copies, whose gradient nobody collects.

    Args:
        before: owner and name of each parameter that will be read of the block before.
        after: the same of the block after.
        inner: the mesh of tensor parallelism within FSDP: what is whole for FSDP is a DTensor on that.
    """
    sharded = [theta for theta in _managed((*before, *after)) if is_dtensor(theta)]
    smaller = {id(theta) for theta in sharded if theta.device_mesh.ndim > 1}
    ahead = {id(t) for t in _managed(after) if not is_dtensor(t) or t.device_mesh == inner}
    suspects = smaller | (ahead if torch.is_grad_enabled() else set())
    if suspects:
        _shard_again(suspects)


def _managed(readings: Parameters) -> list[Tensor]:
    """Of these parameters those that FSDP looks after."""
    return [getattr(owner, leaf) for owner, leaf in readings if is_managed_by_fsdp(owner)]


_shard_again = disable_dynamo(reshard)  # in compiled code too it has to happen at each call
