"""Least squares from sums of products alone, so that memory does not grow with the number of rows."""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Gram", "solve"]


@dataclass
class Gram:
    """Σ wwᵀ over rows w = (regressors, target), apart for each channel, in float64.

    Attributes:
        sums: (channels, k, k), or None before the first row.
    """

    sums: Tensor | None = None

    def add(self, columns: list[Tensor], weights: Tensor | None = None) -> None:
        """Add rows.

        Args:
            columns: k tensors (rows, channels); the last is the target.
            weights: (rows, channels), how much each row counts; None for all alike.
        """
        rows = torch.stack([column.double() for column in columns], -1)  # (rows, channels, k)
        weighed = rows if weights is None else rows * weights.double().unsqueeze(-1)
        sums = torch.einsum("nci,ncj->cij", weighed, rows)
        self.sums = sums if self.sums is None else self.sums + sums


def solve(sums: Tensor) -> Tensor:
    """Coefficients (…, k − 1) of the regressors for sums (…, k, k); the smallest ones where several are as good."""
    regressors, target = sums[..., :-1, :-1], sums[..., :-1, -1:]
    # In units of each regressor's own size, else "small" would mean nothing.
    scale = regressors.diagonal(dim1=-2, dim2=-1).clamp_min(torch.finfo(torch.float64).tiny).rsqrt()
    unit = regressors * scale.unsqueeze(-1) * scale.unsqueeze(-2)
    found: Tensor = torch.linalg.pinv(unit, hermitian=True, rtol=1e-10) @ (target * scale.unsqueeze(-1))
    return found.squeeze(-1) * scale
