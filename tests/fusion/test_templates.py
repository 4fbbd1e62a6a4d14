"""What takes a block's place gives objects of the class that the block gave."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import replfx
from replfx.fusion.templates import fill, leaves

WIDTH = 6


@dataclass
class Seen:
    hidden: Tensor
    weights: Tensor | None = None
    layer: int = -1


class Given(NamedTuple):
    hidden: Tensor
    rest: tuple[Tensor, str]


@dataclass
class Counted:
    hidden: Tensor
    sums: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.sums = self.hidden.sum(0)


Give = Callable[[Tensor], Any]


class Block(nn.Module):
    def __init__(self, give: Give) -> None:
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)
        self.give = give

    def forward(self, x: Tensor) -> Any:
        return self.give(x + self.fc2(self.fc1(self.norm(x)).relu()))


class Net(nn.Module):
    """It reads its blocks' results by attribute, and writes to them where it can."""

    def __init__(self, give: Give, notes: bool = False, recorded: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(give) for _ in range(5))
        self.head, self.notes, self.recorded = nn.Linear(WIDTH, 3), notes, recorded

    def forward(self, x: Tensor) -> Tensor:
        for layer, block in enumerate(self.blocks):
            given = block(x)
            if self.notes:
                given.layer = layer
            x = given.hidden
            if self.recorded and x.shape[0] == 1:  # which symbols cannot answer, so that a run is recorded
                x = x * 1
        out: Tensor = self.head(x)
        return out


KINDS: dict[str, tuple[Any, ...]] = {
    "dataclass": (lambda h: Seen(h, h.softmax(-1)), True),
    "dataclass, recorded": (lambda h: Seen(h, h.softmax(-1)), True, True),
    "named tuple": (lambda h: Given(h, (h.sum(), "rest")),),
    "named tuple, recorded": (lambda h: Given(h, (h.sum(), "rest")), False, True),
}


@pytest.mark.parametrize("operator", ["identity", "light"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_block_that_is_gone_gives_an_object_of_its_class(kind: str, operator: str) -> None:
    torch.manual_seed(0)
    model, x = Net(*KINDS[kind]), torch.randn(4, WIDTH)
    plan = replfx.plan(model, x, operator=operator)
    assert replfx.Plan.from_json(plan.to_json()) == plan
    made = replfx.apply(model, plan)
    outputs = made(x)
    if operator == "identity":
        hidden = x
        for layer in (0, 2, 4):
            block: Any = model.blocks[layer]
            hidden = block(hidden).hidden
        assert torch.equal(outputs, model.head(hidden))
    assert torch.equal(replfx.materialize(made)(x), outputs)
    assert torch.equal(torch.compile(made, backend="eager", fullgraph=True)(x), outputs)
    outputs.sum().backward()
    assert all(p.grad is not None for p in made.parameters())


class Joint(nn.Module):
    """Two streams, each of which is added to."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2 * WIDTH, WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor, rest: tuple[Tensor, str]) -> Given:
        both = torch.cat([x, rest[0]], -1)
        return Given(x + self.first(both.relu()), (rest[0] + self.second(both.relu()), "rest"))


class Streams(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Joint() for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        rest = (x.flip(-1), "rest")
        for block in self.blocks:
            x, rest = block(x, rest)
        return x + rest[0]


def test_both_streams_in_a_named_tuple_stay_when_it_is_unrolled() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, WIDTH, dtype=torch.float64)
    made = replfx.transform(Streams().double(), x, operator="identity")
    before = made(x)
    replfx.unroll(made)
    assert torch.equal(made(x), before)


def test_an_object_that_is_not_made_of_its_fields_alone_is_the_blocks_own() -> None:
    with pytest.raises(replfx.NoChainError, match="gives more than its activation"):
        replfx.plan(Net(Counted), torch.randn(4, WIDTH), operator="identity")


def test_a_class_that_is_not_there_is_named() -> None:
    template = {"object": {"class": "tests.fusion.test_templates:Missing", "fields": {"hidden": {"input": "0"}}}}
    assert [(path, kind) for path, kind, _ in leaves(template)] == [(("hidden",), "input")]
    with pytest.raises(replfx.PlanError, match="Missing, and there is no such class"):
        fill(template, lambda kind, slot: None)
