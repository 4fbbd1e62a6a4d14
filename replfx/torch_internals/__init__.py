"""Private names of PyTorch: no other room has any (`tests/test_rooms.py` looks).

If a release renames one, an error says what is missing, and nothing is lost silently: a name that is imported is looked
up with this module, an attribute of an instance when it is read (`private`), and what is asked for by `hasattr` in the
source of the module that sets it (`must_speak_of`). Here is what every replfx uses; `dynamo` has what compiling does,
and `distributed` what FSDP2, DDP and tensor parallelism do.

These stay where they are used, for a renamed one is an AttributeError there: what nn.Module keeps of each instance
(`_parameters`, `_modules`, `_buffers`, hooks), the hooks of a tensor, its `_version`, and `torch._assert`, which is
documented.
"""

import inspect
import sys
from collections.abc import Collection
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from replfx.errors import ReplfxError

__all__ = [
    "FLAT_WEIGHTS",
    "PRESERVED_ATTRIBUTES",
    "SET_GRAD_ENABLED",
    "BatchNorm",
    "DisableTorchFunction",
    "Dropout",
    "FakeTensor",
    "FakeTensorMode",
    "LazyGraphModule",
    "Norm",
    "TorchDispatchMode",
    "autocast_arguments",
    "convolve",
    "disable_dynamo",
    "enter_autocast",
    "exit_autocast",
    "forward_mode_is_active",
    "functorch_is_active",
    "imported_dynamo",
    "is_fx_symbolic_tracing",
    "is_mutable",
    "memory_id",
    "missing",
    "must_speak_of",
    "private",
    "pruned_name",
    "pytree",
    "renew_flat_weights",
    "saved_tensors_are_packed",
    "what_was_compiled",
]


def private(holder: object, name: str) -> Any:
    """An attribute; a ReplfxError if there is none of this name."""
    try:
        return getattr(holder, name)
    except AttributeError:
        raise missing(f"{getattr(holder, '__name__', holder)}.{name}") from None


def missing(name: str) -> ReplfxError:
    """What to raise where PyTorch lacks something."""
    return ReplfxError(
        f"PyTorch {torch.__version__} has no {name}, on which replfx depends: install a version of PyTorch that this "
        "version of replfx was tested with, or a newer replfx"
    )


def must_speak_of(module: ModuleType, names: Collection[str]) -> None:
    """Make sure of attributes that are only set on instances: the module's source has their names."""
    source = inspect.getsource(module)
    for name in names:
        if name not in source:
            raise missing(f"{name} in {module.__name__}")


try:
    from torch._C import DisableTorchFunction
    from torch._C import _set_grad_enabled as SET_GRAD_ENABLED
    from torch._C._autograd import _top_saved_tensors_default_hooks as _top_hooks
    from torch._C._functorch import maybe_current_level as _functorch_level
    from torch._compile import _disable_dynamo as disable_dynamo
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
    from torch.amp.autocast_mode import _enter_autocast as enter_autocast
    from torch.amp.autocast_mode import _exit_autocast as exit_autocast
    from torch.fx._lazy_graph_module import _LazyGraphModule as LazyGraphModule
    from torch.fx._symbolic_trace import is_fx_symbolic_tracing
    from torch.fx.graph_module import _USER_PRESERVED_ATTRIBUTES_KEY as PRESERVED_ATTRIBUTES
    from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
    from torch.nn.modules.batchnorm import _NormBase as Norm
    from torch.nn.modules.dropout import _DropoutNd as Dropout
    from torch.utils import _pytree as pytree
    from torch.utils._python_dispatch import TorchDispatchMode
except ImportError as error:
    raise missing(f"what replfx imports ({error})") from error


def saved_tensors_are_packed() -> bool:
    """Whether somebody (activation checkpointing) takes note of what is saved for the backward pass."""
    return _top_hooks(False) is not None


def functorch_is_active() -> bool:
    """Whether a transform of torch.func (grad, vmap) runs."""
    return _functorch_level() is not None


def forward_mode_is_active() -> bool:
    """Whether derivatives are taken forward (`torch.autograd.forward_ad`)."""
    return bool(private(forward_ad, "_current_level") >= 0)


def autocast_arguments(context: torch.autocast) -> tuple[Any, ...]:
    """With what `enter_autocast` does what entering the context does."""
    return tuple(private(context, name) for name in ("device", "fast_dtype", "_enabled", "_cache_enabled"))


def memory_id(storage: torch.UntypedStorage) -> int:
    """What two storages of one memory have in common."""
    return int(private(storage, "_cdata"))


def is_mutable(operator: Any) -> bool:
    """Whether an operator of `torch.ops` writes into its arguments."""
    return bool(private(operator, "_schema").is_mutable)


# ---- layers


def convolve(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, inputs: Tensor, weight: Tensor) -> Tensor:
    """What a convolution gives with another weight, and no bias."""
    result: Tensor = private(layer, "_conv_forward")(inputs, weight, None)
    return result


def pruned_name(hook: Any) -> str:
    """The name of the parameter that a hook of `torch.nn.utils.prune` makes."""
    return str(private(hook, "_tensor_name"))


def renew_flat_weights(layer: nn.RNNBase) -> None:
    """Let a recurrent layer list the weights that it has now."""
    private(layer, "_init_flat_weights")()


def _keep_no_refs(layer: nn.RNNBase, value: object) -> None:
    vars(layer)["_flat_weight_refs"] = []  # a layer that is copied deletes them from its state


FLAT_WEIGHTS = {
    "_flat_weights": property(
        lambda layer: [getattr(layer, name, None) for name in private(layer, "_flat_weights_names")],
        lambda layer, value: None,
    ),
    "_flat_weight_refs": property(lambda layer: [None] * len(private(layer, "_flat_weights_names")), _keep_no_refs),
}
"""Recurrent layers keep a list of their weights for the kernels that they call, and ask whether it is still true."""


# ---- Dynamo, which is slow to import

_DYNAMO = "torch._dynamo"

if find_spec(_DYNAMO) is None:
    raise missing(_DYNAMO)


def imported_dynamo() -> Any:
    """Dynamo, where something has imported it; None where nothing has been compiled yet."""
    return sys.modules.get(_DYNAMO)


def what_was_compiled(model: nn.Module) -> nn.Module | None:
    """The model of which `torch.compile` made this one; None if it made none."""
    dynamo = imported_dynamo()
    if dynamo is None or not isinstance(model, private(dynamo, "OptimizedModule")):
        return None
    inner: nn.Module = private(model, "_orig_mod")
    return inner
