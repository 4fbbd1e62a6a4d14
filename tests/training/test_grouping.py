"""Parameter groups: what has weight decay, what has none, and that nothing is left out or there twice."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import replfx
from tests.support.models import GPT, ConvNet, Tower, tower
from tests.support.strategies import Case, cases


def names_in(model: nn.Module, groups: list[dict[str, Any]], name: str) -> set[str]:
    """The parameters of a group by their names in the model; empty where there is no such group."""
    known = {id(p): n for n, p in model.named_parameters()}
    return {known[id(p)] for group in groups if group["name"] == name for p in group["params"]}


# ---- what always holds


@settings(max_examples=10)
@given(case=cases(), frozen=st.sets(st.integers(0, 40)), is_transformed=st.booleans())
def test_each_trainable_parameter_once_and_no_decay_of_coefficients(
    case: Case, frozen: set[int], is_transformed: bool
) -> None:
    model = case.transformed() if is_transformed else case.model()
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index not in frozen or index == 0)
    groups = replfx.parameter_groups(model, 0.3)
    given_out = [id(p) for group in groups for p in group["params"]]
    assert sorted(given_out) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert all(group["weight_decay"] == {"decay": 0.3, "no_decay": 0.0}[group["name"]] for group in groups)
    for name in names_in(model, groups, "decay"):
        assert ".fusion." not in name
        assert model.get_parameter(name).dim() >= 2
    for name in names_in(model, groups, "no_decay"):
        parameter = model.get_parameter(name)
        assert ".fusion." in name or parameter.dim() < 2 or name.rpartition(".")[2].startswith("bias")


# ---- what is a matrix, and what is not


def test_a_small_transformed_model() -> None:
    model = replfx.transform(tower(3))
    groups = replfx.parameter_groups(model, 0.05, learning_rate=1e-3)
    assert [group["name"] for group in groups] == ["decay", "no_decay"]
    assert all(group["lr"] == 1e-3 for group in groups)
    kept = {f"blocks.{index}.fc{layer}.weight" for index in (0, 2) for layer in (1, 2)}
    assert names_in(model, groups, "decay") == {"stem.weight", "head.weight"} | kept
    assert {"blocks.1.replfx.fusion.previous", "blocks.1.replfx.fusion.next"} <= names_in(model, groups, "no_decay")
    assert "lr" not in replfx.parameter_groups(model)[0]


class Matrices(replfx.Fusion):
    def __init__(self, shapes: Any, **options: Any) -> None:
        super().__init__(shapes, **options)
        self.mix = nn.Parameter(torch.full((2, 2), 0.5))

    def combine(self, name: str, previous: Tensor, next: Tensor) -> Tensor:
        return self.mix[0, 0] * previous + self.mix[1, 1] * next


def test_coefficients_of_two_dimensions_are_coefficients_too() -> None:
    replfx.register_fusion("matrices")(Matrices)
    model = replfx.transform(tower(3), fusion="matrices")
    assert "blocks.1.replfx.fusion.mix" in names_in(model, replfx.parameter_groups(model), "no_decay")


def test_norms_and_biases_of_any_shape() -> None:
    model = nn.ModuleDict(
        {"norm": nn.LayerNorm((3, 4)), "attention": nn.MultiheadAttention(4, 2, add_bias_kv=True), "rnn": nn.LSTM(4, 4)}
    )
    groups = replfx.parameter_groups(model)
    assert names_in(model, groups, "decay") == {
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "rnn.weight_ih_l0",
        "rnn.weight_hh_l0",
    }


def test_a_tied_weight_is_there_once() -> None:
    model = replfx.transform(GPT(tied=True))
    params = [p for group in replfx.parameter_groups(model) for p in group["params"]]
    assert sum(p is model.get_parameter("head.weight") for p in params) == 1
    torch.optim.AdamW(replfx.parameter_groups(model))  # which refuses what is there twice


# ---- what the model says of itself


class Positions(Tower):
    """Names what is to have no decay, as timm's models do."""

    def no_weight_decay(self) -> set[str]:
        return {"stem.weight", "blocks.*.fc2.weight", "blocks.1.table"}


def positions() -> Positions:
    return Positions(*tower(3).blocks)


def test_no_weight_decay_of_the_model_is_honoured() -> None:
    model = replfx.transform(positions())
    expected = {"blocks.0.fc1.weight", "blocks.2.fc1.weight", "head.weight"}
    assert names_in(model, replfx.parameter_groups(model), "decay") == expected


def test_it_is_honoured_where_a_trainer_holds_the_model() -> None:
    holder = nn.Module()
    holder.model = replfx.transform(positions())
    for module in (holder, torch.compile(holder.model)):
        decayed = names_in(module, replfx.parameter_groups(module), "decay")
        assert {name.split(".", 1)[1] for name in decayed} == {
            "blocks.0.fc1.weight",
            "blocks.2.fc1.weight",
            "head.weight",
        }


def test_names_are_as_before_transform() -> None:
    made = replfx.transform(positions())
    owner = made.get_submodule("blocks.1")
    owner.table = nn.Parameter(torch.ones(2, 2))
    assert "blocks.1.table" in names_in(made, replfx.parameter_groups(made), "no_decay")
    owner.other = nn.Parameter(torch.ones(2, 2))
    assert "blocks.1.other" in names_in(made, replfx.parameter_groups(made), "decay")


def test_timms_groups_are_the_same_on_timms_models() -> None:
    timm = pytest.importorskip("timm")
    from timm.optim import param_groups_weight_decay

    for name in ("vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "convnext_atto"):
        options = {"embed_dim": 32, "depth": 3, "num_heads": 2} if name.startswith("vit") else {}
        model = timm.create_model(name, **options)
        named = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
        theirs = param_groups_weight_decay(model, 0.05, no_weight_decay_list=named)
        decayed = next(group["params"] for group in theirs if group["weight_decay"])
        ours = replfx.parameter_groups(model, 0.05)[0]
        assert ours["name"] == "decay"
        assert {id(p) for p in ours["params"]} == {id(p) for p in decayed}


# ---- with an optimizer


def test_unroll_keeps_to_the_groups() -> None:
    model = replfx.transform(ConvNet(), operator="block")
    optimizer = torch.optim.AdamW(replfx.parameter_groups(model, 0.1))
    model(torch.rand(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    replfx.unroll(model, optimizer)
    wanted = {group["name"]: {id(p) for p in group["params"]} for group in replfx.parameter_groups(model, 0.1)}
    assert {group["name"]: {id(p) for p in group["params"]} for group in optimizer.param_groups} == wanted


def test_only_what_is_in_the_group_decays() -> None:
    model = replfx.transform(tower(3))
    optimizer = torch.optim.AdamW(replfx.parameter_groups(model, 0.5), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 0.95 if parameter.dim() == 2 else 1.0
        torch.testing.assert_close(parameter.detach(), factor * before[name], msg=name)


# ---- refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight_decay": -0.1}, r"weight_decay must be a finite number from 0 up, not -0\.1"),
        ({"weight_decay": math.nan}, "weight_decay must be a finite number from 0 up, not nan"),
        ({"learning_rate": math.inf}, "learning_rate must be a finite number from 0 up, not inf"),
    ],
)
def test_impossible_numbers_are_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(replfx.ReplfxError, match=message):
        replfx.parameter_groups(tower(3), **arguments)


def test_what_has_nothing_to_train_is_refused() -> None:
    with pytest.raises(replfx.ReplfxError, match=r"Tower has no parameter with requires_grad=True"):
        replfx.parameter_groups(tower(3).requires_grad_(False))
    with pytest.raises(replfx.ReplfxError, match=r"model must be a torch\.nn\.Module, not list"):
        replfx.parameter_groups(list(tower(3).parameters()))
    with pytest.raises(replfx.ReplfxError, match=r"`weight` is lazy"):
        replfx.parameter_groups(nn.LazyLinear(3))
