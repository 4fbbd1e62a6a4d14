"""While a model is looked at: its user's random states are kept, nothing is printed, and nothing is compiled."""

from __future__ import annotations

import logging
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from replfx.torch_internals import FakeTensorMode, imported_dynamo
from replfx.tracing.chance import kept_random_states

__all__ = ["having", "patched", "undisturbed"]

_LOCK = threading.RLock()  # what is watched is the whole process's, as are Python's random states


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Let the code of `model` run for us while open; one thread at a time."""
    with _LOCK, ExitStack() as stack:
        stack.enter_context(kept_random_states(model))
        # What fails under fake tensors is tried again for real: PyTorch need not print it.
        stack.enter_context(having(logging.getLogger(FakeTensorMode.__module__), disabled=True))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # what its code has to say, it says to its user in a run of his own
        stack.enter_context(torch.inference_mode(False))
        if imported_dynamo() is not None:  # else no stance has been taken
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


@contextmanager
def having(holder: object, **attributes: object) -> Iterator[None]:
    """Let an object have these attributes, while open."""
    before = {name: getattr(holder, name) for name in attributes}
    vars(holder).update(attributes)
    try:
        yield
    finally:
        vars(holder).update(before)


@contextmanager
def patched(owner: Any, name: str, value: Callable[..., Any]) -> Iterator[None]:
    """Let `value(original, …)` stand for a function or method while open, for this thread; others get the original.

    If that is a class method, it is bound to the class, and `value` gets the class behind it.
    """
    inherited = name not in vars(owner)
    before = getattr(owner, name) if inherited else vars(owner)[name]
    of_class = isinstance(before, classmethod | types.ClassMethodDescriptorType)
    here = threading.get_ident()

    def either(*args: Any, **kwargs: Any) -> Any:
        original = before.__get__(None, args[0]) if of_class else before
        if threading.get_ident() == here:
            return value(original, *args, **kwargs)
        return original(*args[1:], **kwargs) if of_class else original(*args, **kwargs)

    setattr(owner, name, classmethod(either) if of_class else either)
    try:
        yield
    finally:
        if inherited:
            delattr(owner, name)
        else:
            setattr(owner, name, before)
