"""Launches the kernels on matrices."""

import torch
from torch import Tensor
from torch.library import wrap_triton

from replfx.kernels.availability import INTERPRETED, device_of
from replfx.kernels.matrix_kernels import linear_kernel, low_rank_kernel

__all__ = ["launch_linear", "launch_low_rank"]

_HEIGHT, _WIDTH = 16, 128
_GROUP = 8


def launch_low_rank(previous: Tensor, next: Tensor, a: Tensor, b: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """θ = a·θ_prev + b·θ_next + U·Vᵀ, contiguous."""
    made = torch.empty_like(previous, memory_format=torch.contiguous_format)
    if made.numel() == 0:
        return made
    p, n = previous.flatten(1), next.flatten(1)
    rows, columns = p.shape
    launcher = low_rank_kernel if INTERPRETED else wrap_triton(low_rank_kernel)
    programs = -(-rows // _HEIGHT) * -(-columns // _WIDTH)
    strides = (stride for matrix in (p, n, u, v) for stride in matrix.stride())
    with device_of(made):
        launcher[(programs,)](
            *(p, n, a.contiguous(), b.contiguous(), u, v, made, rows, columns, u.shape[1]),
            *strides,
            *(_step(a), _step(b), _HEIGHT, _WIDTH, made.dtype == torch.float64),
        )
    return made


def launch_linear(x: Tensor, previous: Tensor, next: Tensor, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """Give y = x·θᵀ + bias, contiguous; of at most float32."""
    columns, inner = previous.shape
    made = x.new_empty(*x.shape[:-1], columns)
    if made.numel() == 0:
        return made
    flat = x.reshape(made.numel() // columns, inner)
    half = x.dtype != torch.float32
    tile_m = _tile(flat.shape[0], 128 if half else 64)
    tile_n = _tile(columns, 128 if half else 64)
    launcher = linear_kernel if INTERPRETED else wrap_triton(linear_kernel)
    programs = -(-flat.shape[0] // tile_m) * -(-columns // tile_n)
    strides = (stride for matrix in (flat, previous, next) for stride in matrix.stride())
    exact = half or torch.get_float32_matmul_precision() == "highest"
    with device_of(made):
        launcher[(programs,)](
            *(flat, previous, next, a.contiguous(), b.contiguous()),
            flat if bias is None else bias.contiguous(),  # something in its place, which is not read
            *(made, flat.shape[0], columns, inner),
            *strides,
            *(_step(a), _step(b), tile_m, tile_n, 32, _GROUP, bias is not None),
            "ieee" if exact else "tf32",
            INTERPRETED and x.dtype == torch.bfloat16,
        )
    return made


def _step(coefficients: Tensor) -> int:
    """How far the coefficient moves from row to row."""
    return int(coefficients.numel() > 1)


def _tile(size: int, most: int) -> int:
    """The power of two that covers `size`, from 16 (the least that is multiplied in one go) to `most`."""
    return next((tile for tile in (16, 32, 64) if tile >= size), most)
