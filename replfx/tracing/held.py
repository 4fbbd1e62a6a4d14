"""What a model's code reaches otherwise than through its modules: by closures, weak references, globals.

No copy of a model changes what those hold. So while a copy is looked at, a call of the model's own module means its
counterpart in the copy; and a copy that is to last may not reach the model that it was copied from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from replfx.errors import CaptureError
from replfx.modules.tree import named_tensors
from replfx.tracing.watch import watching_modules

__all__ = ["Held", "HeldElsewhereError"]


class HeldElsewhereError(CaptureError):
    """A copy of a model calls, or reads, parts of the model that it was copied from."""


class Held:
    """Knows the parts of a model, and of the one that it was copied from, by identity.

    Args:
        model: the model that is looked at.
        original: what `model` was copied from, for its user to go on with; None if it is the user's own.
    """

    def __init__(self, model: nn.Module, original: nn.Module | None) -> None:
        self._modules = list(model.modules())  # kept, so that no id is given out again
        self.paths = {id(module): path for path, module in model.named_modules()}
        self.names = {id(tensor): name for name, tensor in named_tensors(model)}
        self._foreign: dict[int, str] = {}
        if original is not None and original is not model:
            parts = (*original.named_modules(), *named_tensors(original))
            own = self.paths.keys() | self.names.keys()
            self._foreign = {id(part): name or type(original).__name__ for name, part in parts if id(part) not in own}

    def path_of(self, module: nn.Module) -> str | None:
        """Where a module is in the model; None if it is in neither."""
        self.check(module)
        return self.paths.get(id(module))

    def check(self, part: nn.Module | Tensor) -> None:
        """Refuse a part of the original.

        Raises:
            HeldElsewhereError: it is one.
        """
        name = self._foreign.get(id(part))
        if name is not None:
            raise HeldElsewhereError(
                f"`{name}` is also held by something that Python does not copy with the model, such as a function's "
                "closure, a weak reference or a global: the copy would run, and train, your own model's. "
                "Pass inplace=True, or let the model reach it through its modules"
            )

    @contextmanager
    def redirected(self, ghost: nn.Module) -> Iterator[None]:
        """While open, a call of one of the model's own modules is one of its counterpart in `ghost`, a copy."""

        def call(module: nn.Module, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            path = self.path_of(module)
            return original(module if path is None else ghost.get_submodule(path), *args, **kwargs)

        with watching_modules(call):
            yield
