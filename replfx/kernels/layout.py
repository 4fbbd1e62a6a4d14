"""How a synthesis lies before a kernel: as rows of one memory order, each with one coefficient a and one b."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

__all__ = ["Layout", "Needs", "Slot", "accumulator", "gradients_like", "in_order_of", "prepare"]

Needs: TypeAlias = tuple[bool, bool, bool, bool]  # of gradients for θ_prev, θ_next, a and b

_SCALAR_ROW = 1024
_WIDTHS = (1, 4, 16, 64, 256)  # few, because syntheses of one width share a launch


@dataclass(frozen=True)
class Layout:
    """Rows of a flat tensor.

    Attributes:
        total: elements in all; the last row may be short of some.
        inner: elements a row: those of one output channel, or a stretch of the whole where both coefficients are
            scalars.
        step_a, step_b: how far the coefficient moves from row to row: 1 for one a channel, 0 for a scalar.
        width: columns of a tile.
    """

    total: int
    inner: int
    step_a: int
    step_b: int
    width: int

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return -(-self.total // self.inner)

    def tiles(self, height: int) -> int:
        """Tiles of height × width that cover all."""
        return self.strips(height) * -(-self.inner // self.width)

    def strips(self, height: int) -> int:
        """Stretches of `height` rows that cover all."""
        return -(-self.rows // height)

    @classmethod
    def of(cls, theta: Tensor, a: Tensor, b: Tensor) -> "Layout":
        """The layout of a dense tensor with elements."""
        total = theta.numel()
        step_a, step_b = int(a.numel() > 1), int(b.numel() > 1)
        if not step_a and not step_b:
            return cls(total, min(total, _SCALAR_ROW), 0, 0, _WIDTHS[-1])
        inner = total // theta.shape[0]
        width = next((w for w in _WIDTHS if w >= inner), _WIDTHS[-1])
        return cls(total, inner, step_a, step_b, width)


@dataclass(frozen=True)
class Slot:
    """One synthesis with both neighbours dense and in the same memory order."""

    previous: Tensor
    next: Tensor
    a: Tensor
    b: Tensor

    @property
    def layout(self) -> Layout:
        """How the kernels walk through it; of a tensor with elements only."""
        return Layout.of(self.previous, self.a, self.b)


def prepare(previous: Sequence[Tensor], next: Sequence[Tensor], a: Sequence[Tensor], b: Sequence[Tensor]) -> list[Slot]:
    """Bring each pair of neighbours into one memory order in which an output channel is one stretch.

    Nothing is copied if they are so already, as contiguous and `channels_last` tensors are. A neighbour in another
    order, or with gaps (a slice of columns, a transposed matrix, an expanded one), is copied.
    """
    slots = []
    for p, n, *coefficients in zip(previous, next, a, b, strict=True):
        p = p if _is_dense_by_channel(p) else p.contiguous()
        slots.append(Slot(p, in_order_of(p, n), *(c.contiguous() for c in coefficients)))
    return slots


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What sums of tensors of a dtype are made in: float32 for the half types."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def gradients_like(slot: Slot, needs: Needs) -> tuple[Tensor, ...]:
    """Room for the gradients of θ_prev, θ_next, a and b; no elements where one is not needed."""
    tensors = (slot.previous, slot.next, slot.a, slot.b)
    return tuple(torch.empty_like(t) if need else t.new_empty(0) for t, need in zip(tensors, needs, strict=True))


def in_order_of(like: Tensor, tensor: Tensor) -> Tensor:
    """`tensor` if it has the memory order of the dense tensor `like`, else a copy that has."""
    if _strides(tensor) == _strides(like):
        return tensor
    return torch.empty_like(like).copy_(tensor)


def _strides(tensor: Tensor) -> list[int]:
    """Strides of the dimensions that have any: of a dimension of one element they mean nothing."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size != 1]


def _is_dense_by_channel(tensor: Tensor) -> bool:
    """No gaps, no overlaps, and the first dimension the outermost in memory."""
    expected = 1
    order = sorted((stride, size) for stride, size in zip(tensor.stride()[1:], tensor.shape[1:], strict=True))
    for stride, size in [*order, *zip(tensor.stride()[:1], tensor.shape[:1], strict=True)]:
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
