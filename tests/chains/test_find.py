"""Which blocks are a chain, and why not where not."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import replfx
from tests.support.models import GPT, ConvNet, Mlp, Plain, Row, Tower, WithExtras, tower
from tests.support.snapshots import assert_unchanged, snapshot

X = torch.linspace(-1, 1, 8).view(2, 4)


def chains(model: nn.Module, inputs: Any = X) -> list[list[str]]:
    return replfx.inspect(model, inputs).chains


def refused(model: nn.Module, path: str) -> str:
    """Why the block cannot be replaced; the model must be as it was afterwards."""
    before = snapshot(model)
    reason = replfx.inspect(model, X).refused[path]
    assert_unchanged(model, before)
    with pytest.raises(replfx.ReplfxError, match=r"cannot be replaced|no chain of 3") as caught:
        replfx.transform(model, X, select=path)
    assert reason in str(caught.value)
    assert_unchanged(model, before)
    return reason


def numbered(prefix: str, *numbers: int) -> list[str]:
    return [f"{prefix}{number}" for number in numbers]


def test_a_flat_chain() -> None:
    assert chains(tower(4)) == [numbered("blocks.", 0, 1, 2, 3)]


def test_fewer_than_three_are_no_chain() -> None:
    assert chains(tower(2)) == []


def test_across_container_boundaries() -> None:
    model = tower(0)
    model.blocks = nn.Sequential(nn.Sequential(Mlp(), Mlp()), nn.Sequential(Mlp()), Mlp())
    assert chains(model) == [["blocks.0.0", "blocks.0.1", "blocks.1.0", "blocks.2"]]


def test_across_stages_with_something_without_parameters_between() -> None:
    model = Tower(Mlp(), Mlp(), Mlp(), nn.Tanh(), Mlp(), Mlp(), Mlp())
    assert chains(model) == [numbered("blocks.", 0, 1, 2, 4, 5, 6)]


def test_groups_of_blocks_take_the_level_that_replaces_most() -> None:
    model = tower(0)
    # Six inner blocks in a row let two be replaced, the three groups one of twice the size: a tie.
    model.blocks = nn.Sequential(*(nn.Sequential(Mlp(), Mlp()) for _ in range(3)))
    assert chains(model) == [[f"blocks.{i}.{j}" for i in range(3) for j in range(2)]]


def test_a_stage_of_three_and_more_is_a_container() -> None:
    stages = [[f"blocks.{i}.blocks.{j}" for j in range(3)] for i in range(3)]
    assert chains(Tower(*(Row(Mlp(), Mlp(), Mlp()) for _ in range(3)))) == [list(itertools.chain(*stages))]
    assert chains(Tower(*(Row(Mlp(), Mlp()) for _ in range(3)))) == [numbered("blocks.", 0, 1, 2)]


def test_layers_that_add_nothing_to_what_they_get_are_parts_of_a_block() -> None:
    """A residual block of three convolutions is no stage of them."""

    class Residual(Row):
        def forward(self, x: Tensor) -> Tensor:
            return x + super().forward(x)

    assert chains(Tower(*(Residual(Plain(), Plain(), Plain()) for _ in range(3)))) == [numbered("blocks.", 0, 1, 2)]


class Inner(Mlp):
    """Of a class of its own."""


class Layer(nn.Module):
    """A block with a smaller one inside, of one of two classes."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.mlp = inner, Mlp(hidden=64)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.mlp(self.inner(x))
        return y


class Nested(nn.Module):
    """One chain in two places, the second of which is less deep: what lies in blocks there is found after them."""

    def __init__(self, around: int) -> None:
        super().__init__()
        first: nn.Module = nn.ModuleDict({"blocks": nn.Sequential(*(Layer(Plain()) for _ in range(4)))})
        for _ in range(around):
            first = nn.ModuleDict({"inside": first})
        self.first, self.depth = first, around
        self.blocks = nn.Sequential(*(Layer(Inner()) for _ in range(4)))

    def forward(self, x: Tensor) -> Tensor:
        first: Any = self.first
        for _ in range(self.depth):
            first = first["inside"]
        y: Tensor = self.blocks(first["blocks"](x))
        return y


@pytest.mark.parametrize("around", range(4))
def test_no_chain_lies_in_the_blocks_of_another(around: int) -> None:
    first = "first." + "inside." * around + "blocks."
    assert chains(Nested(around), torch.randn(2, 8)) == [numbered(first, 0, 1, 2, 3) + numbered("blocks.", 0, 1, 2, 3)]


class Group(nn.Module):
    """Two unlike blocks that are repeated together."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Mlp(), Plain()

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x))


def test_groups_whose_parts_alternate_are_themselves_the_blocks() -> None:
    assert chains(Tower(*(Group() for _ in range(4)))) == [numbered("blocks.", 0, 1, 2, 3)]


def test_stages_of_different_width_are_one_chain_that_is_counted_anew() -> None:
    model, x = ConvNet(depth=4, widths=(6, 8)), torch.randn(2, 3, 8, 8)
    assert chains(model, x) == [numbered("stages.0.", 0, 1, 2, 3) + numbered("stages.1.", 0, 1, 2, 3)]
    report = replfx.inspect(model, x)
    assert report.replaced == ["stages.0.1", "stages.0.3", "stages.1.1"]
    kept = {block.path: block.kept for block in report.blocks}
    assert kept["stages.0.0"] == "`stages.0.1` is made from it"
    assert kept["stages.1.0"] == "`stages.0.3` is made from it"
    assert kept["stages.1.3"] == "it is the last block of its chain"
    assert kept["stages.1.1"] is None


def test_a_stride_makes_the_count_begin_anew() -> None:
    class Strided(nn.Module):
        def __init__(self, stride: int) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, stride, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).relu()

    model, x = nn.Sequential(*(Strided(2 if i == 3 else 1) for i in range(7))), torch.randn(1, 4, 8, 8)
    assert chains(model, x) == [numbered("", 0, 1, 2, 3, 4, 5, 6)]
    report = replfx.inspect(model, x, every=3)
    assert report.replaced == ["2", "5"]
    assert report.blocks[3].kept == "`2` is made from it"


def test_a_change_of_shape_without_parameters_keeps_the_block() -> None:
    class Pooled(nn.Module):
        def __init__(self, pool: bool) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, 1, 1)
            self.pool = nn.MaxPool2d(2) if pool else nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.pool(self.conv(x))

    model, x = nn.Sequential(*(Pooled(i == 3) for i in range(7))), torch.randn(1, 4, 8, 8)
    assert chains(model, x) == [numbered("", 0, 1, 2, 3, 4, 5, 6)]
    report = replfx.inspect(model, x, every=6)  # the third of the second stage at most
    assert report.replaced == ["5"]
    assert report.blocks[3].kept == "it changes the shape of its activation: (1, 4, 8, 8) → (1, 4, 4, 4)"
    assert replfx.inspect(model, x, select="3").replaced == ["3"]  # whoever asks for it gets it


def test_blocks_that_differ_in_drop_rates_are_one_kind() -> None:
    class Dropped(Mlp):
        def __init__(self, rate: float) -> None:
            super().__init__()
            self.rate = rate
            self.drop: nn.Module = nn.Dropout(rate) if rate else nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return x + self.drop(super().forward(x))

    assert chains(Tower(*(Dropped(0.1 * i) for i in range(4)))) == [numbered("blocks.", 0, 1, 2, 3)]


def test_settings_of_convolutions_decide() -> None:
    def conv(groups: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(4, 4 * groups, 3, 1, 1, groups=groups), nn.ReLU(), nn.Conv2d(4 * groups, 4, 1))

    assert chains(nn.Sequential(*(conv(1) for _ in range(3))), torch.randn(1, 4, 4, 4))
    assert not chains(nn.Sequential(conv(1), conv(2), conv(4)), torch.randn(1, 4, 4, 4))


# ---- how blocks are called


class Branching(nn.Module):
    """A trunk of blocks and a side branch of the same kind."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.ModuleList(Mlp(4) for _ in range(4))
        self.side = Mlp(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.trunk[1](self.trunk[0](x))
        y = self.side(x)
        return self.trunk[3](self.trunk[2](x)) + y


def test_a_branch_takes_the_longest_path() -> None:
    assert chains(Branching()) == [numbered("trunk.", 0, 1, 2, 3)]


def test_a_chain_may_be_read_between_its_blocks() -> None:
    class Skips(Row):
        def forward(self, x: Tensor) -> Tensor:
            seen = []
            for block in self.blocks:
                x = block(x)
                seen.append(x)
            return torch.stack(seen).sum(0)

    model = Skips(*(Mlp(4) for _ in range(4)))
    assert chains(model) == [numbered("blocks.", 0, 1, 2, 3)]
    made = replfx.transform(model, X, operator="identity", select="blocks.1")
    one = model.blocks[0](X)
    two = model.blocks[2](one)
    torch.testing.assert_close(made(X), one + one + two + model.blocks[3](two))


@pytest.mark.parametrize("operator", ["block", "identity"])
def test_shared_arguments_and_tuples(operator: str) -> None:
    model = WithExtras()
    assert chains(model) == [numbered("blocks.", 0, 1, 2, 3, 4)]
    made = replfx.transform(model, X, operator=operator)
    assert replfx.report(made).replaced == ["blocks.1", "blocks.3"]
    assert made(X).shape == X.shape
    if operator == "identity":
        kept = WithExtras()
        kept.blocks = nn.ModuleList([model.blocks[0], model.blocks[2], model.blocks[4]])
        assert torch.equal(made(X), kept(X))


def test_blocks_that_also_take_the_block_before_last() -> None:
    class Two(Plain):
        def forward(self, x: Tensor, before: Tensor) -> Tensor:
            return super().forward(x) + before

    class Dense(Row):
        def forward(self, x: Tensor) -> Tensor:
            before = x
            for block in self.blocks:
                x, before = block(x, before), x
            return x

    assert chains(Dense(*(Two(4) for _ in range(6)))) == [numbered("blocks.", 0, 1, 2, 3, 4, 5)]


def test_a_block_called_by_keyword() -> None:
    class ByKeyword(Row):
        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x=x)
            return x

    model = ByKeyword(*(Mlp(4) for _ in range(3)))
    assert chains(model) == [numbered("blocks.", 0, 1, 2)]
    made = replfx.transform(model, X, operator="identity")
    assert torch.equal(made(X), model.blocks[2](model.blocks[0](X)))


def test_attention_blocks_with_a_tied_head() -> None:
    ids = torch.randint(0, 31, (2, 8))
    assert chains(GPT(tied=True, depth=4), ids) == [numbered("blocks.", 0, 1, 2, 3)]


# ---- refusals


def test_called_twice() -> None:
    class Twice(Tower):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.blocks[1](self.stem(x)).sum()

    model = Twice(*(Mlp() for _ in range(6)))
    assert chains(model) == [numbered("blocks.", 0, 2, 3, 4, 5)]
    assert refused(model, "blocks.1") == "it is called 2 times in one forward pass"


def test_one_module_in_two_places() -> None:
    shared = Mlp()
    model = Tower(shared, Mlp(), shared, Mlp())
    before = snapshot(model)
    with pytest.raises(replfx.NoChainError, match="called 2 times"):
        replfx.transform(model, X)
    assert_unchanged(model, before)


def test_never_called() -> None:
    model = tower(4)
    model.spare = Mlp()
    model.other = Mlp()
    assert chains(model) == [numbered("blocks.", 0, 1, 2, 3)]
    assert refused(model, "spare") == "it is not called in a forward pass"


def test_two_blocks_that_share_a_parameter() -> None:
    model = tower(5)
    model.blocks[3].fc1.weight = model.blocks[1].fc1.weight
    assert refused(model, "blocks.1").endswith("is shared with `blocks.3.fc1.weight`")
    assert "`blocks.1.fc1.weight`" in refused(model, "blocks.3")
    made = replfx.transform(model, X)
    assert replfx.report(made).replaced == ["blocks.2"]  # for every second one has to stay
    assert made.blocks[3].fc1.weight is made.blocks[1].fc1.weight
    model.blocks[2].fc2.weight = model.blocks[4].fc2.weight
    with pytest.raises(replfx.NoChainError, match="shared with"):
        replfx.transform(model, X)


def test_a_block_tied_to_the_head_stays_and_neighbours_may_read_it() -> None:
    model = tower(5)
    model.head = nn.Linear(8, 16)
    model.head.weight = model.blocks[1].fc1.weight
    assert "`head.weight`" in refused(model, "blocks.1")
    made = replfx.transform(model, X)
    assert replfx.report(made).replaced == ["blocks.3"]
    assert replfx.report(replfx.transform(model, X, select="blocks.2")).replaced == ["blocks.2"]


def test_a_frozen_block_stays_and_neighbours_may_read_it() -> None:
    model = tower(5)
    model.blocks[1].requires_grad_(False)
    assert refused(model, "blocks.1") == "all its parameters are frozen: replacing it would save no training"
    assert replfx.report(replfx.transform(model, X)).replaced == ["blocks.3"]
    made = replfx.transform(model, X, select="blocks.2")
    made(X).sum().backward()
    assert all(p.grad is None for p in made.blocks[1].parameters())
    assert all(p.grad is not None for p in made.blocks[2].parameters())


def test_a_partly_frozen_block_stays() -> None:
    model = tower(5)
    model.blocks[1].fc1.requires_grad_(False)
    reason = refused(model, "blocks.1")
    assert "`blocks.1.fc1.weight` is frozen and the others are not" in reason


def test_parametrised() -> None:
    model = tower(6)
    parametrize.register_parametrization(model.blocks[1].fc1, "weight", nn.Identity())
    reason = refused(model, "blocks.1")
    assert "`fc1` is parametrised" in reason
    assert "remove_parametrizations" in reason
    assert replfx.report(replfx.transform(model, X)).chains == [numbered("blocks.", 0, 2, 3, 4, 5)]


def test_all_parametrised() -> None:
    model = tower(4)
    for block in model.blocks:
        nn.utils.parametrizations.weight_norm(block.fc1)
    before = snapshot(model)
    with pytest.raises(replfx.NoChainError, match="parametrised"):
        replfx.transform(model, X)
    assert_unchanged(model, before)


def test_scripted() -> None:
    model = tower(6)
    model.blocks[1] = torch.jit.script(Plain())
    report = replfx.inspect(model, X)
    assert report.chains == [numbered("blocks.", 0, 2, 3, 4, 5)]
    scripted = Tower(*(torch.jit.script(Mlp()) for _ in range(4)))
    with pytest.raises(replfx.ReplfxError, match="scripted"):
        replfx.transform(scripted, X)


def test_quantised() -> None:
    class Codes(Tensor):
        """A tensor that stands for other data, as a quantised weight of another library does."""

        def __deepcopy__(self, memo: dict[int, object]) -> Tensor:
            return memo.setdefault(id(self), self.detach().clone().as_subclass(type(self)).requires_grad_())

    Codes.__module__ = "another_library.tensors"
    model = tower(6)
    # One that a Parameter keeps its class of.
    weight = model.blocks[1].fc1.weight.detach().as_subclass(Codes)
    model.blocks[1].fc1.weight = nn.Parameter(weight)
    assert "quantised weights are not fused" in refused(model, "blocks.1")


def test_integer_weights() -> None:
    class Eight(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.codes = nn.Parameter(torch.ones(8, 8, dtype=torch.int8), requires_grad=False)
            self.scale = nn.Parameter(torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            return x + nn.functional.linear(x, self.codes.to(x.dtype)) * self.scale

    assert "int8: quantised weights are not fused" in refused(Tower(*(Eight() for _ in range(4))), "blocks.1")


def test_lazy() -> None:
    model = Tower(*(nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 8)) for _ in range(4)))
    with pytest.raises(replfx.ReplfxError, match=r"`blocks\.0\.0\.weight` is lazy.*run the model once"):
        replfx.transform(model, X)
    assert any(nn.parameter.is_lazy(p) for p in model.parameters())


def test_an_intermediate_that_is_used_outside() -> None:
    class Leaky(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            self.kept = self.norm(x)
            return x + self.fc2(self.act(self.fc1(self.kept)))

    class Reader(Tower):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.blocks[1].kept.sum()

    model = Reader(Mlp(), Leaky(), Mlp(), Mlp(), Mlp())
    model.blocks[0], model.blocks[2] = Leaky(), Leaky()
    model.blocks[3], model.blocks[4] = Leaky(), Leaky()
    reason = replfx.inspect(model, X).refused["blocks.1"]
    assert "an intermediate result of it" in reason
    assert "is used outside of it" in reason


def test_a_block_that_reads_what_it_is_not_given() -> None:
    class Sneaky(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.side.pop()

    class Giver(Tower):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for block in self.blocks:
                object.__setattr__(block, "side", [x.mean()])
                x = block(x)
            return self.head(x)

    model = Giver(*(Sneaky() for _ in range(4)))
    reason = replfx.inspect(model, X).refused["blocks.1"]
    assert reason.startswith("it reads `")
    assert reason.endswith("which is not among its arguments")


def test_a_model_without_repeated_blocks() -> None:
    with pytest.raises(replfx.NoChainError, match="no chain of 3 blocks of one kind was found"):
        replfx.transform(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), X)
    with pytest.raises(replfx.NoChainError, match="the model has no repeated blocks"):
        replfx.transform(nn.Sequential(nn.ReLU(), nn.Tanh()), X)


def test_what_sets_blocks_apart_may_be_a_part_that_one_has_not() -> None:
    class Shortcut(nn.Module):
        def __init__(self, way: nn.Module | None) -> None:
            super().__init__()
            self.fc, self.way = nn.Linear(4, 4), way

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x).relu() + (x if self.way is None else self.way(x))

    ways = (nn.Sequential(nn.Linear(4, 32), nn.Linear(32, 4)), None, None)
    report = replfx.inspect(nn.Sequential(*map(Shortcut, ways)), torch.randn(2, 4))
    assert report.chains == [["0", "1", "2"]]
    wide = nn.Sequential(Shortcut(None), Shortcut(ways[0]), Shortcut(None))
    report = replfx.inspect(wide, torch.randn(2, 4))
    assert report.refused["1"] == "too little of it can be made from `0`: `way.0.weight`: (32, 4) ≠ absent"
