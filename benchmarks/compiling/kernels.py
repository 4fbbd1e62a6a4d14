"""The fusion kernels alone, beside what Inductor makes of the same formula and beside what memory allows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from benchmarks.compiling import traffic
from replfx.kernels import synthesize

Call = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One piece of work, and who does it.

    Attributes:
        name: what is computed, of which size.
        bytes_moved: what has to be read and written at least, once each.
        providers: name → does it.
    """

    name: str
    bytes_moved: int
    providers: Mapping[str, Call]


def cases(device: torch.device, dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    """Syntheses of a step of ViT-B and of ResNet-110, forward and backward."""
    attention, stages = (768, 768), [(16, 16, 3, 3), (32, 32, 3, 3), (64, 64, 3, 3)]
    if quick:
        attention, stages = (24, 16), [(4, 4, 3, 3)]
    yield from _syntheses([attention] * 10, False, device, dtype)
    yield from _syntheses(stages * 18, True, device, dtype)


def _tensors(shapes: list[Any], device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for shape in shapes]


def _syntheses(shapes: list[Any], channel: bool, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    kinds = ", ".join(" × ".join(map(str, shape)) for shape in dict.fromkeys(shapes))
    name = f"{len(shapes)} of {kinds}, {'channel' if channel else 'scalar'}"
    previous, following = (_tensors(shapes, device, dtype) for _ in range(2))
    a, b = (_tensors([(shape[0] if channel else 1,) for shape in shapes], device, dtype) for _ in range(2))

    def by_formula(*sides: list[Tensor]) -> list[Tensor]:
        return [_along_first(a, p) * p + _along_first(b, n) * n for p, n, a, b in zip(*sides, strict=True)]

    compiled = torch.compile(by_formula, dynamic=False)
    makers: dict[str, Callable[..., list[Tensor]]] = {"eager": by_formula, "Inductor": compiled, "replfx": synthesize}
    sides = (previous, following, a, b)
    made = {provider: partial(_without_gradients, make, sides) for provider, make in makers.items()}
    yield Case(f"synthesis of {name}", traffic.synthesize(*sides).total, made)
    inputs = [tensor for side in sides for tensor in side]
    grads = [torch.randn_like(tensor) for tensor in previous]
    backward = {
        p: partial(torch.autograd.grad, make(*sides), inputs, grads, retain_graph=True) for p, make in makers.items()
    }
    moved = traffic.synthesize_backward(grads, *sides).total
    yield Case(f"its backward, {name}", moved, backward)


@torch.no_grad()
def _without_gradients(make: Callable[..., Any], arguments: tuple[Any, ...]) -> object:
    return make(*arguments)


def _along_first(coefficients: Tensor, theta: Tensor) -> Tensor:
    return coefficients.view(-1, *[1] * (theta.dim() - 1))


def seconds(call: Call, least: float) -> float:
    """Median time of a call, over runs that together take `least` seconds at least."""
    call()  # what compiles, compiles now
    median: float = Timer("call()", globals={"call": call}).blocked_autorange(min_run_time=least).median
    return median


def copy_rate(device: torch.device, quick: bool) -> float:
    """Bytes a second that a copy of a large tensor reads and writes."""
    source = torch.randn((1 << 16) if quick else (1 << 26), device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source), 0.05 if quick else 0.5)


def gemm_rate(device: torch.device, dtype: torch.dtype, quick: bool) -> float:
    """FLOPs a second of a large matrix product."""
    side = 64 if quick else 4096 if device.type == "cuda" else 1024
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / seconds(lambda: left @ right, 0.05 if quick else 0.5)
