"""Weights that a hook of `torch.nn.utils` makes anew before each call of the module that has them."""

from typing import Any, cast

from torch import Tensor, nn
from torch.nn.utils import prune

from replfx.errors import FusionError
from replfx.torch_internals import pruned_name

__all__ = ["made_by_hook"]


def made_by_hook(owner: nn.Module, leaf: str) -> Tensor:
    """The weight as the hook would make it now.

    The tensor in its place is of the module's last call: it may be stale, and its graph is gone after a backward pass.

    Raises:
        FusionError: no hook that is known makes it.
    """
    for hook in owner._forward_pre_hooks.values():
        made = _made(hook, owner, leaf)
        if made is not None:
            return made
    raise FusionError(
        f"the `{leaf}` of a neighbour's {type(owner).__name__} is no parameter but a tensor that something else makes: "
        "a replaced block cannot tell whether it is made anew before it is read; call replfx.materialize first, or "
        f"make `{leaf}` a parameter again (torch.nn.utils.prune.remove)"
    )


def _made(hook: Any, owner: nn.Module, leaf: str) -> Tensor | None:
    if isinstance(hook, prune.BasePruningMethod):
        return hook.apply_mask(owner) if pruned_name(hook) == leaf else None
    if type(hook).__module__ == "torch.nn.utils.weight_norm" and hook.name == leaf:
        return cast(Tensor, hook.compute_weight(owner))
    if type(hook).__module__ == "torch.nn.utils.spectral_norm" and hook.name == leaf:
        return cast(Tensor, hook.compute_weight(owner, do_power_iteration=False))
    return None
