"""Synthesis from sharded neighbours: under FSDP2 a neighbour's parameters are DTensors outside its forward.

The fusion runs on the shards (it is elementwise), and only its result is gathered. The gradient of the
gathered weight differs from rank to rank, because each saw its own part of the batch, and FSDP averages
gradients: so it goes back as a partial average. With that left out the gradients are wrong and nothing fails.
Where one neighbour is sharded and the other is whole for now (it stays so after its forward pass, or belongs
to a group that is), the sharded one is gathered first, with the same gradient.

Under mixed precision the shards keep the parameters' own dtype. What is gathered goes there in the dtype that the
layer computes in, and its gradient comes back in float32 at least: nothing here knows FSDP's `reduce_dtype`, and
an average in bfloat16 would be silently coarser than one that was asked for in float32.
"""

from collections.abc import Collection, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

__all__ = [
    "all_sharded",
    "any_sharded",
    "as_sharded",
    "computing_dtype",
    "gathered",
    "replicated",
    "settle",
]

# Owner and name of each parameter.
Parameters: TypeAlias = Collection[tuple[nn.Module, str]]

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


def all_sharded(theta: Mapping[str, Tensor]) -> bool:
    """Whether all of the tensors are DTensors."""
    return all(isinstance(tensor, DTensor) for tensor in theta.values())


def replicated(fusion: nn.Module, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The fusion's coefficients as DTensors on the mesh of `like`, the same on every rank.

    Their gradient then is the sum over all shards, on every rank. In the shards' dtype, so that it is rounded to
    that of the coefficients once, and not for each parameter that they are for.
    """
    mesh, dtype = next((tensor.device_mesh, tensor.dtype) for tensor in like.values() if isinstance(tensor, DTensor))
    everywhere = [Replicate()] * mesh.ndim
    return {
        name: p if isinstance(p, DTensor) else DTensor.from_local(p.to(dtype), mesh, everywhere, run_check=False)
        for name, p in fusion.named_parameters()
    }


def computing_dtype(fusion: nn.Module) -> torch.dtype | None:
    """What the layer computes in now: of its own coefficients, which FSDP casts for its forward; None without any."""
    return next((p.dtype for p in fusion.parameters()), None)


def gathered(theta: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Each tensor whole and plain on every rank, in `dtype`; see the module's docstring for its gradient."""
    return {name: _gather(tensor, dtype or tensor.dtype) for name, tensor in theta.items()}


def _gather(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if not isinstance(tensor, DTensor):
        return tensor.to(dtype)
    ndim, wide = tensor.device_mesh.ndim, torch.promote_types(tensor.dtype, torch.float32)
    whole = tensor.redistribute(placements=[Replicate()] * ndim, forward_dtype=dtype, backward_dtype=wide)
    local: Tensor = whole.to_local(grad_placements=[Partial("avg")] * ndim)
    return local


def settle(before: Parameters, after: Parameters) -> None:
    """Have FSDP shard again what the layer must not read as it stands: two things that fail without a word.

    What is whole of the block after: FSDP was told not to reshard after the last backward pass, or a forward pass
    without one came before. That block is through with its backward pass before the layer is: FSDP has reduced its
    gradient and freed its weights then, and what the layer sends there would be lost. Only a group that is at work
    now, because it holds the layer too, waits for it.

    And what `reshard_after_forward=2` has put on a smaller mesh: those are copies, whose gradient nobody collects.

    Args:
        before: owner and name of each parameter that will be read of the block before.
        after: the same of the block after.
    """
    sharded = [theta for theta in _managed((*before, *after)) if isinstance(theta, DTensor)]
    smaller = {id(theta) for theta in sharded if theta.device_mesh.ndim > 1}
    ahead = {id(theta) for theta in _managed(after) if not isinstance(theta, DTensor)}
    suspects = smaller | (ahead if torch.is_grad_enabled() else set())
    if suspects:
        _shard_again(suspects)


def _managed(readings: Parameters) -> list[Tensor]:
    """Of these parameters those that FSDP looks after."""
    return [getattr(owner, leaf) for owner, leaf in readings if hasattr(owner, "_is_fsdp_managed_module")]


@_disable_dynamo  # in compiled code too it has to happen at each call
def _shard_again(parameters: set[int]) -> None:
    from torch.distributed._composable_state import _module_state_mapping  # FSDP is not imported with every replfx
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState

    at_rest = (TrainingState.IDLE, TrainingState.POST_BACKWARD)
    for module in [module for module in _module_state_mapping if isinstance(module, FSDPModule)]:
        # A parameter does not know its group, and the module that was sharded may lie anywhere above its owner.
        state: Any = module._get_fsdp_state()
        for group in getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]:
            if group is None or group.is_sharded or group._training_state not in at_rest:
                continue
            held = ("_unsharded_param", "_sharded_post_forward_param")
            if any(id(getattr(p, name, None)) in parameters for p in group.fsdp_params for name in held):
                group.reshard()
