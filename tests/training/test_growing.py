"""`unroll(start="copies")`: what an operator had freed starts as a copy of a neighbour's, as stacking has it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import replfx
from tests.reference import Stack
from tests.support.models import Mlp
from tests.support.snapshots import assert_unchanged, snapshot

WIDTH = 8


class Block(Mlp):
    """A residual MLP with running statistics."""

    def __init__(self, hidden: int = 16) -> None:
        super().__init__(WIDTH, hidden, norm=nn.BatchNorm1d(WIDTH))


class Twice(Block):
    """Holds its layers by names and in a row, as nnU-Net's blocks do."""

    def __init__(self) -> None:
        super().__init__()
        self.row = nn.Sequential(self.norm, self.fc1, nn.ReLU(), self.fc2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.row(x)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.out(F.scaled_dot_product_attention(self.q(h), self.k(h), self.v(h)))
        y: Tensor = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return y


class Shallow(Stack):
    """A reference: the model without the blocks that are left out, until they are put back as copies."""

    def __init__(self, blocks: list[nn.Module], out: dict[int, int]) -> None:
        super().__init__(blocks)
        self.out = out
        for index in out:
            self.blocks[index] = nn.Identity()

    def grow(self, optimizer: torch.optim.Optimizer) -> None:
        for index, source in self.out.items():
            self.blocks[index] = copy.deepcopy(self.blocks[source])
            pairs = zip(self.blocks[source].parameters(), self.blocks[index].parameters(), strict=True)
            for old, new in pairs:
                new.grad = None
                optimizer.add_param_group({"params": [new]})
                optimizer.state[new] = copy.deepcopy(optimizer.state[old])


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, *shape: int) -> list[float]:
    losses = []
    for step in steps:
        x = torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss = (model(x) - x.sin()).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("options", "out"),
    [({"every": 2}, {1: 0, 3: 2}), ({"keep": 2}, {1: 0, 2: 0, 3: 0, 4: 0}), ({"select": ["2"]}, {2: 1})],
)
def test_it_is_stacking(options: dict[str, Any], out: dict[int, int]) -> None:
    """The losses are those of a model that is grown by hand, before and after."""
    torch.manual_seed(0)
    plain = nn.Sequential(*(Block() for _ in range(6 if "keep" in options else 5)))
    reference = Shallow([copy.deepcopy(block) for block in plain], out)
    model = replfx.transform(plain, torch.randn(4, WIDTH), operator="identity", **options)
    pairs = [(m, torch.optim.AdamW(m.parameters(), 1e-2)) for m in (model, reference)]
    first, second = (_train(*pair, range(4), 4) for pair in pairs)
    assert first == second
    assert replfx.unroll(model, pairs[0][1], start="copies") is model
    reference.grow(pairs[1][1])
    first, second = (_train(*pair, range(4, 8), 4) for pair in pairs)
    assert first == second
    model.eval(), reference.eval()
    x = torch.randn(4, WIDTH)
    assert torch.equal(model(x), reference(x))  # running statistics are copied too
    assert [type(module) for module in model] == [Block] * len(model)
    assert {p for g in pairs[0][1].param_groups for p in g["params"]} == set(model.parameters())


def test_mixer_gets_a_copy_of_what_it_had_freed_alone() -> None:
    torch.manual_seed(0)
    model = replfx.transform(
        nn.Sequential(*(Attention() for _ in range(5))), torch.randn(2, 3, WIDTH), operator="mixer"
    )
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    _train(model, optimizer, range(3), 2, 3)
    mean = 0.5 * (model[0].q.weight + model[2].q.weight).detach()
    norms = model[1].norm1.weight.detach().clone()
    kept = {name: p.detach().clone() for name, p in model[0].named_parameters()}
    q = dict(model[1].replfx.synthesized())["q.weight"].detach().clone()
    replfx.unroll(model, optimizer, start="copies")
    assert not torch.equal(mean, q)
    assert torch.equal(model[1].q.weight, q)
    assert torch.equal(model[1].norm1.weight, norms)
    for name in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"):
        assert torch.equal(model[1].get_parameter(name), kept[name])
        mine, theirs = (optimizer.state[model[i].get_parameter(name)] for i in (1, 0))
        assert torch.equal(mine["exp_avg_sq"], theirs["exp_avg_sq"])
        assert mine["exp_avg_sq"] is not theirs["exp_avg_sq"]
    _train(model, optimizer, range(3, 5), 2, 3)


def test_what_the_block_before_has_not_is_of_the_one_after() -> None:
    model = nn.Sequential(Block(16), Block(24), Block(24), Block(24), Block(16))
    grown = replfx.unroll(
        replfx.transform(model, torch.randn(4, WIDTH), operator="identity", select="1"), start="copies"
    )
    assert torch.equal(grown[1].fc1.weight, grown[2].fc1.weight)
    assert torch.equal(grown[1].fc2.bias, grown[0].fc2.bias)  # which has no hidden length


@pytest.mark.parametrize("start", ["outputs", "copies"])
@pytest.mark.parametrize("operator", ["identity", "light"])
def test_a_layer_that_a_block_holds_by_two_names_is_one(operator: str, start: Any) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(*(Twice() for _ in range(5))), torch.randn(4, WIDTH)
    names = list(model.state_dict())
    made = replfx.transform(model, x, operator=operator).eval()
    before = made(x)
    replfx.unroll(made, example_inputs=x, start=start)
    assert list(made.state_dict()) == names
    block: Any = made[1]
    assert (block.row[0], block.row[1], block.row[3]) == (block.norm, block.fc1, block.fc2)
    if start == "outputs":
        torch.testing.assert_close(made(x), before)
    else:
        assert torch.equal(block.fc1.weight, made[0].fc1.weight)


def test_a_schedule_grows_where_outputs_could_not_stay() -> None:
    """ReLU after the sum: no block with it gives what it takes, so with "outputs" the schedule is refused."""

    class Late(Block):
        def forward(self, x: Tensor) -> Tensor:
            return F.leaky_relu(super().forward(x))

    model = replfx.transform(nn.Sequential(*(Late() for _ in range(5))), torch.randn(4, WIDTH), operator="identity")
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    with pytest.raises(replfx.FusionError, match="cannot be unrolled"):
        replfx.Schedule(model, optimizer, unroll_at=2)
    average = copy.deepcopy(model)
    schedule = replfx.Schedule(model, optimizer, unroll_at=2, start="copies", averages=[average])
    for step in range(4):
        _train(model, optimizer, range(step, step + 1), 4)
        assert schedule.step() == (["1", "3"] if step == 1 else [])
    for each in (model, average):
        assert [type(module) for module in each] == [Late] * 5


def test_under_block_nothing_was_freed() -> None:
    model = replfx.transform(nn.Sequential(*(Block() for _ in range(5))), torch.randn(4, WIDTH))
    x = torch.randn(4, WIDTH)
    expected = model.eval()(x)
    torch.testing.assert_close(replfx.unroll(model, start="copies")(x), expected)


def test_another_start_is_refused() -> None:
    model = replfx.transform(nn.Sequential(*(Block() for _ in range(5))), operator="identity")
    before = snapshot(model)
    for made in (replfx.unroll, lambda m, start: replfx.Schedule(m, unroll_at=1, start=start)):
        with pytest.raises(replfx.PlanError, match="start='zeros': blocks start with the model's \"outputs\", or as"):
            made(model, start="zeros")  # type: ignore[operator]
    assert_unchanged(model, before)


@pytest.mark.parametrize("start", ["outputs", "copies"])
def test_norms_are_frozen_as_those_before_them_and_have_counted_as_far(start: Any) -> None:
    torch.manual_seed(0)
    model = replfx.transform(nn.Sequential(*(Block() for _ in range(5))), torch.randn(4, WIDTH), operator="identity")
    model(torch.randn(4, WIDTH))
    model.get_submodule("0.norm").eval()
    replfx.unroll(model, start=start)
    assert not model.get_submodule("1.norm").training
    assert model.get_submodule("1.fc1").training
    assert model.get_submodule("3.norm").training
    assert model.get_buffer("3.norm.num_batches_tracked") == 1
