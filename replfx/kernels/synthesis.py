"""The synthesis θ = a·θ_prev + b·θ_next and its gradients: Triton kernels, and plain PyTorch where Triton does not run.

A synthesis lies before a kernel as rows of one memory order, each row with one coefficient a and one b. Arithmetic is
in float32, in float64 for float64 tensors. No two programs write to the same place, so results are the same every time.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor

from replfx.dtensors import is_dtensor
from replfx.errors import FusionError

__all__ = ["INSTALLED", "INTERPRETED", "runs_triton", "synthesize", "synthesize_backward", "synthesize_operator"]

INSTALLED: Final = importlib.util.find_spec("triton") is not None
# Triton reads the variable once too, when a kernel is defined.
INTERPRETED: Final = INSTALLED and os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")

if INSTALLED:
    import triton
    import triton.language as tl

    _jit: Callable[..., Any] = triton.jit
else:

    def _jit(kernel: Callable[..., Any]) -> Callable[..., Any]:
        """Leave a kernel that will not run as it is."""
        return kernel


Tensors: TypeAlias = Sequence[Tensor]
Needs: TypeAlias = int
"""Which gradients are wanted: bits 1, 2, 4 and 8 for θ_prev, θ_next, a and b."""

_ALL: Needs = 0b1111
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_WIDTHS = (1, 4, 16, 64, 256)  # columns of a tile: few, because a kernel is compiled for each
_TILE = 2048  # elements that a program of the forward kernel makes
_STRIP = 1024  # elements that a program of the backward kernel has in hand at a time


def synthesize(previous: Tensors, next: Tensors, a: Tensors, b: Tensors) -> list[Tensor]:
    """Give θ[c, …] = a[c]·θ_prev[c, …] + b[c]·θ_next[c, …] for each of K syntheses.

    On a GPU with triton this is the operator `replfx::synthesize`, one launch a synthesis. Its backward pass,
    `replfx::synthesize_backward`, is one launch a synthesis too: it reads each dW once and makes all four gradients of
    it. A scalar coefficient takes a sum of partial sums besides.

    On a CPU, without triton, and for DTensors these are plain PyTorch operations, and compilers see those.

    Args:
        previous: K tensors of any shapes. Contiguous and `channels_last` ones are read in place; a neighbour with
            gaps, or in another memory order than its partner, is copied first, and so is a gradient in another
            order than θ.
        next: K tensors of the same shapes.
        a: K tensors of one element, or of one for each element of θ's first dimension.
        b: likewise; a scalar may stand beside one a channel.

    All tensors are of one dtype (float16, bfloat16, float32 or float64) and on one device.

    Returns:
        K tensors of the shapes of `previous`. Gradients flow into all inputs; on the kernels' path once (they have
        no second derivatives).

    Raises:
        FusionError: lists of different lengths, or tensors of different dtypes, devices or shapes.

    Example:
        >>> before, after = torch.randn(8, 3, 3, 3), torch.randn(8, 3, 3, 3)
        >>> (theta,) = synthesize([before], [after], [torch.full((8,), 0.5)], [torch.full((1,), 0.5)])
        >>> torch.testing.assert_close(theta, (before + after) / 2)
    """
    if previous and runs_triton(previous[0]):
        made: list[Tensor] = synthesize_operator(list(previous), list(next), list(a), list(b))
        return made
    return _forward(previous, next, a, b)


def runs_triton(tensor: Tensor) -> bool:
    """Whether the kernels take this tensor: on a GPU, or anywhere under `TRITON_INTERPRET=1`.

    A DTensor stays with plain operations, whose sharding PyTorch knows.
    """
    if not INSTALLED or is_dtensor(tensor):
        return False
    return tensor.is_cuda or (INTERPRETED and tensor.device.type == "cpu")


# ---- kernels


@_jit
def synthesis_kernel(  # type: ignore[no-untyped-def]
    p, n, a, b, w, total, inner, step_a, step_b, height: tl.constexpr, width: tl.constexpr, double: tl.constexpr
):
    """Makes w = a·p + b·n on one tile; reads each neighbour once and writes w once.

    `total` elements lie in rows of `inner`, and from row to row the coefficients step by `step_a` and `step_b`.
    """
    kind: tl.constexpr = tl.float64 if double else tl.float32
    across = tl.cdiv(inner, width)
    row = ((tl.program_id(0) // across) * height + tl.arange(0, height)).to(tl.int64)
    column = (tl.program_id(0) % across) * width + tl.arange(0, width)
    offset = row[:, None] * inner + column[None, :]
    there = (column[None, :] < inner) & (offset < total)
    scale_a = tl.load(a + row * step_a, mask=row * inner < total, other=0.0).to(kind)
    scale_b = tl.load(b + row * step_b, mask=row * inner < total, other=0.0).to(kind)
    before = tl.load(p + offset, mask=there, other=0.0).to(kind)
    after = tl.load(n + offset, mask=there, other=0.0).to(kind)
    made = scale_a[:, None] * before + scale_b[:, None] * after
    tl.store(w + offset, made.to(w.dtype.element_ty), mask=there)


@_jit
def gradients_kernel(  # type: ignore[no-untyped-def]
    g, p, n, a, b, gp, gn, ga, gb, total, inner, step_a, step_b,
    height: tl.constexpr, width: tl.constexpr, double: tl.constexpr, needs: tl.constexpr,
):  # fmt: skip
    """Makes the gradients that are needed of `height` whole rows; reads g once, and p and n at most once.

    <g, p> and <g, n> of each row go to ga and gb. Of a scalar coefficient these are partial sums.
    """
    kind: tl.constexpr = tl.float64 if double else tl.float32
    row = (tl.program_id(0) * height + tl.arange(0, height)).to(tl.int64)
    scale_a = tl.load(a + row * step_a, mask=row * inner < total, other=0.0).to(kind)
    scale_b = tl.load(b + row * step_b, mask=row * inner < total, other=0.0).to(kind)
    sum_a = tl.zeros((height, width), dtype=kind)
    sum_b = tl.zeros((height, width), dtype=kind)
    for start in range(0, inner, width):
        column = start + tl.arange(0, width)
        offset = row[:, None] * inner + column[None, :]
        there = (column[None, :] < inner) & (offset < total)
        grad = tl.load(g + offset, mask=there, other=0.0).to(kind)
        if needs & 1:
            tl.store(gp + offset, (scale_a[:, None] * grad).to(gp.dtype.element_ty), mask=there)
        if needs & 2:
            tl.store(gn + offset, (scale_b[:, None] * grad).to(gn.dtype.element_ty), mask=there)
        if needs & 4:
            sum_a += grad * tl.load(p + offset, mask=there, other=0.0).to(kind)
        if needs & 8:
            sum_b += grad * tl.load(n + offset, mask=there, other=0.0).to(kind)
    if needs & 4:
        tl.store(ga + row, tl.sum(sum_a, axis=1).to(ga.dtype.element_ty), mask=row * inner < total)
    if needs & 8:
        tl.store(gb + row, tl.sum(sum_b, axis=1).to(gb.dtype.element_ty), mask=row * inner < total)


# ---- launches


@dataclass(frozen=True)
class Rows:
    """One synthesis as a kernel walks through it: both neighbours dense, and in the same memory order.

    Nothing is copied if they are so already, as contiguous and `channels_last` tensors are. A neighbour in another
    order, or with gaps (a slice of columns, a transposed matrix, an expanded one), is copied.
    """

    previous: Tensor
    next: Tensor
    a: Tensor
    b: Tensor

    @classmethod
    def of(cls, previous: Tensor, next: Tensor, a: Tensor, b: Tensor) -> Rows:
        """Bring two neighbours into one memory order in which an output channel is one stretch."""
        previous = previous if _is_dense_by_channel(previous) else previous.contiguous()
        return cls(previous, _in_order_of(previous, next), a.contiguous(), b.contiguous())

    @property
    def steps(self) -> tuple[int, int]:
        """How far a and b move from row to row: 1 for one a channel, 0 for a scalar."""
        return int(self.a.numel() > 1), int(self.b.numel() > 1)

    @property
    def inner(self) -> int:
        """Elements a row: those of an output channel, or a stretch of the whole where both coefficients are scalars."""
        total = self.previous.numel()
        return total // self.previous.shape[0] if any(self.steps) else min(total, _STRIP)

    @property
    def count(self) -> int:
        """How many rows there are; the last may be short of some elements."""
        return -(-self.previous.numel() // self.inner)

    @property
    def width(self) -> int:
        """Columns of a tile."""
        return next((width for width in _WIDTHS if width >= self.inner), _WIDTHS[-1])

    def launch(self, kernel: Any, across: int, tensors: Tensors, height: int, *options: int) -> None:
        """Run `across` programs for each `height` rows."""
        launcher = kernel if INTERPRETED else torch.library.wrap_triton(kernel)
        numbers = (self.previous.numel(), self.inner, *self.steps)
        with _device_of(self.previous):
            launcher[(-(-self.count // height) * across,)](
                *tensors, *numbers, height, self.width, self.previous.dtype == torch.float64, *options
            )


def _launch(rows: Rows) -> Tensor:
    """θ, in the memory order of θ_prev."""
    made = torch.empty_like(rows.previous)
    if made.numel():
        height = _TILE // rows.width
        tensors = (rows.previous, rows.next, rows.a, rows.b, made)
        rows.launch(synthesis_kernel, -(-rows.inner // rows.width), tensors, height)
    return made


def _launch_backward(grad: Tensor, rows: Rows, needs: Needs) -> tuple[Tensor, ...]:
    """Gradients for θ_prev, θ_next, a and b; a tensor of no elements for one that is not needed."""
    results = _gradients_like(rows, needs)
    if not grad.numel():
        return tuple(result.zero_() for result in results)
    if not needs:
        return results
    scalar = [bool(needs & bit) and not step for bit, step in zip((4, 8), rows.steps, strict=True)]
    sums = [
        result.new_empty(rows.count, dtype=torch.promote_types(grad.dtype, torch.float32)) if partial else result
        for result, partial in zip(results[2:], scalar, strict=True)
    ]
    height = _STRIP // rows.width
    tensors = (_in_order_of(rows.previous, grad), rows.previous, rows.next, rows.a, rows.b, *results[:2], *sums)
    rows.launch(gradients_kernel, 1, tensors, height, needs)
    summed = [
        each.sum().to(result.dtype).view(result.shape) if partial else result
        for each, result, partial in zip(sums, results[2:], scalar, strict=True)
    ]
    return (*results[:2], *summed)


def _gradients_like(rows: Rows, needs: Needs) -> tuple[Tensor, ...]:
    """Room for the gradients of θ_prev, θ_next, a and b; no elements where one is not needed."""
    tensors = (rows.previous, rows.next, rows.a, rows.b)
    return tuple(torch.empty_like(t) if needs >> k & 1 else t.new_empty(0) for k, t in enumerate(tensors))


def _device_of(tensor: Tensor) -> AbstractContextManager[None]:
    """Makes the tensor's device the one that Triton launches on; without a GPU a kernel is traced at most."""
    return torch.cuda.device_of(tensor) if torch.cuda.is_available() else nullcontext()


def _in_order_of(like: Tensor, tensor: Tensor) -> Tensor:
    """`tensor` if it has the memory order of the dense tensor `like`, else a copy that has."""
    if _strides(tensor) == _strides(like):
        return tensor
    return torch.empty_like(like).copy_(tensor)


def _strides(tensor: Tensor) -> list[int]:
    """Strides of the dimensions that have any: of a dimension of one element they mean nothing."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size != 1]


def _is_dense_by_channel(tensor: Tensor) -> bool:
    """No gaps, no overlaps, and the first dimension the outermost in memory."""
    dims, expected = list(zip(tensor.stride(), tensor.shape, strict=True)), 1
    for stride, size in (*sorted(dims[1:]), *dims[:1]):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


# ---- plain PyTorch


def _plain(previous: Tensor, next: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """θ = a·θ_prev + b·θ_next."""
    return _along_first(a, previous) * previous + _along_first(b, next) * next


def _plain_backward(grad: Tensor, sides: Tensors, needs: Needs) -> tuple[Tensor, ...]:
    """Gradients for θ_prev, θ_next, a and b; no elements where one is not needed."""
    previous, next, a, b = sides
    makers: tuple[Callable[[], Tensor], ...] = (
        lambda: _along_first(a, grad) * grad,
        lambda: _along_first(b, grad) * grad,
        lambda: _dot(grad, previous, a),
        lambda: _dot(grad, next, b),
    )
    return tuple(make() if needs >> k & 1 else grad.new_empty(0) for k, make in enumerate(makers))


def _along_first(coefficients: Tensor, theta: Tensor) -> Tensor:
    """Shape coefficients to multiply `theta` along its first dimension."""
    return coefficients.reshape(-1, *[1] * (theta.dim() - 1)) if theta.dim() else coefficients.reshape(())


def _dot(grad: Tensor, theta: Tensor, coefficients: Tensor) -> Tensor:
    """<grad, θ> over all that one coefficient multiplies."""
    count = coefficients.numel()
    products = (grad * theta).reshape(count, theta.numel() // max(count, 1))
    wide = torch.promote_types(grad.dtype, torch.float32)
    return products.sum(1, dtype=wide).to(grad.dtype).view(coefficients.shape)


# ---- operators


Lists: TypeAlias = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]


def _forward(previous: Tensors, next: Tensors, a: Tensors, b: Tensors) -> list[Tensor]:
    _check(previous, next, a, b)
    each = zip(previous, next, a, b, strict=True)
    if previous and runs_triton(previous[0]):
        return [_launch(Rows.of(*one)) for one in each]
    return [_plain(*one) for one in each]


def _forward_fake(previous: Tensors, next: Tensors, a: Tensors, b: Tensors) -> list[Tensor]:
    if not previous or not runs_triton(previous[0]):
        return _forward(previous, next, a, b)
    _check(previous, next, a, b)
    return [torch.empty_like(Rows.of(*one).previous) for one in zip(previous, next, a, b, strict=True)]


def _backward(
    grads: Tensors, previous: Tensors, next: Tensors, a: Tensors, b: Tensors, needed: Sequence[int] | None = None
) -> Lists:
    _check(previous, next, a, b, grads)
    needs = _needs(needed, len(grads))
    sides = list(zip(previous, next, a, b, strict=True))
    if grads and runs_triton(grads[0]):
        made = [_launch_backward(g, Rows.of(*side), need) for g, side, need in zip(grads, sides, needs, strict=True)]
    else:
        made = [_plain_backward(g, side, need) for g, side, need in zip(grads, sides, needs, strict=True)]
    return _lists(made)


def _backward_fake(
    grads: Tensors, previous: Tensors, next: Tensors, a: Tensors, b: Tensors, needed: Sequence[int] | None = None
) -> Lists:
    if not grads or not runs_triton(grads[0]):
        return _backward(grads, previous, next, a, b, needed)
    _check(previous, next, a, b, grads)
    sides = zip(previous, next, a, b, _needs(needed, len(grads)), strict=True)
    return _lists([_gradients_like(Rows.of(*side), need) for *side, need in sides])


def _needs(needed: Sequence[int] | None, count: int) -> Sequence[Needs]:
    if needed is not None and len(needed) != count:
        raise FusionError(f"`needed` says what is wanted of {len(needed)} syntheses, and there are {count}")
    return [_ALL] * count if needed is None else needed


def _lists(results: Sequence[tuple[Tensor, ...]]) -> Lists:
    """The gradients for all θ_prev, for all θ_next, for all a and for all b."""
    p, n, a, b = ([result[k] for result in results] for k in range(4))
    return p, n, a, b


def _define(name: str, schema: str, body: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """The operator `replfx::name`.

    With triton it is one that compilers look into: they see the kernels, or on a CPU the plain operations. The
    interpreter's kernels cannot be traced, and without triton PyTorch has no such operator: then it is opaque, and
    `fake` makes its results without their values.
    """
    if INSTALLED and not INTERPRETED:
        return torch.library.triton_op(f"replfx::{name}", body, mutates_args=(), schema=schema)
    made = torch.library.custom_op(f"replfx::{name}", body, mutates_args=(), schema=schema)
    made.register_fake(fake)
    return made


_SIDES = "Tensor[] previous, Tensor[] next, Tensor[] a, Tensor[] b"
synthesize_operator = _define("synthesize", f"({_SIDES}) -> Tensor[]", _forward, _forward_fake)
synthesize_backward = _define(
    "synthesize_backward",
    f"(Tensor[] grads, {_SIDES}, int[]? needed=None) -> (Tensor[], Tensor[], Tensor[], Tensor[])",
    _backward,
    _backward_fake,
)


def _save(ctx: Any, inputs: tuple[Tensors, ...], output: list[Tensor]) -> None:
    ctx.save_for_backward(*(tensor for tensors in inputs for tensor in tensors))
    ctx.set_materialize_grads(False)  # a θ that is not used costs nothing


def _differentiate(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[list[Tensor | None], ...]:
    count = len(grads)
    sides = [ctx.saved_tensors[k * count : (k + 1) * count] for k in range(4)]
    needs = [sum(wanted << bit for bit, wanted in enumerate(each)) for each in zip(*ctx.needs_input_grad, strict=True)]
    live = [k for k, grad in enumerate(grads) if grad is not None and needs[k]]
    found: tuple[list[Tensor | None], ...] = tuple([None] * count for _ in range(4))
    if live:
        chosen = ([tensors[k] for k in live] for tensors in (grads, *sides))
        for bit, made in enumerate(synthesize_backward(*chosen, [needs[k] for k in live])):
            for k, gradient in zip(live, made, strict=True):
                found[bit][k] = gradient if needs[k] >> bit & 1 else None
    return found


synthesize_operator.register_autograd(_differentiate, setup_context=_save)


# ---- what is refused, before a kernel reads memory that is not there


def _check(previous: Tensors, next: Tensors, a: Tensors, b: Tensors, grads: Tensors | None = None) -> None:
    """Refuse what is no list of syntheses.

    Raises:
        FusionError: the lists differ in length, tensors in dtype or device, neighbours in shape, or coefficients are
            neither one nor one a channel.
    """
    lists = {"previous": previous, "next": next, "a": a, "b": b} | ({} if grads is None else {"grads": grads})
    lengths = {name: len(tensors) for name, tensors in lists.items()}
    if len(set(lengths.values())) > 1:
        raise FusionError(f"every synthesis needs one tensor of each list, and the lists have {lengths}")
    _check_alike({f"{name}[{k}]": tensor for name, tensors in lists.items() for k, tensor in enumerate(tensors)})
    for k, theta in enumerate(previous):
        _check_shape(f"next[{k}]", next[k], f"previous[{k}]", theta)
        if grads is not None:
            _check_shape(f"grads[{k}]", grads[k], f"previous[{k}]", theta)
        _check_coefficients(f"a[{k}]", a[k], theta)
        _check_coefficients(f"b[{k}]", b[k], theta)


def _check_alike(named: dict[str, Tensor]) -> None:
    """One floating dtype, one device."""
    if not named:
        return
    name, like = next(iter(named.items()))
    if like.dtype not in _DTYPES:
        raise FusionError(f"{name} is {like.dtype}; the kernels take {', '.join(map(str, _DTYPES))}: cast it first")
    for other, tensor in named.items():
        if tensor.dtype != like.dtype:
            raise FusionError(f"{name} is {like.dtype} and {other} {tensor.dtype}: cast all to one dtype first")
        if tensor.device != like.device:
            raise FusionError(
                f"{name} is on {like.device} and {other} on {tensor.device}: move all to one device first"
            )


def _check_shape(name: str, tensor: Tensor, other: str, theta: Tensor) -> None:
    if tensor.shape != theta.shape:
        raise FusionError(f"{name} is {_of(tensor)} and {other} {_of(theta)}: align them to one shape first")


def _check_coefficients(name: str, coefficients: Tensor, theta: Tensor) -> None:
    if coefficients.dim() <= 1 and (
        coefficients.numel() == 1 or (theta.dim() > 0 and coefficients.shape == theta.shape[:1])
    ):
        return
    channels = f" or {theta.shape[0]} (one an output channel)" if theta.dim() else ""
    raise FusionError(f"{name} is {_of(coefficients)}; for a weight {_of(theta)} it needs 1 element{channels}")


def _of(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
