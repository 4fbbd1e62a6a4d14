"""Which normalisations a light operator can take over, and that none is left out."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import replfx
from tests.support.models import Mlp

WIDTH = 8


def _function(x: Tensor) -> Tensor:
    return F.layer_norm(x, (WIDTH,))


def _model(norm: Callable[[], Callable[[Tensor], Tensor]]) -> nn.Sequential:
    return nn.Sequential(*(Mlp(WIDTH, norm=norm()) for _ in range(5)))


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


class Telling(nn.Module):
    """A block that gives the weights of its attention beside its activation; `single` refuses double precision."""

    def __init__(self, single: bool = False) -> None:
        super().__init__()
        self.norm, self.single = nn.LayerNorm(WIDTH), single
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.norm(x)
        weights = (self.q(h) @ self.k(h).mT).softmax(-1)
        mixed = weights @ self.v(h)
        return x + self.out(_single(mixed) if self.single else mixed), weights


def _single(x: Tensor) -> Tensor:
    if x.dtype == torch.float64:
        raise RuntimeError("Expected mat_a to be Float32, BFloat16 or Float16 matrix, got Double")
    return x


torch.fx.wrap("_single")


class Listening(nn.Module):
    def __init__(self, asks: bool, single: bool = False) -> None:
        super().__init__()
        self.layers, self.asks = nn.ModuleList(Telling(single) for _ in range(3)), asks

    def forward(self, x: Tensor) -> Tensor:
        told = []
        for layer in self.layers:
            x, weights = layer(x)
            told.append(weights)
        return x + torch.stack(told).sum() if self.asks else x


@pytest.mark.parametrize("operator", ["light", "identity"])
def test_what_a_block_gives_and_nobody_reads_is_none(operator: str) -> None:
    model, x = Listening(asks=False), torch.randn(2, 3, WIDTH)
    made = replfx.transform(model, x, operator=operator)
    made(x).sum().backward()
    assert made.layers[1](x)[1] is None
    with torch.no_grad():
        torch.testing.assert_close(replfx.materialize(made)(x), made(x))
    again = replfx.apply(model, replfx.Plan.from_json(replfx.plan_of(made).to_json()))
    again.load_state_dict(made.state_dict())
    torch.testing.assert_close(again(x), made(x))
    with pytest.raises(replfx.NoChainError, match="it gives more than "):
        replfx.transform(Listening(asks=True), x, operator=operator)


def test_a_block_that_knows_no_double_precision_is_measured_in_single() -> None:
    """The value and the output map are found as in double precision."""
    x = torch.randn(2, 3, WIDTH)
    for single in (False, True):
        made = replfx.transform(Listening(asks=False, single=single), x, operator="light")
        assert made.layers[1].replfx.operator.recipe.maps == ("v.weight", "out.weight")
        assert made.layers[1].replfx.operator.recipe.taken is None


class Windows(nn.Module):
    """Attention in windows of a picture (N, d, H, W), whose layers take channels last, as MaxViT's blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        n, height, width, d = x.shape
        tokens = self.norm1(x).view(n, height // 2, 2, width // 2, 2, d).transpose(2, 3).reshape(-1, 4, d)
        q, k, v = self.qkv(tokens).view(-1, 4, 3, 2, d // 2).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, 4, d)
        mixed = self.out(mixed).view(n, height // 2, width // 2, 2, 2, d).transpose(2, 3)
        x = x + mixed.reshape(n, height, width, d)
        return (x + self.fc2(self.fc1(self.norm2(x)).relu())).permute(0, 3, 1, 2)


@pytest.mark.parametrize("sides", [(4, 6), (WIDTH, WIDTH), (4, WIDTH)])
def test_channels_are_found_where_a_block_lays_its_activation_out_anew(sides: tuple[int, int]) -> None:
    """Sides that are as long as there are channels tell nothing; both maps are applied to channels."""
    model, x = nn.Sequential(*(Windows() for _ in range(5))), torch.randn(2, WIDTH, *sides)
    made = replfx.transform(model, x, operator="light")
    operator = made[1].replfx.operator
    with torch.no_grad():
        operator.gain.normal_()
        operator.bias.normal_()
        value = 0.5 * (made[0].qkv.weight + made[2].qkv.weight)[2 * WIDTH :]
        h = operator.norm(x.movedim(1, -1)) @ value.T @ (0.5 * (made[0].out.weight + made[2].out.weight)).T
        expected = x + (operator.gain * h + operator.bias).movedim(-1, 1)
        torch.testing.assert_close(made[1](x), expected)
        torch.testing.assert_close(replfx.materialize(made)[1](x), expected)
    mixing = replfx.transform(model, x, operator="mixer")[1]
    first, second = x.clone(), x.clone()
    second[:, :, 0, 0] = torch.randn(2, WIDTH)
    reached = (mixing(first) != mixing(second)).any(1)[0].nonzero().tolist()
    assert sorted(map(tuple, reached)) == [(0, 0), (0, 1), (1, 0), (1, 1)]


class Halving(nn.Module):
    """Convolves a picture with a stride and brings it back to its size, as EfficientFormerV2's blocks do."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(WIDTH)
        self.fit = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.halve = nn.Conv2d(WIDTH, WIDTH, 3, stride=2, padding=1, groups=groups)

    def halved(self, x: Tensor) -> Tensor:
        return x + F.interpolate(self.halve(x), scale_factor=2)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.interpolate(self.halve(self.fit(self.norm(x)).relu()), scale_factor=2)


class HalvingThenMlp(Halving):
    def __init__(self, groups: int) -> None:
        super().__init__(groups)
        self.fc1, self.fc2 = nn.Conv2d(WIDTH, 16, 1), nn.Conv2d(16, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.halved(x)
        return x + self.fc2(self.fc1(self.norm(x)).relu())


@pytest.mark.parametrize(
    ("groups", "reason"),
    [(1, "`halve.weight` gives an activation of another shape"), (WIDTH, "no weight is seen to be the one map")],
)
def test_a_convolution_with_a_stride_is_no_light_map(groups: int, reason: str) -> None:
    x = torch.randn(2, WIDTH, 4, 4)
    made = replfx.transform(nn.Sequential(*(HalvingThenMlp(groups) for _ in range(3))), x, operator="light")
    assert made[1].replfx.operator.recipe.maps == ("fc1.weight", "fc2.weight")
    with pytest.raises(replfx.NoChainError, match=reason):
        replfx.transform(nn.Sequential(*(Halving(groups) for _ in range(3))), x, operator="light")


class Deep(nn.Module):
    """An MLP whose layers are parts of a part."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layers = nn.LayerNorm(WIDTH), nn.Sequential(nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(self.norm(x))


class Dropping(nn.Module):
    """Attention that drops half of its scores in training mode; the rate is given by place or by name."""

    def __init__(self, by_place: bool) -> None:
        super().__init__()
        self.norm, self.by_place = nn.LayerNorm(WIDTH), by_place
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.mlp = Deep()

    def forward(self, x: Tensor) -> Tensor:
        h, rate = self.norm(x), 0.5 if self.training else 0.0
        q, k, v = self.q(h), self.k(h), self.v(h)
        if self.by_place:
            x = x + self.out(F.scaled_dot_product_attention(q, k, v, None, rate, True))
        else:
            x = x + self.out(F.scaled_dot_product_attention(q, k, v, dropout_p=rate, is_causal=True))
        return x + self.mlp(x)


@pytest.mark.parametrize("by_place", [False, True])
def test_dropped_scores_do_not_hide_the_value_map(by_place: bool) -> None:
    """Where the block is looked into: whole is called what branches on `training` and has no parts of parts."""
    model = nn.Sequential(*(Dropping(by_place) for _ in range(3)))
    made = replfx.transform(model, torch.randn(2, 5, WIDTH), operator="light")
    assert made[1].replfx.operator.recipe.maps == ("v.weight", "out.weight")


class Whole(nn.Module):
    """A block whose own code asks for its mode, and that has no parts of parts."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + (2 if self.training else 1) * self.fc(x)


def test_a_block_that_is_called_whole_is_not_said_to_be_no_sum() -> None:
    with pytest.raises(replfx.NoChainError, match="it is called whole, as its code branches on `training`"):
        replfx.transform(nn.Sequential(*(Whole() for _ in range(3))), torch.randn(2, 3, WIDTH), operator="light")
