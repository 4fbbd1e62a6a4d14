"""Property 5: DDP and FSDP2 on two processes give the gradients of one process."""

import json
import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from tests.ranks import MODES, RANKS, work
from tests.reference import FAMILIES, Options
from tests.strategies import FUSIONS, Case, Policy, fits

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="a build without torch.distributed")


def _cases() -> dict[str, Case]:
    """A transformer and two convolution networks with everything; the other families with one fusion each."""
    found = {}
    for position, family in enumerate(FAMILIES):
        options = Options(width=6, hidden=8, heads=2, dims=3 if family == "basic3d" else 2)
        everything = family in ("transformer", "basic", "convnext")
        for operator in ("block", "light", "identity"):
            if not fits(family, options, operator):
                continue
            for number, fusion in enumerate(FUSIONS):
                if (operator == "identity" and number) or not (everything or number == position % 3):
                    continue
                gradient = (1.0, 0.5, 0.0)[(position + number) % 3] if operator == "light" else (1.0, 0.5)[number % 2]
                policy = Policy({"every": 2}, fusion, operator, gradient)
                # In evaluation mode: normalising over half a batch is another computation.
                found[f"{family}-{operator}-{fusion}"] = Case(
                    family, options, 5, policy, torch.float64, False, False, True, seed=13
                )
    return found


CASES = _cases()


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str | None]]:
    """What each process found, from one run of all."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, args=(port, CASES, str(folder)), nprocs=RANKS, join=True)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CASES)
def test_gradients_of_two_processes_are_those_of_one(
    findings: list[dict[str, str | None]], name: str, mode: str
) -> None:
    for rank, found in enumerate(findings):
        assert found[f"{name}-{mode}"] is None, f"process {rank}:\n{found[f'{name}-{mode}']}"
