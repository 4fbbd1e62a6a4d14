"""Blocks that a model holds in more ways than by one name, and blocks with hooks of others."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import replfx
from tests.support.models import Residual, Row


class Wide(Residual):
    def __init__(self) -> None:
        super().__init__()
        self.out, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.last(self.out(self.fc(x).relu()))


class Held(nn.Module):
    """Registers its blocks, and runs them from where `hold` puts them."""

    def __init__(self, hold: Callable[[list[Residual]], object], run: Callable[[object], list[nn.Module]]) -> None:
        super().__init__()
        blocks = [Residual() for _ in range(5)]
        for number, block in enumerate(blocks):
            self.add_module(f"block{number}", block)
        self.held, self.run = hold(blocks), run

    def forward(self, x: Tensor) -> Tensor:
        for block in self.run(self.held):
            x = block(x)
        return x


def runs_list(held: list[nn.Module]) -> list[nn.Module]:
    return held


def runs_values(held: dict[str, nn.Module]) -> list[nn.Module]:
    return list(held.values())


def runs_pairs(held: tuple[tuple[str, nn.Module], ...]) -> list[nn.Module]:
    return [block for _, block in held]


HOLDERS = {
    "list": (list, runs_list),
    "dict": (lambda blocks: {str(i): block for i, block in enumerate(blocks)}, runs_values),
    "tuples": (lambda blocks: tuple((str(i), block) for i, block in enumerate(blocks)), runs_pairs),
    "other_names": (nn.ModuleList, list),
}


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("inplace", [False, True])
def test_a_block_is_replaced_wherever_the_model_holds_it(holder: str, inplace: bool) -> None:
    torch.manual_seed(0)
    hold, run = HOLDERS[holder]
    model, x = Held(hold, run), torch.randn(3, 4)
    kept = [copy.deepcopy(getattr(model, f"block{i}")) for i in (0, 2, 4)]
    removed = replfx.transform(model, x, operator="identity")
    expected = x
    for block in kept:
        expected = block(expected)
    assert torch.equal(removed(x), expected)
    made = replfx.transform(model, x, inplace=inplace)
    assert (made is model) is inplace
    made(x).sum().backward()
    assert all(p.grad is not None for p in made.parameters())
    output, state = made(x), made.state_dict()
    plain = replfx.materialize(made)
    assert torch.equal(plain(x), output)
    assert not any(type(m).__module__.startswith("replfx") for m in plain.modules())
    again = copy.deepcopy(made)
    assert torch.equal(again(x), output)
    assert list(again.state_dict()) == list(state)
    full = replfx.unroll(made)
    assert torch.equal(full(x), output)
    assert all(type(block) is Residual for block in run(full.held))


def test_a_block_that_was_not_replaced_stays_everywhere_after_a_failure() -> None:
    model, x = Held(list, runs_list), torch.randn(3, 4)
    blocks = list(model.held)
    with torch.no_grad():
        model.block1.fc.weight[0, 0] = float("nan")
    with pytest.raises(replfx.ReplfxError, match="not finite"):
        replfx.transform(model, x, inplace=True)
    assert model.held == blocks


def test_hooks_of_a_replaced_block_stay_with_it() -> None:
    """A library that looks for blocks by their class, after transform, finds replaced ones too."""
    model, x, seen = nn.Sequential(*(Residual() for _ in range(3))), torch.randn(2, 4), []
    made = replfx.transform(model, x)
    for module in made.modules():
        if isinstance(module, Residual):
            module.register_forward_hook(lambda *_: seen.append("class"))
    handle = made[1].register_forward_hook(lambda *_: seen.append("path"))
    made(x)
    assert seen == ["class", "class", "path", "class"]
    for ended in (replfx.materialize(made), replfx.unroll(made)):
        seen.clear()
        ended(x)
        assert seen == ["class", "class", "path", "class"]
    handle.remove()
    seen.clear()
    made(x)
    assert seen == ["class"] * 3


class Rescaling(Row):
    """Halves weights of its blocks when it is first evaluated, and doubles them when it is trained again (RWKV)."""

    def __init__(self, kind: type[Residual], *rescaled: str) -> None:
        super().__init__(*(kind() for _ in range(5)))
        self.rescaled, self.halved = rescaled, False

    def forward(self, x: Tensor) -> Tensor:
        if self.halved is self.training:
            with torch.no_grad():
                for name in self.rescaled:
                    for block in self.blocks:
                        block.get_submodule(name).weight.mul_(2.0 if self.training else 0.5)
            self.halved = not self.training
        return super().forward(x)


@pytest.mark.parametrize("training", [True, False])
def test_weights_that_the_model_writes_to_stay_the_blocks_own(training: bool) -> None:
    """In whichever mode it writes to them, though the capture saw only one."""
    torch.manual_seed(0)
    model, x = Rescaling(Wide, "fc", "out").train(training), torch.randn(3, 4)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    made = replfx.transform(model, x)
    assert all(torch.equal(model.state_dict()[name], t) for name, t in before.items())
    assert replfx.report(made).replaced == ["blocks.1", "blocks.3"]
    state = made.state_dict()
    assert "blocks.1.fc.weight" in state
    assert "blocks.3.fc.weight" in state
    assert "blocks.3.out.weight" in state
    assert "blocks.1.last.weight" not in state
    made.train()(x).sum().backward()
    assert all(p.grad is not None for p in made.parameters())
    trained = made(x)
    made.eval()(x)
    assert torch.equal(made.train()(x), trained)
    again = replfx.apply(model, replfx.Plan.from_json(replfx.rewrite.state.state_of(made).plan.to_json()))
    again.load_state_dict(made.state_dict())
    assert torch.equal(again.train()(x), trained)


@pytest.mark.parametrize("x", [None, torch.ones(3, 4)])
def test_weights_that_the_model_reads_itself_are_the_synthesised_ones(x: Tensor | None) -> None:
    class Penalised(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self[1].fc.weight.square().mean()

    torch.manual_seed(0)
    model, h = Penalised(*(Wide() for _ in range(5))), torch.randn(3, 4)
    made = replfx.transform(model, x, operator="block")
    assert replfx.report(made).replaced == replfx.inspect(model, x, operator="block").replaced == ["1", "3"]
    between = (model[0].fc.weight + model[2].fc.weight) / 2
    torch.testing.assert_close(made(h), nn.Sequential(*made.children())(h) + between.square().mean())
    made(h).sum().backward()
    assert all(p.grad is not None for p in made.parameters())


def test_a_model_that_writes_to_all_that_would_be_replaced_is_refused() -> None:
    model = Rescaling(Residual, "fc")
    with pytest.raises(replfx.FusionError, match=r"`blocks\.1`: operator 'block' has nothing to synthesise"):
        replfx.transform(model, torch.randn(3, 4))
