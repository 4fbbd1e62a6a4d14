"""What `auto` chooses: the rules at blocks of each kind, what may be left to it, and what happens where it fails."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import replfx
from replfx.fusion.auto import RULES
from tests.models import CausalBlock, ConvBlock, Mlp, Plain, Tower
from tests.snapshots import assert_unchanged, snapshot


class Bottleneck(nn.Module):
    """relu(x + bn(1×1(relu(bn(3×3(relu(bn(1×1(x))))))))."""

    def __init__(self, width: int = 8, hidden: int = 3) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, hidden, 1), nn.BatchNorm2d(hidden)
        self.conv2, self.bn2 = nn.Conv2d(hidden, hidden, 3, padding=1), nn.BatchNorm2d(hidden)
        self.conv3, self.bn3 = nn.Conv2d(hidden, width, 1), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        y = torch.relu(self.bn2(self.conv2(y)))
        return torch.relu(x + self.bn3(self.conv3(y)))


class Depthwise(nn.Module):
    """ConvNeXt's block: x + 1×1(gelu(1×1(norm(7×7 a channel(x))))), channels last inside."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.dw, self.norm = nn.Conv2d(width, width, 7, padding=3, groups=width), nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.dw(x).permute(0, 2, 3, 1))
        return x + self.fc2(nn.functional.gelu(self.fc1(y))).permute(0, 3, 1, 2)


PIXELS, TOKENS, VECTORS = torch.rand(2, 8, 4, 4), torch.rand(2, 5, 8), torch.rand(2, 8)
KINDS = {
    "basic residual blocks": (lambda: ConvBlock(8), PIXELS),
    "residual blocks that start with their normalisation (transformers, mixers)": (lambda: CausalBlock(8, 2), TOKENS),
    "bottlenecks and inverted residual blocks": (Bottleneck, PIXELS),
    "residual blocks that start with a depthwise convolution (ConvNeXt)": (Depthwise, PIXELS),
    "all others": (Plain, VECTORS),
}


def chosen(plan: replfx.Plan) -> list[tuple[str, str, str, float]]:
    return [(r.path, r.operator.name, r.fusion.name, r.neighbour_gradient) for r in plan.replacements]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.blocks)
def test_each_rule_holds_at_the_blocks_that_it_names(rule: object) -> None:
    assert rule in RULES
    make, x = KINDS[rule.blocks]  # type: ignore[attr-defined]
    plan = replfx.plan(nn.Sequential(*(make() for _ in range(5))), x)
    wanted = (rule.operator, rule.fusion, rule.neighbour_gradient)  # type: ignore[attr-defined]
    assert chosen(plan) == [(path, *wanted) for path in ("1", "3")]


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_auto_is_the_plan_that_names_what_it_chose(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(sorted(KINDS)))
    make, x = KINDS[kind]
    model = nn.Sequential(*(make() for _ in range(data.draw(st.integers(3, 7)))))
    given_operator = data.draw(st.sampled_from(["auto", "block"]))
    given_fusion = data.draw(st.sampled_from(["auto", "scalar", "channel"]))
    given_gradient = data.draw(st.sampled_from([None, 0.0, 0.5, 1.0]))
    plan = replfx.plan(model, x, operator=given_operator, fusion=given_fusion, neighbour_gradient=given_gradient)
    (rule,) = (rule for rule in RULES if rule.blocks == kind)
    operator = rule.operator if given_operator == "auto" else given_operator
    fusion = (rule.fusion if operator == rule.operator else "scalar") if given_fusion == "auto" else given_fusion
    gradient = given_gradient
    if gradient is None:
        gradient = rule.neighbour_gradient if given_operator == "auto" else 1.0
    assert plan == replfx.plan(model, x, operator=operator, fusion=fusion, neighbour_gradient=gradient)


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


class Curious(Tower):
    """Reads a weight of each of its blocks itself, so that none of them may lose it."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x) * (1 + 0 * block.fc1.weight.sum())  # type: ignore[union-attr,operator]
        y: Tensor = self.head(x)
        return y


@pytest.mark.parametrize("inplace", [False, True])
def test_where_the_light_operator_fails_the_block_stays_itself(inplace: bool) -> None:
    torch.manual_seed(0)
    model, x = Curious(*(Mlp() for _ in range(5))), torch.rand(2, 4)
    before = snapshot(model)
    with pytest.raises(replfx.FusionError, match=r"`blocks.1`: the model reads its `fc1.weight` itself"):
        replfx.transform(model, x, operator="light", inplace=inplace)
    assert_unchanged(model, before)
    (note,) = replfx.inspect(model, x).notes
    assert "every block has operator 'block', because" in note
    made = replfx.transform(model, x, inplace=inplace)
    found = replfx.report(made)
    assert {block.operator for block in found.blocks if block.operator} == {"block"}
    assert any("every block has operator 'block', because" in note for note in found.notes)
    made(x).sum().backward()
    if not inplace:
        assert_unchanged(model, before)


def test_the_page_has_the_rules() -> None:
    page = (Path(__file__).parents[2] / "docs" / "auto.md").read_text()
    rows = [row for row in page.splitlines() if row.startswith("| ")]
    for rule in RULES:
        (row,) = (row for row in rows if row.startswith(f"| {rule.blocks} |"))
        assert row.split(" | ")[1:4] == [f"`{rule.operator}`", f"`{rule.fusion}`", f"{rule.neighbour_gradient:.0f}"]
