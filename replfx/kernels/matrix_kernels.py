"""Triton kernels on matrices: the synthesis with a low-rank term, and a matrix product with the synthesis inside."""
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import triton
import triton.language as tl

__all__ = ["linear_kernel", "low_rank_kernel"]


@triton.jit
def low_rank_kernel(
    p, n, a, b, u, v, w, rows, columns, rank,
    p_row, p_column, n_row, n_column, u_row, u_column, v_row, v_column, step_a, step_b,
    height: tl.constexpr, width: tl.constexpr, double: tl.constexpr,
):  # fmt: skip
    """Makes w = a·p + b·n + u·vᵀ on one tile, w (rows, columns) contiguous, the rest by strides.

    The term is summed as outer products of columns: for the ranks that are low the kernel waits for memory all the
    same, and so every dtype is summed exactly in what the synthesis is computed in.
    """
    across = tl.cdiv(columns, width)
    row = ((tl.program_id(0) // across) * height + tl.arange(0, height)).to(tl.int64)
    column = ((tl.program_id(0) % across) * width + tl.arange(0, width)).to(tl.int64)
    in_rows = row < rows
    in_columns = column < columns
    there = in_rows[:, None] & in_columns[None, :]
    kind: tl.constexpr = tl.float64 if double else tl.float32
    before = tl.load(p + row[:, None] * p_row + column[None, :] * p_column, mask=there, other=0.0).to(kind)
    after = tl.load(n + row[:, None] * n_row + column[None, :] * n_column, mask=there, other=0.0).to(kind)
    made = tl.load(a + row * step_a, mask=in_rows, other=0.0).to(kind)[:, None] * before
    made += tl.load(b + row * step_b, mask=in_rows, other=0.0).to(kind)[:, None] * after
    for k in range(rank):
        left = tl.load(u + row * u_row + k * u_column, mask=in_rows, other=0.0).to(kind)
        right = tl.load(v + column * v_row + k * v_column, mask=in_columns, other=0.0).to(kind)
        made += left[:, None] * right[None, :]
    tl.store(w + row[:, None] * columns + column[None, :], made.to(w.dtype.element_ty), mask=there)


@triton.jit
def linear_kernel(
    x, p, n, a, b, bias, y, m, columns, inner,
    x_row, x_column, p_row, p_column, n_row, n_column, step_a, step_b,
    tile_m: tl.constexpr, tile_n: tl.constexpr, tile_k: tl.constexpr, group: tl.constexpr,
    has_bias: tl.constexpr, precision: tl.constexpr, widen: tl.constexpr,
):  # fmt: skip
    """Makes y = x·(a·p + b·n)ᵀ + bias on one tile, y (m, columns) contiguous, x, p and n by strides.

    Each tile of weights is made in float32 from those of p and n, rounded to their dtype, and multiplied. Programs
    are ordered in groups of `group` tiles along m, which read the same weights while those are in the cache.
    `widen` multiplies in float32 what is rounded already: the interpreter cannot multiply bfloat16.
    """
    down = tl.cdiv(m, tile_m)
    band = group * tl.cdiv(columns, tile_n)
    first = (tl.program_id(0) // band) * group
    height = tl.minimum(down - first, group)
    row = (first + (tl.program_id(0) % band) % height) * tile_m + tl.arange(0, tile_m)
    column = ((tl.program_id(0) % band) // height) * tile_n + tl.arange(0, tile_n)
    in_rows = row < m
    in_columns = column < columns
    row = row.to(tl.int64)
    column = column.to(tl.int64)
    scale_a = tl.load(a + column * step_a, mask=in_columns, other=0.0).to(tl.float32)
    scale_b = tl.load(b + column * step_b, mask=in_columns, other=0.0).to(tl.float32)
    sums = tl.zeros((tile_m, tile_n), dtype=tl.float32)
    for start in range(0, inner, tile_k):
        k = start + tl.arange(0, tile_k)
        here = (k < inner)[:, None] & in_columns[None, :]
        before = tl.load(p + k[:, None] * p_column + column[None, :] * p_row, mask=here, other=0.0).to(tl.float32)
        after = tl.load(n + k[:, None] * n_column + column[None, :] * n_row, mask=here, other=0.0).to(tl.float32)
        made = (scale_a[None, :] * before + scale_b[None, :] * after).to(p.dtype.element_ty)
        there = in_rows[:, None] & (k < inner)[None, :]
        factor = tl.load(x + row[:, None] * x_row + k[None, :] * x_column, mask=there, other=0.0)
        if widen:
            sums = tl.dot(factor.to(tl.float32), made.to(tl.float32), sums, input_precision=precision)
        else:
            sums = tl.dot(factor, made, sums, input_precision=precision)
    if has_bias:
        sums += tl.load(bias + column, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    tl.store(
        y + row[:, None] * columns + column[None, :],
        sums.to(y.dtype.element_ty),
        mask=in_rows[:, None] & in_columns[None, :],
    )
