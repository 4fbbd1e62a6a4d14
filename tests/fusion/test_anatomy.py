"""Which normalisations a light operator can take over, and that none is left out."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import replfx

WIDTH = 8


class Block(nn.Module):
    def __init__(self, norm: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.norm = norm
        self.fc1, self.fc2 = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(F.gelu(self.fc1(self.norm(x))))


def _function(x: Tensor) -> Tensor:
    return F.layer_norm(x, (WIDTH,))


def _model(norm: Callable[[], Callable[[Tensor], Tensor]]) -> nn.Sequential:
    return nn.Sequential(*(Block(norm()) for _ in range(5)))


@pytest.mark.parametrize(
    ("norm", "name"),
    [
        (lambda: _function, "layer_norm"),
        (lambda: nn.LayerNorm(WIDTH, elementwise_affine=False), "LayerNorm"),
        (lambda: nn.RMSNorm(WIDTH, elementwise_affine=False), "RMSNorm"),
    ],
)
def test_a_norm_without_parameters_is_not_left_out(norm: Callable[[], Callable[[Tensor], Tensor]], name: str) -> None:
    x = torch.randn(2, 3, WIDTH)
    with pytest.raises(replfx.NoChainError, match=f"it normalises by `{name}`, which has no parameters of its own"):
        replfx.transform(_model(norm), x, operator="light")
    assert list(replfx.report(replfx.transform(_model(norm), x, operator="block")).replaced) == ["1", "3"]


def test_a_norm_with_parameters_is_taken_over() -> None:
    model = replfx.transform(_model(lambda: nn.LayerNorm(WIDTH)), torch.randn(2, 3, WIDTH), operator="light")
    assert [type(module) for module in model[1].replfx.operator.children()] == [nn.LayerNorm]
