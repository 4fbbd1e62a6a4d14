"""The same computations in plain PyTorch: on a CPU, without triton, and for compilers to fuse."""

import torch.nn.functional as F
from torch import Tensor

from replfx.kernels.layout import Needs, accumulator

__all__ = ["synthesize", "synthesize_backward", "synthesize_low_rank", "synthesized_linear"]


def synthesize(previous: Tensor, next: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """θ = a·θ_prev + b·θ_next."""
    return _along_first(a, previous) * previous + _along_first(b, next) * next


def synthesize_backward(
    grad: Tensor, previous: Tensor, next: Tensor, a: Tensor, b: Tensor, needs: Needs
) -> tuple[Tensor, ...]:
    """Gradients for θ_prev, θ_next, a and b; no elements where one is not needed."""
    return (
        _along_first(a, grad) * grad if needs[0] else grad.new_empty(0),
        _along_first(b, grad) * grad if needs[1] else grad.new_empty(0),
        _dot(grad, previous, a) if needs[2] else grad.new_empty(0),
        _dot(grad, next, b) if needs[3] else grad.new_empty(0),
    )


def synthesize_low_rank(previous: Tensor, next: Tensor, a: Tensor, b: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """θ = a·θ_prev + b·θ_next + U·Vᵀ."""
    return synthesize(previous, next, a, b) + (u @ v.mT).view(previous.shape)


def synthesized_linear(x: Tensor, previous: Tensor, next: Tensor, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """Give y = x·θᵀ + bias."""
    return F.linear(x, synthesize(previous, next, a, b), bias)


def _along_first(coefficients: Tensor, theta: Tensor) -> Tensor:
    """Shape coefficients to multiply `theta` along its first dimension."""
    return coefficients.reshape(-1, *[1] * (theta.dim() - 1)) if theta.dim() else coefficients.reshape(())


def _dot(grad: Tensor, theta: Tensor, coefficients: Tensor) -> Tensor:
    """<grad, θ> over all that one coefficient multiplies."""
    count = coefficients.numel()
    products = (grad * theta).reshape(count, theta.numel() // max(count, 1))
    return products.sum(1, dtype=accumulator(grad.dtype)).to(grad.dtype).view(coefficients.shape)
