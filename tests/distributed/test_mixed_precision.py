"""FSDP2's mixed precision: blocks compute in bfloat16, weights are synthesised and gradients reduced in float32."""

import json
import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from tests.distributed.mixed_precision import CASES, work

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="a build without torch.distributed")


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str | None]]:
    """What each process found, from one run of all."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, args=(2, port, str(folder)), nprocs=2, join=True)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", list(CASES))
def test_steps_are_those_of_the_same_arithmetic_on_one_process(
    findings: list[dict[str, str | None]], name: str
) -> None:
    for rank, found in enumerate(findings):
        assert found[name] is None, f"process {rank}:\n{found[name]}"
