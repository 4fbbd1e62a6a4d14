"""Patches for calls that neither proxies nor a TorchFunctionMode intercept; they last as long as a trace.

`Function.apply`, `with torch.autocast(...)` and `with torch.inference_mode()` leave no call of a torch
function behind. A trace that missed them would compute other values, or other gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn
from torch.amp.autocast_mode import autocast

from replfx.modules.tree import parts_of
from replfx.torch_internals import autocast_arguments, enter_autocast, exit_autocast
from replfx.tracing.undisturbed import patched

__all__ = [
    "ApplyFunction",
    "Watcher",
    "enter_inference",
    "holds_modules",
    "is_autocast_node",
    "leave_inference",
    "runs_modules",
    "watching",
    "watching_modules",
]


class ApplyFunction:
    """`function.apply` as a node's target: source code can name it, which it cannot a class method's."""

    def __init__(self, function: type[torch.autograd.Function]) -> None:
        self.function = function
        self.__name__ = self.__qualname__ = function.__name__
        self.__module__ = function.__module__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function.apply(*args, **kwargs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ApplyFunction) and other.function is self.function

    def __hash__(self) -> int:
        return hash(self.function)


def enter_inference(mode: bool) -> torch.inference_mode:
    """`with torch.inference_mode(...)`, as a node; that of autocast is PyTorch's own, which its compilers know."""
    entered = torch.inference_mode(mode)
    entered.__enter__()
    return entered


def leave_inference(entered: torch.inference_mode) -> None:
    """The end of such a `with`."""
    entered.__exit__(None, None, None)


class Watcher(Protocol):
    """What is told of the entrances."""

    def applied(self, function: type[torch.autograd.Function], call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """`function.apply(*args, **kwargs)`; `call` does it."""

    def entered(self, target: Callable[..., Any], args: tuple[Any, ...]) -> object:
        """A context is entered, or a seed is set; gives what `left` is to be told."""

    def left(self, entry: object, target: Callable[..., Any]) -> None:
        """It is left."""

    def rewrapped(self, tensor: Tensor, kind: type[Tensor], result: Tensor) -> None:
        """`tensor.as_subclass(kind)` was called."""

    def without_hooks(self) -> Any:
        """A context in which no hooks on saved tensors are set."""


@contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    """Tell `watcher`, while open."""

    def apply(call: Any, function: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
        return watcher.applied(function, call, args, kwargs)

    def manual_seed(original: Any, seed: int) -> Any:
        watcher.entered(original, (int(seed),))
        return original(seed)

    def as_subclass(original: Any, tensor: Tensor, kind: type[Tensor]) -> Tensor:
        result: Tensor = original(tensor, kind)
        watcher.rewrapped(tensor, kind, result)
        return result

    @contextmanager
    def disable_hooks(original: Any, message: str) -> Iterator[None]:
        with watcher.without_hooks(), original(message):
            yield

    with ExitStack() as stack:
        for cls in (autocast, torch.inference_mode):
            enter, leave = _context(watcher, cls)
            stack.enter_context(patched(cls, "__enter__", enter))
            stack.enter_context(patched(cls, "__exit__", leave))
        stack.enter_context(patched(torch.autograd.Function, "apply", apply))
        stack.enter_context(patched(torch, "manual_seed", manual_seed))
        stack.enter_context(patched(Tensor, "as_subclass", as_subclass))
        stack.enter_context(patched(torch.autograd.graph, "disable_saved_tensors_hooks", disable_hooks))
        yield


def is_autocast_node(function: object) -> bool:
    """Whether a graph's node enters or leaves autocast: a function mode is to let it by, and hears of the context."""
    return function in (enter_autocast, exit_autocast)


def runs_modules(function: type[torch.autograd.Function], arguments: object) -> bool:
    """Whether `function` is a checkpoint or the like: not it counts but what it calls, which must not be hidden."""
    return function.__module__ == "torch.utils.checkpoint" or holds_modules(arguments)


def holds_modules(tree: object) -> bool:
    """Whether modules or functions, which may call modules, are among the arguments."""
    if isinstance(tree, tuple | list | dict):
        return any(holds_modules(part) for _, part in parts_of(tree))
    return isinstance(tree, nn.Module) or (callable(tree) and not isinstance(tree, Tensor | fx.Proxy | type))


def _context(watcher: Watcher, cls: type[Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    entries: dict[int, list[object]] = {}
    cast = cls is autocast
    start, end = (enter_autocast, exit_autocast) if cast else (enter_inference, leave_inference)

    def enter(original: Any, self: Any) -> Any:
        given = autocast_arguments(self) if cast else (self.mode,)
        entries.setdefault(id(self), []).append(watcher.entered(start, given))
        return original(self)

    def leave(original: Any, self: Any, *error: Any) -> Any:
        result = original(self, *error)
        if entries.get(id(self)):
            watcher.left(entries[id(self)].pop(), end)
        return result

    return enter, leave


@contextmanager
def watching_modules(call: Callable[[nn.Module, Callable[..., Any], Any, Any], Any]) -> Iterator[None]:
    """Let `call(module, original, args, kwargs)` stand for every call of a module."""

    def watched(original: Any, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return call(module, original, args, kwargs)

    with patched(nn.Module, "__call__", watched):
        yield
