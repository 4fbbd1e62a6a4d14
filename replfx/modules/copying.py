"""Copies of models: a faithful one that a user goes on with, and structural ones to look at.

`copy.deepcopy` alone loses what users put on parameters (marks for the optimizer, hooks on gradients), and refuses a
whole model for one lock in it.
"""

from __future__ import annotations

import copy
import functools
import io
import threading
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from replfx.errors import CaptureError
from replfx.modules.tree import attributes_of, inner_path, leaf_copy, named_tensors, tensors_in

__all__ = ["MODULE_HOOKS", "faithful_copy", "held_in", "structural_copy"]

MODULE_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_LOCKS: tuple[tuple[type[Any], Callable[[], Any]], ...] = (
    (type(threading.Lock()), threading.Lock),
    (type(threading.RLock()), threading.RLock),
)
_DEPTH = 6  # containers and objects between a function and a module that it holds


def faithful_copy(model: nn.Module) -> nn.Module:
    """Copy `model` with all that its user put on it: the copy shares no parameter with it.

    Beside what `copy.deepcopy` copies: attributes of parameters and buffers (`_no_weight_decay`), and their hooks on
    gradients. A lock becomes a fresh one, a tensor that autograd made a detached one.

    Raises:
        CaptureError: a part of it can't be copied; a hook holds parts of `model` itself, so that it would go on
            working on them.
    """
    _check_hooks(model)
    memo: dict[int, Any] = {id(t): leaf_copy(t) for t in _plain_tensors(model) if not t.is_leaf}
    twin, memo = _deepcopy(model, memo, lasting=True)
    copies = dict(named_tensors(twin))
    for name, tensor in named_tensors(model):
        if name in copies:
            _carry(tensor, copies[name], memo)
    return twin


def structural_copy(
    model: nn.Module,
    replace: Callable[[Tensor], Tensor] | None = None,
    *,
    plain: Callable[[Tensor], Tensor] | None = None,
    hooks: bool = False,
    given: Mapping[int, object] | None = None,
) -> nn.Module:
    """Copy the modules of `model` but not its tensors.

    What can't be copied, such as a tokenizer of another library, is shared.

    Args:
        model: any module.
        replace: gives the tensor to put for each parameter and buffer (tied ones stay tied); without it
            the copy shares the tensors of `model`.
        plain: the same for tensors that are mere attributes; without it they are copied.
        hooks: keep the user's forward and backward hooks. Off by default: a capture must not fire them. Those of
            `torch.nn.utils` are kept anyway: without its hook, a weight norm would not compute its weight.
        given: what to put in the place of other objects, by their `id`.

    Raises:
        CaptureError: a module refuses to be copied.
    """
    memo: dict[int, Any] = dict(given or {})
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in memo:
            memo[id(tensor)] = _marked(replace(tensor), tensor) if replace else tensor
    for tensor in _plain_tensors(model):
        if id(tensor) not in memo:  # deepcopy refuses those that autograd made
            memo[id(tensor)] = plain(tensor) if plain else leaf_copy(tensor)
    twin, _ = _deepcopy(model, memo, lasting=False)
    if not hooks:
        for module in twin.modules():
            _drop_foreign_hooks(module)
    return twin


def _deepcopy(model: nn.Module, memo: Mapping[int, Any], *, lasting: bool) -> tuple[nn.Module, dict[int, Any]]:
    """Copy with `memo`, then once more with something in the place of each part that `copy.deepcopy` refused."""
    filled = dict(memo)
    try:
        return copy.deepcopy(model, filled), filled
    except Exception as error:
        refused = error
    filled = dict(memo)
    for path, part in _Refusals(model, memo).found:
        if lasting and not _is_common(part):
            raise CaptureError(
                f"{type(model).__name__} could not be copied: its `{path}` holds a {type(part).__module__}."
                f"{type(part).__qualname__}, which copy.deepcopy refuses; pass inplace=True, which copies no such thing"
            )
        filled[id(part)] = _own(part, path)
    try:
        return copy.deepcopy(model, filled), filled
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} could not be copied ({type(refused).__name__}: {refused}), and no attribute of a "
            "module is the reason; make it work with copy.deepcopy first"
        ) from error


def _is_common(part: object) -> bool:
    """Whether it is clear what a copy that lasts has in its place."""
    return isinstance(part, (types.ModuleType, *(kind for kind, _ in _LOCKS)))


def _own(part: object, path: str) -> object:
    """What a copy has in the place of a part that can't be copied."""
    for kind, make in _LOCKS:
        if isinstance(part, kind):
            return make()  # the user's own may be held by the very thread that copies
    if isinstance(part, Iterator | io.IOBase):
        return _Unread(path, type(part).__name__)
    return part


class _Unread:
    """Stands for what can't be looked at without using it up: an iterator, an open file."""

    def __init__(self, path: str, kind: str) -> None:
        self._why = f"`{path}` is a {kind}, which can't be copied, nor used without changing it: a capture must not"

    def __iter__(self) -> Iterator[object]:
        raise CaptureError(self._why)

    def __next__(self) -> object:
        raise CaptureError(self._why)

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        raise CaptureError(self._why)


class _Refusals:
    """Finds the smallest parts of what the modules of a model hold that `copy.deepcopy` refuses, with their paths."""

    def __init__(self, model: nn.Module, memo: Mapping[int, Any]) -> None:
        self.found: list[tuple[str, object]] = []
        # Modules stand for themselves: each attribute is tried alone.
        self._memo = {**memo, **{id(module): module for module in model.modules()}}
        self._seen: set[int] = set()
        for path, module in model.named_modules():
            for name, value in attributes_of(module):
                self._visit(value, inner_path(path, name))

    def _visit(self, value: object, path: str) -> bool:
        """Whether it is refused, for itself or for one of its parts."""
        if id(value) in self._seen:
            return False
        try:
            copy.deepcopy(value, dict(self._memo))
            return False
        except Exception:
            self._seen.add(id(value))
        if not sum(self._visit(part, path) for part in _contents_of(value)):  # a sum, so that all are visited
            self.found.append((path, value))
            self._memo[id(value)] = value
        return True


def held_in(model: nn.Module) -> Iterator[object]:
    """What the attributes of its modules hold, containers and plain objects included, each object once."""
    seen: set[int] = set()
    level = [value for module in model.modules() for _, value in attributes_of(module)]
    for _ in range(_DEPTH):
        fresh = {id(value): value for value in level if id(value) not in seen}
        yield from fresh.values()
        seen.update(fresh)
        level = [part for value in fresh.values() if not isinstance(value, nn.Module) for part in _contents_of(value)]


def _contents_of(value: object) -> list[Any]:
    """What an object holds, as far as a copy of it would copy it too; of a function, what its closure holds."""
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    if isinstance(value, tuple | list | set | frozenset):
        return list(value)
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, types.MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, types.FunctionType):
        cells = [_content(cell) for cell in value.__closure__ or ()]
        return [*cells, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
    if isinstance(value, str | bytes | int | float | type | types.ModuleType | Tensor):
        return []
    return list(getattr(value, "__dict__", {}).values())


def _content(cell: types.CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return None


def _plain_tensors(model: nn.Module) -> list[Tensor]:
    # By identity: a configuration is held by many modules.
    held = {id(value): value for module in model.modules() for _, value in attributes_of(module)}
    return tensors_in(list(held.values()))


def _marked(tensor: Tensor, like: Tensor) -> Tensor:
    """A placeholder for `like`, with the attributes that its user gave it: a model may ask for them as it runs."""
    if tensor is not like:
        for name, value in vars(like).items():
            vars(tensor).setdefault(name, value)
    return tensor


def _drop_foreign_hooks(module: nn.Module) -> None:
    for name in MODULE_HOOKS:
        hooks = getattr(module, name)
        for key in [k for k, hook in hooks.items() if not type(hook).__module__.startswith("torch.nn.utils.")]:
            del hooks[key]


# ---- what users put on tensors


def _carry(tensor: Tensor, twin: Tensor, memo: dict[int, Any]) -> None:
    """Give `twin` the attributes and the hooks that its user gave `tensor`."""
    for name, value in vars(tensor).items():
        if name not in vars(twin):
            vars(twin)[name] = copy.deepcopy(value, memo)
    for name in _TENSOR_HOOKS:
        hooks = getattr(tensor, name)
        if hooks:
            # Not by `register_hook`, which refuses a tensor that has been frozen since.
            setattr(twin, name, type(hooks)((key, copy.deepcopy(hook, memo)) for key, hook in hooks.items()))


_TENSOR_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


def _hooks_of(model: nn.Module) -> Iterable[tuple[str, object]]:
    """All hooks that users have put on modules and tensors, with what they are on."""
    for path, module in model.named_modules():
        for name in MODULE_HOOKS:
            yield from ((path or type(model).__name__, hook) for hook in getattr(module, name).values())
    for path, tensor in named_tensors(model):
        for name in _TENSOR_HOOKS:
            yield from ((path, hook) for hook in (getattr(tensor, name) or {}).values())


def _check_hooks(model: nn.Module) -> None:
    """Refuse hooks whose closures hold parts of the model: Python copies no function, so they would go on holding them.

    Raises:
        CaptureError: there is such a hook.
    """
    names = {id(module): path or type(model).__name__ for path, module in model.named_modules()}
    names |= {id(tensor): path for path, tensor in named_tensors(model)}
    for path, hook in _hooks_of(model):
        held = _held_by_function(hook, names, set())
        if held is not None:
            raise CaptureError(
                f"a hook on `{path}` is a function that holds `{held}` of the model itself, and a copy's hook would "
                "hold it too; pass inplace=True, or remove the hook and put it on the copy"
            )


def _held_by_function(
    value: object, names: Mapping[int, str], seen: set[int], inside: bool = False, depth: int = _DEPTH
) -> str | None:
    """The part of the model that a function in `value` holds, at whatever depth; None if there is none.

    What is in no function is copied with the model, so that it holds the copy's parts.
    """
    if id(value) in names:
        return names[id(value)] if inside else None
    if id(value) in seen or not depth:
        return None
    seen.add(id(value))
    inside = inside or isinstance(value, types.FunctionType)
    found = (_held_by_function(part, names, seen, inside, depth - 1) for part in _contents_of(value))
    return next((name for name in found if name is not None), None)
