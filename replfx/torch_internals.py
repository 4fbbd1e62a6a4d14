"""Private names of PyTorch on which results depend, each looked up before it is used.

If a release renames one, an error says what is missing, and no gradient is lost silently. Names of torch itself are
looked up when this module is imported; those of FSDP2 and of tensor parallelism when they are first asked for in a
process that has imported these, and before that the answer is no. A name that another file imports fails by itself.
"""

import inspect
import sys
from collections.abc import Callable, Collection, Mapping
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad

from replfx.dtensors import broadcast_from_first
from replfx.errors import ReplfxError

__all__ = [
    "adopt_parameter",
    "follow_parameters",
    "forward_mode_is_active",
    "functorch_is_active",
    "gathers",
    "is_managed_by_fsdp",
    "is_tensor_parallel",
    "renew_reducer",
    "reshard",
    "saved_tensors_are_packed",
    "sharded_modules",
]


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


def forward_mode_is_active() -> bool:
    """Whether derivatives are taken forward (`torch.autograd.forward_ad`)."""
    return bool(_private(forward_ad, "_current_level") >= 0)


# ---- FSDP2


@lru_cache(maxsize=1)
def _check_fsdp() -> None:
    from torch.distributed.fsdp._fully_shard import _fsdp_param, _fsdp_param_group, _fsdp_state, _fully_shard

    _must_speak_of(_fully_shard, ("_is_fsdp_managed_module",))
    _must_speak_of(_fsdp_state, ("_fsdp_param_group",))
    _must_speak_of(_fsdp_param, (*_HELD, "sharded_param", "class FSDPParam", "class ParamModuleInfo"))
    _must_speak_of(_fsdp_param_group, _OF_A_GROUP)


_FULLY_SHARD = "torch.distributed.fsdp._fully_shard"

_HELD = ("_unsharded_param", "_sharded_post_forward_param")
"""Where a parameter that is whole for now is kept."""

_OF_A_GROUP = (
    "_training_state",
    "fsdp_params",
    "is_sharded",
    "def reshard",
    "def _init_mp_dtypes",
    "self.mesh_info",
    "self.post_forward_mesh_info",
    "self.mp_policy",
    "self.offload_policy",
)


def is_managed_by_fsdp(module: nn.Module) -> bool:
    """Whether FSDP2 looks after the parameters of a module."""
    if not torch.compiler.is_compiling():  # which cannot follow the check
        if _FULLY_SHARD not in sys.modules:  # nobody has called it
            return False
        _check_fsdp()
    return hasattr(module, "_is_fsdp_managed_module")


def reshard(parameters: Collection[int]) -> None:
    """Have FSDP2 shard the parameters with these ids again, but for those of a group that is at work now."""
    from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState

    at_rest = (TrainingState.IDLE, TrainingState.POST_BACKWARD)
    for module in sharded_modules():
        # A parameter does not know its group, and the module that was sharded may lie anywhere above its owner.
        for group in _groups(module):
            if group.is_sharded or group._training_state not in at_rest:
                continue
            if any(id(getattr(p, name, None)) in parameters for p in group.fsdp_params for name in _HELD):
                group.reshard()


def sharded_modules() -> list[Any]:
    """All modules that `fully_shard` was called with."""
    from torch.distributed._composable_state import _module_state_mapping  # FSDP is not imported with every replfx
    from torch.distributed.fsdp import FSDPModule

    return [module for module in _module_state_mapping if isinstance(module, FSDPModule)]


def _groups(module: Any) -> list[Any]:
    """The groups of parameters that FSDP2 gathers together for a module."""
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
    return [group for group in groups if group is not None]


def gathers(module: nn.Module) -> bool:
    """Whether FSDP2 gathers any parameters for a module that `fully_shard` was called with."""
    return bool(_groups(module))


def follow_parameters(module: nn.Module, homes: Mapping[nn.Parameter, list[tuple[nn.Module, str]]]) -> None:
    """Have FSDP2 find parameters where they are now, and forget those that are nowhere.

    `fully_shard` was called with the module; `homes` has owners and names of each parameter of the model.
    """
    from torch.distributed.fsdp._fully_shard._fsdp_param import ParamModuleInfo

    for group in _groups(module):
        group.fsdp_params = [parameter for parameter in group.fsdp_params if parameter.sharded_param in homes]
        for parameter in group.fsdp_params:
            info, places = parameter._module_info, homes[parameter.sharded_param]
            if (info.module, info.param_name) not in places:
                owner, leaf = places[0]
                parameter._module_info = ParamModuleInfo(owner, leaf)
                _let_manage(owner)


def adopt_parameter(module: nn.Module, owner: nn.Module, leaf: str, like: Any) -> None:
    """Have FSDP2 look after one more parameter, which it shards.

    Args:
        module: `fully_shard` was called with it; its group gathers the parameter with its others.
        owner: has the parameter, whole on each process or sharded as FSDP2 has it.
        leaf: its name there.
        like: a parameter that is sharded in the way that this one shall be; None for FSDP2's usual way.
    """
    from torch.distributed.fsdp._fully_shard import _fsdp_param
    from torch.distributed.tensor import DTensor, Shard

    _check_fsdp()
    group, parameter = _groups(module)[0], owner._parameters[leaf]
    assert parameter is not None
    whole = parameter.detach().to(group.device)
    if isinstance(whole, DTensor) and whole.device_mesh == group.mesh_info.mesh:
        whole = whole.full_tensor()
    if not isinstance(whole, DTensor):
        mesh = group.mesh_info.mesh
        for axis in range(mesh.ndim):  # what was drawn at random differs between the processes
            broadcast_from_first(whole, mesh.get_group(axis))
    placements: Any = like.placements if isinstance(like, DTensor) else ()
    dims = [placement.dim for placement in placements if placement.is_shard()]
    dim = dims[0] if dims else 0  # tensor parallelism shards what FSDP has sharded
    made = _fsdp_param.FSDPParam(
        nn.Parameter(whole.contiguous(), parameter.requires_grad),
        _fsdp_param.ParamModuleInfo(owner, leaf),
        group.mesh_info,
        group.post_forward_mesh_info,
        group.device,
        lambda _: Shard(dim),
        group.mp_policy,
        group.offload_policy,
    )
    vars(made.sharded_param).update(vars(parameter))
    group.fsdp_params.append(made)
    group._init_mp_dtypes()
    _let_manage(owner)


def _let_manage(owner: nn.Module) -> None:
    vars(owner).update(_is_fsdp_managed_module=True, _fsdp_use_orig_params=True)


# ---- DDP


def renew_reducer(wrapper: Any) -> None:
    """Let a DistributedDataParallel module know of the parameters that its module has now."""
    wrapper._module_parameters = [
        parameter
        for name, parameter in wrapper.module.named_parameters()
        if name not in _private(wrapper, "parameters_to_ignore")
    ]
    parameters, sparse = _private(wrapper, "_build_params_for_reducer")()
    names = _private(wrapper, "_build_debug_param_to_name_mapping")(parameters)
    _private(wrapper, "_ddp_init_helper")(parameters, sparse, names, wrapper.static_graph)
    wrapper._has_rebuilt_buckets = False
    if wrapper.static_graph:
        wrapper.static_graph = False  # or else it says that it is set already
        wrapper._set_static_graph()
    hooks, wrapper._comm_hooks = list(_private(wrapper, "_comm_hooks")), []
    for hook, state in hooks:
        wrapper.register_comm_hook(state, hook)


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
