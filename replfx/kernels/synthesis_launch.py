"""Launches the synthesis kernels: up to eight syntheses of one tile width at a time."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.library import wrap_triton

from replfx.kernels.availability import INTERPRETED, device_of
from replfx.kernels.layout import Needs, Slot, accumulator, gradients_like, in_order_of, prepare
from replfx.kernels.synthesis_kernels import gradients_kernel, synthesis_kernel, totals_kernel

__all__ = ["launch_gradients", "launch_synthesis"]

_SLOTS = 8  # as the kernels have
_TOTALS = 16
_TILE = 2048  # elements a program of the forward kernel makes
_STRIP = 1024  # elements a program of the backward kernel has in hand at a time
_T = TypeVar("_T")


def launch_synthesis(
    previous: Sequence[Tensor], next: Sequence[Tensor], a: Sequence[Tensor], b: Sequence[Tensor]
) -> list[Tensor]:
    """θ of each synthesis, in the memory order of its θ_prev."""
    slots = prepare(previous, next, a, b)
    made = [torch.empty_like(slot.previous) for slot in slots]
    work = [(slot, w) for slot, w in zip(slots, made, strict=True) if w.numel()]
    launcher = synthesis_kernel if INTERPRETED else wrap_triton(synthesis_kernel)
    for group in _groups(work, lambda item: item[0].layout.width, _SLOTS):
        width = group[0][0].layout.width
        height = _TILE // width
        args = [arg for slot, w in group for arg in (*_tensors(slot), w, *_numbers(slot, slot.layout.tiles(height)))]
        slot, w = group[0]
        for _ in range(_SLOTS - len(group)):  # a tensor that is written to must not be there twice
            args += [*_tensors(slot), w.new_empty(0), *_numbers(slot, 0)]
        programs = sum(slot.layout.tiles(height) for slot, _ in group)
        with device_of(w):
            launcher[(programs,)](*args, height, width, w.dtype == torch.float64)
    return made


@dataclass(frozen=True)
class _Job:
    """A synthesis whose gradients are wanted.

    Attributes:
        grad: dW in the memory order of the neighbours.
        results: where gradients for θ_prev, θ_next, a and b go; of no elements where none is needed.
        sums: where sums a row for a and b go: the results themselves, or partial sums of a scalar's.
    """

    slot: Slot
    grad: Tensor
    needs: Needs
    results: tuple[Tensor, ...]
    sums: tuple[Tensor, ...]


def launch_gradients(
    grads: Sequence[Tensor],
    previous: Sequence[Tensor],
    next: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    needs: Sequence[Needs],
) -> list[tuple[Tensor, ...]]:
    """Gradients for θ_prev, θ_next, a and b of each synthesis; a tensor of no elements for one that is not needed."""
    slots = prepare(previous, next, a, b)
    jobs = [_job(slot, grad, needed) for slot, grad, needed in zip(slots, grads, needs, strict=True)]
    work = [job for job in jobs if job.grad.numel() and any(job.needs)]
    launcher = gradients_kernel if INTERPRETED else wrap_triton(gradients_kernel)
    for group in _groups(work, lambda job: (job.slot.layout.width, job.needs), _SLOTS):
        first = group[0]
        width = first.slot.layout.width
        height = _STRIP // width
        args: list[Any] = []
        for job in group:
            args += [
                job.grad,
                *_tensors(job.slot),
                *job.results[:2],
                *job.sums,
                *_numbers(job.slot, job.slot.layout.strips(height)),
            ]
        for _ in range(_SLOTS - len(group)):
            nothing = [first.grad.new_empty(0) for _ in range(4)]
            args += [first.grad, *_tensors(first.slot), *nothing, *_numbers(first.slot, 0)]
        programs = sum(job.slot.layout.strips(height) for job in group)
        with device_of(first.grad):
            launcher[(programs,)](*args, height, width, first.grad.dtype == torch.float64, *first.needs)
    _launch_totals(work)
    return [job.results for job in jobs]


def _job(slot: Slot, grad: Tensor, needs: Needs) -> _Job:
    """Allocate what the gradients of a synthesis need."""
    results = gradients_like(slot, needs)
    if grad.numel() == 0:
        return _Job(slot, grad, needs, tuple(result.zero_() for result in results), ())
    layout = slot.layout
    sums = [
        result.new_empty(layout.rows, dtype=accumulator(result.dtype)) if need and not step else result
        for result, need, step in zip(results[2:], needs[2:], (layout.step_a, layout.step_b), strict=True)
    ]
    return _Job(slot, in_order_of(slot.previous, grad), needs, results, tuple(sums))


def _launch_totals(jobs: Sequence[_Job]) -> None:
    """Sum what the programs of the scalar coefficients have left."""
    pairs = [
        (partial, result)
        for job in jobs
        for partial, result in zip(job.sums, job.results[2:], strict=True)
        if partial is not result
    ]
    launcher = totals_kernel if INTERPRETED else wrap_triton(totals_kernel)
    for group in _groups(pairs, lambda pair: pair[0].dtype, _TOTALS):
        args = [arg for partial, result in group for arg in (partial, result, partial.numel())]
        first = group[0][0]
        for _ in range(_TOTALS - len(group)):
            args += [first, first.new_empty(0), 0]
        with device_of(first):
            launcher[(len(group),)](*args, _STRIP, first.dtype == torch.float64)


def _tensors(slot: Slot) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return slot.previous, slot.next, slot.a, slot.b


def _numbers(slot: Slot, tiles: int) -> tuple[int, ...]:
    layout = slot.layout
    return layout.total, layout.inner, layout.step_a, layout.step_b, tiles


def _groups(items: Sequence[_T], key: Callable[[_T], Hashable], size: int) -> Iterator[list[_T]]:
    """Items of one key together, at most `size` at a time."""
    kinds: dict[Hashable, list[_T]] = {}
    for item in items:
        kinds.setdefault(key(item), []).append(item)
    for kind in kinds.values():
        for start in range(0, len(kind), size):
            yield kind[start : start + size]
