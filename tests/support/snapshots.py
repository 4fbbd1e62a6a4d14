"""Everything that a call may not change of a model, and the random state with it."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_load_state_dict_pre_hooks")


def bits(tensor: Tensor) -> object:
    """A digest of the tensor's content, to the bit; NaN is equal to itself."""
    if tensor.device.type == "meta" or nn.parameter.is_lazy(tensor):
        return None
    if tensor.is_quantized:
        return repr(tensor)
    raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.blake2b(raw.tobytes(), digest_size=16).digest()


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Modules by identity, classes, flags, plain attributes, hooks, tensors by identity and to the bit."""
    facts: dict[str, Any] = {"random": bits(torch.get_rng_state()), "grad": torch.is_grad_enabled()}
    for path, module in model.named_modules(remove_duplicate=False):
        facts[f"{path}:module"] = (id(module), type(module), module.training, [n for n, _ in module.named_children()])
        facts[f"{path}:hooks"] = [list(getattr(module, name, ())) for name in _HOOKS]
        plain = {k: v for k, v in vars(module).items() if k not in ("_modules", "_parameters", "_buffers")}
        facts[f"{path}:attributes"] = sorted(plain)
        facts[f"{path}:values"] = {k: v for k, v in plain.items() if isinstance(v, bool | int | float | str | tuple)}
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)):
        facts[f"{name}:tensor"] = (id(tensor), type(tensor), tensor.requires_grad, tensor.dtype, tensor.device)
        facts[f"{name}:bits"] = bits(tensor)
        facts[f"{name}:grad"] = None if tensor.grad is None else bits(tensor.grad)
    return facts


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    """Name the first thing that is not as it was."""
    after = snapshot(model)
    changed = [key for key in (*before, *after) if key not in before or key not in after or before[key] != after[key]]
    assert not changed, f"changed: {changed[:5]}"
