"""Magnitudes, and the bounds that fusions give from them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from replfx.fusion.alignment import AlignedFusion
from replfx.fusion.fusions import Fusion, fusions
from replfx.fusion.magnitude import is_finite, largest
from tests.fusion.test_alignment import TWO, Drawn, aligned, alignment_of

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@given(
    dtype=st.sampled_from(DTYPES),
    values=st.lists(st.floats(width=16) | st.sampled_from((math.nan, math.inf, -math.inf)), max_size=70),
    stride=st.integers(1, 3),
)
def test_largest_is_that_of_the_definition(dtype: torch.dtype, values: list[float], stride: int) -> None:
    tensor = torch.zeros(len(values), stride, dtype=dtype)[:, 0]
    tensor.copy_(torch.tensor(values))
    found, wanted = largest(tensor), float(tensor.abs().max()) if values else 0.0
    assert found == wanted or (math.isnan(found) and math.isnan(wanted))
    assert is_finite(tensor) == bool(torch.isfinite(tensor).all())


@pytest.mark.parametrize("name", ["scalar", "scalar_layer", "channel"])
@given(drawn=st.lists(aligned(), min_size=1, max_size=3), scale=st.sampled_from((1.0, 1e100)), seed=st.integers(0, 999))
def test_nothing_synthesised_exceeds_the_bound(name: str, drawn: list[Drawn], scale: float, seed: int) -> None:
    torch.manual_seed(seed)
    before, sources, targets = alignment_of(drawn)
    after = alignment_of(drawn)[0]
    rule = fusions[name]({n: torch.Size(s) for n, s in targets.items()}, dtype=TWO, device=torch.device("cpu"))
    fusion = AlignedFusion(rule, before, after)
    with torch.no_grad():
        for parameter in fusion.parameters():
            parameter.normal_(0, 2)
    sides = [{n: scale * torch.randn(s, dtype=TWO) for n, s in sources.items()} for _ in range(2)]
    made: dict[str, Tensor] = fusion(*sides)
    bound = fusion.bound(*({n: largest(theta) for n, theta in side.items()} for side in sides))
    actual = max(map(largest, made.values()))
    assert actual <= bound * (1 + 1e-12)
    assert bound < math.inf


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bound_from_what_is_not_finite_promises_nothing(bad: float) -> None:
    for name in ("scalar", "scalar_layer", "channel"):
        shapes = dict.fromkeys("pqr", torch.Size((2, 2)))
        fusion, ones = fusions[name](shapes, dtype=TWO, device=torch.device("cpu")), dict.fromkeys(shapes, 1.0)
        assert not fusion.bound({**ones, "q": bad}, ones) < math.inf
        fusion.next.data[len(fusion.next) // 2] = bad
        assert not fusion.bound(ones, ones) < math.inf


def test_a_fusion_that_knows_none_gives_none() -> None:
    assert Fusion({}, dtype=TWO, device=torch.device("cpu")).bound({}, {}) == math.inf
