"""From a policy to positions: never adjacent, never an end, always the same."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import replfx
from replfx import Choice
from replfx.chains.chain import Chains
from replfx.chains.find import find_chains
from replfx.chains.policy import Policy
from replfx.chains.select import select
from tests.chains.containers import CONTAINERS
from tests.support.models import Plain, Tower, tower
from tests.support.snapshots import assert_unchanged, snapshot

LENGTHS = st.integers(3, 13)


@functools.cache
def found_in(length: int) -> Chains:
    return find_chains(replfx.capture(Tower(*(Plain() for _ in range(length)))))


def positions(length: int, **policy: object) -> list[int]:
    """Numbers, from 0, of the blocks that a policy chooses in one chain."""
    plan = select(found_in(length), Policy(**policy)).plan
    return [int(r.path.removeprefix("blocks.")) for r in plan.replacements]


def check(chosen: list[int], length: int) -> None:
    assert chosen == sorted(set(chosen))
    assert 0 not in chosen
    assert length - 1 not in chosen
    assert all(b - a >= 2 for a, b in itertools.pairwise(chosen))


@settings(max_examples=60, deadline=None)
@given(length=LENGTHS, every=st.integers(2, 15))
def test_every(length: int, every: int) -> None:
    chosen = positions(length, every=every)
    check(chosen, length)
    assert chosen == [i - 1 for i in range(1, length) if i % every == 0]
    assert positions(length, every=every) == chosen


@settings(max_examples=60, deadline=None)
@given(length=LENGTHS, fraction=st.floats(0.0, 0.5, exclude_min=True))
def test_fraction(length: int, fraction: float) -> None:
    chosen = positions(length, fraction=fraction)
    check(chosen, length)
    assert abs(len(chosen) - min(fraction * length, (length - 1) // 2)) <= 0.5
    assert positions(length, fraction=fraction) == chosen


@settings(max_examples=60, deadline=None)
@given(data=st.data(), length=LENGTHS)
def test_select(data: st.DataObject, length: int) -> None:
    wanted = data.draw(st.sets(st.integers(0, length - 1), min_size=1))
    select = tuple(f"blocks.{i}" for i in data.draw(st.permutations(sorted(wanted))))
    possible = not wanted & {0, length - 1}
    if possible:
        assert positions(length, select=select) == sorted(wanted)
    else:
        with pytest.raises(replfx.PlanError, match="has no kept block on each side"):
            positions(length, select=select)


@settings(max_examples=60, deadline=None)
@given(length=LENGTHS, keep=st.integers(2, 20) | st.floats(0.05, 0.95))
def test_keep(length: int, keep: int | float) -> None:
    count = min(length, max(2, keep if isinstance(keep, int) else round(keep * length)))
    if count == length:
        assert positions(length, keep=keep) == []
        return
    kept = sorted(set(range(length)) - set(positions(length, keep=keep)))
    assert len(kept) == count
    assert (kept[0], kept[-1]) == (0, length - 1)
    gaps = [b - a for a, b in itertools.pairwise(kept)]
    assert max(gaps) - min(gaps) <= 1  # as evenly as whole numbers allow


def test_of_several_in_a_row_each_is_made_from_the_nearest_kept_blocks() -> None:
    model = tower(6)
    made = replfx.transform(model, select=["blocks.1", "blocks.3", "blocks.4"])
    rows = [(r.path, r.previous, r.next) for r in replfx.plan_of(made).replacements]
    places = [("1", "0", "2"), ("3", "2", "5"), ("4", "2", "5")]
    assert rows == [tuple(f"blocks.{number}" for number in place) for place in places]
    # The nearer neighbour's part is the larger one, and both together are one.
    for number, part in ((1, 1 / 2), (3, 2 / 3), (4, 1 / 3)):
        first, last = (0, 2) if number == 1 else (2, 5)
        expected = part * model.blocks[first].fc1.weight + (1 - part) * model.blocks[last].fc1.weight
        torch.testing.assert_close(made.blocks[number].fc1.weight, expected)
    again = replfx.apply(model, replfx.Plan.from_json(replfx.plan_of(made).to_json()))
    x = torch.randn(2, 4)
    assert torch.equal(again(x), made(x))


def test_fraction_is_spread_evenly() -> None:
    assert positions(13, fraction=0.25) == [2, 6, 10]
    assert positions(13, fraction=0.5) == [1, 3, 5, 7, 9, 11]
    assert positions(3, fraction=0.5) == [1]


def test_every_counts_through_what_lies_between() -> None:
    model = Tower(*(Plain() for _ in range(4)), nn.Tanh(), *(Plain() for _ in range(3)))
    assert [r.path for r in replfx.plan(model, every=2).replacements] == ["blocks.1", "blocks.3", "blocks.6"]
    assert [r.path for r in replfx.plan(model, every=3).replacements] == ["blocks.2", "blocks.6"]


def test_an_operator_without_neighbours_may_replace_any() -> None:
    made = replfx.transform(tower(4), torch.randn(2, 4), operator="identity", select="blocks.*")
    assert replfx.report(made).replaced == [f"blocks.{i}" for i in range(4)]
    plan = replfx.plan(tower(4), torch.randn(2, 4), operator="identity", select="blocks.*")
    first = plan.replacements[0]
    assert (first.previous, first.next) == (None, None)


def test_select_takes_a_path_a_glob_or_several() -> None:
    model = tower(7)
    for asked, expected in [
        ("blocks.3", [3]),
        ("blocks.[135]", [1, 3, 5]),
        (["blocks.1", "blocks.[35]"], [1, 3, 5]),
        (("blocks.5", "blocks.1"), [1, 5]),
    ]:
        made = replfx.transform(model, select=asked)
        assert replfx.report(made).replaced == [f"blocks.{i}" for i in expected]


BAD = [
    ({}, "give one of every=, fraction=, select=, keep=, not none"),
    ({"every": 2, "fraction": 0.3}, "not every and fraction"),
    ({"every": 1}, "every=1: .*at least 2"),
    ({"keep": 1}, "keep=1: .*at least 2"),
    ({"keep": 1.5}, "keep=1.5: .*between 0 and 1"),
    ({"keep": "half"}, "keep must be a number"),
    ({"every": 0}, "every=0"),
    ({"every": -1}, "every=-1"),
    ({"every": True}, "whole number, not True"),
    ({"every": 2.5}, r"whole number, not 2\.5"),
    ({"every": "2"}, "whole number, not '2'"),
    ({"fraction": 0.0}, r"fraction=0\.0"),
    ({"fraction": 0.51}, "at most 0.5"),
    ({"fraction": -0.1}, "over 0"),
    ({"fraction": float("nan")}, "fraction=nan"),
    ({"fraction": "half"}, "fraction must be a number, not 'half'"),
    ({"fraction": True}, "fraction must be a number, not True"),
    ({"every": 2, "neighbour_gradient": "all"}, "neighbour_gradient must be a number between 0 and 1, not 'all'"),
    ({"every": 2, "neighbour_gradient": 1.5}, r"neighbour_gradient must be a number between 0 and 1, not 1\.5"),
    ({"every": 2, "neighbour_gradient": float("nan")}, "between 0 and 1, not nan"),
    ({"every": 2, "neighbour_gradient": -0.1}, "between 0 and 1"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[str(o) for o, _ in BAD])
def test_impossible_policies(options: dict[str, object], message: str) -> None:
    with pytest.raises(replfx.PlanError, match=message):
        Policy(**options)
    if options:
        with pytest.raises(replfx.PlanError, match=message):
            replfx.transform(tower(5), **options)


@pytest.mark.parametrize(
    ("select", "message"),
    [
        ("blocks.9", r"select='blocks\.9' matches nothing; blocks that are in a chain: blocks\.0, blocks\.1"),
        ("layer*", r"select='layer\*' matches nothing"),
        (["blocks.1", "nothing.*"], r"select='nothing\.\*' matches nothing"),
        ("stem", r"matches `stem`, which is no block of a chain; blocks are: blocks\.0"),
        ("blocks.1.fc1", r"matches `blocks\.1\.fc1`, which is no block of a chain"),
        ("blocks.0", r"`blocks\.0` has no kept block on each side: it is the first block of its chain"),
        ("blocks.4", r"`blocks\.4` .*it is the last block of its chain"),
        ("blocks.[01]", r"`blocks\.0` .*it is the first block of its chain"),
        ("blocks.[1234]", r"`blocks\.1` .*`blocks\.4` is to be replaced too, and it is the last block of its chain"),
        ([1], "select must be a path or a glob, or a sequence"),
        ([], "select must be"),
        (5, "select must be"),
        ("", "matches nothing"),
    ],
)
def test_impossible_selections(select: str | list[str], message: str) -> None:
    model = tower(5)
    before = snapshot(model)
    with pytest.raises(replfx.PlanError, match=message):
        replfx.transform(model, select=select, inplace=True)
    assert_unchanged(model, before)


def test_a_policy_that_replaces_nothing_says_so() -> None:
    with pytest.raises(replfx.NoChainError, match="every=7 replaces nothing: the longest chain has 5 blocks"):
        replfx.transform(tower(5), every=7)
    with pytest.raises(replfx.NoChainError, match=r"fraction=0\.01 replaces nothing"):
        replfx.transform(tower(5), fraction=0.01)


def test_options_travel_into_the_plan() -> None:
    plan = replfx.plan(
        tower(5), fusion={"name": "channel", "initial": 0.25}, operator={"name": "light"}, neighbour_gradient=0
    )
    (first, _) = plan.replacements
    assert first.fusion == Choice("channel", {"initial": 0.25})
    assert first.operator.name == "light"
    assert first.operator.options["maps"]
    assert first.neighbour_gradient == 0.0


@given(every=st.integers(2, 6), operator=st.sampled_from(["block", "light", "mixer", "identity"]))
def test_one_search_serves_every_policy(every: int, operator: str) -> None:
    found, policy = found_in(7), Policy(every=every, operator=Choice(operator))
    refused = dict(found.refused)
    first, again = select(found, policy), select(found, policy)
    for name in ("plan", "kept", "refused", "nothing"):
        assert getattr(first, name) == getattr(again, name)
    assert found.refused == refused
    assert (first.nothing is None) == bool(first.plan.replacements)


def test_identity_for_blocks_that_widen_is_refused_with_the_shapes() -> None:
    grow = CONTAINERS["GrowingNet"]
    with pytest.raises(replfx.NoChainError, match=r"changes the shape of its activation: \(2, 7, 8, 8\) → \(2, 10"):
        replfx.transform(grow.build(), grow.inputs(), operator="identity")
