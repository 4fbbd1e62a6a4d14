"""Property 5: DDP and FSDP2 on two processes give the gradients of one process."""

import json
import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from tests.ranks import MODES, RANKS, work
from tests.reference import FAMILIES, Options
from tests.reference.heterogeneous import Step
from tests.strategies import FUSIONS, Case, Policy, fits
from tests.test_property_functional import Regions, spec_of
from tests.test_property_heterogeneous import Drawn

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="a build without torch.distributed")


def _jobs() -> list[tuple[str, Case | Drawn | Regions, tuple[str, ...]]]:
    """A transformer and a convolution network in everything; the other families with something of each."""
    modes = tuple(MODES)
    # A wider block with another kernel between two, and one of other heads: all that is read is aligned.
    units = (Step(4, 4), Step(4, 6, kernel=5), Step(6, 6), Step(6, 4, groups=2))
    flat = (Step(4, 4), Step(4, 6, kernel=5), Step(6, 6), Step(6, 6))
    whole = ("ddp", "fsdp_whole")  # no block of theirs is a module
    tokens = (Step(4, 4), Step(4, 6, heads=2, hidden=12), Step(6, 4, hidden=3))
    found: list[tuple[str, Case | Drawn | Regions, tuple[str, ...]]] = [
        ("unlike_units", Drawn("units", units, neighbour_gradient=0.5, training=False), modes),
        ("flat", Drawn("flat_conv_norm", flat, fusion="scalar", training=False), whole),
        ("functional", Regions(spec_of("mlp", dropout=False), training=False), whole),
        ("unlike_tokens", Drawn("tokens", tokens, fusion="scalar", training=False), ("fsdp_by_block",)),
    ]
    for position, family in enumerate(FAMILIES):
        options = Options(width=6, hidden=8, heads=2, dims=3 if family == "basic3d" else 2)
        everything = family in ("transformer", "basic")
        for operator in ("block", "light", "identity"):
            if not fits(family, options, operator):
                continue
            for number, fusion in enumerate(FUSIONS):
                if operator == "identity" and (number or not everything):
                    continue
                if not everything and number != (position + (operator == "light")) % 3:
                    continue
                gradient = (1.0, 0.5, 0.0)[(position + number) % 3]
                policy = Policy({"every": 2}, fusion, operator, gradient)
                # In evaluation mode: normalising over half a batch is another computation.
                case = Case(family, options, 5, policy, torch.float64, False, False, True, seed=13)
                some = ("fsdp_by_block", modes[len(found) % len(modes)])
                found.append((f"{family}-{operator}-{fusion}", case, modes if everything else tuple(sorted({*some}))))
    return found


JOBS = _jobs()


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str | None]]:
    """What each process found, from one run of all."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, args=(port, JOBS, str(folder)), nprocs=RANKS, join=True)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.mark.parametrize("name", [f"{name}-{mode}" for name, _, modes in JOBS for mode in modes])
def test_gradients_of_two_processes_are_those_of_one(findings: list[dict[str, str | None]], name: str) -> None:
    for rank, found in enumerate(findings):
        assert found[name] is None, f"process {rank}:\n{found[name]}"
