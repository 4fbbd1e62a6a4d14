"""Synthesis from sharded neighbours: under FSDP2 a neighbour's parameters are DTensors outside its forward.

The fusion runs on the shards (it is elementwise), and only its result is gathered. The gradient of the
gathered weight differs from rank to rank, because each saw its own part of the batch, and FSDP averages
gradients: so it goes back as a partial average. With that left out the gradients are wrong and nothing fails.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

__all__ = ["any_sharded", "as_sharded", "gathered", "replicated"]

if torch.distributed.is_available():
    from torch.distributed.tensor import DTensor, Partial, Replicate
else:  # a build of torch without torch.distributed has no DTensors either

    class DTensor(Tensor):  # type: ignore[no-redef]
        """Stands for a class that cannot exist in this build."""


def as_sharded(theta: Tensor) -> Tensor:
    """`theta` itself; its gradient comes back sharded as it is, however the operations on it laid that out.

    FSDP adds its own gradient to the one that it finds, shard to shard.
    """
    if not isinstance(theta, DTensor):
        return theta
    return theta.redistribute(placements=theta.placements)


def any_sharded(theta: Mapping[str, Tensor]) -> bool:
    """Whether any of the tensors is a DTensor."""
    return any(isinstance(tensor, DTensor) for tensor in theta.values())


def replicated(fusion: nn.Module, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The fusion's coefficients as DTensors on the mesh of `like`, the same on every rank.

    Their gradient then is the sum over all shards, on every rank.
    """
    mesh = next(tensor.device_mesh for tensor in like.values() if isinstance(tensor, DTensor))
    everywhere = [Replicate()] * mesh.ndim
    return {
        name: p if isinstance(p, DTensor) else DTensor.from_local(p, mesh, everywhere, run_check=False)
        for name, p in fusion.named_parameters()
    }


def gathered(theta: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each DTensor as a whole plain tensor on every rank; see the module's docstring for its gradient."""
    return {name: _gather(tensor) for name, tensor in theta.items()}


def _gather(tensor: Tensor) -> Tensor:
    if not isinstance(tensor, DTensor):
        return tensor
    ndim = tensor.device_mesh.ndim
    whole = tensor.redistribute(placements=[Replicate()] * ndim)
    local: Tensor = whole.to_local(grad_placements=[Partial("avg")] * ndim)
    return local
