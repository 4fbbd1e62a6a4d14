"""Skeletons: the structure of a block whose modules are freed, to make a full block of."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from replfx.modules.copying import structural_copy

__all__ = ["Skeleton"]


class Skeleton:
    """A block's modules without weights.

    Parameters that no layer initialises (a LayerScale's, a table of relative positions) keep their values.

    Attributes:
        module: the block without them; who asks it for one gets an AttributeError.
    """

    def __init__(self, block: nn.Module) -> None:
        module = structural_copy(block, _without_values)
        named = dict(module.named_parameters(remove_duplicate=False))
        first: dict[int, str] = {}
        self._names: dict[str, list[str]] = {}  # of a tied parameter all, by the first
        for name, parameter in named.items():
            self._names.setdefault(first.setdefault(id(parameter), name), []).append(name)
        self._shapes = {name: named[name] for name in self._names}
        self._starts = {n: _value(block.get_parameter(n)) for n in self._names if _reset(_slot(block, n)[0]) is None}
        for name in named:  # who reads one is to be told that it is gone
            owner, leaf = _slot(module, name)
            owner._parameters.pop(leaf, None)  # a module that the block holds by two names has lost it by the first
        self.module = module

    def parameters(self) -> list[str]:
        """The names of all parameters that the block had."""
        return [name for names in self._names.values() for name in names]

    def full_block(self, neighbours: Sequence[nn.Module], like: Tensor, *, copies: bool) -> nn.Module:
        """A block of this structure, made of the neighbours' parameters of its names and shapes.

        A parameter whose like neither has starts as its layer initialises it, or else as it was.

        Args:
            neighbours: the kept block before and the one after, or none.
            like: tells device and dtype.
            copies: whether each parameter is that of the first neighbour that has it, rather than the mean of both.
        """
        block = copy.deepcopy(self.module)
        sides = [dict(neighbour.named_parameters()) for neighbour in neighbours]
        values: dict[str, Tensor] = {}
        for name, meta in self._shapes.items():
            found = [side[name].detach() for side in sides if name in side and side[name].shape == meta.shape]
            if found:
                values[name] = torch.stack(found[:1] if copies else found).mean(0)
            elif name in self._starts:
                values[name] = self._starts[name].to(like, copy=True)
            parameter = nn.Parameter(values.get(name, like.new_empty(meta.shape)), requires_grad=meta.requires_grad)
            for holder, leaf in (_slot(block, each) for each in self._names[name]):
                holder._parameters[leaf] = parameter
        _like_theirs(block, neighbours)
        missing = dict.fromkeys(_slot(block, name)[0] for name in self._shapes if name not in values)
        for owner in missing if sides else block.modules():
            if reset := _reset(owner):
                reset()
        for name, value in values.items():  # a layer resets all that it has
            block.get_parameter(name).detach().copy_(value)
        return block.to(like.device)


def _reset(owner: nn.Module) -> Callable[[], None] | None:
    """What initialises the parameters of a layer, if it can do that itself."""
    found = getattr(owner, "reset_parameters", None) or getattr(owner, "_reset_parameters", None)
    return found if callable(found) else None


def _value(parameter: Tensor) -> Tensor:
    """A copy of its value, which takes one element where all are equal."""
    value = parameter.detach()
    if value.is_meta or not value.numel():
        return value
    first = value.flatten()[:1].clone()
    return first.view([1] * value.dim()).expand(value.shape) if bool((value == first).all()) else value.clone()


def _slot(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return module.get_submodule(path), leaf


def _like_theirs(block: nn.Module, neighbours: Sequence[nn.Module]) -> None:
    """Copy running statistics from a neighbour, and cast other buffers to its dtype; masks and tables stay."""
    theirs = {name: buffer for side in reversed(neighbours) for name, buffer in side.named_buffers()}
    for name, mine in list(block.named_buffers()):
        if name in theirs:
            owner, leaf = _slot(block, name)
            statistics = leaf.startswith(("running_", "num_batches_")) and theirs[name].shape == mine.shape
            owner._buffers[leaf] = theirs[name].detach().clone() if statistics else mine.to(theirs[name].dtype)


def _without_values(tensor: Tensor) -> Tensor:
    """A parameter with shape and dtype alone; a buffer (a table of relative positions) as it is."""
    return nn.Parameter(tensor.to("meta"), tensor.requires_grad) if isinstance(tensor, nn.Parameter) else tensor
