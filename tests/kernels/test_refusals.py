"""What is no synthesis is refused with what was wrong and what to do, before any kernel runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import replfx
from replfx.kernels import synthesize
from replfx.kernels.synthesis import synthesize_backward

W, A, ONE = torch.ones(4, 3), torch.ones(4), torch.ones(1)


def one(p: Tensor = W, n: Tensor = W, a: Tensor = A, b: Tensor = A) -> list[Tensor]:
    return synthesize([p], [n], [a], [b])


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
]


@pytest.mark.parametrize(("call", "message"), [pytest.param(call, text, id=name) for name, call, text in REFUSALS])
def test_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(replfx.FusionError, match=message):
        call()


def test_the_backward_operator_refuses_too() -> None:
    with pytest.raises(replfx.FusionError, match=r"grads\[0\] is \(3,\)"):
        synthesize_backward([torch.ones(3)], [W], [W], [A], [A])
    with pytest.raises(replfx.FusionError, match="of 2 syntheses, and there are 1"):
        synthesize_backward([W], [W], [W], [A], [A], [1, 1])


def test_nothing_is_something() -> None:
    assert synthesize([], [], [], []) == []
