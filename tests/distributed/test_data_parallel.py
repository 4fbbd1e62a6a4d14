"""Property 5: DDP and FSDP2 on 2 and on 4 processes give the gradients and the steps of one process."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.distributed.layouts import MODES, MORE_MODES
from tests.distributed.ranks import Job, work
from tests.reference import FAMILIES
from tests.reference.heterogeneous import Step
from tests.support.processes import assert_all_well, on_ranks
from tests.support.regions import Regions, spec_of
from tests.support.stacks import Drawn
from tests.support.strategies import FUSIONS, Case, case_of, fits

pytestmark = pytest.mark.timeout(1800)  # many cases in one group of processes

BOTH = ("transformer", "basic")
HYBRID = tuple(mode for mode in MORE_MODES if mode.startswith("hsdp"))


def _uniform(operators: tuple[str, ...], families: tuple[str, ...] = tuple(FAMILIES)) -> list[tuple[str, Case, int]]:
    """Stacks of like blocks, with their number: the first two families in every fusion, the others in one."""
    found = []
    for position, family in enumerate(families):
        for operator in operators:
            for number, fusion in enumerate(FUSIONS):
                gradient = (1.0, 0.5, 0.0)[(position + number) % 3]
                # In evaluation mode: normalising over half a batch is another computation.
                case = case_of(family, operator, fusion, gradient=gradient, training=False, width=6, depth=5, seed=13)
                if not fits(family, case.options, operator):
                    continue
                if operator == "identity" and (number or family not in BOTH):
                    continue
                if family not in BOTH and number != (position + (operator == "light")) % 3:
                    continue
                # Looked at in each process, which takes longer than training.
                case = replace(case, traced_on_inputs=not FAMILIES[family].residual)
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
    for name, case, number in (*_uniform(("block", "light", "identity")), *_uniform(("mixer",))):
        if case.family not in BOTH:
            some = tuple(sorted({"fsdp_by_block", modes[number % len(modes)]}))
            found.append(Job(name, case, some, ("sgd", "adamw")[number % 2]))
    for operator, each in (("block", 2), ("light", 1), ("identity", 1), ("mixer", 1)):
        found += _by_turns(operator, modes, each)
    return found


def _by_turns(operator: str, modes: tuple[str, ...], each: int = 1) -> list[Job]:
    """A transformer and a convolution network with an operator in all modes, each mode with `each` of the fusions."""
    found = []
    for family in BOTH:
        cases = _uniform((operator,), (family,))
        some: dict[int, list[str]] = {}
        for turn, mode in enumerate(modes):
            for number in {(turn + step) % len(cases) for step in range(each)} if cases else ():
                some.setdefault(number, []).append(mode)
        for number, ways in some.items():
            name, case, _ = cases[number]
            found.append(Job(name, case, tuple(ways), ("sgd", "adamw")[number % 2]))
    return found


def _jobs_of_four() -> list[Job]:
    every = (*MODES, *MORE_MODES)
    return [*_by_turns("block", every), *_by_turns("light", every), *_by_turns("identity", ("ddp", "hsdp_by_block"))]


def _unrolled() -> list[Job]:
    """Unrolled on the way: what wraps a model hears of its new parameters."""
    every = tuple(mode for mode in (*MODES, *MORE_MODES) if mode not in HYBRID)
    some = ("ddp", "fsdp_by_block", "fsdp_whole")
    drawn = {name: case for name, case, _ in (*_uniform(("block", "identity"), BOTH), *_uniform(("mixer",)))}
    modes = {"transformer-block-channel": every, "basic-block-scalar": some, "transformer-identity-scalar": ("ddp",)}
    mixer = next(name for name in drawn if "mixer" in name)
    found = [
        Job(f"unrolled-{name}", drawn[name], ways, "adamw", unrolled=1) for name, ways in {**modes, mixer: some}.items()
    ]
    regions = Job("unrolled-functional", Regions(spec_of("mlp", dropout=False), training=False), ("ddp", "fsdp_whole"))
    return [*found, replace(regions, optimizer="adamw", unrolled=1)]


TWO, FOUR = _jobs_of_two(), _jobs_of_four()


def _family(job: Job) -> str:
    """One of those that are trained in everything, or nothing."""
    return next((family for family in BOTH if job.name.startswith(f"{family}-")), "")


def check(ranks: int, jobs: list[Job], folder: Path) -> None:
    """All in one group of processes, and so in one test: it takes longer to start than to train."""
    assert_all_well(on_ranks(ranks, work, folder, jobs))


@pytest.mark.parametrize(
    "family",
    ["transformer", *(pytest.param(name, marks=pytest.mark.slow, id=name or "others") for name in ("basic", ""))],
)
def test_two_processes_train_as_one(tmp_path: Path, family: str) -> None:
    check(2, [job for job in TWO if _family(job) == family], tmp_path)


@pytest.mark.slow
def test_two_processes_unroll_as_one(tmp_path: Path) -> None:
    check(2, _unrolled(), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", BOTH)
def test_four_processes_train_as_one(tmp_path: Path, family: str) -> None:
    check(4, [job for job in FOUR if _family(job) == family], tmp_path)
