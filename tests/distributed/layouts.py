"""How a stack is spread over processes: each mode wraps it and says how a step goes."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.reference import Stack


def _ddp(model: Stack) -> nn.Module:
    return DistributedDataParallel(model)


def by_block(model: Stack, every: int = 1, **options: Any) -> nn.Module:
    """Shard some blocks each by itself, and the rest as one."""
    for block in list(model.blocks)[::every]:
        fully_shard(block, **options)
    options.pop("reshard_after_forward", None)
    fully_shard(model, **options)
    return model


def _kept(model: Stack) -> nn.Module:
    """After its forward a block stays whole: the neighbour before is whole then, and the one after is not."""
    return by_block(model, reshard_after_forward=False)


def _some_blocks(model: Stack) -> nn.Module:
    """Some neighbours are in the root's group, which is whole during the forward pass."""
    return by_block(model, every=4)


def _halves(model: Stack) -> nn.Module:
    """After its forward a block is sharded over fewer processes, two or all."""
    return by_block(model, reshard_after_forward=min(2, dist.get_world_size()))


def _whole(model: Stack) -> nn.Module:
    fully_shard(model)
    return model


def _hybrid(model: Stack) -> nn.Module:
    """Replicas of a sharded model: 2 × 2 of four processes, 1 × 2 of two."""
    shape = (dist.get_world_size() // 2, 2)
    return by_block(model, mesh=init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")))


def _hybrid_whole(model: Stack) -> nn.Module:
    shape = (dist.get_world_size() // 2, 2)
    fully_shard(model, mesh=init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")))
    return model


def _offloaded(model: Stack) -> nn.Module:
    """To where it is: all that can be tried without an accelerator, and pinning needs one."""
    return by_block(model, offload_policy=CPUOffloadPolicy(pin_memory=False))


def _prefetching(model: Stack) -> nn.Module:
    by_block(model)
    blocks: list[Any] = list(model.blocks)
    for i, block in enumerate(blocks):
        block.set_modules_to_forward_prefetch(blocks[i + 1 : i + 3])
        block.set_modules_to_backward_prefetch(blocks[max(0, i - 2) : i][::-1])
    return model


def _checkpoint_blocks(model: Stack) -> None:
    # Both of PyTorch's recipes put the wrapper on before DDP or fully_shard; its blocks are then under the wrappers.
    apply_activation_checkpointing(model, check_fn=lambda module: module in list(model.blocks))


def _checkpointed_ddp(model: Stack) -> nn.Module:
    _checkpoint_blocks(model)
    return DistributedDataParallel(model)


def _checkpointed_outside(model: Stack) -> nn.Module:
    """`fully_shard(checkpoint_wrapper(block))`, PyTorch's own order: a block is gathered once for recomputing."""
    _checkpoint_blocks(model)
    return by_block(model)


def _checkpointed_inside(model: Stack) -> nn.Module:
    """`checkpoint_wrapper(fully_shard(block))`: FSDP's hooks run again as the block is recomputed."""
    by_block(model)
    _checkpoint_blocks(model)
    return model


def _checkpointed_kept(model: Stack) -> nn.Module:
    _checkpoint_blocks(model)
    return by_block(model, reshard_after_forward=False)


def _without_sync(wrapped: Any, last: bool) -> Any:
    """DDP's or FSDP2's way to say that a backward pass is not the last of its step."""
    if isinstance(wrapped, DistributedDataParallel):
        return nullcontext() if last else wrapped.no_sync()
    wrapped.set_requires_gradient_sync(last)
    return nullcontext()


def _without_resharding(wrapped: FSDPModule, last: bool) -> Any:
    """And all stays whole from one backward pass to the next forward."""
    wrapped.set_reshard_after_backward(last)
    return _without_sync(wrapped, last)


def _without_all_reduce(wrapped: FSDPModule, last: bool) -> Any:
    """Gradients are summed within a shard group at once, between the groups at the end."""
    wrapped.set_requires_all_reduce(last)
    return nullcontext()


@dataclass(frozen=True)
class Mode:
    """Attributes.

    wrap: spreads the model over the processes.
    accumulate: called before each of the two parts of a step; None for steps in one part.
    evaluated: whether a forward pass without a backward comes before each step.
    """

    wrap: Callable[[Stack], nn.Module]
    accumulate: Callable[[Any, bool], Any] | None = None
    evaluated: bool = False


MODES: dict[str, Mode] = {
    "ddp": Mode(_ddp),
    "fsdp_by_block": Mode(by_block),
    "fsdp_by_block_kept": Mode(_kept),
    "fsdp_some_blocks": Mode(_some_blocks),
    "fsdp_whole": Mode(_whole),
}

MORE_MODES: dict[str, Mode] = {
    "fsdp_halves": Mode(_halves),
    "hsdp_by_block": Mode(_hybrid),
    "hsdp_whole": Mode(_hybrid_whole),
    "fsdp_offloaded": Mode(_offloaded),
    "fsdp_prefetching": Mode(_prefetching),
    "fsdp_evaluated": Mode(_kept, evaluated=True),
    "ddp_checkpointed": Mode(_checkpointed_ddp),
    "fsdp_checkpointed_outside": Mode(_checkpointed_outside),
    "fsdp_checkpointed_inside": Mode(_checkpointed_inside),
    "fsdp_checkpointed_kept": Mode(_checkpointed_kept),
    "ddp_accumulating": Mode(_ddp, _without_sync),
    "fsdp_accumulating": Mode(by_block, _without_sync),
    "fsdp_whole_accumulating": Mode(_whole, _without_sync),
    "fsdp_accumulating_whole": Mode(by_block, _without_resharding),
    "fsdp_kept_accumulating_whole": Mode(_kept, _without_resharding),
    "fsdp_checkpointed_accumulating_whole": Mode(_checkpointed_outside, _without_resharding),
    "hsdp_accumulating": Mode(_hybrid, _without_all_reduce),
}
