"""Blocks left out at random while training: stochastic depth (arXiv 1603.09382) and LayerDrop (arXiv 1909.11556)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from benchmarks.accuracy.resnet import BasicBlock, skipped


class Dropped(nn.Module):
    """A residual block that is left out of a training step, for the whole batch, with some probability.

    Args:
        block: the block; of one that changes its activation's shape the shortcut stays.
        survival: probability that it runs.
        scaled: in evaluation its branch counts `survival` times (stochastic depth), or else fully (LayerDrop).

    """

    def __init__(self, block: nn.Module, survival: float, *, scaled: bool) -> None:
        super().__init__()
        self.block = block
        self.survival = survival
        self.scaled = scaled

    def forward(self, x: Tensor) -> Tensor:
        """Run the block, or not."""
        if self.training and float(torch.rand(())) >= self.survival:
            left: Tensor = skipped(self.block)(x)
            return left
        y: Tensor = self.block(x)
        if self.training or not self.scaled:
            return y
        if isinstance(self.block, BasicBlock):  # its ReLU follows the sum
            return torch.relu(self.block.shortcut(x) + self.survival * self.block.branch(x))
        return torch.lerp(skipped(self.block)(x), y, self.survival)


def survival(options: Mapping[str, str], default: float) -> float:
    """Read the option `survival`.

    Raises:
        ValueError: another option, or no probability.

    """
    unknown = set(options) - {"survival"}
    value = float(options.get("survival", default))
    if unknown or not 0 < value <= 1:
        raise ValueError(f"there is one option, survival, over 0 and at most 1, not {dict(options)}")
    return value


def stochastic_depth(model: nn.Module, paths: Sequence[str], last: float) -> nn.Module:
    """Let the l-th of L blocks run with probability 1 − l/L · (1 − last), the published linear rule."""
    for number, path in enumerate(paths, start=1):
        chance = 1 - number / len(paths) * (1 - last)
        model.set_submodule(path, Dropped(model.get_submodule(path), chance, scaled=True))
    return model


def layerdrop(model: nn.Module, paths: Sequence[str], kept: float) -> nn.Module:
    """Let every block run with the same probability."""
    for path in paths:
        model.set_submodule(path, Dropped(model.get_submodule(path), kept, scaled=False))
    return model
