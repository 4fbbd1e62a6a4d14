"""Property 5: DDP and FSDP2 on two and four processes give the gradients and the steps of one process."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from tests.distributed.data_parallel import MODES, work
from tests.reference import FAMILIES, Options
from tests.reference.heterogeneous import Step
from tests.strategies import FUSIONS, Case, Policy, fits
from tests.test_property_functional import Regions, spec_of
from tests.test_property_heterogeneous import Drawn

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="a build without torch.distributed")


Jobs = list[tuple[str, Case | Drawn | Regions, tuple[str, ...]]]

EVERY_FUSION = ("ddp", "fsdp_by_block", "fsdp_by_block_kept", "fsdp_some_blocks", "fsdp_whole")
ON_TWO = tuple(mode for mode in MODES if mode != "fsdp_hybrid")
ON_FOUR = ("ddp", "fsdp_by_block", "fsdp_hybrid", "fsdp_whole", "fsdp_checkpointed", "ddp_accumulated")


def _jobs_on_two() -> Jobs:
    """A transformer and a convolution network in everything; the other families with something of each."""
    # A wider block with another kernel between two, and one of other heads: all that is read is aligned.
    units = (Step(4, 4), Step(4, 6, kernel=5), Step(6, 6), Step(6, 4, groups=2))
    flat = (Step(4, 4), Step(4, 6, kernel=5), Step(6, 6), Step(6, 6))
    whole = ("ddp", "fsdp_whole")  # no block of theirs is a module
    tokens = (Step(4, 4), Step(4, 6, heads=2, hidden=12), Step(6, 4, hidden=3))
    aligned = ("ddp", "fsdp_by_block", "fsdp_by_block_kept", "fsdp_some_blocks", "fsdp_whole", "fsdp_accumulated")
    found: Jobs = [
        ("unlike_units", Drawn("units", units, neighbour_gradient=0.5, training=False), aligned),
        ("flat", Drawn("flat_conv_norm", flat, fusion="scalar", training=False), whole),
        ("functional", Regions(spec_of("mlp", dropout=False), training=False), whole),
        ("unlike_tokens", Drawn("tokens", tokens, fusion="scalar", training=False), ("fsdp_by_block",)),
    ]
    for position, family in enumerate(FAMILIES):
        everything = family in ("transformer", "basic")
        for number, (name, case) in enumerate(_cases(family, position)):
            some = ("fsdp_by_block", ON_TWO[(position + number) % len(ON_TWO)])
            if everything or number in (0, 3):
                of_all = ON_TWO if case.policy.fusion == "channel" else EVERY_FUSION
                found.append((name, case, of_all if everything else tuple(sorted({*some}))))
    return found


def _cases(family: str, position: int = 0) -> Iterator[tuple[str, Case]]:
    """Every fusion and operator that these blocks have."""
    options = Options(width=6, hidden=8, heads=2, dims=3 if family == "basic3d" else 2)
    for operator in ("block", "light", "identity"):
        if not fits(family, options, operator):
            continue
        for number, fusion in enumerate(FUSIONS if operator != "identity" else FUSIONS[:1]):
            policy = Policy({"every": 2}, fusion, operator, (1.0, 0.5, 0.0)[(position + number) % 3])
            # In evaluation mode: normalising over a part of a batch is another computation.
            case = Case(family, options, 5, policy, torch.float64, False, False, True, seed=13)
            yield f"{family}-{operator}-{fusion}", case


JOBS_ON_TWO = _jobs_on_two()
JOBS_ON_FOUR: Jobs = [(name, case, ON_FOUR) for family in ("transformer", "basic") for name, case in _cases(family)]


def _findings(world: int, jobs: Jobs, folder: Path) -> list[dict[str, str | None]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, args=(world, port, jobs, str(folder)), nprocs=world, join=True)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]


@pytest.fixture(scope="module")
def on_two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str | None]]:
    """What each of two processes found, from one run of all."""
    return _findings(2, JOBS_ON_TWO, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def on_four(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str | None]]:
    """The same of four."""
    return _findings(4, JOBS_ON_FOUR, tmp_path_factory.mktemp("four"))


def _names(jobs: Jobs) -> list[str]:
    return [f"{name}-{mode}" for name, _, modes in jobs for mode in modes]


@pytest.mark.parametrize("name", _names(JOBS_ON_TWO))
def test_two_processes_train_as_one(on_two: list[dict[str, str | None]], name: str) -> None:
    for rank, found in enumerate(on_two):
        assert found[name] is None, f"process {rank}:\n{found[name]}"


@pytest.mark.slow
@pytest.mark.parametrize("name", _names(JOBS_ON_FOUR))
def test_four_processes_train_as_one(on_four: list[dict[str, str | None]], name: str) -> None:
    for rank, found in enumerate(on_four):
        assert found[name] is None, f"process {rank}:\n{found[name]}"
