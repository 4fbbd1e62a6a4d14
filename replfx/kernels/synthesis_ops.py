"""The operators `replfx::synthesize` and `replfx::synthesize_backward`.

Importing this module registers them. It is imported where they run, because with triton PyTorch imports it for that.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from replfx.errors import FusionError
from replfx.kernels import plain
from replfx.kernels.availability import INSTALLED, runs_triton
from replfx.kernels.checks import check_syntheses
from replfx.kernels.layout import Needs, gradients_like, prepare
from replfx.kernels.registration import define

if INSTALLED:
    from replfx.kernels.synthesis_launch import launch_gradients, launch_synthesis

__all__ = ["gradients", "synthesize", "synthesize_backward"]

Tensors: TypeAlias = Sequence[Tensor]
Lists: TypeAlias = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]


# ---- forward


def _synthesize(previous: Tensors, next: Tensors, a: Tensors, b: Tensors) -> list[Tensor]:
    check_syntheses(previous, next, a, b)
    if previous and runs_triton(previous[0]):
        return launch_synthesis(previous, next, a, b)
    return [plain.synthesize(*each) for each in zip(previous, next, a, b, strict=True)]


def _allocate(previous: Tensors, next: Tensors, a: Tensors, b: Tensors) -> list[Tensor]:
    if previous and runs_triton(previous[0]):
        check_syntheses(previous, next, a, b)
        return [torch.empty_like(slot.previous) for slot in prepare(previous, next, a, b)]
    return _synthesize(previous, next, a, b)


synthesize = define(
    "synthesize", "(Tensor[] previous, Tensor[] next, Tensor[] a, Tensor[] b) -> Tensor[]", _synthesize, _allocate
)


# ---- backward


def _synthesize_backward(
    grads: Tensors, previous: Tensors, next: Tensors, a: Tensors, b: Tensors, needed: Sequence[int] | None = None
) -> Lists:
    check_syntheses(previous, next, a, b, grads)
    needs = _needs(needed, len(grads))
    if grads and runs_triton(grads[0]):
        return _lists(launch_gradients(grads, previous, next, a, b, needs))
    each = zip(grads, previous, next, a, b, needs, strict=True)
    return _lists([plain.synthesize_backward(*one) for one in each])


def _allocate_backward(
    grads: Tensors, previous: Tensors, next: Tensors, a: Tensors, b: Tensors, needed: Sequence[int] | None = None
) -> Lists:
    if grads and runs_triton(grads[0]):
        check_syntheses(previous, next, a, b, grads)
        slots = prepare(previous, next, a, b)
        return _lists([gradients_like(*each) for each in zip(slots, _needs(needed, len(grads)), strict=True)])
    return _synthesize_backward(grads, previous, next, a, b, needed)


def _needs(needed: Sequence[int] | None, count: int) -> list[Needs]:
    """Which gradients are wanted: bits 1, 2, 4 and 8 for θ_prev, θ_next, a and b of each synthesis."""
    if needed is not None and len(needed) != count:
        raise FusionError(f"`needed` says what is wanted of {len(needed)} syntheses, and there are {count}")
    masks = [0b1111] * count if needed is None else needed
    return [(bool(mask & 1), bool(mask & 2), bool(mask & 4), bool(mask & 8)) for mask in masks]


def _lists(results: Sequence[tuple[Tensor, ...]]) -> Lists:
    """The gradients for all θ_prev, for all θ_next, for all a and for all b."""
    p, n, a, b = ([result[k] for result in results] for k in range(4))
    return p, n, a, b


synthesize_backward = define(
    "synthesize_backward",
    "(Tensor[] grads, Tensor[] previous, Tensor[] next, Tensor[] a, Tensor[] b, int[]? needed=None) "
    "-> (Tensor[], Tensor[], Tensor[], Tensor[])",
    _synthesize_backward,
    _allocate_backward,
)


# ---- autograd


def _save(ctx: Any, inputs: tuple[Tensors, ...], output: list[Tensor]) -> None:
    ctx.save_for_backward(*(tensor for tensors in inputs for tensor in tensors))
    ctx.set_materialize_grads(False)  # a θ that is not used costs nothing


def _backward(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[list[Tensor | None], ...]:
    count = len(grads)
    saved = [ctx.saved_tensors[k * count : (k + 1) * count] for k in range(4)]
    results: tuple[list[Tensor | None], ...] = tuple([None] * count for _ in range(4))
    needs: list[Needs] = list(zip(*ctx.needs_input_grad, strict=True))
    live = {k: grad for k, grad in enumerate(grads) if grad is not None and any(needs[k])}
    made = gradients(
        list(live.values()), *([tensors[k] for k in live] for tensors in saved), needs=[needs[k] for k in live]
    )
    for k, each in zip(live, made, strict=True):
        for result, gradient in zip(results, each, strict=True):
            result[k] = gradient
    return results


def gradients(
    grads: Tensors, previous: Tensors, next: Tensors, a: Tensors, b: Tensors, *, needs: Sequence[Needs]
) -> list[tuple[Tensor | None, ...]]:
    """`synthesize_backward` one synthesis at a time, with None for what is not needed."""
    if not grads:
        return []
    needed = [sum(wanted << bit for bit, wanted in enumerate(need)) for need in needs]
    lists = synthesize_backward(grads, previous, next, a, b, needed)
    return [
        tuple(results[k] if wanted else None for results, wanted in zip(lists, need, strict=True))
        for k, need in enumerate(needs)
    ]


synthesize.register_autograd(_backward, setup_context=_save)
