"""Blocks that are run alone, on numbers drawn at random."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import replfx
from replfx.chains.find import find_chains
from replfx.operators.probe import Probe


class Single(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        assert x.dtype == torch.float32
        return super().forward(x)


class Block(nn.Module):
    def __init__(self, layer: type[nn.Linear]) -> None:
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(8), layer(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.layer(self.norm(x))
        return y


def test_numbers_are_of_double_precision_unless_a_block_knows_no_other_than_single() -> None:
    for layer, dtype in ((nn.Linear, torch.float64), (Single, torch.float32)):
        model = nn.Sequential(*(Block(layer) for _ in range(3)))
        (chain,) = find_chains(replfx.capture(model, torch.randn(2, 5, 8))).chains
        found = Probe(chain.blocks[1].site)
        assert (found.dtype, found.x.dtype, found.block.layer.weight.dtype) == (dtype,) * 3  # type: ignore[union-attr]
