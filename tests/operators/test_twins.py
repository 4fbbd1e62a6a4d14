"""Twins: blocks that are measured once, and plans that are the same as if each had been."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import replfx
from replfx.chains import select as select_blocks
from replfx.chains.find import find_chains
from replfx.operators import probe, twins

X = torch.randn(2, 6, 8)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.up, self.down, self.drop = nn.Linear(8, 16), nn.Linear(16, 8), nn.Dropout(0.1)
        self.register_buffer("scale", torch.ones(8))
        self.act: Callable[[Tensor], Tensor] = F.gelu

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v))
        return x + self.drop(self.down(self.act(self.up(self.norm2(x))))) * self.scale


def model(depth: int = 9) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(depth)))


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The paths of the blocks that are run alone."""
    found: list[str] = []
    start = probe.Probe.__init__

    def note(self: probe.Probe, site: replfx.Site, shape: tuple[int, ...] | None = None) -> None:
        found.append(site.path)
        start(self, site, shape)

    monkeypatch.setattr(probe.Probe, "__init__", note)
    return found


@pytest.mark.parametrize("operator", ["light", "mixer", "identity"])
def test_the_plan_is_the_same_and_one_block_is_measured(
    operator: str, probed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = replfx.plan(model(), X, operator=operator)
    assert set(probed) == {"1"}
    monkeypatch.setattr(select_blocks, "twin_key", lambda site: None)
    probed.clear()
    assert replfx.plan(model(), X, operator=operator) == plan
    assert set(probed) == {"1", "3", "5", "7"}


def _wider(block: Block) -> None:
    block.up, block.down = nn.Linear(8, 12), nn.Linear(12, 8)


def _set(name: str, value: object) -> Callable[[Block], None]:
    return lambda block: setattr(block, name, value)


@pytest.mark.parametrize(
    "change",
    [
        _wider,
        _set("act", F.relu),
        _set("drop", nn.Dropout(0.2)),
        _set("norm1", nn.LayerNorm(8, eps=1e-3)),
        _set("scale", torch.full((8,), 2.0)),
        _set("mark", object()),
    ],
)
def test_what_differs_in_anything_is_measured_itself(change: Callable[[Block], None], probed: list[str]) -> None:
    changed = model()
    change(changed[5])
    replfx.plan(changed, X, operator="identity")
    assert {"1", "5"} <= set(probed)


def test_weights_are_no_difference() -> None:
    (chain,) = find_chains(replfx.capture(model(), X)).chains
    keys = {twins.twin_key(block.site) for block in chain.blocks[1:]}
    assert len(keys) == 1
    assert None not in keys


class Activated(nn.Module):
    """A residual MLP whose activation is a module."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.norm, self.fc1, self.act, self.fc2 = nn.LayerNorm(8), nn.Linear(8, 16), act, nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.act(self.fc2(self.act(self.fc1(self.norm(x)))))
        return y


@pytest.mark.parametrize("operator", ["light", "identity"])
def test_one_activation_for_all_blocks_is_each_blocks_own(operator: str, probed: list[str]) -> None:
    """As in YOLO: the model has the module in its first layer, and each block by a name of its own."""
    plans = []
    for shared in (True, False):
        act = nn.GELU()
        blocks = [Activated(act if shared else nn.GELU()) for _ in range(5)]
        plans.append(replfx.plan(nn.Sequential(act, *blocks), X, operator=operator))
        assert set(probed) == {"2"}
        probed.clear()
    assert plans[0] == plans[1]
