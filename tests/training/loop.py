"""A training loop as users write it, in processes that can be killed: a schedule, dropout, a log and checkpoints.

Imported by the process that the others are forked from, so that each starts at once.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import sys
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import load as load_sharded
from torch.distributed.checkpoint import save as save_sharded
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import replfx
from tests.support.processes import PRELOADED, join, meeting_in

STEPS, EVERY, SWITCH = 24, 5, 12  # the switch comes between two checkpoints
ACTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload([*PRELOADED, __name__])  # there is one such server for all tests


@dataclass(frozen=True)
class Run:
    """One start of the training.

    Attributes:
        folder: where checkpoints and the log are.
        ranks: processes that train together.
        sharded: by FSDP2 rather than DistributedDataParallel.
        die_at: the last rank kills itself with -9 just before its act of this number in the folder (opening, renaming,
            removing, …).
        die_after: the same before the first act after it gave a checkpoint this name.
    """

    folder: Path
    ranks: int = 1
    sharded: bool = False
    die_at: int | None = None
    die_after: str | None = None

    def go(self) -> bool:
        """Run until the end, or until one rank dies; whether it came to the end."""
        meeting = meeting_in(self.folder.parent)
        processes = [context.Process(target=_work, args=(self, rank, meeting)) for rank in range(self.ranks)]
        for process in processes:
            process.start()
        left = list(processes)
        while left and not any(process.exitcode for process in processes):
            ready = wait([process.sentinel for process in left])
            left = [process for process in left if process.sentinel not in ready]
        for process in processes:
            process.kill()  # it waits for one that died
            process.join()
        codes = [process.exitcode for process in processes]
        assert self.die_at or self.die_after or not any(codes), codes
        return not any(codes)

    @property
    def losses(self) -> list[str]:
        """One line a step: its number and its loss, exactly."""
        return (self.folder / "log").read_text().splitlines()

    @property
    def acts(self) -> int:
        """How many acts on its folder the last rank had."""
        return int(self.folder.with_name(f"{self.folder.name}-acts").read_text())


def _work(run: Run, rank: int, meeting: Path) -> None:
    join(rank, run.ranks, meeting)
    acts = 0

    def watch(event: str, values: tuple[object, ...]) -> None:
        nonlocal acts
        if event in ACTS and str(values[0]).startswith(str(run.folder)):
            acts += 1
            named = run.die_after is not None and (run.folder / run.die_after).exists()
            if rank == run.ranks - 1 and (acts == run.die_at or named):
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    _train(run)
    if rank == run.ranks - 1:
        run.folder.with_name(f"{run.folder.name}-acts").write_text(str(acts))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may abort an interpreter that ends


def build() -> nn.Module:
    torch.manual_seed(0)
    layer = partial(nn.TransformerEncoderLayer, 8, 2, 16, dropout=0.2, batch_first=True)
    return nn.Sequential(*(layer() for _ in range(5)))


def _train(run: Run) -> None:
    model = replfx.transform(build())
    replfx.check_ranks(model)
    if run.sharded:
        for block in model.children():
            fully_shard(block)
        fully_shard(model)
    wrapped = DistributedDataParallel(model) if run.ranks > 1 and not run.sharded else model
    optimizer = torch.optim.AdamW(replfx.parameter_groups(model), lr=1e-2)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    schedule = replfx.Schedule(wrapped, optimizer, unroll_at=SWITCH)
    torch.manual_seed(100 + dist.get_rank())  # dropout draws other numbers on each rank
    run.folder.mkdir(exist_ok=True)
    step = _resume(run.folder, model, optimizer, rates, schedule)
    log = run.folder / "log"
    if dist.get_rank() == 0:  # what was logged after the checkpoint is trained once more
        log.write_text("".join(f"{line}\n" for line in (log.read_text().splitlines() if step else [])[:step]))
    while step < STEPS:
        x = torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(step * run.ranks + dist.get_rank()))
        loss = (wrapped(x) - x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        rates.step()
        schedule.step()
        step += 1
        if dist.get_rank() == 0:
            with log.open("a") as file:
                print(step, loss.item().hex(), file=file)
        if step % EVERY == 0 or step == STEPS:
            _save(run.folder / f"step-{step:03}", model, optimizer, rates, schedule)


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments, f"random {dist.get_rank()}": torch.get_rng_state()}


def _save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, rates: Any, schedule: Any) -> None:
    """Written beside and then renamed, so that what has its name is whole."""
    beside = folder.with_name(f".{folder.name}.part")
    if dist.get_rank() == 0:
        shutil.rmtree(beside, ignore_errors=True)
    dist.barrier()
    save_sharded(_state(model, optimizer), checkpoint_id=beside)
    if dist.get_rank() == 0:
        text = json.dumps({"schedule": schedule.state_dict(), "rates": rates.state_dict()})
        (beside / "run.json").write_text(text)
        beside.rename(folder)
        for old in sorted(folder.parent.glob("step-*"))[:-2]:
            shutil.rmtree(old)
    dist.barrier()


def _resume(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, rates: Any, schedule: Any) -> int:
    """Go on from the newest checkpoint; gives the steps that it has."""
    found = sorted(path for path in folder.glob("step-*") if (path / "run.json").exists())
    if not found:
        return 0
    about = json.loads((found[-1] / "run.json").read_text())
    schedule.load_state_dict(about["schedule"])  # first: it says what the model and the optimizer hold
    state = _state(model, optimizer)
    load_sharded(state, checkpoint_id=found[-1])
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    torch.set_rng_state(state[f"random {dist.get_rank()}"])
    rates.load_state_dict(about["rates"])
    return int(schedule.steps)
