"""What a user adds and what a user holds on to: own fusions and operators, hooks, attributes, parameters."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import replfx
from tests.support.models import Mlp, Tower, tower

X = torch.linspace(-1, 1, 8).view(2, 4)


class Mean(replfx.Fusion):
    """The documented example."""

    def combine(self, name: str, previous: Tensor, next: Tensor) -> Tensor:
        return (previous + next) / 2


class LowRank(replfx.Fusion):
    """The mean, plus a learned product of its own."""

    def __init__(
        self, shapes: Mapping[str, torch.Size], *, dtype: torch.dtype, device: torch.device, rank: int = 1
    ) -> None:
        super().__init__(shapes, dtype=dtype, device=device)
        self.left = nn.ParameterDict(
            {n.replace(".", "_"): torch.ones(s[0], rank, dtype=dtype, device=device) for n, s in shapes.items()}
        )
        self.right = nn.ParameterDict(
            {n.replace(".", "_"): torch.ones(rank, s[1], dtype=dtype, device=device) for n, s in shapes.items()}
        )

    def combine(self, name: str, previous: Tensor, next: Tensor) -> Tensor:
        key = name.replace(".", "_")
        return (previous + next) / 2 + self.left[key] @ self.right[key]


class Gain(replfx.Operator):
    """y = scale · mean|W| · x with one synthesised weight."""

    def __init__(self, block: nn.Module, interface: replfx.Interface, *, weight: str, scale: float = 1.0) -> None:
        super().__init__(block, interface)
        self.sources = {"weight": replfx.Source(weight)}
        self.scale = scale

    @classmethod
    def match(cls, site: replfx.Site) -> replfx.Match:
        names = [name for name, p in site.block.named_parameters() if p.dim() == 2]
        return replfx.Match({"weight": names[0]}) if names else replfx.Match(reason="it has no matrix")

    def forward(self, theta: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args[0] * theta["weight"].abs().mean() * self.scale


def test_a_fusion_in_a_few_lines() -> None:
    replfx.register_fusion("mean")(Mean)
    model = tower(5)
    made = replfx.transform(model, X, fusion="mean", operator="block")
    (a, b) = (model.blocks[i].fc1.weight for i in (0, 2))
    layer = made.blocks[1]
    assert set(layer.synthesized()) == {"fc1.weight", "fc2.weight"}
    assert torch.equal(layer.synthesized()["fc1.weight"], (a + b) / 2)
    block = copy.deepcopy(model.blocks[1])
    with torch.no_grad():
        block.fc1.weight.copy_((a + b) / 2)
        block.fc2.weight.copy_((model.blocks[0].fc2.weight + model.blocks[2].fc2.weight) / 2)
    h = torch.randn(3, 8)
    assert torch.equal(layer(h), block(h))
    assert not any(".fusion." in name for name, _ in made.named_parameters())
    assert replfx.report(made).blocks[1].fusion == "mean"


def test_a_fusion_with_parameters_and_options_of_its_own() -> None:
    replfx.register_fusion("low_rank")(LowRank)
    made = replfx.transform(tower(5), fusion={"name": "low_rank", "rank": 3})
    assert made.blocks[1].replfx.fusion.left["fc1_weight"].shape == (16, 3)
    made(X).sum().backward()
    assert all(p.grad is not None for name, p in made.named_parameters() if ".fusion." in name)
    plan = replfx.Plan.from_json(replfx.plan(tower(5), fusion={"name": "low_rank", "rank": 3}).to_json())
    twin = replfx.apply(tower(5), plan)
    twin.load_state_dict(made.state_dict())
    assert torch.equal(twin(X), made(X))
    plain = replfx.materialize(made)
    torch.testing.assert_close(plain(X), made(X), rtol=0, atol=0)
    assert not any("fusion" in name for name, _ in plain.named_parameters())


def test_an_operator_with_options_of_its_own() -> None:
    replfx.register_operator("gain")(Gain)
    model = tower(5)
    made = replfx.transform(model, X, operator={"name": "gain", "scale": 2.0}, select="blocks.1")
    h = torch.randn(3, 8)
    weight = (model.blocks[0].fc1.weight + model.blocks[2].fc1.weight) / 2
    torch.testing.assert_close(made.blocks[1](h), h * weight.abs().mean() * 2.0)
    assert replfx.report(made).blocks[1].operator == "gain"


def test_an_operator_that_does_not_fit_says_why() -> None:
    class Never(Gain):
        @classmethod
        def match(cls, site: replfx.Site) -> replfx.Match:
            return replfx.Match(reason="it is a Tuesday")

    replfx.register_operator("never")(Never)
    with pytest.raises(replfx.NoChainError, match=r"`blocks\.1`: operator 'never' does not fit it: it is a Tuesday"):
        replfx.transform(tower(5), operator="never")
    assert replfx.inspect(tower(5), X, operator="never").refused["blocks.1"].endswith("it is a Tuesday")


def test_names_are_taken_once() -> None:
    replfx.register_fusion("mean")(Mean)
    replfx.register_fusion("mean")(Mean)  # a notebook's cell, run again
    with pytest.raises(replfx.FusionError, match="the fusion name 'mean' is taken by Mean"):
        replfx.register_fusion("mean")(LowRank)
    with pytest.raises(replfx.FusionError, match="the operator name 'block' is taken by BlockOperator"):
        replfx.register_operator("block")(Gain)
    with pytest.raises(replfx.FusionError, match="taken by ScalarFusion"):
        replfx.register_fusion("scalar")(Mean)


def test_an_unknown_name_lists_what_a_user_registered() -> None:
    replfx.register_fusion("mean")(Mean)
    with pytest.raises(replfx.FusionError, match="there are: auto, channel, mean, scalar, scalar_layer"):
        replfx.transform(tower(5), fusion="meen")


@pytest.mark.parametrize("operator", ["block", "light", "identity"])
def test_hooks_on_a_replaced_block_still_fire(operator: str) -> None:
    model = tower(5)
    seen: list[str] = []
    block = model.blocks[1]
    block.register_forward_pre_hook(lambda *_: seen.append("before"))
    block.register_forward_hook(lambda *_, **__: seen.append("after"), with_kwargs=True)
    block.register_full_backward_hook(lambda *_: seen.append("backward"))
    block.act.register_forward_hook(lambda *_: seen.append("inside"))
    made = replfx.transform(model, X, operator=operator)
    assert seen == []
    made(X).sum().backward()
    inside = ["inside"] if operator == "block" else []
    assert seen == ["before", *inside, "after", "backward"]
    if operator == "block":
        seen.clear()
        replfx.unroll(made)(X).sum().backward()
        assert seen == ["before", "inside", "after", "backward"]


def test_a_hooks_handle_still_removes_it() -> None:
    model = tower(5)
    seen: list[str] = []
    handle = model.blocks[1].register_forward_hook(lambda *_: seen.append("hook"))
    replfx.transform(model, X, inplace=True)(X)
    assert seen == ["hook"]
    handle.remove()
    model(X)
    replfx.unroll(model)(X)
    assert seen == ["hook"]


def test_a_replaced_block_has_the_attributes_that_it_had() -> None:
    class Shifted(Mlp):
        def __init__(self) -> None:
            super().__init__()
            self.shift_size, self.drop_rate = (1, 2), 0.25

    model = Tower(*(Shifted() for _ in range(5)))
    for operator in ("block", "light", "identity"):
        made = replfx.transform(model, X, operator=operator)
        for block in (made.blocks[1], replfx.materialize(made).blocks[1]):
            for each in (block, copy.deepcopy(block)):
                assert (each.shift_size, each.drop_rate) == ((1, 2), 0.25)
        with pytest.raises(AttributeError, match="nothing_such"):
            _ = made.blocks[1].nothing_such


def test_in_place_keeps_the_identity_of_what_is_kept() -> None:
    model = tower(5)
    kept = {name: p for name, p in model.named_parameters() if not name.startswith(("blocks.1.", "blocks.3."))}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert replfx.transform(model, X, inplace=True) is model
    now = dict(model.named_parameters())
    assert all(now[name] is parameter for name, parameter in kept.items())
    held = {id(p) for p in optimizer.param_groups[0]["params"]}
    assert {id(p) for p in kept.values()} <= held


def test_a_copy_shares_nothing_with_the_original() -> None:
    model = tower(5)
    for operator in ("block", "light", "identity"):
        made = replfx.transform(model, X, operator=operator)
        one, other = ({t.data_ptr() for t in m.state_dict().values()} for m in (model, made))
        assert not one & other


def test_frozen_modes_and_requires_grad_are_kept() -> None:
    model = tower(5).eval()
    model.stem.requires_grad_(False)
    made = replfx.transform(model, X)
    assert not any(m.training for m in made.modules())
    assert not made.stem.weight.requires_grad
    made.train()
    assert all(m.training for m in made.modules())
