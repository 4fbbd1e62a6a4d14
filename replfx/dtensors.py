"""DTensors and process groups, asked about without importing what makes them.

`torch.distributed.tensor` takes longer to import than all of replfx. Nothing can be a DTensor before somebody has
imported it.
"""

import sys
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = ["broadcast_from_first", "is_distributed", "is_dtensor"]


def is_distributed() -> bool:
    """Whether this process is one of a group."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def broadcast_from_first(tensor: Tensor, group: Any) -> None:
    """Give all processes of a group the first one's values, in place."""
    torch.distributed.broadcast(tensor, torch.distributed.get_global_rank(group, 0), group)


def is_dtensor(value: object) -> "TypeGuard[DTensor]":
    """Whether a value is a DTensor."""
    if not torch.distributed.is_available():
        return False
    # Dynamo would guard on all loaded modules, and imports this one itself.
    if not torch.compiler.is_compiling() and "torch.distributed.tensor" not in sys.modules:
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)
