"""Activation checkpointing: less memory for more time, and the same training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Checkpointed(nn.Module):
    """A block whose inside is computed again for the backward pass.

    Its batch normalisations would count a batch twice; the second time they don't.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        """Run the block."""
        if not (self.training and torch.is_grad_enabled()):
            direct: Tensor = self.block(x)
            return direct
        recomputing = False

        def run(x: Tensor) -> Tensor:
            nonlocal recomputing
            buffers = [b.clone() for b in self.block.buffers()] if recomputing else []
            try:
                y: Tensor = self.block(x)
            finally:  # the second time PyTorch leaves by an exception as soon as it has all it needs
                for buffer, before in zip(self.block.buffers(), buffers, strict=False):
                    buffer.copy_(before)
            recomputing = True
            return y

        result: Tensor = checkpoint(run, x, use_reentrant=False)
        return result


def checkpointed(model: nn.Module, paths: Sequence[str]) -> nn.Module:
    """Checkpoint each of the blocks."""
    for path in paths:
        model.set_submodule(path, Checkpointed(model.get_submodule(path)))
    return model
