"""replfx.measure against figures worked out by hand."""

from __future__ import annotations

import itertools
import math
import os
import statistics
import time
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import replfx
from replfx import measure
from tests.support.models import tower

CPU = torch.device("cpu")
FLOAT = 4  # bytes


class Squares(nn.Module):
    """y = ((w·x)²)²: each product saves its factors."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.weight * x
        return (y * y).square()


@given(batch=st.integers(1, 9), width=st.integers(1, 9))
def test_saved_bytes_of_products(batch: int, width: int) -> None:
    model, x = Squares(width), torch.ones(batch, width)
    # Saved: x (for the weight), y (twice, counted once) and y·y. The weight is the model's own.
    expected = 3 * batch * width * FLOAT
    assert measure.saved_activation_bytes(lambda: model(x), model) == expected


@given(batch=st.integers(1, 5), widths=st.lists(st.integers(1, 7), min_size=2, max_size=5))
def test_saved_bytes_of_a_linear_relu_stack(batch: int, widths: list[int]) -> None:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    model, x = nn.Sequential(*layers), torch.ones(batch, widths[0])
    # A linear layer saves its input and its weight; a ReLU its output, which is the next layer's input.
    expected = batch * sum(widths) * FLOAT
    assert measure.saved_activation_bytes(lambda: model(x), model) == expected


def test_a_view_of_a_parameter_or_buffer_is_not_an_activation() -> None:
    model = nn.BatchNorm1d(4).eval()
    x = torch.ones(3, 4)
    saved = measure.saved_activation_bytes(lambda: model(x) * model.weight[:1], model)
    # The normalised x, which the product saves, and the input that the norm saves.
    assert saved == 2 * 3 * 4 * FLOAT


def test_nothing_is_saved_without_gradients() -> None:
    model = nn.Linear(3, 3)
    with torch.no_grad():
        assert measure.saved_activation_bytes(lambda: model(torch.ones(2, 3)), model) == 0


def test_storages_count_once() -> None:
    whole = torch.empty(10, 10)
    assert measure.unique_storage_bytes([whole, whole.t(), whole[3], torch.empty(5)]) == 105 * FLOAT


def test_trainable_parameters_counts_tied_once_and_frozen_never() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.Linear(4, 2))
    model[1].weight = model[0].weight
    model[2].bias.requires_grad_(False)
    assert measure.trainable_parameters(model) == 16 + 8


def peak_beside_nothing(step: Callable[[], object]) -> int:
    """The peak of a step that trains an empty model."""
    model = Squares(0)
    return measure.peak_training_bytes(step, model, torch.optim.SGD(model.parameters()), CPU)


@given(sizes=st.lists(st.integers(1, 1000), min_size=1, max_size=8))
@settings(deadline=None)  # the profiler's first start takes a second
def test_peak_of_tensors_replaced_in_turn_is_the_largest_neighbouring_pair(sizes: list[int]) -> None:
    def step() -> None:
        kept = torch.empty(0)
        for size in sizes:
            # torch.empty runs first, then the old tensor goes: two are alive for a moment.
            kept = torch.empty(size)
        del kept

    expected = max(a + b for a, b in itertools.pairwise([0, *sizes])) * FLOAT
    assert peak_beside_nothing(step) == expected


def test_what_the_step_before_left_is_freed_by_the_step() -> None:
    held: dict[str, Tensor] = {}

    def step() -> None:
        held.clear()
        held["t"] = torch.empty(600)
        torch.empty(100)

    assert peak_beside_nothing(step) == 100 * FLOAT


@given(n=st.integers(64, 128), batch=st.integers(1, 3), foreach=st.booleans())
@settings(max_examples=10, deadline=None)
def test_peak_of_a_training_step_by_hand(n: int, batch: int, foreach: bool) -> None:
    model = nn.Linear(n, n, bias=False)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=foreach)
    x = torch.ones(batch, n)

    def step() -> None:
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()

    peak = measure.peak_training_bytes(step, model, optimizer, CPU)
    # At the top: weight, gradient, two moments and one temporary of AdamW (the denominator), or two.
    weight = n * n * FLOAT
    assert 5 * weight <= peak <= 6 * weight + 2 * batch * n * FLOAT + 256


def test_peak_of_forward_and_backward_by_hand() -> None:
    n, batch, depth = 8, 512, 4
    model = nn.Sequential(*(nn.Sequential(nn.Linear(n, n, bias=False), nn.Tanh()) for _ in range(depth)))
    optimizer = torch.optim.SGD(model.parameters())
    x = torch.ones(batch, n)

    def step() -> None:
        optimizer.zero_grad()
        model(x).sum().backward()

    activation, weight = batch * n * FLOAT, n * n * FLOAT
    peak = measure.peak_training_bytes(step, model, optimizer, CPU)
    # Each tanh keeps its output. At the top all of them are alive, with the last product or the gradients
    # of one activation and of the one before it.
    assert (depth + 1) * activation + depth * weight <= peak
    assert peak <= (depth + 2) * activation + 2 * depth * weight + 256


def test_peak_leaves_the_environment_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KINETO_LOG_LEVEL", raising=False)
    peak_beside_nothing(lambda: None)
    assert "KINETO_LOG_LEVEL" not in os.environ


def test_steps_are_interleaved_and_warmup_is_not_timed() -> None:
    order: list[str] = []
    rounds: list[int] = []
    steps = {name: (lambda name=name: order.append(name)) for name in "abc"}
    times = measure.interleaved_times(steps, repeats=3, warmup=1, on_round=lambda: rounds.append(len(order)))
    assert "".join(order) == "abc" * 4
    assert rounds == [3, 6, 9, 12]
    assert {len(sample.values) for sample in times.values()} == {3}


def test_times_are_seconds() -> None:
    times = measure.interleaved_times({"sleep": lambda: time.sleep(0.02)}, repeats=3, warmup=0)
    assert 0.02 <= times["sleep"].median < 0.2


def test_no_repeats_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        measure.interleaved_times({}, repeats=0)


positive = st.floats(1e-3, 1e3)


@given(pairs=st.lists(st.tuples(positive, positive), min_size=1, max_size=9))
def test_ratios_are_pair_by_pair(pairs: list[tuple[float, float]]) -> None:
    base, other = zip(*pairs, strict=True)
    ratios = measure.pairwise_ratios({"x": measure.Sample(base), "y": measure.Sample(other)}, "x")
    assert set(ratios["x"].values) == {1.0}
    assert ratios["y"].values == tuple(b / a for a, b in pairs)
    lower, upper = ratios["y"].quartiles
    assert lower <= ratios["y"].median <= upper
    assert ratios["y"].median == statistics.median(b / a for a, b in pairs)


def test_quartiles_by_hand() -> None:
    assert measure.Sample((5.0, 1.0, 3.0, 2.0, 4.0)).quartiles == (2.0, 4.0)
    assert measure.Sample((7.0,)).quartiles == (7.0, 7.0)


@given(removed=positive, saving=positive, share=st.floats(-2, 2))
def test_saving_kept_is_the_share(removed: float, saving: float, share: float) -> None:
    full = removed + saving
    eta = measure.saving_kept(full, full - share * saving, removed)
    assert math.isclose(eta, share, abs_tol=1e-6 * full / saving)


def test_saving_kept_of_nothing_is_none() -> None:
    assert measure.saving_kept(1.0, 1.0, 1.0) is None
    assert measure.saving_kept(1.0, 0.5, 2.0) is None


def test_costs_of_a_training() -> None:
    def training(width: int) -> measure.Training:
        model = Squares(width)
        x = torch.ones(2, width)
        return measure.Training(model, torch.optim.SGD(model.parameters()), lambda: model(x).sum(), CPU)

    rounds: list[None] = []
    trainings = {"narrow": training(100), "wide": training(300)}
    costs = measure.training_costs(trainings, 3, warmup=1, on_round=lambda: rounds.append(None))
    assert len(rounds) == 4
    assert [c.trainable_parameters for c in costs.values()] == [100, 300]
    assert [c.saved_bytes for c in costs.values()] == [3 * 2 * 100 * FLOAT, 3 * 2 * 300 * FLOAT]
    assert costs["narrow"].peak_bytes < costs["wide"].peak_bytes
    assert len(costs["wide"].step_seconds.values) == 3
    assert all(set(c.to_dict()) >= {"step_seconds", "peak_training_bytes"} for c in costs.values())


@pytest.mark.parametrize("once", [False, True])
def test_a_step_of_micro_batches_is_that_of_their_mean(once: bool) -> None:
    found = []
    for count in (1, 3):
        torch.manual_seed(0)
        model = replfx.transform(tower(), torch.randn(2, 4)).double()
        x = torch.randn(2, 4, dtype=torch.float64)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        measure.Training(model, optimizer, lambda: model(x).square().mean(), CPU, count, once).step()  # noqa: B023
        found.append(list(model.parameters()))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)  # float64, sums in another order
