"""The public functions: Triton kernels where they run, plain PyTorch elsewhere."""

from collections.abc import Sequence

from torch import Tensor

from replfx.kernels import plain
from replfx.kernels.availability import runs_triton
from replfx.kernels.checks import check_linear, check_low_rank, check_syntheses

__all__ = ["synthesize", "synthesize_low_rank", "synthesized_linear"]


def synthesize(
    previous: Sequence[Tensor], next: Sequence[Tensor], a: Sequence[Tensor], b: Sequence[Tensor]
) -> list[Tensor]:
    """Give θ[c, …] = a[c]·θ_prev[c, …] + b[c]·θ_next[c, …] for each of K syntheses.

    On a GPU with triton this is the operator `replfx::synthesize`: a launch covers up to eight syntheses whose
    channels are of about one size (1, up to 4, up to 16, up to 64, or more elements), without copying them together,
    and computes in float32 (float64 for float64). Its backward pass, `replfx::synthesize_backward`, covers eight in
    a launch likewise; it reads each dW once and makes all four gradients of it. Scalar coefficients take one more
    launch, for the sum of the partial sums, which has room for sixteen. No result depends on the order in which
    programs run.

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
        from replfx.kernels import synthesis_ops

        made: list[Tensor] = synthesis_ops.synthesize(list(previous), list(next), list(a), list(b))
        return made
    check_syntheses(previous, next, a, b)
    return [plain.synthesize(*each) for each in zip(previous, next, a, b, strict=True)]


def synthesize_low_rank(previous: Tensor, next: Tensor, a: Tensor, b: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Give θ = a·θ_prev + b·θ_next + U·Vᵀ, with U·Vᵀ never in memory.

    On a GPU with triton this is the operator `replfx::synthesize_low_rank`, one launch. Its backward pass takes two
    matrix products, dU = dW·V and dV = dWᵀ·U, and `replfx::synthesize_backward` for the rest.

    Args:
        previous: (out, in, …), read by strides where it is a matrix, copied where more dimensions cannot be seen
            as a matrix.
        next: likewise.
        a: one element or `out` of them.
        b: likewise.
        u: (out, r), by strides.
        v: (in · …, r), by strides: a row for each element of an output channel.

    Returns:
        (out, in, …), contiguous. Gradients flow into all inputs, once.

    Raises:
        FusionError: shapes, dtypes or devices do not fit.

    Example:
        >>> w, u, v = torch.randn(8, 6), torch.randn(8, 2), torch.randn(6, 2)
        >>> theta = synthesize_low_rank(w, w, torch.ones(1), torch.zeros(1), u, v)
        >>> torch.testing.assert_close(theta, w + u @ v.T)
    """
    if runs_triton(previous):
        from replfx.kernels import matrix_ops

        made: Tensor = matrix_ops.synthesize_low_rank(previous, next, a, b, u, v)
        return made
    check_low_rank(previous, next, a, b, u, v)
    return plain.synthesize_low_rank(previous, next, a, b, u, v)


def synthesized_linear(
    x: Tensor, previous: Tensor, next: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Give x·θᵀ + bias with θ = a·θ_prev + b·θ_next, which the forward pass never has in memory.

    On a GPU with triton this is the operator `replfx::synthesized_linear`: one launch of a matrix product whose
    prologue makes each tile of θ from those of its neighbours, rounds it to the dtype, and sums in float32. (float32
    inputs are multiplied as `torch.set_float32_matmul_precision` says; for float64 θ is synthesised first.) Its
    backward pass makes θ and dW for its time, for matrix products and `replfx::synthesize_backward`.

    Args:
        x: (…, in).
        previous: (out, in), any strides.
        next: likewise.
        a: one element or `out` of them.
        b: likewise.
        bias: (out,), or None.

    Returns:
        (…, out), contiguous on the kernel's path. Gradients flow into all inputs, once.

    Raises:
        FusionError: shapes, dtypes or devices do not fit.

    Example:
        >>> x, before, after = torch.randn(5, 3), torch.randn(2, 3), torch.randn(2, 3)
        >>> y = synthesized_linear(x, before, after, torch.ones(2), torch.ones(2))
        >>> torch.testing.assert_close(y, x @ (before + after).T)
    """
    if runs_triton(previous):
        from replfx.kernels import matrix_ops

        made: Tensor = matrix_ops.synthesized_linear(x, previous, next, a, b, bias)
        return made
    check_linear(x, previous, next, a, b, bias)
    return plain.synthesized_linear(x, previous, next, a, b, bias)
