"""Models whose replaced blocks have computed weights: properties that synthesise when they are read."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn


class Coefficients(nn.Module):
    """One a and one b for each computed weight of a block."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.previous, self.next = (nn.Parameter(torch.full((count,), 0.5)) for _ in range(2))

    def combine(self, index: int, previous: Tensor, next: Tensor) -> Tensor:
        a, b = (side.split(1)[index].view(-1, *[1] * (previous.dim() - 1)) for side in (self.previous, self.next))
        return a * previous + b * next


@lru_cache
def _computing(kind: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    def computed(name: str) -> property:
        def read(self: Any) -> Tensor:
            index, before, after = self._reads[name]
            return self._coefficients[0].combine(index, getattr(before, name), getattr(after, name))

        return property(read)

    return type(kind.__name__, (kind,), {name: computed(name) for name in names})


def compute(model: nn.Module, path: str, previous: str, next: str) -> None:
    """Let the matrices of the block at `path` be made from its neighbours', which are of its class."""
    block, before, after = (model.get_submodule(each) for each in (path, previous, next))
    names = [name for name, parameter in block.named_parameters() if parameter.dim() > 1]
    block.coefficients = coefficients = Coefficients(len(names))
    owners: dict[str, dict[str, Any]] = {}
    for index, name in enumerate(names):
        owner, _, leaf = name.rpartition(".")
        sides = (before.get_submodule(owner), after.get_submodule(owner))
        owners.setdefault(owner, {})[leaf] = (index, *sides)
    for owner, reads in owners.items():
        module: Any = block.get_submodule(owner)
        module._reads, module._coefficients = reads, (coefficients,)  # in a tuple: no submodule of it
        for leaf in reads:
            del module._parameters[leaf]
        module.__class__ = _computing(type(module), tuple(reads))
