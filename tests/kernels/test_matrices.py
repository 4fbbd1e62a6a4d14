"""`synthesize_low_rank` and `synthesized_linear` against NumPy, in outputs and all gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from replfx.kernels import synthesize_low_rank, synthesized_linear
from tests.kernels import reference
from tests.kernels.cases import DEVICES, LAYOUTS, in_triton, laid_out, random
from tests.kernels.reference import DTYPES, Array, array

# Around the sizes of tiles (16 × 128 and 16 to 128 each way), nothing, and one.
SIZES = st.sampled_from((0, 1, 3, 16, 33, 70, 130))


@st.composite
def drawn(draw: Any, *dims: str) -> dict[str, Any]:
    found = {dim: draw(SIZES) for dim in dims}
    return found | {
        "dtype": draw(st.sampled_from(DTYPES)),
        "seed": draw(st.integers(0, 1000)),
        "layouts": draw(st.tuples(*[st.sampled_from(LAYOUTS)] * 4)),
        "per_channel": draw(st.tuples(st.booleans(), st.booleans())),
        "needs": draw(st.one_of(st.just((True,) * 6), st.tuples(*[st.booleans()] * 6))),
    }


def leaves(case: dict[str, Any], device: str, shapes: list[tuple[int, ...]]) -> list[Tensor]:
    """Tensors of these shapes, the first ones laid out as drawn; each asks for a gradient if it is drawn to."""
    made = [random(shape, case["dtype"], device, case["seed"] + k) for k, shape in enumerate(shapes)]
    made = [laid_out(t, where) for t, where in zip(made, (*case["layouts"], "", ""), strict=False)]
    return [t.detach().requires_grad_(need) for t, need in zip(made, case["needs"], strict=False)]


def check(tensors: dict[str, Tensor], expected: dict[str, reference.Pair], terms: int) -> None:
    for name, tensor in tensors.items():
        if tensor.requires_grad:
            assert tensor.grad is not None, name
            # A chain of two or three steps each of which rounds, and is bounded by what goes into the last.
            reference.assert_close(tensor.grad, expected[name], f"gradient of {name}", terms=terms, roundings=6.0)
        else:
            assert tensor.grad is None, name


def four(g: reference.Pair, p: Tensor, n: Tensor, a: Tensor, b: Tensor) -> dict[str, reference.Pair]:
    """Gradients for p, n, a and b of θ's own, whose bound carries on."""
    found: dict[str, reference.Pair] = {}
    for side, theta, coefficients in (("p", p, a), ("n", n, b)):
        scale = np.broadcast_to(array(coefficients), (theta.shape[0],)).reshape(-1, *[1] * (theta.dim() - 1))
        found[side] = g[0] * scale, g[1] * abs(scale)
        axes = tuple(range(0 if coefficients.numel() == 1 else 1, theta.dim()))
        sums = (g[0] * array(theta)).sum(axes), (g[1] * abs(array(theta))).sum(axes)
        found["ab"["pn".index(side)]] = tuple(x.reshape(coefficients.shape) for x in sums)
    return found


@pytest.mark.parametrize("device", DEVICES)
@given(case=drawn("out", "inner"), rank=st.integers(0, 9), taps=st.sampled_from((None, 1, 2)))
def test_low_rank(device: str, case: dict[str, Any], rank: int, taps: int | None) -> None:
    shape = (case["out"], case["inner"]) if taps is None else (case["out"], case["inner"], taps, 2)
    columns = int(np.prod(shape[1:]))
    counts = [(case["out"],) if each else (1,) for each in case["per_channel"]]
    u, v, p, n, a, b = leaves(case, device, [(case["out"], rank), (columns, rank), shape, shape, *counts])
    theta = synthesize_low_rank(p, n, a, b, u, v)
    value, size = reference.synthesis(p, n, a, b)
    term, term_size = reference.product(array(u), array(v).T)
    wanted = value + term.reshape(shape), size + term_size.reshape(shape)
    reference.assert_close(theta, wanted, "θ", terms=rank, roundings=4.0)
    if not theta.requires_grad:
        return
    grad = random(shape, case["dtype"], device, case["seed"] + 6)
    theta.backward(grad)
    matrix = array(grad).reshape(case["out"], columns)
    expected = four((array(grad), abs(array(grad))), p, n, a, b)
    expected |= {"u": reference.product(matrix, array(v)), "v": reference.product(matrix.T, array(u))}
    check({"u": u, "v": v, "p": p, "n": n, "a": a, "b": b}, expected, terms=max(theta.numel(), 1))


@pytest.mark.parametrize("device", DEVICES)
@given(case=drawn("rows", "out", "inner"), batch=st.sampled_from(((), (1,), (2, 1))), biased=st.booleans())
def test_linear(device: str, case: dict[str, Any], batch: tuple[int, ...], biased: bool) -> None:
    counts = [(case["out"],) if each else (1,) for each in case["per_channel"]]
    weight = (case["out"], case["inner"])
    shapes = [(*batch, case["rows"], case["inner"]), weight, weight, (case["out"],), *counts]
    x, p, n, bias, a, b = leaves(case, device, shapes)
    y = synthesized_linear(x, p, n, a, b, bias if biased else None)
    rows, (theta, size) = (
        array(x).reshape(-1, case["inner"]) if case["inner"] else np.zeros((case["rows"] * int(np.prod(batch)), 0)),
        reference.synthesis(p, n, a, b),
    )
    shift = array(bias) if biased else np.zeros(case["out"])
    wanted = [m.reshape(tuple(y.shape)) for m in (rows @ theta.T + shift, abs(rows) @ size.T + abs(shift))]
    reference.assert_close(y, (wanted[0], wanted[1]), "y", terms=case["inner"], roundings=4.0)
    if not y.requires_grad:
        return
    grad = random(tuple(y.shape), case["dtype"], device, case["seed"] + 6)
    y.backward(grad)
    if not biased:
        assert bias.grad is None
        bias = bias.detach()
    check(
        {"x": x, "p": p, "n": n, "a": a, "b": b, "bias": bias},
        backward(grad, rows, (theta, size), x, p, n, a, b),
        terms=max(y.numel(), p.numel(), 1),
    )


def backward(grad: Tensor, rows: Array, theta: reference.Pair, *inputs: Tensor) -> dict[str, reference.Pair]:
    """Gradients of x·θᵀ + bias."""
    x, p, n, a, b = inputs
    matrix = array(grad).reshape(len(rows), p.shape[0])
    through = matrix @ theta[0], abs(matrix) @ theta[1]
    grads = four((matrix.T @ rows, abs(matrix).T @ abs(rows)), p, n, a, b)
    grads["x"] = through[0].reshape(tuple(x.shape)), through[1].reshape(tuple(x.shape))
    grads["bias"] = matrix.sum(0), abs(matrix).sum(0)
    return grads


@pytest.mark.parametrize("device", DEVICES)
def test_gradcheck(device: str) -> None:
    def leaf(*shape: int) -> Tensor:
        return random(shape, torch.float64, device, sum(shape)).requires_grad_()

    p, n, a, b = leaf(3, 2), leaf(3, 2), leaf(3), leaf(1)
    assert torch.autograd.gradcheck(synthesize_low_rank, (p, n, a, b, leaf(3, 1), leaf(2, 1)))
    assert torch.autograd.gradcheck(synthesized_linear, (leaf(2, 2, 2), p, n, a, b, leaf(3)))


@pytest.mark.parametrize("device", DEVICES)
def test_runs_the_operators_where_triton_runs(device: str) -> None:
    w = torch.randn(3, 2, device=device, requires_grad=True)
    a = torch.ones(1, device=device)
    made = synthesize_low_rank(w, w, a, a, w[:, :1], w[:2, :1]), synthesized_linear(w, w, w, a, a)
    for tensor, name in zip(made, ("synthesize_low_rank", "synthesized_linear"), strict=True):
        assert tensor.grad_fn is not None
        assert (f"replfx_{name}" in tensor.grad_fn.name()) == in_triton(device)


@pytest.mark.parametrize("device", DEVICES)
def test_many_tiles(device: str) -> None:
    """Rows in more than one group of tiles, whose last is not full."""
    x, p, n = (random(shape, torch.float32, device, k) for k, shape in enumerate(((600, 20), (70, 20), (70, 20))))
    a, b = (random((70,), torch.float32, device, seed) for seed in (4, 5))
    y = synthesized_linear(x, p, n, a, b)
    theta, size = reference.synthesis(p, n, a, b)
    wanted = array(x) @ theta.T, abs(array(x)) @ size.T
    reference.assert_close(y, wanted, "y", terms=20, roundings=4.0)
