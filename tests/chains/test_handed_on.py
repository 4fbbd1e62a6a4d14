"""What a block takes beside its activation and hands on as it was: neither made by it nor an activation of its own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import replfx
from tests.support.models import Row

X = torch.linspace(-1, 1, 2 * 6 * 8).view(2, 6, 8)


class Block(nn.Module):
    def __init__(self, makes: bool = False) -> None:
        super().__init__()
        self.norm, self.up, self.down, self.makes = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8), makes

    def forward(self, x: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.makes:
            bias = self.down.bias * 2
        return x + self.down(self.up(self.norm(x)).relu()), bias


class Handing(Row):
    """As T5: the first block makes a bias, and all others hand it on."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None
        for block in self.blocks:
            x, bias = block(x, bias)
        return x


def test_a_bias_that_is_handed_on_is_no_second_activation() -> None:
    blocks = (Block(makes=index == 0) for index in range(6))
    model = replfx.transform(Handing(*blocks), X, operator="light")
    assert replfx.report(model).replaced == ["blocks.1", "blocks.3"]
    model(X).sum().backward()


class Casting(nn.Module):
    """A block that casts what all get to the type that it has already, which gives the very same tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        return self.linear(x + position.type(self.linear.weight.dtype)).relu() if x.shape[0] > 0 else x


class Positions(Row):
    def forward(self, x: Tensor) -> Tensor:
        position = x.mean(1, keepdim=True)
        for block in self.blocks:
            x = block(x, position)
        return x


def test_a_cast_that_changes_nothing_is_no_result_of_a_block() -> None:
    model = Positions(*(Casting() for _ in range(5)))
    assert replfx.report(replfx.transform(model, X)).replaced == ["blocks.1", "blocks.3"]


class Naming(nn.Module):
    """A block that hands its mask on under a key that is no name in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor, mask: Tensor) -> dict[str, Tensor]:
        return {"x": x + self.linear(x) * mask, "attention-mask": mask}


class Named(Row):
    def forward(self, x: Tensor) -> Tensor:
        mask = x[..., :1] > 0
        for block in self.blocks:
            given = block(x, mask)
            x, mask = given["x"], given["attention-mask"]
        return x


@pytest.mark.parametrize("operator", ["block", "identity"])
def test_a_mask_that_is_handed_on_by_any_key(operator: str) -> None:
    model = replfx.transform(Named(*(Naming() for _ in range(5))), X, operator=operator)
    assert replfx.report(model).replaced == ["blocks.1", "blocks.3"]
    before = model(X)
    replfx.unroll(model)
    torch.testing.assert_close(model(X), before)
