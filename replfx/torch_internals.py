"""Private names of PyTorch on which results depend, each looked up before it is used.

Where a release renames one, there is an error that says what is missing, and no gradient that is lost silently. Those
of torch itself are looked up with the import of this module. Those of FSDP2 and of tensor parallelism are looked up
when they are first asked for in a process that has imported these; before that the answer is no. What is imported by
name elsewhere fails by itself.
"""

import inspect
import sys
from collections.abc import Callable, Collection
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import nn

from replfx.errors import ReplfxError

__all__ = ["functorch_is_active", "is_managed_by_fsdp", "is_tensor_parallel", "reshard", "saved_tensors_are_packed"]


def _private(holder: object, name: str) -> Any:
    try:
        return getattr(holder, name)
    except AttributeError:
        raise _missing(f"{getattr(holder, '__name__', holder)}.{name}") from None


def _missing(name: str) -> ReplfxError:
    return ReplfxError(
        f"PyTorch {torch.__version__} has no {name}, on which replfx depends: install a version of PyTorch that this "
        "version of replfx was tested with, or a newer replfx"
    )


def _must_speak_of(module: ModuleType, names: Collection[str]) -> None:
    """Make sure of attributes that are only set on instances: the module's source has their names."""
    source = inspect.getsource(module)
    for name in names:
        if name not in source:
            raise _missing(f"{name} in {module.__name__}")


_top_hooks: Callable[[bool], object] = _private(torch._C._autograd, "_top_saved_tensors_default_hooks")
_functorch_level: Callable[[], int | None] = _private(torch._C._functorch, "maybe_current_level")


def saved_tensors_are_packed() -> bool:
    """Whether somebody (activation checkpointing) takes note of what is saved for the backward pass."""
    return _top_hooks(False) is not None


def functorch_is_active() -> bool:
    """Whether a transform of torch.func (grad, vmap) runs."""
    return _functorch_level() is not None


# ---- FSDP2


@lru_cache(maxsize=1)
def _check_fsdp() -> None:
    from torch.distributed.fsdp._fully_shard import _fsdp_param, _fsdp_param_group, _fsdp_state, _fully_shard

    _must_speak_of(_fully_shard, ("_is_fsdp_managed_module",))
    _must_speak_of(_fsdp_state, ("_fsdp_param_group",))
    _must_speak_of(_fsdp_param, _HELD)
    _must_speak_of(_fsdp_param_group, ("_training_state", "fsdp_params", "is_sharded", "def reshard"))


_FULLY_SHARD = "torch.distributed.fsdp._fully_shard"

_HELD = ("_unsharded_param", "_sharded_post_forward_param")
"""Where a parameter that is whole for now is kept."""


def is_managed_by_fsdp(module: nn.Module) -> bool:
    """Whether FSDP2 looks after the parameters of a module."""
    if not torch.compiler.is_compiling():  # which cannot follow the check
        if _FULLY_SHARD not in sys.modules:  # nobody has called it
            return False
        _check_fsdp()
    return hasattr(module, "_is_fsdp_managed_module")


def reshard(parameters: Collection[int]) -> None:
    """Have FSDP2 shard the parameters with these ids again, but for those of a group that is at work now."""
    from torch.distributed._composable_state import _module_state_mapping  # FSDP is not imported with every replfx
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState

    at_rest = (TrainingState.IDLE, TrainingState.POST_BACKWARD)
    for module in [module for module in _module_state_mapping if isinstance(module, FSDPModule)]:
        # A parameter does not know its group, and the module that was sharded may lie anywhere above its owner.
        state: Any = module._get_fsdp_state()
        for group in getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]:
            if group is None or group.is_sharded or group._training_state not in at_rest:
                continue
            if any(id(getattr(p, name, None)) in parameters for p in group.fsdp_params for name in _HELD):
                group.reshard()


# ---- tensor parallelism


@lru_cache(maxsize=1)
def _check_tensor_parallel() -> None:
    from torch.distributed.tensor import _api

    _must_speak_of(_api, (_APPLIED,))


_APPLIED = "_distribute_module_applied"


def is_tensor_parallel(module: nn.Module) -> bool:
    """Whether torch's `distribute_module`, and so `parallelize_module`, was used on a module."""
    if not torch.compiler.is_compiling():
        if "torch.distributed.tensor" not in sys.modules:
            return False
        _check_tensor_parallel()
    return bool(vars(module).get(_APPLIED))
