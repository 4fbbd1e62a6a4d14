"""Private names of PyTorch that replfx depends on, each looked up when it is imported.

Where a release renames one, importing fails with what is missing; nothing goes wrong silently later.
"""

from collections.abc import Callable
from typing import Any

import torch

from replfx.errors import ReplfxError

__all__ = ["functorch_is_active", "saved_tensors_are_packed"]


def _private(holder: object, name: str) -> Any:
    try:
        return getattr(holder, name)
    except AttributeError:
        raise ReplfxError(
            f"PyTorch {torch.__version__} has no {getattr(holder, '__name__', holder)}.{name}, on which replfx depends: "
            "install a version of PyTorch that this version of replfx was tested with, or a newer replfx"
        ) from None


_top_hooks: Callable[[bool], object] = _private(torch._C._autograd, "_top_saved_tensors_default_hooks")
_functorch_level: Callable[[], int | None] = _private(torch._C._functorch, "maybe_current_level")


def saved_tensors_are_packed() -> bool:
    """Whether somebody (activation checkpointing) takes note of what is saved for the backward pass."""
    return _top_hooks(False) is not None


def functorch_is_active() -> bool:
    """Whether a transform of torch.func (grad, vmap) runs."""
    return _functorch_level() is not None
