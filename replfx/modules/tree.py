"""Tensors in anything that a model may be given or may hold: containers, dataclasses, plain objects."""

import copy
import types
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from torch import Tensor, nn

from replfx.torch_internals import pytree

__all__ = [
    "REGISTRIES",
    "arguments_hold",
    "attributes_of",
    "inner_path",
    "is_cache",
    "leaf_copy",
    "named_tensors",
    "parts_of",
    "shapes_in",
    "tensors_in",
    "with_tensors",
]

REGISTRIES = frozenset(("_parameters", "_buffers", "_modules"))

T = TypeVar("T")

_OPAQUE = (str, bytes, int, float, complex, type, types.ModuleType, types.FunctionType, types.MethodType, nn.Module)


def attributes_of(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """What a module itself holds besides its parameters, buffers and submodules, by name."""
    return ((name, value) for name, value in vars(module).items() if name not in REGISTRIES)


def inner_path(path: str, name: str) -> str:
    """The path of what a module at `path` holds by a name; the model's own path is empty."""
    return f"{path}.{name}" if path else name


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters and buffers of a model by their names, each once."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def parts_of(value: object) -> Iterator[tuple[object, object]]:
    """What `value` consists of, with the index, key or attribute name of each part."""
    if isinstance(value, dict):
        yield from list(value.items())
    elif isinstance(value, tuple | list):
        yield from enumerate(value)
    elif isinstance(value, slice):
        yield from (("start", value.start), ("stop", value.stop), ("step", value.step))
    elif not isinstance(value, _OPAQUE) and not type(value).__module__.startswith("torch."):
        yield from list(getattr(value, "__dict__", {}).items())


def is_cache(value: object) -> bool:
    """Whether an object, or objects of a class, append keys and values and count tokens, as transformers' caches do."""
    return all(callable(getattr(value, name, None)) for name in ("update", "get_seq_length"))


def tensors_in(tree: object, *, caches: bool = True) -> list[Tensor]:
    """All tensors in `tree`, however deep, in order; one that is twice in its containers is given twice.

    A plain object is looked into once: what hangs together in circles and diamonds would never end.

    Args:
        tree: anything.
        caches: look into caches of keys and values too.
    """
    return list(_tensors_in(tree, set(), caches))


def _tensors_in(item: object, seen: set[int], caches: bool) -> Iterator[Tensor]:
    # No closure: one that calls itself is a circle, and holds the tensors until the garbage collector runs.
    if isinstance(item, Tensor):
        yield item
    elif id(item) not in seen and not isinstance(item, _OPAQUE) and item is not None:
        seen.add(id(item))
        for _, part in parts_of(item) if caches or not is_cache(item) else ():
            yield from _tensors_in(part, seen, caches)
        if isinstance(item, tuple | list | dict):
            seen.discard(id(item))


def arguments_hold(
    arguments: tuple[tuple[Any, ...], dict[str, Any]], kind: type = Tensor
) -> Iterator[tuple[tuple[object, ...], Any]]:
    """The tensors (or others of a `kind`) in objects, lists and dicts among a call's arguments, with their places.

    A place is the argument's position or name, and the keys, indices and names of attributes that lead on from there.
    """
    args, kwargs = arguments
    seen: set[int] = set()

    def visit(item: object, place: tuple[object, ...], held: bool) -> Iterator[tuple[tuple[object, ...], Any]]:
        if isinstance(item, kind):
            if held:
                yield place, item
        elif item is not None and not isinstance(item, _OPAQUE) and id(item) not in seen:
            seen.add(id(item))
            for key, part in parts_of(item):
                yield from visit(part, (*place, key), held or not isinstance(item, tuple))

    for key, part in (*enumerate(args), *kwargs.items()):
        yield from visit(part, (key,), held=False)


def shapes_in(tree: object) -> list[tuple[int, ...]]:
    """The shapes of the tensors in `tree`, in order, without those in caches, which depend on the blocks that ran."""
    return [tuple(tensor.shape) for tensor in tensors_in(tree, caches=False)]


def leaf_copy(tensor: Tensor) -> Tensor:
    """A copy of a tensor that autograd knows as a leaf, and that asks for a gradient if the tensor does."""
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def with_tensors(tree: T, replace: Callable[[Tensor], Tensor]) -> T:
    """A copy of `tree` with `replace` of every tensor; what was one tensor stays one."""
    memo: dict[int, Any] = {}
    for tensor in tensors_in(tree):
        if id(tensor) not in memo:
            memo[id(tensor)] = replace(tensor)
    try:
        return copy.deepcopy(tree, dict(memo))
    except Exception:  # a part that cannot be copied, such as a generator or a lock, is shared
        mapped: T = pytree.tree_map_only(Tensor, lambda t: memo[id(t)], tree)
        return mapped
