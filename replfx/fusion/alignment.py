"""Alignment: a neighbour's parameter in the shape of the replaced block's. The formulas are ours.

Let a neighbour's parameter W have sizes m₀ × m₁ × … and the block's n₀ × n₁ × …. Then

    W'[i₀, i₁, …] = Π_{d: m_d ≠ n_d} g_d[i_d] · W[σ₀(i₀), σ₁(i₁), …]

with a learnable gain g_d of length n_d for every dimension d that differs, and an index map σ_d:

- channels (the first two dimensions of a kernel, all dimensions of a matrix): σ(i) = i mod m, which takes the first
  n of them where there are more, and repeats them where there are fewer. Where both the first sizes
  are k times the second ones (a fused query-key-value projection, an MLP's expansion), each of the k
  parts is aligned by itself, so that values meet values; the same for a second size k times the first.
- grouped kernels: the second dimension counts the channels of one group, and each row reads those of its own. Let the
  neighbour have s groups and the block t. Where t is r·s, each of the neighbour's groups is split into r: row i, in
  the q-th part of its group, reads σ₁(j) = (q·n₁ + j) mod m₁. Where s is r·t, r of the neighbour's groups become one,
  side by side: W' is block diagonal, and a row is zero outside of its own n₁/r columns. So a dense kernel gives a
  grouped one its diagonal blocks, and gets them back. Rows are aligned group by group. Where neither divides the
  other, groups are passed over.
- taps of a kernel (its further dimensions): the centres meet; what lies outside is cut off or zero.
- tables of relative positions, (2w−1)² rows for a window of side w: as taps, in both directions of the window.

Gains start at 1; that of the first differing dimension of a weight starts at √(m₁/n₁), which keeps the
variance of what an independent initialisation of fan-in m₁ or n₁ gives (at √(m₁·r/n₁) where r groups are put side
by side). Where nothing differs, W' = W and there are no gains. Σ n_d gains stand for Π n_d weights, and W' costs
one multiply-add a weight and dimension: dilations, strides and numbers of heads differ without any change of shape
and need no gains at all.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from replfx.errors import FusionError
from replfx.fusion.fusions import Fusion
from replfx.fusion.magnitude import largest

__all__ = ["AlignedFusion", "Alignment", "Layout", "layout_of"]


@dataclass(frozen=True)
class Layout:
    """What the dimensions of a parameter are.

    Attributes:
        what: a convolution's kernel, a table of relative positions, or anything else.
        groups: of the neighbour's convolution and of the block's.
    """

    what: Literal["kernel", "matrix", "table"]
    groups: tuple[int, int] = (1, 1)


def layout_of(source: nn.Module, target: nn.Module, *shapes: torch.Size) -> Layout:
    """The layout of a parameter, as far as its owners in the neighbour and in the block tell and its shapes there."""
    if hasattr(target, "kernel_size"):
        depthwise = all(shape[1] == 1 for shape in shapes)  # its rows are aligned as those of any other kernel
        return Layout("kernel") if depthwise else Layout("kernel", (_groups(source), _groups(target)))
    rows = [shape[0] for shape in shapes if len(shape) == 2 and not hasattr(target, "in_features")]
    windowed = len(rows) == len(shapes) and all(n % 2 and math.isqrt(n) ** 2 == n for n in rows)
    return Layout("table" if windowed and max(rows) > 1 else "matrix")


def _groups(owner: nn.Module) -> int:
    groups = getattr(owner, "groups", 1)
    return groups if isinstance(groups, int) else 1


@dataclass(frozen=True)
class _Step:
    """How one dimension is aligned: each of `parts` equal parts from its size to `size`.

    Attributes:
        groups: where the rows read different columns, of the neighbour's convolution and of the block's.
    """

    dim: int
    parts: int
    size: int
    how: Literal["channels", "groups", "taps", "table"]
    groups: tuple[int, int] = (1, 1)

    @property
    def beside(self) -> int:
        """How many of the neighbour's groups are put side by side in one of the block's."""
        return max(self.groups[0] // self.groups[1], 1)

    def __call__(self, theta: Tensor) -> Tensor:
        if self.how == "taps":
            return _centred(theta, self.dim, self.size)
        if self.how == "table":
            side, wanted = math.isqrt(theta.shape[0]), math.isqrt(self.size)
            square = theta.unflatten(0, (side, side))
            return _centred(_centred(square, 0, wanted), 1, wanted).flatten(0, 1)
        if self.how == "groups":
            return _regrouped(theta, self.size, *self.groups)
        if self.parts == 1:
            return _repeated(theta, self.dim, self.size)
        split = theta.unflatten(self.dim, (self.parts, -1))
        return _repeated(split, self.dim + 1, self.size // self.parts).flatten(self.dim, self.dim + 1)


def _repeated(theta: Tensor, dim: int, size: int) -> Tensor:
    times = -(-size // theta.shape[dim])
    longer = theta if times == 1 else torch.cat([theta] * times, dim)
    return longer.narrow(dim, 0, size)


def _regrouped(theta: Tensor, size: int, have: int, want: int) -> Tensor:
    """A kernel of `have` groups, whose rows are aligned, as one of `want` groups with `size` columns."""
    taps = [1] * (theta.dim() - 2)
    if want % have == 0:  # split: each part of a group reads columns of its own
        ratio = want // have
        split = theta.unflatten(0, (have, ratio, -1))
        columns = torch.arange(ratio * size, device=theta.device).view(1, ratio, 1, size, *taps) % theta.shape[1]
        taken: Tensor = torch.take_along_dim(split, columns, 3)
        return taken.flatten(0, 2)
    ratio = have // want  # side by side: each keeps its columns, and has zeros in those of the others
    own = torch.eye(ratio, dtype=theta.dtype, device=theta.device).view(1, ratio, 1, ratio, 1, *taps)
    parts = _repeated(theta, 1, size // ratio).unflatten(0, (want, ratio, -1)).unsqueeze(3)
    block_diagonal: Tensor = parts * own
    return block_diagonal.flatten(3, 4).flatten(0, 2)


def _centred(theta: Tensor, dim: int, size: int) -> Tensor:
    surplus = theta.shape[dim] - size
    if surplus >= 0:
        return theta.narrow(dim, surplus // 2, size)
    before = -surplus // 2
    return F.pad(theta, (*[0] * 2 * (theta.dim() - 1 - dim), before, -surplus - before))


def _steps(source: torch.Size, target: torch.Size, layout: Layout) -> list[_Step]:
    if len(source) != len(target):
        raise FusionError(f"a parameter of shape {tuple(source)} cannot be aligned to {tuple(target)}")
    steps = []
    for dim, (have, want) in enumerate(zip(source, target, strict=True)):
        if have == want:
            continue
        if layout.what == "kernel" and dim >= 2:
            steps.append(_Step(dim, 1, want, "taps"))
        elif layout.what == "table" and dim == 0:
            steps.append(_Step(dim, 1, want, "table"))
        elif dim < 2 and _keeps_groups(target, layout.groups):
            rows = dim == 0
            steps.append(
                _Step(dim, layout.groups[0] if rows else 1, want, "channels" if rows else "groups", layout.groups)
            )
        else:
            steps.append(_Step(dim, _parts(source, target, dim), want, "channels"))
    return steps


def _keeps_groups(target: torch.Size, groups: tuple[int, int]) -> bool:
    """Whether there are groups, and they can be split or put side by side."""
    have, want = groups
    if groups == (1, 1) or want % have == 0:
        return groups != (1, 1)
    return have % want == 0 and target[0] % have == 0 and target[1] % (have // want) == 0


def _parts(source: torch.Size, target: torch.Size, dim: int) -> int:
    """k, if the size along `dim` is k times the other channel dimension's in both shapes; else 1."""
    if dim > 1 or len(source) < 2:
        return 1
    have, want = source[dim] / source[1 - dim], target[dim] / target[1 - dim]
    return int(have) if have == want and have == int(have) else 1


class Alignment(nn.Module):
    """Aligns the parameters of one neighbour; the module's docstring has the formula.

    Args:
        sources: shape of each parameter that the neighbour gives, by the block's name for it.
        targets: shape that the block's has.
        layouts: what the dimensions are.
        dtype, device: where the gains are to live.

    Attributes:
        gains: all gains, one vector (of one dimension, as all of a fusion's parameters).
    """

    def __init__(
        self,
        sources: Mapping[str, torch.Size],
        targets: Mapping[str, torch.Size],
        layouts: Mapping[str, Layout],
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.steps: list[tuple[str, _Step]] = []
        starts: list[float] = []
        for name, shape in targets.items():
            steps = _steps(sources[name], shape, layouts[name])
            scaled = bool(steps) and layouts[name].what != "table" and len(shape) > 1
            read = shape[1] // max(step.beside for step in steps) if scaled else 1
            first = math.sqrt(sources[name][1] / read) if scaled else 1.0
            for i, step in enumerate(steps):
                self.steps.append((name, step))
                starts += [1.0 if i else first] * step.size
        self.sizes = [step.size for _, step in self.steps]
        self.gains = nn.Parameter(torch.tensor(starts, dtype=dtype.to_real(), device=device)) if starts else None

    def forward(self, theta: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same parameters in the block's shapes."""
        if self.gains is None:
            return dict(theta)
        aligned = dict(theta)
        for (name, step), gain in zip(self.steps, self.gains.split(self.sizes), strict=True):
            if name in aligned:
                value = step(aligned[name])
                aligned[name] = value * gain.view(-1, *[1] * (value.dim() - 1 - step.dim))
        return aligned

    def bound(self, sizes: Mapping[str, float]) -> dict[str, float]:
        """What no magnitude in the aligned parameters exceeds, from the largest ones before."""
        if self.gains is None:
            return dict(sizes)
        aligned = dict(sizes)
        for (name, _), gain in zip(self.steps, self.gains.split(self.sizes), strict=True):
            aligned[name] *= max(largest(gain), 1.0)  # a gain under 1 may come after one that overflows
        return aligned

    def extra_repr(self) -> str:
        return f"parameters={list(dict(self.steps))}, gains={sum(self.sizes)}"


class AlignedFusion(Fusion):
    """A fusion whose neighbours' parameters are aligned first.

    Args:
        rule: the fusion of parameters of the block's own shapes.
        previous, next: the alignment of each neighbour.
    """

    elementwise: ClassVar[bool] = False

    def __init__(self, rule: Fusion, previous: Alignment, next: Alignment) -> None:
        nn.Module.__init__(self)
        self.rule = rule
        self.separate = rule.separate
        self.align_previous, self.align_next = previous, next

    def forward(self, previous: Mapping[str, Tensor], next: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self.rule.forward(self.align_previous.forward(previous), self.align_next.forward(next))

    def bound(self, previous: Mapping[str, float], next: Mapping[str, float]) -> float:
        return self.rule.bound(self.align_previous.bound(previous), self.align_next.bound(next))
