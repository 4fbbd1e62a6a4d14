"""Large syntheses on a CPU take few passes over memory, and are what the operators give."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad

from replfx.fusion import mixing
from replfx.fusion.mixing import mixed

FORMATS = (torch.contiguous_format, torch.channels_last)
SHAPES = st.lists(st.integers(1, 4), min_size=1, max_size=4)


def drawn(shape: list[int], dtype: torch.dtype, order: torch.memory_format) -> list[Tensor]:
    """Neighbours in one memory order, and a coefficient for each."""
    kept = order if len(shape) == 4 else torch.contiguous_format
    sides = [torch.randn(shape, dtype=dtype).to(memory_format=kept).requires_grad_() for _ in range(2)]
    coefficients = [torch.randn([1] * len(shape), dtype=dtype, requires_grad=True) for _ in range(2)]
    return [*sides, *coefficients]


@pytest.fixture(autouse=True)
def _small_ones_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixing, "_LARGE", 0)


@given(SHAPES, st.sampled_from([torch.float32, torch.float64]), st.sampled_from(FORMATS), st.integers(1, 15))
def test_as_the_operators_give_it(shape: list[int], dtype: torch.dtype, order: torch.memory_format, needs: int) -> None:
    given = drawn(shape, dtype, order)
    for bit, tensor in enumerate(given):
        tensor.requires_grad_(bool(needs >> bit & 1))
    wanted = [tensor for tensor in given if tensor.requires_grad]
    previous, next, a, b = given
    made, plain = mixed(*given), a * previous + b * next
    # A product that is added within one instruction is not rounded first.
    rounding = 2 * torch.finfo(dtype).eps * (abs(a * previous) + abs(b * next)).max().item()
    torch.testing.assert_close(made, plain, rtol=0, atol=rounding)
    strides = [[s for s, size in zip(t.stride(), shape, strict=True) if size > 1] for t in (made, plain)]
    assert strides[0] == strides[1]
    assert "_Mix" in type(made.grad_fn).__name__
    grad = torch.randn_like(made)
    found, expected = (torch.autograd.grad(t, wanted, grad) for t in (made, plain))
    # Sums of up to 256 products in another order: their rounding grows with the length of the sum.
    tolerance = 256 * torch.finfo(dtype).eps
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_derivatives_of_its_derivatives() -> None:
    given = drawn([3, 4], torch.float64, torch.contiguous_format)
    assert torch.autograd.gradcheck(mixed, given)
    assert torch.autograd.gradgradcheck(mixed, given)


# ---- what else there is goes through the operators


def test_forward_mode() -> None:
    previous, next, a, b = drawn([3, 4], torch.float32, torch.contiguous_format)
    tangent = torch.randn(3, 4)
    with forward_ad.dual_level():
        made = mixed(forward_ad.make_dual(previous, tangent), next, a, b)
        torch.testing.assert_close(forward_ad.unpack_dual(made).tangent, a * tangent)


def test_vmap() -> None:
    _, next, a, b = drawn([3, 4], torch.float32, torch.contiguous_format)
    stack = torch.randn(2, 3, 4)
    assert torch.equal(torch.vmap(lambda each: mixed(each, next, a, b))(stack), a * stack + b * next)


@pytest.mark.parametrize(("dtype", "channels"), [(torch.bfloat16, 1), (torch.float32, 3)])
def test_low_precision_and_a_coefficient_a_channel(dtype: torch.dtype, channels: int) -> None:
    previous, next, _, b = drawn([3, 4], dtype, torch.contiguous_format)
    a = torch.randn(channels, 1, dtype=dtype)
    made = mixed(previous, next, a, b)
    assert torch.equal(made, a * previous + b * next)
    assert "_Mix" not in type(made.grad_fn).__name__
