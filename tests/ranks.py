"""What each process of test_property_distributed.py does: one group of processes goes through all cases."""

import copy
import datetime
import json
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import replfx
from tests.reference import Stack
from tests.strategies import Case

RANKS = 2
BATCH = 4

# Of the largest entry of a gradient. The processes sum the same float64 numbers in another order, as in
# test_properties; a gradient that is not averaged, or averaged twice, is off by a factor of RANKS.
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


MODES: dict[str, Callable[[Stack], nn.Module]] = {
    "ddp": _ddp,
    "fsdp_by_block": _by_block,
    "fsdp_by_block_kept": _by_block_kept,
    "fsdp_some_blocks": _by_every_other_block,
    "fsdp_whole": _whole,
}


def work(rank: int, port: int, cases: dict[str, Case], folder: str) -> None:
    """Run every case in every mode; write what went wrong as JSON."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=RANKS,
        timeout=datetime.timedelta(seconds=60),
    )
    found: dict[str, str | None] = {}
    for name, case in cases.items():
        for mode, wrap in MODES.items():
            try:
                _check(case, wrap, rank)
                found[f"{name}-{mode}"] = None
            except Exception:
                found[f"{name}-{mode}"] = traceback.format_exc()
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def _check(case: Case, wrap: Callable[[Stack], nn.Module], rank: int) -> None:
    """Two steps of training on half of the batch a process, against one process with the whole batch."""
    single = case.transformed()
    model = copy.deepcopy(single)
    keys = list(single.state_dict())
    wrapped = wrap(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01) for m in (single, model)]
    for step in range(2):
        x, *extra = case.inputs(BATCH)
        x = x.detach() + step
        weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(7), dtype=x.dtype)
        mine = slice(rank * BATCH // RANKS, (rank + 1) * BATCH // RANKS)
        for optimizer in optimizers:
            optimizer.zero_grad()
        _loss(single(x, *extra), weight).backward()
        _loss(wrapped(x[mine], *extra), weight[mine]).backward()
        for name, parameter in model.named_parameters():
            _compare(_whole_tensor(parameter.grad), single.get_parameter(name).grad, f"gradient {step} of {name}")
        for optimizer in optimizers:
            optimizer.step()
    for name, parameter in model.named_parameters():
        _compare(_whole_tensor(parameter), single.get_parameter(name), f"parameter {name}")
    for path in replfx.report(single).replaced:  # also from outside of a forward pass, where all is sharded
        one, other = (m.get_submodule(path).synthesized() for m in (model, single))  # type: ignore[operator]
        for name, tensor in other.items():
            _compare(_whole_tensor(one[name]), tensor, f"synthesised {name}")
    assert list(model.state_dict()) == keys


def _loss(result: Tensor | tuple[Tensor, Tensor], weight: Tensor) -> Tensor:
    """A mean over the batch, so that the mean over the processes is that over all."""
    if isinstance(result, tuple):
        return _loss(result[0], weight) + result[1]
    return (result * weight).sum() / len(result)


def _whole_tensor(tensor: Tensor | None) -> Tensor | None:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _compare(one: Tensor | None, other: Tensor | None, what: str) -> None:
    assert (one is None) == (other is None), f"{what}: {one is None} here, {other is None} in one process"
    if one is None or other is None:
        return
    assert one.shape == other.shape, what
    error, scale = (one - other).abs().max().item(), max(other.abs().max().item(), 1e-3)
    assert error <= TOLERANCE * scale, f"{what}: off by {error:.2e} at a scale of {scale:.2e}"
