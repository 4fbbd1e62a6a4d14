"""Operators compared: the figures are those that the library and torch give one by one."""

import json

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import replfx
from replfx.cli import main
from replfx.measure import saved_activation_bytes, trainable_parameters
from replfx.show.comparing import compare
from tests.support.models import Tower, tower


def test_each_row_is_of_the_transformed_model():
    model, x = tower(), torch.rand(6, 4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    comparison = compare(model, x, repeats=3)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert comparison.example == "6×4"
    assert {row.operator for row in comparison.rows} >= {"full", "block", "identity", "light"}
    for row in comparison.rows:
        if row.reason is not None:
            with pytest.raises(replfx.ReplfxError):
                replfx.transform(model, x, operator=row.operator)
            continue
        made = model if row.operator == "full" else replfx.transform(model, x, operator=row.operator)
        with FlopCounterMode(display=False) as counter:
            made(x)
        assert row.parameters == trainable_parameters(made)
        assert row.costs.flops == counter.get_total_flops()
        assert row.costs.saved_bytes == saved_activation_bytes(lambda made=made: made(x), made)
        assert len(row.step.values) == 3
        if row.operator != "full":
            assert row.replaced == 2
            assert row.unrolls == replfx.report(made).unrolls
    full = comparison.rows[0]
    assert full.ratio.values == (1.0, 1.0, 1.0)


def test_a_policy_that_is_wrong_for_all_is_an_error():
    with pytest.raises(replfx.PlanError, match="at least 2"):
        compare(tower(), torch.rand(2, 4), every=1)


def test_a_model_without_gradients_has_no_step():
    model = Tower(*tower().blocks).requires_grad_(False)
    with pytest.raises(replfx.CaptureError, match="trainable"):
        compare(model, torch.rand(2, 4))


def test_the_command_line_compares_the_blocks_that_were_asked_for(capsys):
    assert main(["inspect", "timm:test_vit", "--compare", "--keep", "2", "--repeats", "1", "--json"]) == 0
    rows = {row["operator"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    wanted = replfx.inspect(timm.create_model("test_vit"), torch.rand(2, 3, 160, 160), keep=2)
    assert rows["block"]["replaced"] == len(wanted.replaced)
    assert rows["block"]["parameters"] == wanted.parameters_after
