"""What the tests of the kernels draw: lists of syntheses, with tensors laid out in all ways."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from replfx.kernels.synthesis import INTERPRETED, runs_triton
from tests.kernels.reference import DTYPES

__all__ = ["DEVICES", "Case", "One", "cases", "in_triton", "laid_out", "only_interpreted", "only_plain", "random"]

DEVICES = [
    pytest.param("cpu", id="interpreted" if INTERPRETED else "plain"),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
only_interpreted = pytest.mark.skipif(not INTERPRETED, reason="test_interpreter.py runs it in the interpreter")
only_plain = pytest.mark.skipif(INTERPRETED, reason="of plain PyTorch on a CPU")

LAYOUTS = ("contiguous", "channels_last", "transposed", "gaps", "offset")


def in_triton(device: str) -> bool:
    return runs_triton(torch.empty(0, device=device))


def random(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int) -> Tensor:
    """The same numbers on every device."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(dtype).to(device)


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values in another place: `layout` if the tensor has the dimensions for it."""
    if layout == "channels_last" and tensor.dim() == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "transposed" and tensor.dim() >= 2:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "gaps" and tensor.dim() >= 1:
        return torch.stack([tensor, torch.full_like(tensor, torch.nan)], -1)[..., 0]
    if layout == "offset":
        return torch.cat([tensor.new_full((3,), torch.nan), tensor.reshape(-1)])[3:].view(tensor.shape)
    return tensor


@dataclass(frozen=True)
class One:
    """A synthesis.

    Attributes:
        per_channel: whether a and b have one element a channel.
        layouts: of θ_prev, θ_next and dθ.
        needs: which of θ_prev, θ_next, a and b need a gradient.
        used: whether θ gets one.
    """

    shape: tuple[int, ...]
    per_channel: tuple[bool, bool]
    layouts: tuple[str, str, str]
    needs: tuple[bool, bool, bool, bool]
    used: bool


@dataclass(frozen=True)
class Case:
    """Syntheses of one dtype."""

    ones: tuple[One, ...]
    dtype: torch.dtype
    seed: int

    def tensors(self, device: str) -> list[list[Tensor]]:
        """θ_prev, θ_next, a and b of each; leaves."""
        lists = []
        for k, one in enumerate(self.ones):
            shapes = [one.shape, one.shape, *((one.shape[0],) if each else (1,) for each in one.per_channel)]
            made = [random(shape, self.dtype, device, self.seed + 10 * k + j) for j, shape in enumerate(shapes)]
            made[:2] = [laid_out(t, layout) for t, layout in zip(made[:2], one.layouts[:2], strict=True)]
            lists.append([t.detach().requires_grad_(need) for t, need in zip(made, one.needs, strict=True)])
        return [list(each) for each in zip(*lists, strict=True)] if lists else [[], [], [], []]

    def grads(self, device: str) -> list[Tensor]:
        """A dθ for each."""
        return [
            laid_out(random(one.shape, self.dtype, device, self.seed + 10 * k + 9), one.layouts[2])
            for k, one in enumerate(self.ones)
        ]


# Widths on both sides of each tile's, rows of more than one tile, nothing, and one element.
_sizes = st.sampled_from((0, 1, 2, 3, 5, 8, 17))
_shapes = st.one_of(
    st.just(()),
    st.lists(_sizes, min_size=1, max_size=3).map(tuple),
    st.tuples(_sizes, _sizes, st.just(3), st.sampled_from((1, 3))),
    st.sampled_from(((3, 257), (2, 700), (1, 1100), (2500,), (1030, 2), (140, 15), (37, 60))),
)


@st.composite
def _ones(draw: Any) -> One:
    shape = draw(_shapes)
    channels = st.booleans() if shape else st.just(False)
    needs = draw(st.one_of(st.just((True,) * 4), st.tuples(*[st.booleans()] * 4)))
    layouts = draw(st.tuples(*[st.sampled_from(LAYOUTS)] * 3))
    return One(shape, (draw(channels), draw(channels)), layouts, needs, draw(st.integers(0, 4)) > 0)


def cases() -> st.SearchStrategy[Case]:
    """Up to five syntheses."""
    lists = st.lists(_ones(), max_size=5).map(tuple)
    return st.builds(Case, lists, st.sampled_from(DTYPES), st.integers(0, 1000))
