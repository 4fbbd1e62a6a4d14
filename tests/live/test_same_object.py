"""A replaced block is the user's own object: of its class, with its attributes, names, hooks and containers."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import replfx
from replfx.live.classes import live_class
from tests.support.blocks import BLOCKS, WIDTH, Listed, Owner, by_hand, chain, gradients, inputs
from tests.support.copies import copied
from tests.support.models import Mlp, Tower, tower

X = torch.linspace(-1, 1, 8).view(2, 4)


def transformed(name: str) -> tuple[nn.Sequential, nn.Module]:
    model = chain(name)
    made = replfx.transform(model, inputs())
    assert replfx.report(made).replaced == ["1", "3"]
    return model, made


@pytest.mark.parametrize("name", BLOCKS)
def test_outputs_are_those_of_a_model_by_hand(name: str) -> None:
    model, made = transformed(name)
    x = inputs()
    torch.testing.assert_close(made(x), by_hand(model, made)(x))
    torch.testing.assert_close(made.eval()(x), by_hand(model, made).eval()(x))


@pytest.mark.parametrize("name", BLOCKS)
def test_gradients_are_those_of_a_model_by_hand(name: str) -> None:
    """What its mean's gradient is flows on in halves, and a coefficient's is the product with the neighbour."""
    model, made = transformed(name)
    x = inputs()
    twin = by_hand(model, made)
    found, wanted = gradients(made, x), gradients(twin, x)
    matrices = [n for n, p in twin[1].named_parameters() if p.dim() > 1]
    for key, gradient in found.items():
        if ".replfx." in key:
            block, side = int(key[0]), -1 if key.endswith("previous") else 1
            products = [(wanted[f"{block}.{n}"] * twin[block + side].get_parameter(n)).sum() for n in matrices]
            torch.testing.assert_close(gradient, torch.stack(products))
        elif key[0] in "024" and key[2:] in matrices:
            shares = [wanted[f"{i}.{key[2:]}"] / 2 for i in (int(key[0]) - 1, int(key[0]) + 1) if i in (1, 3)]
            torch.testing.assert_close(gradient, wanted[key] + sum(shares))
        else:
            torch.testing.assert_close(gradient, wanted[key])
    assert all(n in found for n, _ in made.named_parameters())


@pytest.mark.parametrize("operator", ["block", "mixer", "light", "identity"])
def test_the_object_and_its_class_stay(operator: str) -> None:
    class Pre(nn.Module):
        """Two branches, so that each operator fits."""

        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2, self.mix = nn.LayerNorm(8), nn.LayerNorm(8), nn.Linear(5, 5)
            self.value, self.out, self.mlp = nn.Linear(8, 4), nn.Linear(4, 8), Mlp(8).fc1
            self.last, self.seen = nn.Linear(16, 8), 0

        def forward(self, x: Tensor) -> Tensor:
            self.seen += 1
            h = self.value(self.norm1(x)).transpose(1, 2)
            x = x + self.out(self.mix(h).transpose(1, 2))
            return x + self.last(torch.relu(self.mlp(self.norm2(x))))

    torch.manual_seed(0)
    model, x = nn.Sequential(*(Pre() for _ in range(3))), torch.randn(2, 5, 8)
    block, kind = model[1], type(model[1])
    calls: list[str] = []
    block.register_forward_hook(lambda *_: calls.append("hook"))
    block.custom = "kept"
    made = replfx.transform(model, x, operator=operator, inplace=True)
    assert made is model
    assert made[1] is block
    assert isinstance(made[1], kind)
    assert type(made[1]).__name__ == "Pre"
    assert made[1].custom == "kept"
    made[1].custom = 3
    assert vars(block)["custom"] == 3
    made(x)
    assert calls == ["hook"]
    back = replfx.unroll(made)
    assert back[1] is block
    assert type(block) is kind
    assert block.custom == 3
    assert list(back.state_dict()) == list(nn.Sequential(*(Pre() for _ in range(3))).state_dict())


@pytest.mark.parametrize("operator", ["light", "identity"])
def test_what_an_operator_frees_is_there_without_its_weights(operator: str) -> None:
    made = replfx.transform(tower(5), operator=operator)
    block: Any = made.get_submodule("blocks.1")
    assert block.fc1.out_features == 16
    assert [name for name, _ in block.named_children()] == ["replfx"]
    with pytest.raises(AttributeError, match="weight"):
        _ = block.fc1.weight
    with pytest.raises(AttributeError, match="nonsense"):
        _ = block.nonsense
    assert not [p for n, p in made.named_parameters() if "blocks.1.fc" in n]


@pytest.mark.parametrize("name", ["sequential", "named", "listed", "children"])
def test_who_goes_through_a_block_meets_what_was_there(name: str) -> None:
    model, made = transformed(name)
    before, after = model[1], made.get_submodule("1")
    assert [n for n, _ in after.named_children()] == [*(n for n, _ in before.named_children()), "replfx"]
    if hasattr(before, "__len__"):
        assert len(after) == len(before)
        assert len(list(after)) == len(list(before))
    made.float()
    assert {p.dtype for p in made.parameters()} == {torch.float32}  # coefficients too
    made.eval()
    assert not any(module.training for module in made.modules())
    seen: list[nn.Module] = []
    made.apply(seen.append)
    assert len(seen) == len(list(made.modules()))


@pytest.mark.parametrize(
    ("name", "how"), [*((name, how) for name in BLOCKS for how in ("deepcopy", "pickle")), ("mlp", "torch.save")]
)
def test_copies_read_their_own_neighbours(name: str, how: str) -> None:
    _, made = transformed(name)
    x = inputs()
    twin = copied(copied(made, how), how)  # a copy has what a copy is made of
    assert torch.equal(twin(x), made(x))
    assert type(twin[1]) is type(made.get_submodule("1"))
    with torch.no_grad():
        for p in made.parameters():
            p.zero_()
    assert twin(x).abs().sum() > 0
    before = twin(x)
    with torch.no_grad():
        for p in twin[0].parameters():
            p.mul_(2)
        for p in twin[0].parameters():
            p.div_(2)
    assert torch.equal(twin(x), before)
    gradients(twin, x)
    assert all(p.grad is None for p in made.parameters())


def test_one_class_for_each_class_and_set_of_names() -> None:
    made = replfx.transform(tower(7))
    one, other = made.get_submodule("blocks.1"), made.get_submodule("blocks.3")
    assert type(one) is type(other)
    assert type(one.fc1) is type(other.fc2)
    traits = type(one.fc1)._replfx_traits
    assert live_class(nn.Linear, traits) is type(one.fc1)
    assert repr(one.fc1) == repr(nn.Linear(8, 16))


# ---- weights


def test_a_weight_that_one_call_reads_twice_is_synthesised_once() -> None:
    model = chain("owner")
    made = replfx.transform(model, inputs())
    fusion, calls = made.get_submodule("1.replfx.fusion"), []
    fusion.register_forward_hook(lambda *_: calls.append(1))
    made(inputs())
    assert len(calls) == 1
    for _ in range(2):
        assert made.get_submodule("1").matrix is not None
    assert len(calls) == 3  # by who asks from outside, each time


def test_a_computed_weight_cannot_be_set_or_parametrised() -> None:
    made = replfx.transform(tower(5))
    layer: Any = made.get_submodule("blocks.1.fc1")
    for change in (
        lambda: setattr(layer, "weight", nn.Parameter(torch.ones(16, 8))),
        lambda: setattr(layer, "weight", torch.ones(16, 8)),
        lambda: parametrizations.spectral_norm(layer),
        lambda: parametrizations.weight_norm(layer),
        lambda: nn.utils.parametrize.register_parametrization(layer, "weight", nn.Identity()),
    ):
        with pytest.raises(replfx.FusionError, match=r"replfx\.materialize"):
            change()
    layer.bias = nn.Parameter(torch.ones(16))
    nn.utils.parametrize.register_parametrization(layer, "bias", nn.Tanh())
    assert torch.equal(layer.bias, torch.ones(16).tanh())
    plain = replfx.materialize(made).get_submodule("blocks.1.fc1")
    assert type(plain).__bases__ == (nn.Linear,)
    assert plain.weight.shape == (16, 8)


def test_what_keeps_its_weights_a_second_time_is_refused() -> None:
    class Keeping(Mlp):
        def __init__(self) -> None:
            super().__init__()
            self.all = [self.fc1.weight, self.fc2.weight]

        def forward(self, x: Tensor) -> Tensor:
            return x + (x @ self.all[0].T).relu() @ self.all[1].T

    with pytest.raises(replfx.FusionError, match=r"its attribute `all` holds the parameter `fc1.weight` too"):
        replfx.transform(Tower(*(Keeping() for _ in range(5))), select="blocks.1")


def test_an_attribute_with_our_name_is_refused() -> None:
    class Taken(Mlp):
        def __init__(self) -> None:
            super().__init__()
            self.replfx = nn.Identity()

    with pytest.raises(replfx.FusionError, match="it has an attribute `replfx` already"):
        replfx.transform(Tower(*(Taken() for _ in range(5))), X)


def test_symbolic_tracing_does_not_freeze_a_synthesised_weight() -> None:
    made = replfx.transform(nn.Sequential(*(Owner() for _ in range(3))), torch.randn(2, WIDTH))
    with pytest.raises(replfx.FusionError, match=r"trace replfx\.materialize"):
        torch.fx.symbolic_trace(made)
    traced = torch.fx.symbolic_trace(replfx.transform(tower(5)))
    x = torch.randn(3, 4)
    traced(x).sum().backward()
    assert all(p.grad is not None for p in traced.parameters())


def test_optimizers_find_parameters_in_the_order_that_they_had() -> None:
    """The state_dict of an optimizer counts them."""
    made = replfx.unroll(replfx.transform(tower(5)))
    assert [n for n, _ in made.named_parameters()] == [n for n, _ in tower(5).named_parameters()]
    listed = replfx.unroll(replfx.transform(chain("listed"), inputs()))
    assert list(listed.state_dict()) == list(nn.Sequential(*(Listed() for _ in range(5))).state_dict())


def test_a_container_keeps_its_empty_places() -> None:
    class Gapped(nn.ModuleList):
        def forward(self, x: Tensor) -> Tensor:
            return self[2](self[0](x).relu())

    model = nn.Sequential(*(Gapped([nn.Linear(4, 4), None, nn.Linear(4, 4)]) for _ in range(5)))  # type: ignore[list-item]
    made = replfx.transform(model, X)
    assert replfx.report(made).replaced == ["1", "3"]
    for block in made:
        assert len(block) == 3
        assert [module is None for module in block] == [False, True, False]
        assert block[1] is None


# ---- threads


@pytest.mark.parametrize("operator", ["block", "light"])
def test_threads_do_not_meet(operator: str) -> None:
    torch.manual_seed(0)
    made = replfx.transform(tower(9), operator=operator).eval()
    batches = [torch.randn(16, 4) for _ in range(20)]
    with torch.no_grad():
        wanted = [made(x) for x in batches]

    def run(index: int) -> bool:
        with torch.no_grad():
            return torch.equal(made(batches[index]), wanted[index])

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(run, list(range(20)) * 10))
    finally:
        sys.setswitchinterval(interval)
