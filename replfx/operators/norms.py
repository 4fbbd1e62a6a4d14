"""The normalisations of a residual block: found by what they do to numbers, whatever they are called."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from replfx.operators.probe import module_at, modules_around, number_of
from replfx.operators.residual import Branch, Residual, is_passing
from replfx.tracing import name_of

__all__ = ["Norm", "first_norm", "is_entry", "is_norm", "is_normalised", "last_norm", "nameless_norm", "norm_behind"]

_SCALE = 8.0
_APART = 0.1  # a norm adds an epsilon to a variance, which shows
_SIDES = (3, 5, 7, 4)
_FUNCTIONS = ("layer_norm", "rms_norm", "group_norm", "batch_norm", "instance_norm")  # of torch.nn.functional


@dataclass(frozen=True)
class Norm:
    """A normalisation of the block.

    Attributes:
        path: where it is in the block.
        first: it comes before the branch's maps.
        last_dim: it wants channels last although the activation has them second.
    """

    path: str
    first: bool
    last_dim: bool


def first_norm(branch: Branch) -> Norm | None:
    """The normalisation, or what stands for one (an affine map, a bounded one), through which a branch gets all."""
    around = [modules_around(branch.residual.site, node) for node in _readers(branch)]
    for path in around[0] if around else ():
        if all(path in paths for paths in around) and is_entry(branch.residual, path):
            return _norm(branch.residual, path, first=True)
    return None


def norm_behind(residual: Residual, node: fx.Node) -> Norm | None:
    """The normalisation that takes what a node gives, perhaps in another layout."""
    for user in node.users:
        if user in residual.site.nodes:
            module = module_at(residual.site, user)
            if module is not None and is_norm(residual, residual.site.inside(user)):
                return _norm(residual, residual.site.inside(user), first=False)
            if is_passing(residual.site, user):
                return norm_behind(residual, user)
    return None


def last_norm(branch: Branch) -> Norm | None:
    """The last normalisation that a branch applies."""
    for node in reversed(branch.nodes):
        for path in modules_around(branch.residual.site, node):
            if is_norm(branch.residual, path):
                return _norm(branch.residual, path, first=False)
    return None


def is_normalised(branch: Branch) -> bool:
    """Whether a branch gives the same whatever the scale of its input is, be that large or small."""
    with torch.no_grad():
        small, large = (
            branch.gives({entry: value * factor for entry, value in branch.inputs.items()}, training=True)[branch.end]
            for factor in (1 / _SCALE, _SCALE)
        )
    return _alike(small, large) and bool(large.any())


def _alike(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).norm() <= _APART * other.norm())


def nameless_norm(residual: Residual) -> str | None:
    """A normalisation that is a function, or a module without parameters."""
    for node in residual.site.nodes:
        name = name_of(node)
        if node.op == "call_function" and name in _FUNCTIONS:
            return name
        module = module_at(residual.site, node) if residual.site.inside(node) else None
        if module is not None and hasattr(module, "eps") and number_of(module) == 0:
            return type(module).__name__
    return None


def is_norm(residual: Residual, path: str) -> bool:
    """Whether a module has one value a channel, and gives the same whatever the scale of what it gets is."""
    return _acts_by_channel(residual, path, at_any_scale=True)


def is_entry(residual: Residual, path: str) -> bool:
    """Whether a module has one value a channel and keeps its input's shape: a norm, or what stands in its place."""
    return _acts_by_channel(residual, path, at_any_scale=False)


def _acts_by_channel(residual: Residual, path: str, *, at_any_scale: bool) -> bool:
    """Whether a module has one value a channel and keeps its input's shape, and perhaps gives the same at any scale."""
    module = residual.probe.block.get_submodule(path)
    parameters = list(module.parameters())
    if not path or not parameters or any(p.shape != (residual.width,) for p in parameters):
        return False
    x = residual.probe.draw((4, *residual.probe.x.shape[1:]))
    for layout in (x, x.movedim(residual.axis, -1)):
        twin = copy.deepcopy(module).train()
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                one, other = twin(layout / _SCALE), twin(layout * _SCALE)
        except Exception:  # it takes another layout, or more than one input
            continue
        keeps_shape = isinstance(one, Tensor) and one.shape == layout.shape
        if keeps_shape and (not at_any_scale or (_alike(one, other) and bool(one.any()))):
            return True
    return False


def _norm(residual: Residual, path: str, *, first: bool) -> Norm:
    second = residual.linear or _takes_channels_second(residual, path)
    return Norm(path, first, not second)


def _takes_channels_second(residual: Residual, path: str) -> bool:
    """Ask the module itself, on a shape that no last dimension can fit."""
    width = residual.width
    sides = [side for side in _SIDES if side != width][: residual.probe.x.dim() - 2]
    try:
        twin = copy.deepcopy(residual.probe.block.get_submodule(path))
        twin(torch.zeros(2, width, *sides, dtype=residual.probe.dtype))
    except (RuntimeError, ValueError, IndexError):
        return False
    return True


def _readers(branch: Branch) -> list[fx.Node]:
    """The nodes of a branch that first do more with the activation than to lay it out, or to ask for its shape."""
    behind, found = set(branch.entries), list[fx.Node]()
    values = branch.gives(watch=branch.nodes)
    for node in branch.nodes:
        if behind.intersection(node.all_input_nodes) and isinstance(values[node], Tensor):
            if len(node.all_input_nodes) == 1 and is_passing(branch.residual.site, node):
                behind.add(node)
            else:
                found.append(node)
    return found
