"""What has taken note of a model and must hear that it has changed: DDP's reducer, FSDP2's groups, and Dynamo."""

import gc
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from replfx.dtensors import broadcast_from_first, is_distributed
from replfx.torch_internals import imported_dynamo
from replfx.torch_internals.distributed import (
    adopt_parameter,
    follow_parameters,
    gathers,
    is_managed_by_fsdp,
    renew_reducer,
    sharded_modules,
)

__all__ = ["gather_nothing", "tell_of_change"]


def gather_nothing(root: nn.Module) -> None:
    """Have FSDP2 shard again what it left whole of a model, as it does after a forward pass alone."""
    for module in _sharded(root):
        module.reshard()


def tell_of_change(root: nn.Module, new: Mapping[nn.Parameter, Tensor | None]) -> None:
    """Let DDP and FSDP2 know of new parameters, and forget those that are gone; let Dynamo compile once more.

    Args:
        root: the model, or the part of it, that has changed; what wraps it is found.
        new: parameters that it has now, each with one that is like it, if any is.
    """
    if dynamo := imported_dynamo():  # which gives up after so many versions of one model
        dynamo.config.recompile_limit += 1
    if not is_distributed():
        return
    wrappers = _reducers_of(root)
    for wrapper in wrappers:  # DDP does so when it wraps a model
        for parameter in new:
            broadcast_from_first(parameter.detach(), wrapper.process_group)
    if sharded := _sharded(root):
        _shard(new, sharded)
    for wrapper in wrappers:
        renew_reducer(wrapper)


# ---- FSDP2


def _sharded(root: nn.Module) -> list[Any]:
    """The modules that FSDP2 shards: of a model, and those that hold it."""
    if not is_distributed() or not any(is_managed_by_fsdp(module) for module in root.modules()):
        return []
    inside = set(root.modules())
    return [module for module in sharded_modules() if module in inside or root in module.modules()]


def _shard(new: Mapping[nn.Parameter, Tensor | None], sharded: Collection[Any]) -> None:
    """Give each new parameter to the smallest of FSDP2's modules that has its owner."""
    inside = {module: set(module.modules()) for module in sharded}
    homes: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for owner in dict.fromkeys(module for modules in inside.values() for module in modules):
        for leaf, held in owner._parameters.items():
            if held is not None:
                homes.setdefault(held, []).append((owner, leaf))
    for module in sharded:
        follow_parameters(module, homes)
    for parameter, like in new.items():
        owner, leaf = homes[parameter][0]
        holders = [module for module in sharded if owner in inside[module] and gathers(module)]
        if holders:
            adopt_parameter(min(holders, key=lambda module: len(inside[module])), owner, leaf, like)


# ---- DDP


def _reducers_of(root: nn.Module) -> list[Any]:
    """The DistributedDataParallel modules that hold a model, which itself knows nothing of them."""
    from torch.nn.parallel import DistributedDataParallel

    alive = [each for each in gc.get_objects() if issubclass(type(each), DistributedDataParallel)]
    return [wrapper for wrapper in alive if root in wrapper.modules()]
