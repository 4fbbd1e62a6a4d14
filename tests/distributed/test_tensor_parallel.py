"""Tensor parallelism, alone and within FSDP2, gives the gradients and the training steps of one process."""

import json
import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from tests.distributed.tensor_parallel import Case, refusals, work
from tests.strategies import FUSIONS

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="a build without torch.distributed")

Jobs = list[tuple[str, Case, tuple[str, ...]]]


def _jobs(modes: dict[str, tuple[str, ...]]) -> Jobs:
    """Every operator and fusion for each kind of block, in these modes."""
    found: Jobs = []
    for block, its_modes in modes.items():
        for operator in ("block", "light", "identity"):
            for number, fusion in enumerate(FUSIONS if operator != "identity" else FUSIONS[:1]):
                case = Case(block, operator, fusion, (1.0, 0.5, 0.0)[number])
                found.append((f"{block}-{operator}-{fusion}", case, its_modes))
    return found


ON_TWO = _jobs(
    {
        "transformer": ("tensor", "by_block", "sequence", "prepared", "distributed"),
        "fused": ("matrices",),
        "cnn": ("distributed",),
    }
)
ON_FOUR = _jobs({"transformer": ("tensor", "sharded_tensor", "sharded_sequence"), "cnn": ("distributed",)})


def _run(worker: object, world: int, *args: object) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, args=(world, port, *args), nprocs=world, join=True)


def _findings(world: int, jobs: Jobs, folder: Path) -> list[dict[str, str | None]]:
    _run(work, world, jobs, str(folder))
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]


@pytest.fixture(scope="module")
def on_two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str | None]]:
    """What each of two processes found, from one run of all."""
    return _findings(2, ON_TWO, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def on_four(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str | None]]:
    """The same of four."""
    return _findings(4, ON_FOUR, tmp_path_factory.mktemp("four"))


def _names(jobs: Jobs) -> list[str]:
    return [f"{name}-{mode}" for name, _, modes in jobs for mode in modes]


@pytest.mark.parametrize("name", _names(ON_TWO))
def test_two_processes_train_as_one(on_two: list[dict[str, str | None]], name: str) -> None:
    for rank, found in enumerate(on_two):
        assert found[name] is None, f"process {rank}:\n{found[name]}"


@pytest.mark.slow
@pytest.mark.parametrize("name", _names(ON_FOUR))
def test_four_processes_train_as_one(on_four: list[dict[str, str | None]], name: str) -> None:
    for rank, found in enumerate(on_four):
        assert found[name] is None, f"process {rank}:\n{found[name]}"


def test_what_is_refused_and_what_is_left_as_it_was(tmp_path: Path) -> None:
    _run(refusals, 2, str(tmp_path))
    for rank in range(2):
        assert (tmp_path / f"{rank}.txt").read_text() == "", f"process {rank}"
