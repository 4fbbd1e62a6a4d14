"""Chains cut at pipeline stages: as each stage alone would be transformed, and never across a cut."""

from __future__ import annotations

import itertools
from bisect import bisect_right

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import replfx
from tests.support.models import ConvNet, Plain, Tower, tower
from tests.support.snapshots import assert_unchanged, snapshot
from tests.support.strategies import policies


def replaced(model: nn.Module, **options: object) -> list[int]:
    """Numbers of the blocks that are replaced; none where nothing is."""
    try:
        plan = replfx.plan(model, **options)
    except replfx.NoChainError:
        return []
    return [int(r.path.removeprefix("blocks.")) for r in plan.replacements]


@settings(max_examples=30, deadline=None)
@given(data=st.data(), depth=st.integers(3, 11))
def test_a_replaced_block_and_its_neighbours_are_in_one_stage(data: st.DataObject, depth: int) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(0, depth - 1), max_size=3)))
    choice = data.draw(policies(depth, ("block", "light"))).choice
    options = {**choice, "split_at": [f"blocks.{cut}" for cut in cuts]}
    selected = [int(path.removeprefix("blocks.")) for path in choice.get("select", ())]
    if any(i in cuts or i + 1 in cuts for i in selected):
        with pytest.raises(replfx.PlanError, match="would be in another pipeline stage"):
            replfx.plan(tower(depth), **options)
        return
    try:
        plan = replfx.plan(tower(depth), **options)
    except replfx.NoChainError:
        assert not selected
        return
    for replacement in plan.replacements:
        names = (replacement.path, replacement.previous, replacement.next)
        assert len({bisect_right(cuts, int(str(name).removeprefix("blocks."))) for name in names}) == 1


@settings(max_examples=30, deadline=None)
@given(data=st.data(), depth=st.integers(3, 11), every=st.integers(2, 4))
def test_each_stage_is_planned_as_a_model_of_its_own(data: st.DataObject, depth: int, every: int) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(1, depth - 1), max_size=3)))
    ends = [0, *cuts, depth]
    alone = [
        first + number
        for first, last in itertools.pairwise(ends)
        if last - first >= 3
        for number in replaced(tower(last - first), every=every)
    ]
    assert replaced(tower(depth), every=every, split_at=[f"blocks.{cut}" for cut in cuts]) == alone
    if every == 2:  # no more can be
        assert len(alone) == sum((last - first - 1) // 2 for first, last in itertools.pairwise(ends))


@pytest.mark.slow
@settings(max_examples=10, deadline=None)
@given(data=st.data(), depth=st.integers(3, 8))
def test_a_cut_outside_of_the_chain_changes_nothing(data: st.DataObject, depth: int) -> None:
    choice = data.draw(policies(depth, ("block",))).choice
    model = tower(depth)
    plain = replfx.plan(model, **choice)
    for split_at in (None, (), "blocks.0", ["head"], ["stem", "blocks", "head"]):
        assert replfx.plan(model, **choice, split_at=split_at) == plain


def test_a_stage_that_begins_between_blocks() -> None:
    model = Tower(*(Plain() for _ in range(4)), nn.Tanh(), *(Plain() for _ in range(3)))
    assert replaced(model, split_at="blocks.4") == [1, 6]
    assert replaced(model, split_at="blocks.5") == [1, 6]
    assert replaced(model, split_at="blocks.6") == [1, 3]


def test_windows_and_recorded_graphs() -> None:
    layers = [layer for _ in range(6) for layer in (nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())]
    plan = replfx.plan(nn.Sequential(*layers), torch.rand(2, 4, 8, 8), split_at="9")
    assert [r.path for r in plan.replacements] == ["[3:6]", "[12:15]"]
    assert replfx.plan(nn.Sequential(*layers), torch.rand(2, 4, 8, 8), split_at="[9:12]") == plan


def test_a_graph_of_stages() -> None:
    model = ConvNet(depth=4)
    plan = replfx.plan(model, torch.rand(2, 3, 8, 8), split_at=["stages.0.2", "stages.1.1"])
    assert [(r.previous, r.path, r.next) for r in plan.replacements] == [
        ("stages.0.2", "stages.0.3", "stages.1.0"),
        ("stages.1.1", "stages.1.2", "stages.1.3"),
    ]


def test_the_report_says_what_a_cut_keeps() -> None:
    kept = {b.path: b.kept for b in replfx.inspect(tower(6), split_at="blocks.2").blocks}
    assert kept["blocks.1"] == "its neighbour `blocks.2` would be in another pipeline stage"
    assert kept["blocks.0"] == "it is the first block of its chain"
    assert kept["blocks.2"] == "`blocks.3` is made from it"
    made = replfx.transform(tower(6), split_at="blocks.2")
    assert replfx.report(made).replaced == ["blocks.3"]


@pytest.mark.parametrize(
    ("split_at", "message"),
    [
        ("blocks.9", r"split_at='blocks\.9': the model has no such module; .*blocks are: blocks\.0, blocks\.1"),
        ("", "split_at='': the model has no such module"),
        ("blocks.2.fc2", r"begins a pipeline stage inside of the block `blocks\.2`, .* at `blocks\.2`"),
        (["blocks.2", "layer3"], "split_at='layer3'"),
        (4, "split_at must be a module path or a sequence of them, not 4"),
        ([4], r"split_at must be a module path or a sequence of them, not \[4\]"),
    ],
)
def test_impossible_splits(split_at: object, message: str) -> None:
    model = tower(5)
    before = snapshot(model)
    with pytest.raises(replfx.PlanError, match=message):
        replfx.transform(model, split_at=split_at, inplace=True)
    assert_unchanged(model, before)


def test_a_container_that_is_never_called() -> None:
    class Loop(Tower):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            for block in self.blocks:
                x = block(x)
            return self.head(x)

    with pytest.raises(replfx.PlanError, match="split_at='blocks': the model never calls that module itself"):
        replfx.plan(Loop(*tower(5).blocks), split_at="blocks")


def test_nothing_fits_between_the_cuts() -> None:
    with pytest.raises(replfx.NoChainError, match="the longest part of a chain in one pipeline stage has 2 blocks"):
        replfx.transform(tower(4), split_at="blocks.2")
    with pytest.raises(replfx.PlanError, match=r"`blocks\.1` .*its neighbour `blocks\.2` would be in another pipeline"):
        replfx.transform(tower(4), select="blocks.1", split_at="blocks.2")
    plan = replfx.plan(tower(5))
    with pytest.raises(replfx.PlanError, match="give plan= or split_at=, not both"):
        replfx.transform(tower(5), plan=plan, split_at="blocks.2")
