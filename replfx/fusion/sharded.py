"""Synthesis from sharded neighbours: under FSDP2 a neighbour's parameters are DTensors outside its forward.

The fusion runs on the shards (it is elementwise), and only its result is gathered. The gradient of the
gathered weight differs from rank to rank, because each saw its own part of the batch, and FSDP averages
gradients: so it goes back as a partial average. With that left out the gradients are wrong and nothing fails.
Where one neighbour is sharded and the other is whole for now (it stays so after its forward pass, or belongs
to a group that is), the sharded one is gathered first, with the same gradient.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

__all__ = ["DTensor", "any_sharded", "as_sharded", "gather", "gathered", "synthesize_sharded"]

if torch.distributed.is_available():
    from torch.distributed.device_mesh import DeviceMesh
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


def synthesize_sharded(
    fusion: nn.Module, previous: Mapping[str, Tensor], next: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What the fusion makes of neighbours some of which are DTensors.

    DTensors where it ran on the shards; plain tensors where it could not: it is not elementwise, or not all that it
    reads lies on the same processes.
    """
    mesh, *others = {t.device_mesh if isinstance(t, DTensor) else None for t in (*previous.values(), *next.values())}
    made: dict[str, Tensor]
    if getattr(fusion, "elementwise", False) and mesh is not None and not others:
        coefficients = {name: _replicated(p, mesh) for name, p in fusion.named_parameters()}
    else:
        coefficients = gathered(dict(fusion.named_parameters()))
        previous, next = gathered(previous), gathered(next)
    made = torch.func.functional_call(fusion, coefficients, (previous, next), tie_weights=False)
    return made


def _replicated(coefficient: Tensor, mesh: "DeviceMesh") -> Tensor:
    """A coefficient as a DTensor that is the same on every process; its gradient then is the sum over all shards."""
    if isinstance(coefficient, DTensor) and coefficient.device_mesh == mesh:
        return coefficient
    return DTensor.from_local(gather(coefficient), mesh, [Replicate()] * mesh.ndim, run_check=False)


def gathered(theta: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each DTensor as a whole plain tensor on every rank; see the module's docstring for its gradient."""
    return {name: gather(tensor) for name, tensor in theta.items()}


def gather(tensor: Tensor) -> Tensor:
    """The same for one tensor."""
    if not isinstance(tensor, DTensor):
        return tensor
    ndim = tensor.device_mesh.ndim
    whole = tensor.redistribute(placements=[Replicate()] * ndim)
    local: Tensor = whole.to_local(grad_placements=[Partial("avg")] * ndim)
    return local
