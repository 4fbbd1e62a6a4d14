"""Complex weights: their linear combinations, with real coefficients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import replfx
from replfx.fusion.fusions import fusions
from replfx.fusion.magnitude import is_finite, largest
from replfx.fusion.pairing import pair

X = torch.linspace(-1, 1, 2 * 4 * 16, dtype=torch.float64).view(2, 4, 16)


class Spectral(nn.Module):
    """Mixes channels among a few frequencies by complex weights, and everywhere by real ones."""

    def __init__(self, hidden: int = 4, kind: torch.dtype = torch.cdouble) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(4, hidden, 3, dtype=kind))
        self.last = nn.Parameter(torch.randn(hidden, 4, 3, dtype=kind))
        self.skip = nn.Conv1d(4, 4, 1, dtype=torch.double)

    def forward(self, x: Tensor) -> Tensor:
        low = torch.fft.rfft(x)[..., :3]
        low = torch.einsum("bim,iom->bom", low, self.first)
        low = torch.einsum("bim,iom->bom", low, self.last)
        return torch.tanh(torch.fft.irfft(low, n=x.shape[-1]) + self.skip(x))


def blocks(*hidden: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Spectral(h) for h in hidden))


@pytest.mark.parametrize("fusion", ["scalar", "scalar_layer", "channel"])
def test_outputs_and_gradients_are_the_references(fusion: str) -> None:
    model = blocks(4, 4, 4, 4, 4)
    made = replfx.transform(model, X, fusion={"name": fusion, "initial": 0.3})
    assert replfx.report(made).replaced == ["1", "3"]
    twin = copy.deepcopy(model)

    def run(x: Tensor) -> Tensor:
        for index, block in enumerate(twin):
            if index % 2:
                before, after = dict(twin[index - 1].named_parameters()), dict(twin[index + 1].named_parameters())
                own = dict(block.named_parameters())
                theta = {n: 0.3 * before[n] + 0.3 * after[n] if own[n].dim() > 1 else own[n] for n in own}
                x = torch.func.functional_call(block, theta, (x,))
            else:
                x = block(x)
        return x

    torch.testing.assert_close(made(X), run(X))
    made(X).square().sum().backward()
    run(X).square().sum().backward()
    for index in (0, 2, 4):
        for name, parameter in twin[index].named_parameters():
            torch.testing.assert_close(made[index].get_parameter(name).grad, parameter.grad)
    coefficients = [p for n, p in made.named_parameters() if "fusion" in n]
    assert coefficients
    assert all(p.dtype == torch.double and p.grad is not None for p in coefficients)
    for whole in (replfx.materialize(made), replfx.unroll(copy.deepcopy(made))):
        torch.testing.assert_close(whole(X), made(X))


def test_unlike_neighbours_are_aligned() -> None:
    made = replfx.transform(blocks(4, 4, 6, 4, 4), X)
    made(X).sum().backward()
    gains = [p for n, p in made.named_parameters() if "gains" in n]
    assert gains
    assert all(not p.is_complex() and p.grad is not None for p in gains)


def test_complex_is_paired_with_complex() -> None:
    assert pair(Spectral(), Spectral(kind=torch.double)) == {"skip.weight": "skip.weight", "skip.bias": "skip.bias"}
    report = replfx.inspect(nn.Sequential(*(nn.Linear(4, 4, dtype=k) for k in (torch.cdouble, torch.double) * 2)))
    assert "complex ≠ real" in " ".join(report.refused.values())


@given(values=st.lists(st.complex_numbers(width=64, allow_nan=True), max_size=20))
def test_largest_is_that_of_both_parts(values: list[complex]) -> None:
    tensor = torch.tensor(values, dtype=torch.cfloat)
    wanted = float(torch.view_as_real(tensor).abs().max()) if values else 0.0
    assert largest(tensor) == wanted or wanted != wanted
    assert is_finite(tensor) == bool(tensor.isfinite().all())


def test_weights_that_are_not_finite_are_refused() -> None:
    model = blocks(4, 4, 4)
    with torch.no_grad():
        model[0].first[0, 0, 0] = complex(0, float("inf"))
    with pytest.raises(replfx.FusionError, match=r"`0.first` has weights that are not finite"):
        replfx.transform(model, X)


@pytest.mark.parametrize("name", ["scalar", "scalar_layer", "channel"])
def test_coefficients_are_real(name: str) -> None:
    rule: Any = fusions[name]({"w": torch.Size((3, 2))}, dtype=torch.cfloat, device=torch.device("cpu"))
    theta = torch.randn(3, 2, dtype=torch.cfloat)
    assert rule.previous.dtype == torch.float
    torch.testing.assert_close(rule({"w": theta}, {"w": 2 * theta})["w"], 1.5 * theta)


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_numbers_that_are_only_stored_are_refused(kind: torch.dtype) -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(4))).to(kind)
    assert "which PyTorch stores but does not add" in " ".join(replfx.inspect(model).refused.values())


@pytest.mark.parametrize("kind", [torch.half, torch.bfloat16])
def test_other_floats_are_fused(kind: torch.dtype) -> None:
    assert replfx.inspect(nn.Sequential(*(nn.Sequential(nn.Linear(4, 4)) for _ in range(4))).to(kind)).replaced
