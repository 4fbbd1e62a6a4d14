"""What single blocks cost: forward and backward of each alone, on inputs as it gets them in its model."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from replfx.measure import Rise, memory_rises
from replfx.modules.paths import block_at
from replfx.modules.tree import tensors_in
from replfx.tracing import Inputs

__all__ = ["BlockCost", "Work"]

_READING = 10e-3  # seconds: short blocks run several times in one reading
_TIMES = (3, 8)  # at least, so that memory is as warm as the block before leaves it; and at most


@dataclass(frozen=True)
class BlockCost:
    """What a block costs in a training step."""

    seconds: tuple[float, ...]  # of forward and backward, one value a round
    forward: Rise  # how memory rises in its forward; what is kept at the end is there until its backward
    backward: Rise  # how memory rises in its backward, gradients of its own parameters included


class Work:
    """Forward and backward of one block of a model, whose other gradients are taken to be there, as in a step."""

    def __init__(self, model: nn.Module, path: str, call: Inputs) -> None:
        self._block, self._call = block_at(model, path), call
        self._own = [p for p in self._block.parameters() if p.requires_grad]
        self._given = self._fresh()
        self._outputs: list[Tensor] = []
        self._grads: list[Tensor] = []
        self._count = 1

    def _fresh(self) -> Inputs:
        """Inputs for one run: what it does to them in place, or appends to a cache, is gone in the next."""

        def fresh(tensor: Tensor) -> Tensor:
            # Not a leaf, into which a block could not write.
            return tensor.detach().requires_grad_().clone() if tensor.requires_grad else tensor.detach()

        return self._call.map(fresh)

    def _clear(self) -> None:
        for parameter in self._own:
            parameter.grad = None

    def _forward(self) -> None:
        result = self._block(*self._given.args, **self._given.kwargs)
        self._outputs = [t for t in tensors_in(result, caches=False) if t.requires_grad]
        if len(self._grads) != len(self._outputs):
            self._grads = [torch.ones_like(t) for t in self._outputs]

    def _backward(self) -> None:
        if self._outputs:
            torch.autograd.backward(self._outputs, self._grads)
        self._outputs = []

    def warm_up(self, clock: Callable[[], float]) -> None:
        """Run twice, untimed but to find how often it is to run in a reading."""
        self.seconds(clock)
        least, most = _TIMES
        self._count = min(most, max(least, int(_READING / max(self.seconds(clock), 1e-6))))

    def seconds(self, clock: Callable[[], float]) -> float:
        """Time a run."""
        given = [self._fresh() for _ in range(self._count)]
        start = clock()
        for self._given in given:
            self._clear()
            self._forward()
            self._backward()
        return (clock() - start) / self._count

    def rises(self, device: torch.device) -> list[Rise]:
        """How memory rises in forward and in backward of a block that has run before."""
        self._given = self._fresh()
        self._clear()
        return memory_rises([self._forward, self._backward], device)
