"""a·θ_prev + b·θ_next with few passes over memory, where PyTorch runs operation by operation on a CPU."""

from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from replfx.torch_internals import forward_mode_is_active, functorch_is_active

__all__ = ["mixed"]

_LARGE: Final = 1 << 16  # elements, from which on passes over memory cost more than a Function's Python
_PLAIN: Final = (Tensor, nn.Parameter)
_DTYPES: Final = (torch.float32, torch.float64)  # of lower ones `torch.dot` sums in the same


def mixed(previous: Tensor, next: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """a·θ_prev + b·θ_next, as these operators give it up to the rounding of a sum.

    For large tensors with one coefficient each, a step reads or writes 13 times what θ holds, where the operators do
    so 19 times, and nothing but the results is allocated, where they allocate four tensors besides.

    Args:
        previous: θ_prev, any shape.
        next: θ_next, the same shape.
        a: what multiplies θ_prev, in a shape that broadcasts to its.
        b: what multiplies θ_next, likewise.
    """
    made: Tensor = _Mix.apply(previous, next, a, b) if _pays(previous, next, a, b) else a * previous + b * next
    return made


def _pays(previous: Tensor, next: Tensor, a: Tensor, b: Tensor) -> bool:
    """Whether `_Mix` is faster, and nothing looks at what is computed: compilers are to see the operators."""
    if torch.compiler.is_compiling() or previous.numel() < _LARGE or previous.device.type != "cpu":
        return False
    tensors = (previous, next, a, b)
    alike = all(type(t) in _PLAIN and t.dtype == previous.dtype and t.device == previous.device for t in tensors)
    return (
        alike
        and previous.dtype in _DTYPES
        and a.numel() == b.numel() == 1
        and previous.shape == next.shape
        and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        and not functorch_is_active()
        and not forward_mode_is_active()
    )


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, previous: Tensor, next: Tensor, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(previous, next, a, b)
        return torch.mul(a, previous).addcmul_(b, next)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        previous, next, a, b = ctx.saved_tensors
        needs = ctx.needs_input_grad
        return (
            a * grad if needs[0] else None,
            b * grad if needs[1] else None,
            _dot(grad, previous).view_as(a) if needs[2] else None,
            _dot(grad, next).view_as(b) if needs[3] else None,
        )


def _dot(one: Tensor, other: Tensor) -> Tensor:
    """The sum of all products; both are read in the memory order of `other`, where they have the same."""
    order = sorted(range(other.dim()), key=other.stride, reverse=True)
    return torch.dot(one.permute(order).reshape(-1), other.permute(order).reshape(-1))
