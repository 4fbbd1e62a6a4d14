"""Questions about modules that need no graph: what kind a block is, how to reach in.

A block's *kind* is its parameter tree: the classes of the submodules that own parameters, and every
parameter's name, shape and dtype. Submodules without parameters (activations, dropout, drop-path) do not
decide, because nothing of theirs is fused: two ViT blocks that differ in their drop-path rate are one kind.
"""

import hashlib
import operator
from collections.abc import Hashable, Mapping
from functools import reduce

import torch
from torch import Tensor, fx, nn

from replfx.modules.copying import MODULE_HOOKS
from replfx.modules.tree import attributes_of, inner_path

__all__ = [
    "attribute_at",
    "block_digest",
    "class_of",
    "family",
    "is_container",
    "is_placeholder_module",
    "is_setting",
    "is_wrapped",
    "move_hooks",
    "pass_for",
    "pass_for_like",
    "redirect",
    "set_submodule",
    "signature",
    "trainable_parameters",
]


def trainable_parameters(model: nn.Module) -> int:
    """Count the scalars that an optimizer would train; a tied parameter counts once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


_CLASS = "_replfx_stands_for"


def attribute_at(module: nn.Module, path: str) -> object:
    """Follow a dotted path of attributes from `module`; the empty path is the module itself."""
    return reduce(getattr, path.split("."), module) if path else module


def set_submodule(root: nn.Module, path: str, module: nn.Module) -> nn.Module | None:
    """Put `module` at `path`, keeping its place among its siblings; gives what was there."""
    parent, _, name = path.rpartition(".")
    owner = root.get_submodule(parent)
    before = owner._modules.get(name)
    owner._modules[name] = module
    return before


def redirect(root: nn.Module, swaps: Mapping[nn.Module, nn.Module]) -> None:
    """Let all who still hold a module that was swapped for another hold that one.

    A module may be known to its model under other names too, or stand in a plain list that `forward` goes through.
    """
    for module in list(root.modules()):
        for name, child in module._modules.items():
            if child is not None and child in swaps:
                module._modules[name] = swaps[child]
        for name, value in attributes_of(module):
            vars(module)[name] = _redirected(value, swaps)


def _redirected(value: object, swaps: Mapping[nn.Module, nn.Module], depth: int = 3) -> object:
    if isinstance(value, nn.Module):
        return swaps.get(value, value)
    if type(value) not in (list, tuple, dict) or not depth:
        return value
    if isinstance(value, dict):
        value.update({key: _redirected(item, swaps, depth - 1) for key, item in value.items()})
        return value
    assert isinstance(value, list | tuple)
    items = [_redirected(item, swaps, depth - 1) for item in value]
    if isinstance(value, list):
        value[:] = items
        return value
    return value if all(map(operator.is_, items, value)) else tuple(items)


def move_hooks(source: nn.Module, target: nn.Module) -> None:
    """Give `target` the forward and backward hooks that `source` itself has (not its submodules').

    The very dicts, so that the handles that a user holds go on removing them. Hooks of `target` come first: it was
    called by `source`.
    """
    for name in MODULE_HOOKS:
        hooks, own = getattr(source, name), dict(getattr(target, name))
        if own:
            later = dict(hooks)
            hooks.clear()
            hooks.update({**own, **later})
        setattr(target, name, hooks)
    if source._is_full_backward_hook is not None:
        target._is_full_backward_hook = source._is_full_backward_hook


def signature(module: nn.Module) -> dict[str, object]:
    """Describe the kind of `module`: two blocks are of one kind when their signatures are equal.

    Includes, of childless submodules, the integer and string settings that the class itself declares in
    `__constants__` (a convolution's stride, padding, groups), never floats (drop rates, epsilons).
    """
    facts: dict[str, object] = {}
    for path, sub in module.named_modules(remove_duplicate=False):
        if next(sub.parameters(), None) is None:
            continue
        facts[inner_path(path, "class")] = class_of(sub)
        for name, parameter in sub._parameters.items():
            shape = None if parameter is None else (tuple(parameter.shape), parameter.dtype)
            facts[inner_path(path, name)] = shape
        if not sub._modules:
            for name in getattr(sub, "__constants__", ()):
                value = getattr(sub, name, None)
                if is_setting(value):
                    facts[inner_path(path, name)] = value
    return facts


def class_of(module: nn.Module) -> type[nn.Module]:
    """The class of a module as its author wrote it: a GraphModule has one of its own, a placeholder says whose."""
    kind: type[nn.Module] | None = vars(module).get(_CLASS)
    if kind is not None:
        return kind
    return fx.GraphModule if isinstance(module, fx.GraphModule) else type(module)


def pass_for(module: nn.Module, kind: type[nn.Module], settings: Mapping[str, object] | None = None) -> None:
    """Let a module that only holds parameters pass for one of class `kind`, with its `settings` as attributes.

    Where there is a graph and no model, as in Dynamo's, such modules answer what is asked of a model's.
    """
    vars(module)[_CLASS] = kind
    if settings:
        vars(module).update(settings, __constants__=tuple(settings))  # as torch.nn's layers declare them


def pass_for_like(module: nn.Module, other: nn.Module) -> None:
    """Let `module`, and what is in it, pass for what is of the same names in `other`."""
    for path, inner in list(module.named_modules()):
        like = other.get_submodule(path)
        known = getattr(like, "__constants__", ()) if is_placeholder_module(like) else ()
        pass_for(inner, class_of(like), {name: getattr(like, name) for name in known})


def is_placeholder_module(module: nn.Module) -> bool:
    """Whether it only passes for a module of its class: it has parameters, and nothing to call."""
    return _CLASS in vars(module)


def is_container(module: nn.Module) -> bool:
    """Whether it is a list of others."""
    return issubclass(class_of(module), nn.Sequential | nn.ModuleList)


def family(module: nn.Module) -> Hashable:
    """What the members of a chain have in common: their class, and the families of a container's children."""
    if is_container(module):
        inner = (family(child) for child in module.children() if next(child.parameters(), None) is not None)
        return (id(class_of(module)), *inner)
    return id(class_of(module))


def is_setting(value: object) -> bool:
    """Whether it says which computation a module does: a number of steps or a name, never a rate."""
    if isinstance(value, tuple | list):
        return all(map(is_setting, value))
    return isinstance(value, int | str) or value is None


def block_digest(module: nn.Module) -> str:
    """A short stable hash of a block's kind, free of dtype, for plans that travel between processes."""
    facts = []
    for key, fact in signature(module).items():
        if isinstance(fact, type):
            fact = f"{fact.__module__}.{fact.__qualname__}"
        elif isinstance(fact, tuple) and len(fact) == 2 and isinstance(fact[1], torch.dtype):
            fact = fact[0]  # `.half()` and `.double()` do not make it another model
        facts.append(f"{key}={fact}")
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]


def is_wrapped(parameter: Tensor) -> bool:
    """A tensor subclass that stands for other data (torchao's quantised weights); DTensors are fine."""
    if type(parameter) in (Tensor, nn.Parameter):
        return False
    kind = type(parameter.data)
    return kind not in (Tensor, nn.Parameter) and kind.__module__.split(".")[0] != "torch"
