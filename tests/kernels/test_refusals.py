"""What is no synthesis is refused with what was wrong and what to do, before any kernel runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import replfx
from replfx.kernels import synthesize, synthesize_low_rank, synthesized_linear

W, A, ONE = torch.ones(4, 3), torch.ones(4), torch.ones(1)


def one(p: Tensor = W, n: Tensor = W, a: Tensor = A, b: Tensor = A) -> list[Tensor]:
    return synthesize([p], [n], [a], [b])


def low_rank(u: Tensor, v: Tensor, w: Tensor = W) -> Tensor:
    return synthesize_low_rank(w, w, ONE, ONE, u, v)


def linear(x: Tensor, w: Tensor = W, bias: Tensor | None = None) -> Tensor:
    return synthesized_linear(x, w, w, ONE, ONE, bias)


REFUSALS: list[tuple[str, Callable[[], Any], str]] = [
    ("lengths", lambda: synthesize([W, W], [W], [A], [A]), "one tensor of each list.*'previous': 2, 'next': 1"),
    ("none_and_one", lambda: synthesize([], [W], [A], [A]), "one tensor of each list"),
    ("shapes", lambda: one(n=torch.ones(3, 4)), r"next\[0\] is \(3, 4\) and previous\[0\] \(4, 3\): align them"),
    ("as_many_elements", lambda: one(n=torch.ones(2, 6)), "align them to one shape"),
    ("dtypes", lambda: one(n=W.double()), r"next\[0\] torch.float64: cast all to one dtype"),
    ("dtype_of_b", lambda: one(b=A.half()), r"b\[0\] torch.float16: cast all"),
    ("second", lambda: synthesize([W, W.half()], [W, W], [A, A], [A, A]), r"previous\[1\] torch.float16"),
    ("integers", lambda: one(*[t.long() for t in (W, W, A, A)]), "torch.int64; the kernels take torch.float16"),
    ("devices", lambda: one(n=W.to("meta")), "on meta: move all to one device"),
    ("coefficients", lambda: one(a=torch.ones(3)), r"a\[0\] is \(3,\); for a weight \(4, 3\) it needs 1 element or 4"),
    ("matrix_of_coefficients", lambda: one(b=torch.ones(4, 1)), r"b\[0\] is \(4, 1\)"),
    ("scalar_weight", lambda: one(torch.ones(()), torch.ones(()), ONE, torch.ones(2)), "it needs 1 element$"),
    ("no_matrix", lambda: low_rank(torch.ones(4), torch.ones(3, 1)), r"U \(out, r\), V \(in, r\)"),
    ("ranks", lambda: low_rank(torch.ones(4, 2), torch.ones(3, 1)), r"U \(out, r\), V \(in, r\)"),
    ("vector", lambda: low_rank(torch.ones(4, 1), torch.ones(1, 1), A), r"neighbours \(out, in, …\)"),
    ("rows_of_u", lambda: low_rank(torch.ones(3, 1), torch.ones(3, 1)), "one row an output channel"),
    ("rows_of_v", lambda: low_rank(torch.ones(4, 1), torch.ones(4, 1)), "one row for each of the 3 elements"),
    ("dtype_of_u", lambda: low_rank(torch.ones(4, 1).half(), torch.ones(3, 1)), "u torch.float16: cast all"),
    ("x", lambda: linear(torch.ones(5, 4)), r"they are \(5, 4\) and \(4, 3\)"),
    ("scalar_x", lambda: linear(torch.ones(())), r"x \(…, in\)"),
    ("no_weights", lambda: linear(torch.ones(5, 3), torch.ones(4, 3, 1)), r"weights \(out, in\)"),
    (
        "bias",
        lambda: linear(torch.ones(5, 3), bias=torch.ones(3)),
        r"bias is \(3,\); weights \(4, 3\) need one of \(4,\)",
    ),
    ("dtype_of_x", lambda: linear(torch.ones(5, 3).double()), "x torch.float64: cast all"),
    ("dtype_of_bias", lambda: linear(torch.ones(5, 3), bias=A.double()), "bias torch.float64: cast all"),
]


@pytest.mark.parametrize(("call", "message"), [pytest.param(call, text, id=name) for name, call, text in REFUSALS])
def test_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(replfx.FusionError, match=message):
        call()


def test_the_backward_operator_refuses_too() -> None:
    from replfx.kernels import synthesis_ops

    with pytest.raises(replfx.FusionError, match=r"grads\[0\] is \(3,\)"):
        synthesis_ops.synthesize_backward([torch.ones(3)], [W], [W], [A], [A])
    with pytest.raises(replfx.FusionError, match="of 2 syntheses, and there are 1"):
        synthesis_ops.synthesize_backward([W], [W], [W], [A], [A], [1, 1])


def test_nothing_is_something() -> None:
    assert synthesize([], [], [], []) == []
