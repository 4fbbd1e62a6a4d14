"""Fusion layers fitted to the blocks that they replace, against least squares over all activations at once."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import replfx
from replfx.calibration.grams import Gram, solve
from tests.support.functional import Functional, Spec
from tests.support.models import ConvBlock, ConvNet, Mlp, Tower, tower
from tests.support.snapshots import assert_unchanged, snapshot
from tests.support.strategies import randomize

FUSIONS = ("scalar", "scalar_layer", "channel")


def loader(batches: int = 3, size: int = 20, shape: tuple[int, ...] = (4,)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, *shape, generator=generator, dtype=torch.float64) for _ in range(batches)]


def pretrained(blocks: int = 3) -> Tower:
    model = tower(blocks).double().eval()
    randomize(model, 0)
    return model


def activations(model: Tower, batches: list[Tensor], block: int) -> Tensor:
    with torch.no_grad():
        x: Tensor = model.blocks[:block](model.stem(torch.cat(batches)))
    return x


def least_squares(columns: list[Tensor], target: Tensor) -> Tensor:
    return torch.linalg.lstsq(torch.stack([c.flatten() for c in columns], 1), target.flatten()).solution


# ---- the block's own computation


@pytest.mark.parametrize("fusion", FUSIONS)
def test_each_map_of_a_block_is_fitted_over_its_inputs(fusion: str) -> None:
    model, batches = pretrained(), loader()
    made = replfx.transform(model, fusion=fusion, calibrate=batches)
    x = activations(model, batches, 1)
    before, block, after = model.blocks
    with torch.no_grad():
        h1 = block.norm(x)
        h2 = F.gelu(block.fc1(h1))
    found: dict[str, Tensor] = {}
    for name, h in (("fc1", h1), ("fc2", h2)):
        found[name] = torch.stack([h @ getattr(b, name).weight.detach().T for b in (before, after, block)])
    layer: Any = made.blocks[1].replfx.fusion
    if fusion == "scalar":
        wanted = torch.stack([least_squares([p, n], t) for p, n, t in found.values()], 1)
    elif fusion == "scalar_layer":
        p, n, t = (torch.cat([each[i].flatten() for each in found.values()]) for i in range(3))
        wanted = least_squares([p, n], t)[:, None]
    else:
        rows = [least_squares([p[:, c], n[:, c]], t[:, c]) for p, n, t in found.values() for c in range(p.shape[1])]
        wanted = torch.stack(rows, 1)
    torch.testing.assert_close(torch.stack([layer.previous, layer.next]).detach(), wanted)


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("make", [pretrained, None], ids=["linear", "convolution"])
def test_a_block_that_its_neighbours_can_make_is_made(make: Any, fusion: str) -> None:
    model: Any = pretrained() if make else ConvNet(depth=3, widths=(6,)).double().eval()
    randomize(model, 1)
    before, block, after = model.blocks if make else model.stages[0]
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            if parameter.dim() > 1:
                one, other = before.get_parameter(name), after.get_parameter(name)
                parameter.copy_(0.3 * one - 0.8 * other)
    batches = loader() if make else loader(shape=(3, 8, 8), size=4)
    made = replfx.transform(model, batches[0], fusion=fusion, calibrate=batches)
    torch.testing.assert_close(made(batches[0]), model(batches[0]))


def test_weights_that_run_in_no_linear_layer_are_fitted_as_they_are() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            return x + (x @ self.matrix).tanh()

    torch.manual_seed(0)
    model = Tower(*(Own() for _ in range(3))).double()
    made: Any = replfx.transform(model, calibrate=loader())
    before, block, after = (b.matrix.detach() for b in model.blocks)
    wanted = least_squares([before, after], block)
    fusion = made.blocks[1].replfx.fusion
    # The start imitated the block better on the activations, or what least squares gives.
    found = torch.cat([fusion.previous, fusion.next]).detach()
    start = torch.full((2,), 0.5, dtype=torch.float64)
    assert torch.allclose(found, wanted) or torch.equal(found, start)


# ---- light operators


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_light_map_is_fitted_to_the_residual_branch(fusion: str) -> None:
    model, batches = pretrained(), loader()
    made: Any = replfx.transform(model, operator="light", fusion=fusion, calibrate=batches)
    x = activations(model, batches, 1)
    before, block, after = model.blocks
    with torch.no_grad():
        target = block(x) - x
        inner = block.norm(x) @ (0.5 * before.fc1.weight + 0.5 * after.fc1.weight).T
        sides = [inner @ b.fc2.weight.T for b in (before, after)]
    ones = torch.ones_like(target[:, 0])
    if fusion == "channel":
        fitted = [least_squares([p, n, ones], t) for p, n, t in zip(*(v.T for v in (*sides, target)), strict=True)]
        rows = zip(fitted, *(s.T for s in sides), strict=True)
        expected = torch.stack([a * p + b * n + c for (a, b, c), p, n in rows], 1)
    else:
        centred = [v - v.mean(0) for v in (*sides, target)]
        # One a and b for both maps would change the first one too: then they stay at their start.
        a, b = torch.tensor([0.5, 0.5]) if fusion == "scalar_layer" else least_squares(centred[:2], centred[2])
        z = a * sides[0] + b * sides[1]
        lines = [least_squares([z[:, c], ones], target[:, c]) for c in range(z.shape[1])]
        expected = torch.stack([g * z[:, c] + t for c, (g, t) in enumerate(lines)], 1)
    with torch.no_grad():
        torch.testing.assert_close(made.blocks[1](x) - x, expected)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_light_convolution_behind_which_come_a_norm_and_a_relu(fusion: str) -> None:
    model: Any = ConvNet(depth=3, widths=(6,)).double().eval()
    randomize(model, 2)
    batches = loader(shape=(3, 8, 8), size=4)
    made: Any = replfx.transform(model, operator="light", fusion=fusion, calibrate=batches)
    before, block, after = model.stages[0]
    with torch.no_grad():
        x = before(model.stem(torch.cat(batches)))
        y = block(x)
        sides = [F.conv2d(x, b.conv2.weight, padding=1) for b in (before, after)]
        got = made.stages[0][1](x)
    columns = [v.movedim(1, -1).reshape(-1, 6) for v in (*sides, y - x)]
    seen = (y > 0).movedim(1, -1).reshape(-1, 6)
    if fusion == "channel":
        z = torch.zeros_like(y)
        for c in range(6):
            p, n, t = (v[:, c][seen[:, c]] for v in columns)
            a, b, shift = least_squares([p, n, torch.ones_like(p)], t)
            z[:, c] = a * sides[0][:, c] + b * sides[1][:, c] + shift
        torch.testing.assert_close(got, torch.relu(x + z))
    error = ((got - y)[y > 0]).square().sum()
    assert error < (x - y)[y > 0].square().sum(), "better than the identity where the ReLU lets through"


@pytest.mark.parametrize("operator", ["light", "block"])
def test_a_block_that_writes_into_its_input_is_fitted_as_one_that_does_not(operator: str) -> None:
    class Written(nn.Module):
        def __init__(self, block: Any) -> None:
            super().__init__()
            self.norm, self.fc1, self.act, self.fc2 = block.norm, block.fc1, block.act, block.fc2

        def forward(self, x: Tensor) -> Tensor:
            return x.add_(self.fc2(self.act(self.fc1(self.norm(x)))))

    batches, made = loader(), []
    for written in (False, True):
        model: Any = pretrained()
        if written:
            model.blocks = nn.Sequential(*[Written(block) for block in model.blocks])
        made.append(replfx.transform(model, operator=operator, calibrate=batches))
    torch.testing.assert_close(made[1].state_dict(), made[0].state_dict())


# ---- the loop


@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    channels=st.integers(1, 3),
    regressors=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_grams_are_least_squares_over_all_rows(sizes: list[int], channels: int, regressors: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    gram, rows = Gram(), []
    for size in [*sizes, 4]:
        columns = [torch.randn(size, channels, generator=generator) for _ in range(regressors + 1)]
        weights = torch.rand(size, channels, generator=generator)
        gram.add(columns, weights)
        rows.append(torch.stack([c * weights.sqrt() for c in columns], -1).double())
    whole = torch.cat(rows)
    for c, found in enumerate(solve(gram.sums)):
        wanted = torch.linalg.lstsq(whole[:, c, :-1], whole[:, c, -1:]).solution[:, 0]
        fits = [(whole[:, c, :-1] @ w - whole[:, c, -1]).square().sum() for w in (found, wanted)]
        assert fits[0] <= fits[1] * (1 + 1e-6) + 1e-10  # products were rounded to float32 before they were weighed


def test_regressors_that_are_alike_share() -> None:
    gram = Gram()
    x = torch.randn(20, 1)
    gram.add([x, x, 3 * x])
    torch.testing.assert_close(solve(gram.sums), torch.full((1, 2), 1.5, dtype=torch.float64))


def test_how_the_batches_are_cut_does_not_matter() -> None:
    model, batches = pretrained(5), loader(4, 6)
    results = []
    for cut in (batches, [torch.cat(batches)], [(b, None) for b in batches], [{"x": b} for b in batches]):
        made = replfx.transform(model, operator="light", fusion="channel", calibrate=cut)
        results.append(torch.cat([p.detach().flatten() for p in made.parameters()]))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


def test_no_batch_outlives_the_next() -> None:
    alive: list[weakref.ref[Tensor]] = []

    def batches() -> Iterator[Tensor]:
        for _ in range(6):
            assert sum(ref() is not None for ref in alive) <= 1
            batch = torch.randn(3, 4, dtype=torch.float64)
            alive.append(weakref.ref(batch))
            yield batch
            del batch

    replfx.transform(pretrained(), operator="light", calibrate=batches())


def test_a_layer_that_imitates_worse_goes_back_to_its_start() -> None:
    model = pretrained()
    with torch.no_grad():  # its neighbours' mean
        for name in ("fc1.weight", "fc2.weight"):
            model.blocks[1].get_parameter(name).copy_(
                (model.blocks[0].get_parameter(name) + model.blocks[2].get_parameter(name)) / 2
            )
    made: Any = replfx.transform(model, calibrate=[torch.zeros(1, 4, dtype=torch.float64)])
    assert torch.equal(made.blocks[1].replfx.fusion.previous, torch.full((2,), 0.5, dtype=torch.float64))


def test_the_original_and_the_modes_stay() -> None:
    model = ConvNet(depth=4).train()
    model.stages[0][1].bn1.eval()
    batch = torch.randn(4, 3, 8, 8)
    before = snapshot(model)
    made: Any = replfx.transform(model, operator="light", calibrate=[batch])
    assert_unchanged(model, before)
    assert made.training
    assert made.stages[0][1].training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_pretrained_model_survives_better() -> None:
    """After training, what calibration gives is nearer to the model's outputs than what replacing starts with."""
    torch.manual_seed(0)
    model = Tower(*(Mlp() for _ in range(5)))
    x = torch.randn(256, 4)
    labels = (x[:, 0] * x[:, 1] > 0).long()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()
    for operator in ("block", "light"):
        plain = replfx.transform(model, operator=operator, fusion="channel")
        fitted = replfx.transform(model, operator=operator, fusion="channel", calibrate=x.split(64))
        errors = [(made(x) - model(x)).square().mean().item() for made in (plain, fitted)]
        assert errors[1] < 0.8 * errors[0]


def test_a_loader_without_a_length_and_a_wrapped_model() -> None:
    class FlatGraph(torch.utils.data.IterableDataset[Tensor]):
        def __iter__(self) -> Iterator[Tensor]:
            yield from torch.randn(8, 4)

    model = tower()
    made = replfx.transform(model, operator="light")
    start = copy.deepcopy(made.state_dict())
    replfx.calibrate(nn.DataParallel(made), model, torch.utils.data.DataLoader(FlatGraph(), 4), progress=False)
    assert any(not torch.equal(value, start[name]) for name, value in made.state_dict().items())


# ---- bad input


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "the loader gave no batch"),
        (iter(()), "the loader gave no batch"),
        ([torch.full((2, 4), torch.nan)], r"what `blocks\.1` gives for a batch of the loader is not finite"),
        ([torch.randn(2, 4), torch.randn(2, 5)], r"Tower does not take batch 2 of the loader \(RuntimeError"),
        (["text"], "does not take batch 1"),
    ],
)
def test_a_bad_loader_is_refused_and_nothing_changed(batches: Any, message: str) -> None:
    model = tower()
    made = replfx.transform(model, operator="light")
    before, original = snapshot(made), snapshot(model)
    with pytest.raises(replfx.CalibrationError, match=message):
        replfx.calibrate(made, model, batches, progress=False)
    assert_unchanged(made, before)
    assert_unchanged(model, original)


def test_other_models_are_refused() -> None:
    made = replfx.transform(tower())
    with pytest.raises(replfx.CalibrationError, match=r"no block `blocks\.1`: give the untransformed model"):
        replfx.calibrate(made, made, [torch.randn(2, 4)])
    with pytest.raises(replfx.CalibrationError, match=r"no block `blocks\.3`"):
        replfx.calibrate(replfx.transform(tower(6)), tower(3), [torch.randn(2, 4)])
    with pytest.raises(replfx.PlanError, match="is not a transformed model"):
        replfx.calibrate(tower(), tower(), [torch.randn(2, 4)])
    with pytest.raises(replfx.CalibrationError, match="leave inplace=True out"):
        replfx.transform(tower(), calibrate=[torch.randn(2, 4)], inplace=True)


def test_pieces_of_a_graph_cannot_be_watched() -> None:
    spec = Spec("mlp", (3,) * 5, "relu", True, None, False, "lists", False, False, True)
    model = Functional(spec)
    with pytest.raises(replfx.CalibrationError, match="is no module but a piece of the graph"):
        replfx.transform(model, model.inputs(), calibrate=[model.inputs()[0]])


def test_copies_of_a_calibrated_model_are_its_like() -> None:
    model = ConvNet(depth=4)
    x = torch.randn(4, 3, 8, 8)
    made = replfx.transform(model, calibrate=[x]).eval()
    assert torch.equal(copy.deepcopy(made)(x), made(x))
    assert isinstance(made.stages[0][1], ConvBlock)
