"""What `auto` stands for, and what may be left to it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import replfx
from tests.support.models import CausalBlock, ConvBlock, Mlp, Plain, Tower

KINDS = {
    "convolutions": (lambda: ConvBlock(8), torch.rand(2, 8, 4, 4)),
    "attention": (lambda: CausalBlock(8, 2), torch.rand(2, 5, 8)),
    "plain": (Plain, torch.rand(2, 8)),
}


@pytest.mark.slow
@settings(max_examples=8)
@given(data=st.data())
def test_auto_is_the_plan_that_names_what_it_chose(data: st.DataObject) -> None:
    make, x = KINDS[data.draw(st.sampled_from(sorted(KINDS)))]
    model = nn.Sequential(*(make() for _ in range(data.draw(st.integers(3, 7)))))
    operator = data.draw(st.sampled_from(["auto", "block", "identity"]))
    fusion = data.draw(st.sampled_from(["auto", "scalar", "channel"]))
    named = {"operator": operator.replace("auto", "block"), "fusion": fusion.replace("auto", "scalar")}
    assert replfx.plan(model, x, operator=operator, fusion=fusion) == replfx.plan(model, x, **named)
    if operator == fusion == "auto":
        assert replfx.plan(model, x) == replfx.plan(model, x, **named)


def test_a_plan_and_a_report_name_what_was_taken() -> None:
    made = replfx.transform(Tower(*(Mlp() for _ in range(5))), operator="auto", fusion="auto")
    assert '"auto"' not in replfx.rewrite.state.state_of(made).plan.to_json()
    replaced = [block for block in replfx.report(made).blocks if block.operator]
    assert {(block.operator, block.fusion) for block in replaced} == {("block", "scalar")}


def test_options_need_a_name() -> None:
    model = Tower(*(Mlp() for _ in range(5)))
    with pytest.raises(replfx.FusionError, match="fusion 'auto' takes no options, so not 'initial': name the fusion"):
        replfx.transform(model, fusion={"name": "auto", "initial": 0.7})
    with pytest.raises(replfx.FusionError, match="operator 'auto' takes no options, so not 'keep': name the operator"):
        replfx.transform(model, operator={"name": "auto", "keep": []})
    with pytest.raises(replfx.FusionError, match="unknown operator 'atuo'; there are: auto, block"):
        replfx.transform(model, operator="atuo")


def test_the_name_is_not_to_be_had() -> None:
    with pytest.raises(replfx.FusionError, match="the fusion name 'auto' stands for a choice"):
        replfx.register_fusion("auto")(replfx.Fusion)


def test_the_page_says_what_is_taken() -> None:
    page = (Path(__file__).parents[2] / "docs" / "auto.md").read_text()
    rows = [row.split(" | ") for row in page.splitlines() if row.startswith("| ") and "`" in row]
    assert rows
    assert {(row[1], row[2]) for row in rows} == {("`block`", "`scalar`")}
