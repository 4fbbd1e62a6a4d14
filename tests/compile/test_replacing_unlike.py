"""replfx.backend(every=2) on models whose blocks are not alike: what it makes of them is what `transform` makes."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch.func import functional_call

import replfx
from tests.support.compiled import assert_is_what_transform_makes, in_graph, paths, replacing
from tests.support.models import ConvNet, Mlp, Row, Tower
from tests.support.stacks import Drawn, drawn_stacks, various

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@given(drawn=drawn_stacks())
@settings(max_examples=20)
@pytest.mark.slow
def test_it_is_what_transform_makes(drawn: Drawn) -> None:
    assert_is_what_transform_makes(drawn.model(), drawn.inputs, {"every": 2, **drawn.policy()})


@pytest.mark.parametrize("kind", ["units", "windows", "flat_conv_norm"])
def test_every_kind_of_stack(kind: str) -> None:
    drawn = Drawn(kind, various(kind), "channel", "block", 0.5)
    assert_is_what_transform_makes(drawn.model(), drawn.inputs, {"every": 2, **drawn.policy()})


def flat(*widths: int) -> nn.Sequential:
    """[Conv, BN, ReLU] of these widths, one after the other."""
    layers: list[nn.Module] = []
    for before, width, kernel in zip((3, *widths), widths, (3, 5, 7, 3), strict=False):
        layers += [nn.Conv2d(before, width, kernel, padding=kernel // 2), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def units() -> nn.Module:
    """A small ResNet: two blocks a stage, of which every second is made from blocks of other widths."""
    return ConvNet(depth=2, widths=(4, 6, 8))


@pytest.mark.parametrize(
    ("build", "blocks"), [(units, ["stages.0.1", "stages.1.1"]), (lambda: flat(4, 8, 6, 6), ["[3:6]"])]
)
def test_bit_for_bit(build: Any, blocks: list[str]) -> None:
    """In eager mode both run the same operations in the same order."""
    torch.manual_seed(0)
    model, x = build(), torch.randn(2, 3, 8, 8)
    transformed = replfx.transform(copy.deepcopy(model), x, every=2)
    compiled, backend = replacing(copy.deepcopy(model), "eager", every=2)
    assert torch.equal(compiled(x), transformed(x))
    assert list(replfx.report(transformed).replaced) == blocks
    assert paths(backend) == [f"@{block}" for block in blocks]
    assert any("gains" in name for name, _ in backend.named_parameters())
    expected = {in_graph(name, blocks): p for name, p in transformed.named_parameters() if ".fusion." in name}
    for name, parameter in backend.named_parameters():
        assert torch.equal(parameter, expected.pop(name)), name
    assert not expected


@pytest.mark.slow
def test_other_values_at_each_call() -> None:
    """`functional_call` puts other tensors in the parameters' places: neighbours' are read anew, and get gradients."""
    model, x = units().eval(), torch.randn(2, 3, 8, 8)
    compiled, _ = replacing(model, "eager", every=2)
    compiled(x)
    for factor in (2.0, 3.0):
        values = {name: (factor * p.detach()).requires_grad_() for name, p in model.named_parameters()}
        found = functional_call(compiled, {f"_orig_mod.{name}": value for name, value in values.items()}, (x,))
        reference = replfx.transform(copy.deepcopy(model), x, every=2)
        with torch.no_grad():
            for name, parameter in reference.named_parameters():
                if ".fusion." not in name:
                    parameter.copy_(values[name])
        expected = reference(x)
        assert torch.equal(found, expected)
        found.square().sum().backward()
        expected.square().sum().backward()
        for name in ("stages.0.0.conv1.weight", "stages.1.0.conv1.weight", "stages.2.0.conv2.weight"):
            torch.testing.assert_close(values[name].grad, reference.get_parameter(name).grad)


def test_a_window_is_selected_by_its_path() -> None:
    model, x = nn.Sequential(OrderedDict(features=flat(4, 8, 6, 6))), torch.randn(2, 3, 8, 8)
    compiled, backend = replacing(model, "eager", select="features[6:9]")
    transformed = replfx.transform(model, x, select="features[6:9]")
    assert torch.equal(compiled(x), transformed(x))
    assert paths(backend) == ["@features[6:9]"]


@pytest.mark.parametrize("position", [1, 2])  # one that would be replaced, and a neighbour
def test_a_frozen_block_stays_and_lends_its_weights(position: int) -> None:
    model = Tower(*(Mlp(8, hidden) for hidden in (8, 6, 7, 5, 7)))
    model.blocks[position].requires_grad_(False)
    compiled, backend = replacing(model, "eager", every=2)
    x = torch.randn(2, 4)
    transformed = replfx.transform(copy.deepcopy(model), x, every=2)
    assert torch.equal(compiled(x), transformed(x))
    assert [path[1:] for path in paths(backend)] == list(replfx.report(transformed).replaced)


def test_a_light_operator_is_refused() -> None:
    """It would have to leave out the norm, and has no convolution to call."""
    compiled, backend = replacing(units(), "eager", every=2, operator="light")
    compiled(torch.randn(2, 3, 8, 8))
    with pytest.raises(replfx.CompileError, match=r"operator 'light' does not fit it: its layers are functions in Dyn"):
        list(backend.parameters())


def unlike(kind: type[Row]) -> Row:
    return kind(*(Mlp(4, hidden) for hidden in (8, 6, 7)))


class Twice(Row):
    """Calls its second block twice."""

    def forward(self, x: Tensor) -> Tensor:
        for index in (0, 1, 1, 2):
            x = self.blocks[index](x)
        return x


def test_a_block_that_is_called_twice_is_refused() -> None:
    compiled, backend = replacing(unlike(Twice), "eager", every=2)
    compiled(torch.randn(2, 4))
    with pytest.raises(replfx.CompileError, match=r"`@blocks\.1`: it is called 2 times in one forward pass"):
        list(backend.parameters())


class Reads(Row):
    """Reads a weight of a block's itself."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.blocks[1].fc1.weight.sum()


def test_a_block_whose_weight_is_read_outside_stays() -> None:
    compiled, backend = replacing(unlike(Reads), "eager", every=2)
    compiled(torch.randn(2, 4))
    with pytest.raises(replfx.CompileError, match=r"`@blocks\.1`: its parameter `fc1\.weight` is read outside"):
        list(backend.parameters())
