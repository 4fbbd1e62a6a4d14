"""Bytes that each kernel has to move, to compare with what a memory can carry.

Each function takes the arguments of the operator of its name, of which it looks at shapes and dtypes alone, and
counts every tensor once: what caches save or waste is not in it, nor are copies of inputs that have gaps.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from replfx.kernels.synthesis import Rows

__all__ = ["Traffic", "synthesize", "synthesize_backward"]


@dataclass(frozen=True)
class Traffic:
    """Bytes read and written.

    Example:
        >>> w, half = torch.randn(8, 8), torch.full((8,), 0.5)
        >>> synthesize([w], [w], [half], [half])
        Traffic(read=576, written=256)
    """

    read: int
    written: int

    @property
    def total(self) -> int:
        """Both."""
        return self.read + self.written


def synthesize(previous: Sequence[Tensor], next: Sequence[Tensor], a: Sequence[Tensor], b: Sequence[Tensor]) -> Traffic:
    """Reads θ_prev, θ_next, a and b; writes θ."""
    return Traffic(_bytes(*previous, *next, *a, *b), _bytes(*previous))


def synthesize_backward(
    grads: Sequence[Tensor],
    previous: Sequence[Tensor],
    next: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
) -> Traffic:
    """Reads dθ, θ_prev, θ_next, a and b; writes as much as it reads without dθ, if all gradients are needed.

    The partial sums of a scalar coefficient, one a row, are written and read once more.
    """
    inputs = _bytes(*previous, *next, *a, *b)
    partial = 0
    for theta, *coefficients in zip(previous, a, b, strict=True):
        if theta.numel():
            scalars = sum(c.numel() == 1 for c in coefficients)
            partial += scalars * Rows(theta, theta, *coefficients).count * max(theta.itemsize, 4)  # float32 at least
    return Traffic(inputs + _bytes(*grads) + partial, inputs + partial)


def _bytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.dtype.itemsize for tensor in tensors)
