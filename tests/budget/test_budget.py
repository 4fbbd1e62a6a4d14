"""Budgets: what is chosen is within them, is the mildest plan, and costs what is expected."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import replfx
from replfx.budget.asked import Budget
from replfx.cli import main
from replfx.demo.model import GPT
from replfx.measure import peak_training_bytes, trainable_parameters
from tests.support.models import ConvNet, Tower, tower

X = torch.rand(6, 4)


def gpt(depth: int = 7) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return GPT(64, 32, width=32, depth=depth, heads=2), torch.randint(64, (4, 32))


@pytest.mark.parametrize(
    ("given", "bytes"),
    [("12GiB", 12 * 2**30), ("1.5 gb", 1_500_000_000), (" 800MiB", 800 * 2**20), ("7b", 7), (1024, 1024)],
)
def test_sizes(given: object, bytes: int) -> None:
    assert Budget.of({"memory": given}) == Budget(memory=bytes)


@pytest.mark.parametrize(
    ("budget", "says"),
    [
        ({}, "is empty"),
        ("12GiB", "must be a dict"),
        ({"memroy": "1GiB"}, "'memroy'"),
        ({"memory": "12"}, "is no size"),
        ({"memory": "12 parsecs"}, "is no size"),
        ({"memory": 0}, "no room"),
        ({"memory": 1.2}, "at most 1"),
        ({"time": 0}, "over 0"),
        ({"time": 1.5}, "at most 1"),
        ({"time": "fast"}, "'fast'"),
        ({"parameters": True}, "True"),
    ],
)
def test_what_is_no_budget(budget: object, says: str) -> None:
    with pytest.raises(replfx.PlanError, match=says):
        replfx.transform(tower(), X, budget=budget)


def test_one_way_of_choosing() -> None:
    with pytest.raises(replfx.PlanError, match="budget= or every="):
        replfx.transform(tower(), X, budget={"parameters": 0.9}, every=2)
    with pytest.raises(replfx.PlanError, match="budget= or keep="):
        replfx.plan(tower(), X, budget={"parameters": 0.9}, keep=2)
    with pytest.raises(replfx.PlanError, match="plan= or budget="):
        replfx.transform(tower(), X, budget={"parameters": 0.9}, plan=replfx.plan(tower(), X))


def test_steps_need_inputs() -> None:
    with pytest.raises(replfx.CaptureError, match="example_inputs"):
        replfx.transform(tower(), budget={"time": 0.9})


# ---- parameters are exact, and nothing runs


def _mildest(model: nn.Module, operator: str, share: float) -> int | None:
    """By hand: the fewest blocks, of any set of them, within the budget; all blocks are alike."""
    inner = [f"blocks.{i}" for i in range(1, len(model.blocks) - 1)]
    for count in range(len(inner) + 1):
        for chosen in itertools.islice(itertools.combinations(inner, count), 1):
            made = replfx.transform(model, operator=operator, select=chosen) if chosen else model
            if trainable_parameters(made) <= share * trainable_parameters(model):
                return count
    return None


@pytest.mark.slow
@settings(max_examples=8)
@given(st.integers(3, 7), st.floats(0.2, 1.0), st.sampled_from(["block", "identity"]))
def test_the_fewest_blocks_within_a_share_of_the_parameters(depth: int, share: float, operator: str) -> None:
    model = tower(depth)
    wanted = _mildest(model, operator, share)
    budget = {"parameters": share}
    if wanted is None:
        with pytest.raises(replfx.PlanError, match=r"at best parameters 0\.\d\d of full"):
            replfx.transform(model, X, budget=budget, operator=operator)
        return
    made = replfx.transform(model, X, budget=budget, operator=operator)
    found = replfx.report(made)
    assert len(found.replaced) == wanted
    assert found.expected.planned.parameters == trainable_parameters(made) <= share * trainable_parameters(model)
    assert found.expected.full.parameters == trainable_parameters(model)
    assert {block.operator for block in found.blocks} <= {operator, None}


def test_few_blocks_are_spread_over_the_depth_and_the_mildest_operator_comes_first() -> None:
    model = tower(9)
    one = replfx.report(replfx.transform(model, X, budget={"parameters": 0.93}))
    assert (one.replaced, one.blocks[5].operator) == (["blocks.5"], "block")
    assert one.blocks[3].kept == "the budget leaves it"
    two = replfx.plan(model, X, budget={"parameters": 0.85})
    assert [r.path for r in two.replacements] == ["blocks.3", "blocks.7"]


def test_what_saves_most_is_replaced_first() -> None:
    model = ConvNet(4, (6, 8))
    made = replfx.transform(model, torch.rand(2, 3, 8, 8), budget={"parameters": 0.9}, operator="identity")
    assert replfx.report(made).replaced == ["stages.1.1"]  # of 8 channels; in the stage before there are 6


def test_a_model_within_the_budget_stays_as_it_is() -> None:
    model = tower()
    made = replfx.transform(model, X, budget={"parameters": 1.0})
    assert replfx.report(made).replaced == []
    assert list(made.state_dict()) == list(model.state_dict())
    assert torch.equal(made(X), model(X))
    assert replfx.plan(model, X, budget={"memory": "1GiB"}).replacements == ()


# ---- time and memory are measured


@pytest.mark.parametrize("share", [0.9, 0.6])
def test_the_peak_is_as_expected(share: float) -> None:
    model, ids = gpt()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    made = replfx.transform(model, ids, budget={"memory": share})
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    expected = replfx.report(made).expected

    def peak(net: nn.Module) -> int:
        optimizer = torch.optim.AdamW(net.parameters(), fused=True)

        def step() -> None:
            optimizer.zero_grad()
            net(ids).mean().backward()
            optimizer.step()

        return peak_training_bytes(step, net, optimizer, torch.device("cpu"))

    assert expected.full.peak_bytes == pytest.approx(peak(model), rel=0.02)
    assert expected.planned.peak_bytes == pytest.approx(peak(made), rel=0.02)
    assert peak(made) <= share * peak(model) * 1.02


@pytest.mark.slow
def test_several_limits_and_what_is_possible() -> None:
    model, ids = gpt(5)
    with pytest.raises(replfx.PlanError, match=r"memory [\d.]+ MiB \(0\.\d\d of full\) \(`\w+` in the place of"):
        replfx.transform(model, ids, budget={"memory": "64KiB", "parameters": 0.9})
    made = replfx.transform(model, ids, budget={"memory": "1GiB", "parameters": 0.8})
    assert trainable_parameters(made) <= 0.8 * trainable_parameters(model)


def test_blocks_that_fill_a_cache_and_that_write_to_their_input() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x += 1.0
            return x + self.fc(x)

    model = Tower(*(Writes() for _ in range(5)))
    made = replfx.transform(model, X, budget={"memory": 0.95})
    assert replfx.report(made).replaced


@pytest.mark.slow
def test_the_report_and_the_command_line_say_what_to_expect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("timm")
    file = tmp_path / "plan.json"
    command = ["plan", "timm:test_vit", "--budget", "parameters=0.8", "--save", str(file)]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    plan = replfx.Plan.from_json(file.read_text())
    assert [r.path for r in plan.replacements] == found["replaced"] != []
    assert found["expected"]["budget"] == {"parameters": 0.8}
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "budget: parameters ≤ 0.8 of full; expected on cpu" in said
    assert main(["plan", "timm:test_vit", "--budget", "parameters=0.01"]) == 1
    assert "at best parameters" in capsys.readouterr().err
