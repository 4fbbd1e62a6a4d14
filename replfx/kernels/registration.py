"""Makes operators of the library `replfx`."""

from collections.abc import Callable
from typing import Any

import torch

from replfx.kernels.availability import INSTALLED, INTERPRETED

__all__ = ["define"]


def define(name: str, schema: str, body: Callable[..., Any], allocate: Callable[..., Any]) -> Any:
    """The operator `replfx::name`.

    With triton it is one that compilers look into: they see the kernels, or on a CPU the plain operations. The
    interpreter's kernels cannot be traced, and without triton PyTorch has no such operator: then it is opaque.

    Args:
        name: without the library's.
        schema: what it takes and gives.
        body: what it does.
        allocate: its results without their values, for fake tensors where the operator is opaque.
    """
    if INSTALLED and not INTERPRETED:
        return torch.library.triton_op(f"replfx::{name}", body, mutates_args=(), schema=schema)
    made = torch.library.custom_op(f"replfx::{name}", body, mutates_args=(), schema=schema)
    made.register_fake(allocate)
    return made
