"""What each process of test_data_parallel.py does: one group of processes goes through all cases."""

import copy
import datetime
import json
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from replfx.state import fusion_layers
from tests.reference import Stack
from tests.strategies import Case
from tests.test_property_functional import Regions
from tests.test_property_heterogeneous import Drawn

Gradients = dict[str, Tensor | None]

STEPS = 5
BATCH = 8

# Of the largest entry of a gradient. The processes sum the same float64 numbers in another order, as in
# test_properties; a gradient that is not averaged, or averaged twice, is off by a factor of the processes.
TOLERANCE = 1e-10


def _ddp(model: Stack) -> nn.Module:
    return DistributedDataParallel(model)


def _by_block(model: Stack) -> nn.Module:
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    return model


def _by_block_kept(model: Stack) -> nn.Module:
    """After its forward a block stays whole: the neighbour before is whole then, and the one after is not."""
    for block in model.blocks:
        fully_shard(block, reshard_after_forward=False)
    fully_shard(model)
    return model


def _by_every_other_block(model: Stack) -> nn.Module:
    """Some neighbours are in the root's group, which is whole during the forward pass."""
    for block in list(model.blocks)[::4]:
        fully_shard(block)
    fully_shard(model)
    return model


def _whole(model: Stack) -> nn.Module:
    fully_shard(model)
    return model


def _offloaded(model: Stack) -> nn.Module:
    """Shards stay on the CPU; without a GPU that is all the same place, but another way through FSDP2."""
    for block in model.blocks:
        fully_shard(block, offload_policy=CPUOffloadPolicy(pin_memory=False))
    fully_shard(model, offload_policy=CPUOffloadPolicy(pin_memory=False))
    return model


def _hybrid(model: Stack) -> nn.Module:
    """Shards on pairs of processes, copies of them across."""
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("replicate", "shard"))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def _checkpointed(model: Stack) -> None:
    """What a block computes is computed again in the backward pass."""
    apply_activation_checkpointing(model, check_fn=lambda module: module in set(model.blocks))


def _ddp_checkpointed(model: Stack) -> nn.Module:
    _checkpointed(model)
    return _ddp(model)


def _fsdp_checkpointed(model: Stack) -> nn.Module:
    """The order that PyTorch asks for: first the wrappers, then the shards."""
    _checkpointed(model)
    return _by_block(model)


MODES: dict[str, Callable[[Stack], nn.Module]] = {
    "ddp": _ddp,
    "fsdp_by_block": _by_block,
    "fsdp_by_block_kept": _by_block_kept,
    "fsdp_some_blocks": _by_every_other_block,
    "fsdp_whole": _whole,
    "fsdp_offloaded": _offloaded,
    "fsdp_hybrid": _hybrid,
    "ddp_checkpointed": _ddp_checkpointed,
    "fsdp_checkpointed": _fsdp_checkpointed,
    "ddp_accumulated": _ddp,
    "fsdp_accumulated": _by_block,
    "fsdp_accumulated_kept": _by_block_kept,
}


def work(
    rank: int, world: int, port: int, jobs: list[tuple[str, Case | Drawn | Regions, tuple[str, ...]]], folder: str
) -> None:
    """Run every case in its modes; write what went wrong as JSON."""
    join(rank, world, port)
    found: dict[str, str | None] = {}
    for number, (name, case, modes) in enumerate(jobs):
        model = case.transformed()
        single = copy.deepcopy(model)
        adaptive = bool(number % 2)
        history = list(_train(single, single, case, [slice(None)], adaptive))
        for mode in modes:
            try:
                twin = copy.deepcopy(model)
                _check(MODES[mode](twin), twin, single, history, case, mode.partition("_")[2], adaptive)
                found[f"{name}-{mode}"] = None
            except Exception:
                found[f"{name}-{mode}"] = traceback.format_exc()
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def join(rank: int, world: int, port: int) -> None:
    """Make this process one of a group."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=60),
    )


def _check(
    wrapped: nn.Module,
    model: Stack,
    single: Stack,
    history: list[Gradients],
    case: Case | Drawn | Regions,
    kind: str,
    adaptive: bool,
) -> None:
    """Training on a part of the batch a process, against one process with the whole batch."""
    size = BATCH // dist.get_world_size()
    start = dist.get_rank() * size
    parts = [slice(start, start + size)]
    if kind.startswith("accumulated"):
        parts = [slice(start, start + size // 2), slice(start + size // 2, start + size)]
    for step, gradients in enumerate(_train(wrapped, model, case, parts, adaptive)):
        for name, gradient in gradients.items():
            _compare(gradient, history[step][name], f"gradient {step} of {name}")
    for name, parameter in named(model):
        _compare(whole_tensor(parameter), single.get_parameter(name), f"parameter {name}")
    for path in fusion_layers(single):  # also from outside of a forward pass, where all is sharded
        if kind.startswith("checkpointed"):
            continue  # it has another path there
        one, other = (m.get_submodule(path).synthesized() for m in (model, single))  # type: ignore[operator]
        for name, tensor in other.items():
            _compare(whole_tensor(one[name]), tensor, f"synthesised {name}")
    assert list(model.state_dict()) == list(single.state_dict())


def named(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters by the names that they had before blocks were wrapped for checkpointing."""
    for name, parameter in model.named_parameters():
        yield name.replace("_checkpoint_wrapped_module.", ""), parameter


def _train(
    wrapped: nn.Module, model: Stack, case: Case | Drawn | Regions, parts: list[slice], adaptive: bool
) -> Iterator[Gradients]:
    """Five steps on parts of each batch, one after the other; the gradients of each step."""
    optimizer: torch.optim.Optimizer
    if adaptive:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-3)  # no noise where gradients vanish
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    for step in range(STEPS):
        x, *extra = case.inputs(BATCH)
        x = x.detach() + step
        optimizer.zero_grad()
        for part in parts:
            with _synchronised(wrapped, part is parts[-1]):
                (_loss(wrapped(x[part], *extra), part) / len(parts)).backward()
        yield {name: whole_tensor(p.grad) for name, p in named(model)}
        optimizer.step()


def _synchronised(wrapped: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Gradients are reduced with the last part of a step alone."""
    if isinstance(wrapped, DistributedDataParallel):
        return nullcontext() if last else wrapped.no_sync()
    if isinstance(wrapped, FSDPModule):
        wrapped.set_requires_gradient_sync(last)
    return nullcontext()


def _loss(result: Tensor | tuple[Tensor, Tensor], part: slice) -> Tensor:
    """A mean over the batch, so that the mean over the processes is that over all."""
    if isinstance(result, tuple):
        return _loss(result[0], part) + result[1]
    weight = torch.randn(BATCH, *result.shape[1:], generator=torch.Generator().manual_seed(7), dtype=result.dtype)
    return (result * weight[part]).sum() / len(result)


def whole_tensor(tensor: Tensor | None) -> Tensor | None:
    """The same tensor, whole on every process."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _compare(one: Tensor | None, other: Tensor | None, what: str) -> None:
    assert (one is None) == (other is None), f"{what}: {one is None} here, {other is None} in one process"
    if one is None or other is None:
        return
    assert one.shape == other.shape, what
    error, scale = (one - other).abs().max().item(), max(other.abs().max().item(), 1e-3)
    assert error <= TOLERANCE * scale, f"{what}: off by {error:.2e} at a scale of {scale:.2e}"
