"""Property 5: DDP and FSDP2 on 2 and on 4 processes give the gradients and 5 steps of one process."""

from dataclasses import replace

import pytest
import torch

from tests.distributed.layouts import MODES, MORE_MODES
from tests.distributed.processes import on_ranks
from tests.distributed.ranks import Job, work
from tests.reference import FAMILIES, Options
from tests.reference.heterogeneous import Step
from tests.strategies import FUSIONS, Case, Policy, fits
from tests.test_property_functional import Regions, spec_of
from tests.test_property_heterogeneous import Drawn

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="a build without torch.distributed")

BOTH = ("transformer", "basic")
HYBRID = tuple(mode for mode in MORE_MODES if mode.startswith("hsdp"))


def _uniform(operators: tuple[str, ...], families: tuple[str, ...] = tuple(FAMILIES)) -> list[tuple[str, Case, int]]:
    """Stacks of like blocks, with their number: the first two families in every fusion, the others in one."""
    found = []
    for position, family in enumerate(families):
        options = Options(width=6, hidden=8, heads=2, dims=3 if family == "basic3d" else 2)
        for operator in operators:
            for number, fusion in enumerate(FUSIONS):
                if not fits(family, options, operator) or operator == "identity" and (number or family not in BOTH):
                    continue
                if family not in BOTH and number != (position + (operator == "light")) % 3:
                    continue
                policy = Policy({"every": 2}, fusion, operator, (1.0, 0.5, 0.0)[(position + number) % 3])
                # In evaluation mode: normalising over half a batch is another computation.
                case = Case(family, options, 5, policy, torch.float64, False, False, True, seed=13)
                found.append((f"{family}-{operator}-{fusion}", case, len(found)))
    return found


def _jobs_of_two() -> list[Job]:
    """A transformer and a convolution network in everything; the other families with something of each."""
    modes = tuple(MODES)
    # A wider block with another kernel between two, and one of other heads: all that is read is aligned.
    units = (Step(4, 4), Step(4, 6, kernel=5), Step(6, 6), Step(6, 4, groups=2))
    flat = (Step(4, 4), Step(4, 6, kernel=5), Step(6, 6), Step(6, 6))
    whole = ("ddp", "fsdp_whole")  # no block of theirs is a module
    tokens = (Step(4, 4), Step(4, 6, heads=2, hidden=12), Step(6, 4, hidden=3))
    unlike = Drawn("units", units, neighbour_gradient=0.5, training=False)
    more = tuple(mode for mode in MORE_MODES if mode not in HYBRID)  # a hybrid of two is one replica
    found = [
        Job("unlike_units", unlike, (*modes, *more), "adamw"),
        Job("flat", Drawn("flat_conv_norm", flat, fusion="scalar", training=False), whole),
        Job("functional", Regions(spec_of("mlp", dropout=False), training=False), whole, "adamw"),
        Job("unlike_tokens", Drawn("tokens", tokens, fusion="scalar", training=False), ("fsdp_by_block",)),
    ]
    for name, case, number in _uniform(("block", "light", "identity")):
        some = tuple(sorted({"fsdp_by_block", modes[number % len(modes)]}))
        found.append(Job(name, case, modes if case.family in BOTH else some, ("sgd", "adamw")[number % 2]))
    return found


def _jobs_of_four() -> list[Job]:
    """A transformer and a convolution network in every fusion and operator; each in some of the modes."""
    modes = (*MODES, *MORE_MODES)
    found = []
    for name, case, number in _uniform(("block", "light", "identity"), BOTH):
        some = {"fsdp_by_block", *modes[1 + number % 2 :: 7][:1], *(modes[(3 * number + i) % len(modes)] for i in (0, 1, 2))}
        found.append(Job(name, case, tuple(sorted(some)), ("sgd", "adamw")[number % 2]))
    return found


TWO, FOUR = _jobs_of_two(), _jobs_of_four()
ALL_OF_FOUR = [replace(job, modes=(*MODES, *MORE_MODES)) for job in FOUR]

Found = list[dict[str, str | None]]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What each of two processes found, from one run of all."""
    return on_ranks(2, work, tmp_path_factory.mktemp("two"), TWO)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return on_ranks(4, work, tmp_path_factory.mktemp("four"), FOUR)


@pytest.fixture(scope="module")
def all_of_four(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return on_ranks(4, work, tmp_path_factory.mktemp("all"), ALL_OF_FOUR)


def check(found: Found, name: str) -> None:
    for rank, its in enumerate(found):
        assert its[name] is None, f"process {rank}:\n{its[name]}"


@pytest.mark.parametrize("name", [name for job in TWO for name in job.names])
def test_two_processes_train_as_one(two: Found, name: str) -> None:
    check(two, name)


@pytest.mark.parametrize("name", [name for job in FOUR for name in job.names])
def test_four_processes_train_as_one(four: Found, name: str) -> None:
    check(four, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for job in ALL_OF_FOUR for name in job.names])
def test_four_processes_train_as_one_in_every_mode(all_of_four: Found, name: str) -> None:
    check(all_of_four, name)
