"""The syntheses and their gradients in NumPy, channel by channel, with the rounding that each dtype may cost.

Every function gives pairs: the value in float64, and a bound on its magnitude before cancellation, to which the
rounding errors are in proportion.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[np.float64]
Pair = tuple[Array, Array]

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def array(tensor: Tensor) -> Array:
    return tensor.detach().cpu().double().numpy()


def synthesis(p: Tensor, n: Tensor, a: Tensor, b: Tensor) -> Pair:
    value, size = (np.zeros(tuple(p.shape)) for _ in range(2))
    for c in range(p.shape[0] if p.dim() else 1):
        where = c if p.dim() else ...
        first = coefficient(a, c) * array(p)[where]
        second = coefficient(b, c) * array(n)[where]
        value[where], size[where] = first + second, abs(first) + abs(second)
    return value, size


def coefficient(coefficients: Tensor, channel: int) -> float:
    flat = array(coefficients).reshape(-1)
    return float(flat[channel] if flat.size > 1 else flat[0])


def gradients(g: Tensor, p: Tensor, n: Tensor, a: Tensor, b: Tensor) -> list[Pair]:
    """For p, n, a and b."""
    gradient_p, _ = synthesis(g, g, a, torch.zeros(1))
    gradient_n, _ = synthesis(g, g, torch.zeros(1), b)
    sums = []
    for coefficients, theta in ((a, p), (b, n)):
        count = coefficients.numel()
        products = (array(g) * array(theta)).reshape(count, theta.numel() // max(count, 1))
        sums += [tuple(x.sum(1).reshape(tuple(coefficients.shape)) for x in (products, abs(products)))]
    return [(gradient_p, abs(gradient_p)), (gradient_n, abs(gradient_n)), *sums]


def assert_close(got: Tensor, wanted: Pair, what: str, *, terms: int = 1, roundings: float = 2.0) -> None:
    """Within the rounding of `roundings` operations in the dtype, and of a sum of so many terms.

    Plain PyTorch rounds a·θ_prev, b·θ_next and their sum, each by half an ε; the kernels round once, but where they
    are interpreted bfloat16 is cut off rather than rounded, which is a whole ε. Sums are made in float32 for the half
    types, whose ε is so much smaller that their length does not matter; for float32 and float64 errors of n terms
    add up like a random walk: √n.
    """
    value, size = wanted
    limits = torch.finfo(got.dtype)
    summed = math.sqrt(terms) if got.dtype in (torch.float32, torch.float64) else 0.0
    allowed = limits.eps * (roundings + summed) * size + 4 * limits.smallest_normal * limits.eps
    assert tuple(got.shape) == value.shape, what
    assert np.isfinite(array(got)).all(), what
    worst = np.max(abs(array(got) - value) - allowed, initial=-1.0)
    assert worst <= 0, f"{what}: {worst} more than rounding explains in {got.dtype}"
