"""Values that are computed once for each version of the weights they are made of."""

import weakref
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.utils.weak import TensorWeakRef

from replfx.dtensors import is_distributed
from replfx.torch_internals import memory_id

__all__ = ["Cached", "forget", "with_cached"]

_alive: "weakref.WeakSet[Cached]" = weakref.WeakSet()


def forget() -> None:
    """Let all compiled models synthesise anew at their next call.

    Needed only after writes that PyTorch does not count, other than a `torch.optim.Optimizer`'s: in place through
    `.data`, in a CUDA graph of one's own, from another process.

    Example:
        >>> parameter.data.mul_(0.5)
        >>> replfx.compile.forget()
    """
    for cached in _alive:
        cached.forget()


@cache  # once a process
def _watch_optimizers() -> None:
    """Forget what an optimizer changes: fused ones and those that write through `.data` are not counted by PyTorch."""
    register_optimizer_step_post_hook(torch.compiler.disable(_after_step))  # so that a compiled step calls it too


def _after_step(optimizer: Optimizer, args: object, kwargs: object) -> None:
    changed = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for cached in list(_alive):
        cached.forget_if(changed)


@dataclass(frozen=True)
class _Stamp:
    """One tensor as it was: which object, which memory, how often it had been written to.

    Weak references, so that old weights are not kept alive; but their addresses are not given out anew as long as
    the references are there, so nothing new can look like something old.
    """

    tensor: TensorWeakRef
    storage: StorageWeakRef
    address: int
    version: int

    @classmethod
    def of(cls, tensor: Tensor) -> "_Stamp":
        storage = StorageWeakRef(tensor.untyped_storage())
        return cls(TensorWeakRef(tensor), storage, tensor.data_ptr(), tensor._version)

    def fits(self, tensor: Tensor) -> bool:
        return (
            self.tensor() is tensor
            and self.storage.cdata == memory_id(tensor.untyped_storage())
            and self.address == tensor.data_ptr()
            and self.version == tensor._version
        )


class Cached:
    """Calls `compute` where weights have changed since the last call, and gives what it gave then otherwise.

    Args:
        compute: tensors → values; it is called without gradients.

    Example:
        >>> weight = torch.ones(2)
        >>> cached = Cached(lambda w: (2 * w,))
        >>> cached([weight]) is cached([weight])
        True
    """

    def __init__(self, compute: Callable[..., Sequence[Tensor]]) -> None:
        _watch_optimizers()
        self._compute = compute
        self._kept: tuple[list[_Stamp], tuple[Tensor, ...]] | None = None
        _alive.add(self)

    def forget(self) -> None:
        """Let the next call compute."""
        self._kept = None

    def forget_if(self, changed: Set[int]) -> None:
        """Let the next call compute if a tensor with one of these ids has a part in what is kept."""
        kept = self._kept
        if kept is not None and not changed.isdisjoint(id(stamp.tensor()) for stamp in kept[0]):
            self._kept = None

    def __call__(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        kept = self._kept  # once, because another thread may put another one there
        if kept is not None and all(stamp.fits(tensor) for stamp, tensor in zip(kept[0], tensors, strict=True)):
            return kept[1]
        self._kept = kept = None  # no more than one set of values in memory
        # Taken before: if another thread writes meanwhile, the next call computes again.
        stamps = [_Stamp.of(tensor) for tensor in tensors] if _can_tell_writes(tensors) else None
        with torch.inference_mode(False), torch.no_grad():
            values = tuple(self._compute(*tensors))
        if stamps is not None:
            self._kept = stamps, values
        return values


def _can_tell_writes(tensors: Sequence[Tensor]) -> bool:
    """Whether PyTorch counts each write into these tensors.

    It counts none into tensors that were made in inference mode. Where several processes train, FSDP gathers weights
    into the same memory again and again, and hides that from the counter.
    """
    return not is_distributed() and not any(tensor.is_inference() for tensor in tensors)


def with_cached(main: Callable[..., Any], cached: Cached, inputs: Sequence[int]) -> Callable[..., Any]:
    """`main` with the cached values behind its own arguments; `inputs` tells which of those they are made of."""

    def run(*args: Any) -> Any:
        return main(*args, *cached([args[index] for index in inputs]))

    return run
