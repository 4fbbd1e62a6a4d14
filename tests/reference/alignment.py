"""Alignment of a parameter by loops over its indices, after the formula in replfx/fusion/alignment.py.

W'[i₀, i₁, …] = Π_{d: m_d ≠ n_d} g_d[i_d] · W[σ₀(i₀), σ₁(i₁), …]

A layout is "kernel", "matrix" or "table"; of a kernel's channels `groups` says in how many groups they are, in the
neighbour and in the block.
"""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

Gains = dict[int, Tensor]  # by dimension
Groups = tuple[int, int]
UNGROUPED = (1, 1)


def differing(source: Sequence[int], target: Sequence[int]) -> list[int]:
    """The dimensions that have gains."""
    return [d for d, (m, n) in enumerate(zip(source, target, strict=True)) if m != n]


def starts(source: Sequence[int], target: Sequence[int], layout: str, groups: Groups = UNGROUPED) -> list[float]:
    """The first gain of each differing dimension at the start; all of a dimension are equal."""
    found = [1.0] * len(differing(source, target))
    if found and len(source) > 1 and layout != "table":
        read = target[1]  # how many entries of a row come from the neighbour's
        if source[1] != target[1] and divide(target, groups) and groups[0] > groups[1]:
            read = target[1] * groups[1] // groups[0]
        found[0] = math.sqrt(source[1] / read)
    return found


def divide(target: Sequence[int], groups: Groups) -> bool:
    """Whether the groups of one side can be put together from those of the other."""
    s, t = groups
    if s == t == 1:
        return False
    return t % s == 0 or (s % t == 0 and target[0] % s == 0 and target[1] % (s // t) == 0)


def column(i: int, j: int, source: Sequence[int], target: Sequence[int], groups: Groups) -> int | None:
    """Where the entry of row i and column j of a grouped kernel comes from, in its row; None for a zero."""
    (s, t), wide = groups, target[1]
    if t % s == 0:
        group = i // (target[0] // t)
        return (group % (t // s) * wide + j) % source[1]
    width = wide * t // s  # columns of the block's group that one of the neighbour's groups has
    part = i // (target[0] // s) % (s // t)
    return (j - part * width) % source[1] if part * width <= j < (part + 1) * width else None


def origin(
    i: int, dim: int, source: Sequence[int], target: Sequence[int], layout: str, groups: Groups = UNGROUPED
) -> int | None:
    """σ(i) along one dimension; None for what lies outside."""
    m, n = source[dim], target[dim]
    if m == n:
        return i
    if dim == 0 and divide(target, groups):
        part, rest = divmod(i, n // groups[0])
        return part * (m // groups[0]) + rest % (m // groups[0])
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


def align(theta: Tensor, gains: Gains, target: Sequence[int], layout: str, groups: Groups = UNGROUPED) -> Tensor:
    """W', by the place in W of each of its entries."""
    source = tuple(theta.shape)
    maps = [[origin(i, dim, source, target, layout, groups) for i in range(n)] for dim, n in enumerate(target)]
    flat, inside = [], []
    for index in itertools.product(*(range(n) for n in target)):
        places, position = [maps[dim][i] for dim, i in enumerate(index)], 0
        if len(source) > 1 and source[1] != target[1] and divide(target, groups):
            places[1] = column(index[0], index[1], source, target, groups)
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
            found[name][dim] = vector[position : position + target[dim]]
            position += target[dim]
    assert position == (0 if vector is None else len(vector))
    return found
