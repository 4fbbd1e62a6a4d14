"""Tensor parallelism, alone and within FSDP2, gives the gradients and the training steps of one process."""

from pathlib import Path

import pytest

from tests.distributed.tensor_parallel import Case, Jobs, refusals, work
from tests.support.processes import assert_all_well, on_ranks
from tests.support.strategies import FUSIONS

pytestmark = pytest.mark.timeout(1800)  # many cases in one group of processes


OPERATORS = ("block", "light", "identity", "mixer")


def _jobs(block: str, modes: tuple[str, ...], operators: tuple[str, ...] = OPERATORS, each: int = 1) -> Jobs:
    """These operators in these modes, in `each` fusions: by turns, so that all fusions meet all modes."""
    found: dict[tuple[str, str], list[str]] = {}
    for row, operator in enumerate(operators):
        for column, mode in enumerate(modes):
            for step in range(1 if operator == "identity" else each):  # it reads no weights
                found.setdefault((operator, FUSIONS[(row + column + step) % len(FUSIONS)]), []).append(mode)
    return [
        (
            f"{block}-{operator}-{fusion}",
            Case(block, operator, fusion, (1.0, 0.5, 0.0)[FUSIONS.index(fusion)]),
            tuple(some),
        )
        for (operator, fusion), some in found.items()
    ]


ON_TWO = [
    *_jobs("transformer", ("tensor", "sequence"), each=2),
    *_jobs("transformer", ("by_block", "prepared", "distributed"), ("light", "block")),
    *_jobs("fused", ("matrices",), ("block", "light")),
    *_jobs("cnn", ("distributed",), ("block", "light"), each=2),
]
ON_FOUR = [
    *_jobs("transformer", ("tensor", "sharded_tensor", "sharded_sequence", "sharded_evaluated"), each=2),
    *_jobs("cnn", ("distributed",), ("block", "light", "identity"), each=3),
]


@pytest.fixture(scope="module")
def on_two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str | None]]:
    """What each of two processes found, from one run of all."""
    return on_ranks(2, work, tmp_path_factory.mktemp("two"), ON_TWO)


@pytest.fixture(scope="module")
def on_four(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str | None]]:
    """The same of four."""
    return on_ranks(4, work, tmp_path_factory.mktemp("four"), ON_FOUR)


def _names(jobs: Jobs) -> list[str]:
    return [f"{name}-{mode}" for name, _, modes in jobs for mode in modes]


@pytest.mark.slow
@pytest.mark.parametrize("name", _names(ON_TWO))
def test_two_processes_train_as_one(on_two: list[dict[str, str | None]], name: str) -> None:
    assert_all_well(on_two, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", _names(ON_FOUR))
def test_four_processes_train_as_one(on_four: list[dict[str, str | None]], name: str) -> None:
    assert_all_well(on_four, name)


@pytest.mark.slow
def test_what_is_refused_and_what_is_left_as_it_was(tmp_path: Path) -> None:
    assert on_ranks(2, refusals, tmp_path) == [None, None]
