"""Private names of FSDP2, DDP and tensor parallelism, on which gradients depend.

They are looked up when they are first asked for in a process that has imported these; before that the answer is no.
"""

import sys
from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from replfx.dtensors import broadcast_from_first
from replfx.torch_internals import must_speak_of, private

__all__ = [
    "adopt_parameter",
    "follow_parameters",
    "gathers",
    "is_managed_by_fsdp",
    "is_tensor_parallel",
    "renew_reducer",
    "reshard",
    "sharded_modules",
    "split_points",
]


# ---- FSDP2


@lru_cache(maxsize=1)
def _check_fsdp() -> None:
    from torch.distributed.fsdp._fully_shard import _fsdp_param, _fsdp_param_group, _fsdp_state, _fully_shard

    must_speak_of(_fully_shard, ("_is_fsdp_managed_module",))
    must_speak_of(_fsdp_state, ("_fsdp_param_group",))
    must_speak_of(_fsdp_param, (*_HELD, "sharded_param", "class FSDPParam", "class ParamModuleInfo"))
    must_speak_of(_fsdp_param_group, _OF_A_GROUP)


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
        if "torch.distributed.fsdp" not in sys.modules:  # nobody has called it
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
        if name not in private(wrapper, "parameters_to_ignore")
    ]
    parameters, sparse = private(wrapper, "_build_params_for_reducer")()
    names = private(wrapper, "_build_debug_param_to_name_mapping")(parameters)
    private(wrapper, "_ddp_init_helper")(parameters, sparse, names, wrapper.static_graph)
    wrapper._has_rebuilt_buckets = False
    if wrapper.static_graph:
        wrapper.static_graph = False  # or else it says that it is set already
        wrapper._set_static_graph()
    hooks, wrapper._comm_hooks = list(private(wrapper, "_comm_hooks")), []
    for hook, state in hooks:
        wrapper.register_comm_hook(state, hook)


# ---- tensor parallelism


@lru_cache(maxsize=1)
def _check_tensor_parallel() -> None:
    from torch.distributed.tensor import _api

    must_speak_of(_api, (_APPLIED,))


_APPLIED = "_distribute_module_applied"


def is_tensor_parallel(module: nn.Module) -> bool:
    """Whether torch's `distribute_module`, and so `parallelize_module`, was used on a module."""
    if not torch.compiler.is_compiling():
        if "torch.distributed.tensor" not in sys.modules:
            return False
        _check_tensor_parallel()
    return bool(vars(module).get(_APPLIED))


# ---- pipelines


def split_points(model: nn.Module) -> dict[str, bool]:
    """Where `torch.distributed.pipelining.pipeline` is about to split a model: whether a stage begins with a module.

    It marks modules by another `forward`, of which there are two.
    """
    if "torch.distributed.pipelining" not in sys.modules:
        return {}
    from torch.distributed.pipelining import _IR

    begins, ends = (private(_IR, f"_split_{where}_forward") for where in ("before", "after"))
    forwards = ((path, getattr(module.forward, "__func__", None)) for path, module in model.named_modules())
    return {path: forward is begins for path, forward in forwards if forward in (begins, ends)}
