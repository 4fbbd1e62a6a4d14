"""Several optimizers for one model: Muon or the like for its matrices, AdamW for the rest."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

import replfx
from tests.support.models import tower

OPERATORS = [("block", "outputs"), ("identity", "outputs"), ("identity", "copies")]


def _model(operator: str) -> nn.Module:
    torch.manual_seed(0)
    return replfx.transform(tower(5).double(), torch.randn(2, 4, dtype=torch.float64), operator=operator)


def _divided(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The matrices, and what has fewer dimensions: norms, biases and coefficients."""
    parameters = list(model.parameters())
    return [p for p in parameters if p.dim() == 2], [p for p in parameters if p.dim() != 2]


def _train(model: nn.Module, optimizers: list[Optimizer], steps: range) -> list[Tensor]:
    losses = []
    for step in steps:
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.detach())
    return losses


def _unroll(model: nn.Module, optimizers: Any, start: Any) -> None:
    torch.manual_seed(1)  # a block that was left out starts at random in part
    replfx.unroll(model, optimizers, start=start)


@pytest.mark.parametrize(("operator", "start"), OPERATORS)
def test_two_train_as_one_does(operator: str, start: str) -> None:
    losses = []
    for several in (False, True):
        model = _model(operator)
        parts = _divided(model) if several else (list(model.parameters()),)
        optimizers: list[Optimizer] = [AdamW(part, 1e-2) for part in parts]
        before = _train(model, optimizers, range(3))
        _unroll(model, optimizers if several else optimizers[0], start)
        losses.append([*before, *_train(model, optimizers, range(3, 6))])
    assert losses[0] == losses[1]


@pytest.mark.parametrize(("operator", "start"), OPERATORS)
def test_each_gets_what_it_can_train(operator: str, start: str) -> None:
    """Muon takes matrices alone; and what both hold fits optimizers that are made for the full model."""
    model = _model(operator)
    matrices, rest = _divided(model)
    optimizers: list[Optimizer] = [Muon(matrices, 1e-2), AdamW(rest, 1e-2)]
    _train(model, optimizers, range(3))
    _unroll(model, optimizers, start)
    for optimizer, part in zip(optimizers, _divided(model), strict=True):
        assert [id(p) for group in optimizer.param_groups for p in group["params"]] == [id(p) for p in part]
        assert set(optimizer.state) <= set(part)
    twin = copy.deepcopy(model)
    matrices, rest = _divided(twin)
    again: list[Optimizer] = [Muon(matrices, 1e-2), AdamW(rest, 1e-2)]
    for old, new in zip(optimizers, again, strict=True):
        new.load_state_dict(copy.deepcopy(old.state_dict()))
    assert _train(model, optimizers, range(3, 6)) == _train(twin, again, range(3, 6))


def test_a_schedule_hands_over_to_all() -> None:
    model = _model("block")
    optimizers: list[Optimizer] = [AdamW(part, 1e-2) for part in _divided(model)]
    schedule = replfx.Schedule(model, optimizers, unroll_at=[1, 2])
    for step in range(3):
        _train(model, optimizers, range(step, step + 1))
        schedule.step()
    assert schedule.is_done
    held = {p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    assert held == set(model.parameters())


def test_one_that_cannot_exchange_its_parameters_is_refused_beside_one_that_can() -> None:
    model = _model("block")
    before = [name for name, _ in model.named_parameters()]
    matrices, rest = _divided(model)
    with pytest.raises(replfx.FusionError, match="LBFGS keeps the history"):
        replfx.unroll(model, [AdamW(rest), torch.optim.LBFGS(matrices)])
    assert [name for name, _ in model.named_parameters()] == before


@pytest.mark.parametrize(("operator", "start"), OPERATORS)
def test_what_nothing_trained_is_not_trained_then(operator: str, start: str) -> None:
    model = _model(operator)
    head = list(model.get_submodule("blocks.4").parameters())
    optimizer = AdamW(head, 1e-2)
    for path in ("blocks.0", "blocks.2"):
        model.get_submodule(path).requires_grad_(False)
    _unroll(model, optimizer, start)
    between, last = (list(model.get_submodule(path).parameters()) for path in ("blocks.1", "blocks.3"))
    # Both neighbours are frozen; under `block` norms and biases were the block's own all along.
    assert not any(p.requires_grad for p in between if p.dim() == 2)
    assert all(p.requires_grad for p in last)
    held = {p for group in optimizer.param_groups for p in group["params"]}
    assert held.isdisjoint(between)
    assert held >= set(head)


class _Unusual(AdamW):
    """Keeps a list of matrices, or a tensor of a class of its own, of each parameter."""

    def fill(self, value: Any) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["unusual"] = value(p)


class _Packed(Tensor):
    """As torchao's moments in eight bits."""


@pytest.mark.parametrize("value", [lambda p: [p.detach().clone()], lambda p: p.detach().clone().as_subclass(_Packed)])
def test_a_state_that_cannot_be_averaged_begins_anew(value: Any) -> None:
    model = _model("block")
    optimizer = _Unusual(model.parameters(), 1e-2)
    _train(model, [optimizer], range(2))
    optimizer.fill(value)
    known = set(model.parameters())
    _unroll(model, optimizer, "outputs")
    new = [p for p in model.parameters() if p not in known]
    assert new
    assert not any(optimizer.state.get(p) for p in new)
    _train(model, [optimizer], range(2, 4))


@pytest.mark.parametrize(("operator", "start"), OPERATORS)
def test_names_go_with_their_parameters(operator: str, start: str) -> None:
    model = _model(operator)
    optimizer = AdamW(model.named_parameters(), 1e-2)
    _train(model, [optimizer], range(2))
    _unroll(model, optimizer, start)
    (group,) = optimizer.param_groups
    assert dict(zip(group["param_names"], group["params"], strict=True)) == dict(model.named_parameters())
    AdamW(tower(5).named_parameters()).load_state_dict(optimizer.state_dict())
