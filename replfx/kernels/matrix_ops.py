"""The operators `replfx::synthesize_low_rank` and `replfx::synthesized_linear`; importing this registers them."""

from typing import Any

import torch
from torch import Tensor

from replfx.kernels import plain
from replfx.kernels.availability import INSTALLED, runs_triton
from replfx.kernels.checks import check_linear, check_low_rank
from replfx.kernels.registration import define
from replfx.kernels.synthesis_ops import gradients, synthesize

if INSTALLED:
    from replfx.kernels.matrix_launch import launch_linear, launch_low_rank

__all__ = ["synthesize_low_rank", "synthesized_linear"]


# ---- θ = a·θ_prev + b·θ_next + U·Vᵀ


def _low_rank(previous: Tensor, next: Tensor, a: Tensor, b: Tensor, u: Tensor, v: Tensor) -> Tensor:
    check_low_rank(previous, next, a, b, u, v)
    if runs_triton(previous):
        return launch_low_rank(previous, next, a, b, u, v)
    return plain.synthesize_low_rank(previous, next, a, b, u, v)


def _allocate_low_rank(previous: Tensor, next: Tensor, a: Tensor, b: Tensor, u: Tensor, v: Tensor) -> Tensor:
    if runs_triton(previous):
        check_low_rank(previous, next, a, b, u, v)
        return torch.empty_like(previous, memory_format=torch.contiguous_format)
    return _low_rank(previous, next, a, b, u, v)


def _save_low_rank(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _low_rank_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    previous, next, a, b, u, v = ctx.saved_tensors
    *needs, need_u, need_v = ctx.needs_input_grad
    (four,) = gradients([grad], [previous], [next], [a], [b], needs=[tuple(needs)])
    matrix = grad.flatten(1)
    return (*four, matrix @ v if need_u else None, matrix.mT @ u if need_v else None)


synthesize_low_rank = define(
    "synthesize_low_rank",
    "(Tensor previous, Tensor next, Tensor a, Tensor b, Tensor u, Tensor v) -> Tensor",
    _low_rank,
    _allocate_low_rank,
)
synthesize_low_rank.register_autograd(_low_rank_backward, setup_context=_save_low_rank)


# ---- y = x·(a·θ_prev + b·θ_next)ᵀ + bias


def _linear(x: Tensor, previous: Tensor, next: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    check_linear(x, previous, next, a, b, bias)
    if runs_triton(previous) and x.dtype != torch.float64:  # not every GPU multiplies tiles of float64
        return launch_linear(x, previous, next, a, b, bias)
    return plain.synthesized_linear(x, previous, next, a, b, bias)


def _allocate_linear(
    x: Tensor, previous: Tensor, next: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None
) -> Tensor:
    if runs_triton(previous) and x.dtype != torch.float64:
        check_linear(x, previous, next, a, b, bias)
        return x.new_empty(*x.shape[:-1], previous.shape[0])
    return _linear(x, previous, next, a, b, bias)


def _save_linear(ctx: Any, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])  # not the bias


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, previous, next, a, b = ctx.saved_tensors
    need_x, *needs, need_bias = [*ctx.needs_input_grad, False][:6]
    count = x.shape[:-1].numel()
    rows = grad.reshape(count, previous.shape[0])
    grad_x = None
    if need_x:
        (theta,) = synthesize([previous], [next], [a], [b])
        grad_x = (rows @ theta).view(x.shape)
    four: tuple[Tensor | None, ...] = (None,) * 4
    if any(needs):
        grad_theta = rows.mT @ x.reshape(count, previous.shape[1])
        (four,) = gradients([grad_theta], [previous], [next], [a], [b], needs=[tuple(needs)])
    grads = (grad_x, *four, rows.sum(0) if need_bias else None)
    return grads[: len(ctx.needs_input_grad)]


synthesized_linear = define(
    "synthesized_linear",
    "(Tensor x, Tensor previous, Tensor next, Tensor a, Tensor b, Tensor? bias=None) -> Tensor",
    _linear,
    _allocate_linear,
)
synthesized_linear.register_autograd(_linear_backward, setup_context=_save_linear)
