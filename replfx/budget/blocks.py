"""What single blocks cost: forward and backward of each alone, on inputs as it gets them in its model."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from replfx.measure import Rise, memory_rises
from replfx.modules.paths import block_at, head_of
from replfx.modules.tree import leaf_copy, tensors_in, with_tensors
from replfx.tracing import Inputs

__all__ = ["BlockCost", "Work", "calls_of", "clock_for", "interleaved", "rises_of"]

K = TypeVar("K")

_READING = 10e-3  # seconds: short blocks run several times in one reading
_TIMES = (3, 8)  # at least, so that memory is as warm as the block before leaves it; and at most


@dataclass(frozen=True)
class BlockCost:
    """What a block costs in a training step.

    Attributes:
        seconds: of forward and backward, one value a round.
        forward: how memory rises in its forward; what is kept at the end is there until its backward.
        backward: how memory rises in its backward, gradients of its own parameters included.
    """

    seconds: tuple[float, ...]
    forward: Rise
    backward: Rise


def clock_for(device: torch.device) -> Callable[[], float]:
    """Seconds: of one thread on the CPU its own time, which other programs hardly disturb; else wall time."""
    if device.type == "cpu":
        return time.process_time if torch.get_num_threads() == 1 else time.perf_counter

    def waited() -> float:
        torch.accelerator.synchronize(device)
        return time.perf_counter()

    return waited


def calls_of(model: nn.Module, inputs: Inputs, paths: Sequence[str]) -> dict[str, Inputs]:
    """What the blocks at `paths` are called with, the first time that each is, in one forward pass of `model`.

    Nothing is kept for backward. A block that is not called is not in the result.
    """
    calls: dict[str, Inputs] = {}
    handles = []
    for path in paths:

        def note(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], path: str = path) -> None:
            if path not in calls:
                calls[path] = Inputs(args, kwargs).map(leaf_copy)

        block = model.get_submodule(head_of(model, path))
        handles.append(block.register_forward_pre_hook(note, with_kwargs=True))
    try:
        with torch.enable_grad(), saved_tensors_hooks(lambda tensor: None, lambda nothing: nothing):
            model(*inputs.args, **inputs.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return calls


class Work:
    """Forward and backward of one block.

    Args:
        model: holds the block; of its neighbours' gradients it is assumed that they are there already, as in a step.
        path: of the block.
        call: what it is called with.
    """

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

        return Inputs(*with_tensors((self._call.args, self._call.kwargs), fresh))

    def prepare(self) -> None:
        """Make inputs for a run, and let the block's own parameters have no gradients."""
        self._given = self._fresh()
        self._clear()

    def _clear(self) -> None:
        for parameter in self._own:
            parameter.grad = None

    def forward(self) -> None:
        """Run the block."""
        result = self._block(*self._given.args, **self._given.kwargs)
        self._outputs = [t for t in tensors_in(result, caches=False) if t.requires_grad]
        if len(self._grads) != len(self._outputs):
            self._grads = [torch.ones_like(t) for t in self._outputs]

    def backward(self) -> None:
        """Go back through the run."""
        if self._outputs:
            torch.autograd.backward(self._outputs, self._grads)
        self._outputs = []

    def warm_up(self, clock: Callable[[], float]) -> None:
        """Run twice, untimed but to find how often it is to run in a reading."""
        taken = _READING
        for _ in range(2):
            self.prepare()
            start = clock()
            self.forward()
            self.backward()
            taken = clock() - start
        least, most = _TIMES
        self._count = min(most, max(least, int(_READING / max(taken, 1e-6))))

    def seconds(self, clock: Callable[[], float]) -> float:
        """Time a run."""
        given = [self._fresh() for _ in range(self._count)]
        start = clock()
        for self._given in given:
            self._clear()
            self.forward()
            self.backward()
        return (clock() - start) / self._count


def rises_of(work: Work, device: torch.device) -> tuple[Rise, Rise]:
    """How memory rises in forward and in backward of a block that has run before."""
    work.prepare()
    forward, backward = memory_rises([work.forward, work.backward], device)
    return forward, backward


def interleaved(readings: Mapping[K, Callable[[], float]], rounds: int) -> dict[K, tuple[float, ...]]:
    """Take the readings in turn, A B C A B C …, so that a slow spell of the machine meets all of them."""
    taken: dict[K, list[float]] = {name: [] for name in readings}
    for _ in range(rounds):
        for name, read in readings.items():
            taken[name].append(read())
    return {name: tuple(values) for name, values in taken.items()}
