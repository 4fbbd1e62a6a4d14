"""What each process of test_checkpoint.py does: training that is saved on some processes and goes on on others."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import replfx
from tests.distributed.data_parallel import join, whole_tensor
from tests.distributed.models import BLOCKS, WIDTH, Model
from tests.strategies import randomize

BATCH = 8
BEFORE, AFTER = 3, 2  # steps until the checkpoint is saved, and after it

CASES = [(block, operator) for block in ("transformer", "cnn") for operator in ("block", "light")]


def build(block: str, plan: replfx.Plan | None = None, **policy: Any) -> nn.Module:
    """A model, transformed: by the plan that lies beside its weights, or by a policy."""
    torch.manual_seed(3)
    plain = Model(BLOCKS[block]).double()
    model = replfx.transform(plain, batch(block, 0), **policy) if plan is None else replfx.apply(plain, plan)
    randomize(model, 5)
    return model


def batch(block: str, step: int) -> Tensor:
    """The same for all, whoever trains on which part of it."""
    shape = (BATCH, 6, WIDTH) if block == "transformer" else (BATCH, WIDTH, 6, 6)
    return torch.randn(shape, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """One with a state for each parameter."""
    return torch.optim.AdamW(replfx.parameter_groups(model), lr=1e-3, eps=1e-3)


def train(wrapped: nn.Module, optimizer: torch.optim.Optimizer, block: str, steps: range) -> None:
    """On this process's part of each batch."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    for step in steps:
        optimizer.zero_grad()
        wrapped(batch(block, step).chunk(world)[rank]).square().mean().backward()
        optimizer.step()


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """Whole and detached, by name."""
    return {name: whole_tensor(p.detach()) for name, p in model.named_parameters()}  # type: ignore[misc]


def sharded(model: nn.Module) -> nn.Module:
    """By block."""
    for block in model.blocks:  # type: ignore[union-attr]
        fully_shard(block)
    fully_shard(model)
    return model


def save(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """As docs/integrations.md says: beside, then renamed, with the plan in it."""
    weights, moments = get_state_dict(model, optimizer)
    state = {"plan": replfx.plan_of(model).to_json(), "model": weights, "optimizer": moments}
    beside = folder.with_suffix(".part")
    dcp.save(state, checkpoint_id=beside)
    if not dist.is_initialized() or dist.get_rank() == 0:
        beside.rename(folder)
    if dist.is_initialized():
        dist.barrier()


def plan_in(folder: Path) -> replfx.Plan:
    """The plan that a checkpoint was saved under."""
    found: dict[str, Any] = {"plan": ""}
    dcp.load(found, checkpoint_id=folder, no_dist=True)
    return replfx.Plan.from_json(found["plan"])


def load(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """All of it into a model with the checkpoint's plan."""
    weights, moments = get_state_dict(model, optimizer)
    state: Mapping[str, Any] = {"model": weights, "optimizer": moments}
    dcp.load(dict(state), checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)


def save_on_these(rank: int, world: int, port: int, folder: str) -> None:
    """Train, save, and train on, to know where that leads."""
    join(rank, world, port)
    for block, operator in CASES:
        home = Path(folder) / f"{block}-{operator}"
        model = sharded(build(block, every=2, operator=operator, fusion="channel"))
        optimizer = optimizer_of(model)
        train(model, optimizer, block, range(BEFORE))
        save(model, optimizer, home / "checkpoint")
        train(model, optimizer, block, range(BEFORE, BEFORE + AFTER))
        found = parameters(model)
        if rank == 0:
            torch.save(found, home / "end.pt")
    dist.destroy_process_group()


def load_on_these(rank: int, world: int, port: int, folder: str) -> None:
    """Go on where the others stopped, sharded, and with DDP; write where that leads."""
    join(rank, world, port)
    for block, operator in CASES:
        home = Path(folder) / f"{block}-{operator}"
        for how in ("fsdp", "ddp"):
            model = build(block, plan_in(home / "checkpoint"))
            wrapped = sharded(model) if how == "fsdp" else DistributedDataParallel(model)
            optimizer = optimizer_of(model)
            load(model, optimizer, home / "checkpoint")
            train(wrapped, optimizer, block, range(BEFORE, BEFORE + AFTER))
            found = parameters(model)
            if rank == 0:
                torch.save(found, home / f"end-{how}-{world}.pt")
    dist.destroy_process_group()


def die_while_saving(rank: int, world: int, port: int, folder: str) -> None:
    """Save a checkpoint, then be killed as the second has written some of its files."""
    join(rank, world, port)
    model = sharded(build("transformer", every=2))
    optimizer = optimizer_of(model)
    train(model, optimizer, "transformer", range(1))
    save(model, optimizer, Path(folder) / "first")
    writer = dcp.FileSystemWriter(Path(folder) / "second.part")
    finish = writer.finish
    writer.finish = lambda *_: os._exit(9)  # type: ignore[method-assign]
    assert finish
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, storage_writer=writer)
