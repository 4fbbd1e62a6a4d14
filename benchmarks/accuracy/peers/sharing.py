"""Blocks that share their parameters (ALBERT, arXiv 1909.11942)."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer


def share_all(model: nn.Module, paths: Sequence[str]) -> nn.Module:
    """Give all blocks with the same shapes of parameters those of the first one."""
    firsts: dict[tuple[object, ...], nn.Module] = {}
    for path in paths:
        block = model.get_submodule(path)
        first = firsts.setdefault(shapes(block), block)
        if first is not block:
            _share(first, block)
    return model


def share_with_neighbours(model: nn.Module, chosen: Sequence[tuple[str, str]]) -> nn.Module:
    """Give blocks the parameters of a neighbour, whose path comes with each block's."""
    for path, source in chosen:
        _share(model.get_submodule(source), model.get_submodule(path))
    return model


def unshare(model: nn.Module, optimizer: Optimizer) -> nn.Module:
    """Give each module a copy of the parameters that another has too, and the optimizer's state of them."""
    known: set[nn.Parameter] = set()
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is None:
                continue
            if parameter not in known:
                known.add(parameter)
                continue
            own = nn.Parameter(parameter.detach().clone())
            setattr(module, leaf, own)
            groups[parameter]["params"].append(own)
            optimizer.state[own] = copy.deepcopy(optimizer.state[parameter])
    return model


def shapes(block: nn.Module) -> tuple[object, ...]:
    """Names and shapes of a block's parameters: blocks that agree in them can take each other's."""
    return tuple((name, tuple(p.shape)) for name, p in block.named_parameters())


def _share(source: nn.Module, target: nn.Module) -> None:
    """All parameters but those of batch normalisations: each depth has statistics of its own."""
    for name, module in target.named_modules():
        if not isinstance(module, _BatchNorm):
            other = source.get_submodule(name)
            for leaf in module._parameters:
                setattr(module, leaf, getattr(other, leaf))
