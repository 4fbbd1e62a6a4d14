"""Starts processes of a group on this machine, and brings back what each of them found."""

import datetime
import faulthandler
import multiprocessing
import os
import pickle
import sys
import traceback
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# What the processes import: once in a server that they are forked from, where a fresh interpreter for each of them
# took longer to import torch than most cases to train.
PRELOADED = ["torch.distributed.fsdp", "torch.distributed.tensor.parallel", "torch.distributed.checkpoint", "replfx"]
multiprocessing.set_forkserver_preload(PRELOADED)


def on_ranks(count: int, work: Callable[..., Any], folder: Path, *args: Any, backend: str = "gloo") -> list[Any]:
    """Call `work(*args)` in `count` processes of one group; what each returned, by rank.

    A process that waits for one that raised fails after two minutes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    arguments = (count, meeting_in(folder), folder, work, args, backend)
    mp.start_processes(_join, args=arguments, nprocs=count, start_method="forkserver")
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(count)]


def meeting_in(folder: Path) -> Path:
    """A file for one group of processes to meet in: a port that is free now may be taken when they get to it."""
    return folder / f"meeting-{uuid.uuid4().hex}"


def join(rank: int, count: int, meeting: Path, backend: str = "gloo") -> None:
    """Become a process of a group."""
    faulthandler.enable()  # a process that is killed by a signal says where
    torch.set_num_threads(1)
    dist.init_process_group(
        backend,
        init_method=meeting.as_uri(),
        rank=rank,
        world_size=count,
        timeout=datetime.timedelta(seconds=120),
    )


def tried(check: Callable[..., object], *args: Any) -> str | None:
    """What went wrong in a check, for the process that asks; None where nothing did."""
    try:
        check(*args)
    except Exception:
        return traceback.format_exc()
    return None


def assert_all_well(findings: list[dict[str, str | None]], name: str | None = None) -> None:
    """Nothing went wrong in any process: in the case of this name, or in all."""
    failed = [
        f"process {rank}, {each}:\n{found[each]}"
        for rank, found in enumerate(findings)
        for each in (found if name is None else [name])
        if found[each] is not None
    ]
    assert not failed, "\n".join(failed)


def _join(
    rank: int, count: int, meeting: Path, folder: Path, work: Callable[..., Any], args: tuple[Any, ...], backend: str
) -> None:
    join(rank, count, meeting, backend)
    (folder / f"{rank}.pickle").write_bytes(pickle.dumps(work(*args)))
    dist.barrier()
    dist.destroy_process_group()
    # Whoever still refers to the group (DDP's cycles do) would have it end with the interpreter, where gloo's threads
    # may abort the process ("terminate called without an active exception", pytorch/pytorch#190489). What is tested
    # is done.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
