"""The largest magnitude in a tensor: whether all is finite, without temporaries of its size as `isfinite` makes."""

import math

import torch
from torch import Tensor

from replfx.fusion.sharded import gather

__all__ = ["is_finite", "largest"]


def largest(tensor: Tensor) -> float:
    """Give max |x| over all elements x, and over both parts of complex ones; NaN if one is, 0 if there are none."""
    if tensor.numel() == 0:
        return 0.0
    values = tensor.detach()
    ends = torch.aminmax(torch.view_as_real(values) if values.is_complex() else values)
    whole = [gather(end) for end in ends]  # of a sharded tensor, over all shards
    return float(torch.stack(whole).abs().max())  # a tensor's max gives NaN where there is one


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is infinite or NaN."""
    return math.isfinite(largest(tensor))
