"""Alignment of a parameter by loops over its indices, after the formula in replfx/fusion/alignment.py.

W'[i₀, i₁, …] = Π_{d: m_d ≠ n_d} g_d[i_d] · W[σ₀(i₀), σ₁(i₁), …]
"""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

Gains = dict[int, Tensor]  # by dimension


def differing(source: Sequence[int], target: Sequence[int]) -> list[int]:
    """The dimensions that have gains."""
    return [d for d, (m, n) in enumerate(zip(source, target, strict=True)) if m != n]


def starts(source: Sequence[int], target: Sequence[int], layout: str) -> list[float]:
    """The first gain of each differing dimension at the start; all of a dimension are equal."""
    found = [1.0] * len(differing(source, target))
    if found and len(source) > 1 and layout != "table":
        found[0] = math.sqrt(source[1] / target[1])
    return found


def origin(i: int, dim: int, source: Sequence[int], target: Sequence[int], layout: str) -> int | None:
    """σ(i) along one dimension; None for what lies outside."""
    m, n = source[dim], target[dim]
    if m == n:
        return i
    if layout == "kernel" and dim >= 2:
        return _centred(i, m, n)
    if layout == "table" and dim == 0:
        have, want = math.isqrt(m), math.isqrt(n)
        row, column = (_centred(place, have, want) for place in divmod(i, want))
        return None if row is None or column is None else row * have + column
    other = 1 - dim
    if layout != "table" and dim < 2 and len(source) > 1:
        for k in range(2, n + 1):
            if m == k * source[other] and n == k * target[other]:
                part, rest = divmod(i, target[other])
                return part * source[other] + rest % source[other]
    return i % m


def _centred(i: int, m: int, n: int) -> int | None:
    """Middle to middle; of the two next to the middle of an even number of taps, the first ones."""
    place = i + (m - n) // 2 if m >= n else i - (n - m) // 2
    return place if 0 <= place < m else None


def align(theta: Tensor, gains: Gains, target: Sequence[int], layout: str) -> Tensor:
    """W', by the place in W of each of its entries."""
    source = tuple(theta.shape)
    maps = [[origin(i, dim, source, target, layout) for i in range(n)] for dim, n in enumerate(target)]
    flat, inside = [], []
    for index in itertools.product(*(range(n) for n in target)):
        places, position = [maps[dim][i] for dim, i in enumerate(index)], 0
        inside.append(None not in places)
        for place, size in zip(places, source, strict=True):
            position = position * size + (place or 0)
        flat.append(position)
    entries = theta.flatten()[flat] * torch.tensor(inside, dtype=theta.dtype)
    for dim in differing(source, target):
        indices = [index[dim] for index in itertools.product(*(range(n) for n in target))]
        entries = entries * gains[dim][indices]
    return entries.view(*target)


def split_gains(
    vector: Tensor | None, sources: dict[str, Sequence[int]], targets: dict[str, Sequence[int]]
) -> dict[str, Gains]:
    """All gains of a neighbour, laid end to end, by parameter and dimension."""
    found: dict[str, Gains] = {}
    position = 0
    for name, target in targets.items():
        found[name] = {}
        for dim in differing(sources[name], target):
            assert vector is not None
            found[name][dim] = vector[position : position + target[dim]]
            position += target[dim]
    assert position == (0 if vector is None else len(vector))
    return found
