"""Which layers start at zero so that a full block computes what its operator did, and who says so before."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import replfx
from tests.support.models import ConvBlock

WIDTH = 8


class Basic(ConvBlock):
    """ResNet's: an activation follows the sum."""

    def __init__(self) -> None:
        super().__init__(WIDTH)


class Excited(Basic):
    """With squeeze and excitation, and what drops whole examples."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(WIDTH, 4, 1), nn.Conv2d(4, WIDTH, 1)

    def branch(self, x: Tensor) -> Tensor:
        out = super().branch(x)
        gate = self.up(F.relu(self.down(out.mean((2, 3), keepdim=True))))
        return F.dropout(out * gate.sigmoid(), 0.0, self.training)


class Rectified(Basic):
    """A ReLU ends its branch: with the norm before it at zero no gradient would reach that."""

    def branch(self, x: Tensor) -> Tensor:
        return F.relu(super().branch(x))


class Responding(nn.Module):
    """ConvNeXt V2's: a global response normalisation between the layers; a bare scale behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH), nn.LayerNorm(WIDTH)
        self.fc1, self.fc2, self.response = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH), Response()
        self.gamma = nn.Parameter(torch.rand(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        h = self.fc2(self.response(F.gelu(self.fc1(h)))).permute(0, 3, 1, 2)
        return x + self.gamma.reshape(1, -1, 1, 1) * h


class Response(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(16)), nn.Parameter(torch.rand(16))

    def forward(self, x: Tensor) -> Tensor:
        size = x.norm(dim=(1, 2), keepdim=True)
        return x + self.bias + self.weight * x * size / (size.mean(-1, keepdim=True) + 1e-6)


class After(nn.Module):
    """Normalised after the sum, as BERT: it gives on nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm = nn.Conv2d(WIDTH, WIDTH, 1), nn.GroupNorm(2, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.fc(x).tanh())


def stack(kind: Callable[[], nn.Module]) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(kind() for _ in range(5))).double()


def rooted(kind: Callable[[], nn.Module]) -> nn.Sequential:
    """Between blocks something moves what they get below zero."""
    torch.manual_seed(0)
    blocks = [module for _ in range(5) for module in (kind(), nn.GroupNorm(2, WIDTH))]
    return nn.Sequential(*blocks).double()


X = torch.randn(4, WIDTH, 6, 6, dtype=torch.float64)


@pytest.mark.parametrize(
    ("kind", "silenced"),
    [(Basic, ["bn2"]), (Excited, ["bn2"]), (Rectified, None), (Responding, ["fc2"]), (After, None)],
)
@pytest.mark.parametrize("with_inputs", [True, False])
def test_what_starts_at_zero_for_the_identity(
    kind: type[nn.Module], silenced: list[str] | None, with_inputs: bool
) -> None:
    model = stack(kind)
    shaped = X if with_inputs or kind is After else None  # nothing else tells that it keeps its shape
    plan = replfx.plan(model, shaped, operator="identity", select="2")
    fold = plan.replacements[0].operator.options["fold"]
    if silenced is None:
        assert isinstance(fold, str)
        made = replfx.transform(model, X, operator="identity", select="2")
        assert replfx.report(made).blocks[2].not_unrolled == fold
        assert f"`2` back at full depth: {fold}" in replfx.report(made).notes[0]
        assert not replfx.report(made).unrolls
        assert replfx.inspect(model, X, operator="identity", select="2").blocks[2].not_unrolled == fold
        with pytest.raises(replfx.FusionError, match="cannot be unrolled"):
            replfx.unroll(made)
        return
    assert isinstance(fold, dict)
    assert fold["silenced"] == silenced
    block, x = model[2], model[:2](X)
    with torch.no_grad():
        for path in silenced:
            for parameter in block.get_submodule(path).parameters():
                parameter.zero_()
    for training in (True, False):
        assert torch.equal(block.train(training)(x), x)


def test_an_activation_after_the_sum_is_no_identity_where_its_input_may_be_negative() -> None:
    made = replfx.transform(rooted(Basic), X, operator="identity", select="4")
    assert replfx.report(made).blocks[2].not_unrolled is not None
    assert replfx.report(replfx.transform(stack(Basic), X, operator="identity", select="2")).unrolls


@pytest.mark.parametrize("kind", [Basic, Responding])
def test_light_blocks_are_unrolled_exactly(kind: type[nn.Module]) -> None:
    made = replfx.transform(stack(kind), X, operator="light")
    assert replfx.report(made).unrolls
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) / 16)
    expected = made(X)
    torch.testing.assert_close(replfx.unroll(made, None, X)(X), expected)


class Joint(nn.Module):
    """Two streams that attend to each other and are both added to, as in SD3 and Flux."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out1, self.out2 = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        both = self.qkv(torch.cat([self.norm1(x), self.norm2(context)], 1))
        made = F.scaled_dot_product_attention(*both.chunk(3, -1))
        return x + self.out1(made[:, : x.shape[1]]), context + self.out2(made[:, x.shape[1] :])


class TwoStreams(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Joint() for _ in range(5))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        for block in self.blocks:
            x, context = block(x, context)
        return torch.cat([x, context], 1)


def test_both_streams_of_a_joint_block_stay_when_it_is_unrolled() -> None:
    torch.manual_seed(0)
    inputs = tuple(torch.randn(2, tokens, 8, dtype=torch.float64) for tokens in (5, 3))
    model: Any = replfx.transform(TwoStreams().double(), inputs, operator="identity")
    before = model(*inputs)
    replfx.unroll(model)
    assert torch.equal(model(*inputs), before)
    model(*inputs).square().sum().backward()
    assert all(layer.weight.grad.any() for layer in (model.blocks[1].out1, model.blocks[1].out2))
