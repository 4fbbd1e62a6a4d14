"""A peer: a linear map in a block's place, estimated in closed form from calibration activations.

ReplaceMe (Shopov et al., arXiv 2505.02819) puts one linear map in the place of a run of transformer blocks. This is its
least-squares form, of our own code, for single blocks: a d×d map of the channels with a shift, y ≈ W x + c. There it is
merged into the layer before; here it is a layer of its own, and is fine-tuned with the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

__all__ = ["ChannelMap", "with_linear_maps"]


class ChannelMap(nn.Module):
    """y = W x + c over the channels (dimension 1) of (N, C, H, W)."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map the channels of every place."""
        return nn.functional.conv2d(x, self.weight[:, :, None, None], self.bias)


def with_linear_maps(model: nn.Module, paths: list[str], batches: Iterable[Tensor]) -> nn.Module:
    """Put the best linear map into each block's place; the blocks must keep the shape of their activation.

    Args:
        model: in evaluation mode, changed in place.
        paths: the blocks.
        batches: calibration images (N, C, H, W).

    """
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    handles = [model.get_submodule(path).register_forward_hook(_adder(path, sums)) for path in paths]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for handle in handles:
        handle.remove()
    for path in paths:
        gram, products = sums[path]
        found = torch.linalg.pinv(gram, hermitian=True) @ products
        model.set_submodule(path, ChannelMap(found[:-1].T.float(), found[-1].float()))
    return model


def _adder(
    path: str, sums: dict[str, tuple[Tensor, Tensor]]
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def add(block: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        x, y = (t.double().movedim(1, -1).flatten(0, -2) for t in (args[0], output))
        x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
        gram, products = x.T @ x, x.T @ y
        before = sums.get(path)
        sums[path] = (gram, products) if before is None else (before[0] + gram, before[1] + products)

    return add
