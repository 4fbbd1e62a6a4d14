"""`pair` against brute force (tests/reference/pairing.py), over blocks that lack, have more or rename submodules."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from replfx.fusion.pairing import counterparts, pair, share_paired, synthesizable
from tests.reference.pairing import is_pairing

LAYERS = {
    "linear": lambda: nn.Linear(2, 2),
    "bare": lambda: nn.Linear(3, 2, bias=False),
    "norm": lambda: nn.LayerNorm(2),
    "dense": lambda: nn.Conv2d(2, 2, 3),
    "grouped": lambda: nn.Conv2d(4, 4, 3, groups=2, bias=False),
    "depthwise": lambda: nn.Conv2d(4, 4, 3, groups=4),
    "pointwise": lambda: nn.Conv2d(2, 3, 1),
    "grey": lambda: nn.Conv2d(1, 3, 3),  # of one channel, and still no depthwise one
    "relu": lambda: nn.ReLU(),
    "in_a_list": lambda: nn.Sequential(nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 3)),
}


class Block(nn.Module):
    def __init__(self, parts: list[tuple[str, str]]) -> None:
        super().__init__()
        for name, kind in parts:
            self.add_module(name, LAYERS[kind]())


@st.composite
def neighbours(draw: st.DrawFn) -> tuple[Block, Block]:
    """A block, and one with some of its submodules left out, renamed, exchanged and added."""
    kinds = draw(st.lists(st.sampled_from(sorted(LAYERS)), min_size=1, max_size=6))
    ours = [(f"part{i}", kind) for i, kind in enumerate(kinds)]
    theirs = []
    for name, kind in ours:
        change = draw(st.sampled_from(("none", "none", "none", "rename", "drop", "insert", "exchange")))
        if change == "insert":
            theirs.append((f"more_{name}", draw(st.sampled_from(sorted(LAYERS)))))
        if change != "drop":
            other = draw(st.sampled_from(sorted(LAYERS))) if change == "exchange" else kind
            theirs.append((f"new_{name}" if change == "rename" else name, other))
    if draw(st.booleans()):  # as in a Sequential, where what comes after a missing one moves up
        ours, theirs = ([(f"{i}", kind) for i, (_, kind) in enumerate(side)] for side in (ours, theirs))
    return Block(ours), Block(theirs)


@settings(max_examples=100)
@given(blocks=neighbours())
def test_it_is_by_name_and_then_by_role_in_order(blocks: tuple[Block, Block]) -> None:
    for one, other in (blocks, blocks[::-1]):
        found = pair(one, other)
        is_pairing(found, one, other)
        assert pair(one, other) == found
        assert pair(one, one) == {name: name for name, _ in one.named_parameters()}


@given(blocks=neighbours(), more=neighbours())
def test_counterparts_are_of_both_or_twice_of_the_one(blocks: tuple[Block, Block], more: tuple[Block, Block]) -> None:
    block, previous = blocks
    following = more[1]
    wanted = list(synthesizable(block))
    one, other = pair(block, previous), pair(block, following)
    before, after = counterparts(one, other, wanted)
    assert list(before) == list(after) == [name for name in wanted if name in one or name in other]
    for name in before:
        sides = {"previous": one.get(name), "next": other.get(name)}
        assert before[name] == ("previous", one[name]) if name in one else before[name] == after[name]
        assert after[name] == ("next", other[name]) if name in other else before[name] == after[name]
        for side, theirs in (before[name], after[name]):
            assert sides[side] == theirs
    sizes = {name: block.get_parameter(name).numel() for name in wanted}
    share = sum(n for name, n in sizes.items() if name in one and name in other) / max(sum(sizes.values()), 1)
    assert share_paired(block, one, other) == pytest.approx(share)


def test_a_missing_first_convolution_moves_the_others_up() -> None:
    """MobileNet's inverted residual without its expansion."""
    full = Block([("0", "pointwise"), ("1", "depthwise"), ("2", "pointwise")])
    short = Block([("0", "depthwise"), ("1", "pointwise")])
    found = pair(full, short)
    assert {k: v for k, v in found.items() if k.endswith("weight")} == {"1.weight": "0.weight", "2.weight": "1.weight"}


def test_a_first_convolution_of_one_channel_is_no_depthwise_one() -> None:
    grey, colour = Block([("conv", "grey")]), Block([("conv", "dense")])
    assert pair(grey, colour) == {"conv.weight": "conv.weight", "conv.bias": "conv.bias"}
    assert share_paired(colour, pair(colour, grey)) == 1.0
