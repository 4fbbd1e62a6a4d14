"""Progressive stacking (Gong et al., ICML 2019): train a shallow model, then grow it by copying blocks."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import Tensor, nn
from torch.optim import Optimizer


class Absent(nn.Module):
    """The place of a block that is yet to come.

    Args:
        path: where it is.
        source: path of the neighbour of which it will be a copy.

    """

    def __init__(self, path: str, source: str) -> None:
        super().__init__()
        self.path = path
        self.source = source

    def forward(self, x: Tensor) -> Tensor:
        """Give the activation on as it is."""
        return x


def shallow(model: nn.Module, chosen: Sequence[tuple[str, str]]) -> nn.Module:
    """Leave the chosen blocks out; each is given with the path of a neighbour that is like it."""
    for path, source in chosen:
        model.set_submodule(path, Absent(path, source))
    return model


def grown(model: nn.Module, optimizer: Optimizer) -> nn.Module:
    """Put copies of the neighbours in all absent blocks' places, the state of the optimizer included."""
    absent = [module for module in model.modules() if isinstance(module, Absent)]
    for place in absent:
        source = model.get_submodule(place.source)
        block = copy.deepcopy(source)
        model.set_submodule(place.path, block)
        for old, new in zip(source.parameters(), block.parameters(), strict=True):
            new.grad = None
            if old in optimizer.state:
                optimizer.state[new] = copy.deepcopy(optimizer.state[old])
        optimizer.param_groups[0]["params"] += list(block.parameters())
    return model
