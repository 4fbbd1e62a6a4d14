"""Ranks with different plans: every rank raises, and says who differs and where; nobody waits."""

from pathlib import Path

import pytest

import replfx
from tests.distributed.plans import without_the_check, work
from tests.support.models import tower
from tests.support.processes import on_ranks

pytestmark = pytest.mark.timeout(1800)  # many cases in one group of processes

# What differs → the words for it, with the last rank as {last}.
SAID = {
    "nothing": None,
    "nothing, wrapped": None,
    "nothing, wrapped on one rank": None,
    "nothing, untransformed": None,
    "a group that agrees": None,
    "blocks of one shape": "rank {last} replaces `blocks.3`, rank 0 `blocks.1`.",
    "how many": "rank {last} replaces nothing there, rank 0 `blocks.5`.",
    "fusion": "rank {last} replaces `blocks.1` with fusion channel, rank 0 `blocks.1` with fusion scalar.",
    "option": "replaces `blocks.1` with neighbour_gradient 0.5, rank 0 `blocks.1` with neighbour_gradient 1.0.",
    "one untransformed": "rank {last} has a model that is not transformed.",
    "all but one untransformed": "rank 0 has a model that is not transformed.",
    "one materialized": "rank {last} has a model that is not transformed.",
    "within": "rank {last} replaces `blocks.2`, rank 0 `blocks.1`.",
    "no module": "rank {last} has no torch.nn.Module.",
    "several": "rank 1 replaces `blocks.2`, rank 0 `blocks.1`.",
}


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_every_rank_says_which_ranks_differ_and_where(world: int, tmp_path: Path) -> None:
    for found in on_ranks(world, work, tmp_path):
        assert found.keys() == SAID.keys()
        for name, words in SAID.items():
            if words is None:
                assert found[name] is None, name
                continue
            unlike = "1, 2, 3" if name == "several" and world == 4 else str(world - 1)
            who = f"rank{'s' if ',' in unlike else ''} {unlike} not as rank 0: "
            assert who in found[name], name
            assert words.format(last=world - 1) in found[name], name


def test_ddp_alone_would_train_them(tmp_path: Path) -> None:
    on_ranks(2, without_the_check, tmp_path)


def test_one_process_is_in_agreement() -> None:
    replfx.check_ranks(replfx.transform(tower(5)))
    replfx.check_ranks(tower(5))
