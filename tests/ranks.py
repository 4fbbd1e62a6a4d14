"""What each process of test_property_distributed.py does: one group of processes goes through all cases."""

import copy
import datetime
import json
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from replfx.state import fusion_layers
from tests.reference import Stack
from tests.strategies import Case
from tests.test_property_functional import Regions
from tests.test_property_heterogeneous import Drawn

Gradients = dict[str, Tensor | None]

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


def work(rank: int, port: int, jobs: list[tuple[str, Case | Drawn | Regions, tuple[str, ...]]], folder: str) -> None:
    """Run every case in its modes; write what went wrong as JSON."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=RANKS,
        timeout=datetime.timedelta(seconds=60),
    )
    found: dict[str, str | None] = {}
    for name, case, modes in jobs:
        model = case.transformed()
        single = copy.deepcopy(model)
        history = list(_train(single, single, case, slice(None)))
        for mode in modes:
            try:
                _check(copy.deepcopy(model), single, history, MODES[mode], case, rank)
                found[f"{name}-{mode}"] = None
            except Exception:
                found[f"{name}-{mode}"] = traceback.format_exc()
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def _check(
    model: Stack,
    single: Stack,
    history: list[Gradients],
    wrap: Callable[[Stack], nn.Module],
    case: Case | Drawn | Regions,
    rank: int,
) -> None:
    """Training on half of the batch a process, against one process with the whole batch."""
    mine = slice(rank * BATCH // RANKS, (rank + 1) * BATCH // RANKS)
    for step, gradients in enumerate(_train(wrap(model), model, case, mine)):
        for name, gradient in gradients.items():
            _compare(gradient, history[step][name], f"gradient {step} of {name}")
    for name, parameter in model.named_parameters():
        _compare(_whole_tensor(parameter), single.get_parameter(name), f"parameter {name}")
    for path in fusion_layers(single):  # also from outside of a forward pass, where all is sharded
        one, other = (m.get_submodule(path).synthesized() for m in (model, single))  # type: ignore[operator]
        for name, tensor in other.items():
            _compare(_whole_tensor(one[name]), tensor, f"synthesised {name}")
    assert list(model.state_dict()) == list(single.state_dict())


def _train(wrapped: nn.Module, model: Stack, case: Case | Drawn | Regions, part: slice) -> Iterator[Gradients]:
    """Two steps on a part of each batch; the gradients of each."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(2):
        x, *extra = case.inputs(BATCH)
        x = x.detach() + step
        optimizer.zero_grad()
        _loss(wrapped(x[part], *extra), part).backward()
        yield {name: _whole_tensor(p.grad) for name, p in model.named_parameters()}
        optimizer.step()


def _loss(result: Tensor | tuple[Tensor, Tensor], part: slice) -> Tensor:
    """A mean over the batch, so that the mean over the processes is that over all."""
    if isinstance(result, tuple):
        return _loss(result[0], part) + result[1]
    weight = torch.randn(BATCH, *result.shape[1:], generator=torch.Generator().manual_seed(7), dtype=result.dtype)
    return (result * weight[part]).sum() / len(result)


def _whole_tensor(tensor: Tensor | None) -> Tensor | None:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _compare(one: Tensor | None, other: Tensor | None, what: str) -> None:
    assert (one is None) == (other is None), f"{what}: {one is None} here, {other is None} in one process"
    if one is None or other is None:
        return
    assert one.shape == other.shape, what
    error, scale = (one - other).abs().max().item(), max(other.abs().max().item(), 1e-3)
    assert error <= TOLERANCE * scale, f"{what}: off by {error:.2e} at a scale of {scale:.2e}"
