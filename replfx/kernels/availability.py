"""Where the Triton kernels run, found out without importing triton."""

import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Final

import torch
from torch import Tensor

from replfx.dtensors import is_dtensor

__all__ = ["INSTALLED", "INTERPRETED", "device_of", "runs_triton"]

INSTALLED: Final = importlib.util.find_spec("triton") is not None
# Triton reads the variable once too, when a kernel is defined.
INTERPRETED: Final = INSTALLED and os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def runs_triton(tensor: Tensor) -> bool:
    """Whether the kernels take this tensor: on a GPU, or anywhere under `TRITON_INTERPRET=1`.

    A DTensor stays with plain operations, whose sharding PyTorch knows.
    """
    if not INSTALLED or is_dtensor(tensor):
        return False
    return tensor.is_cuda or (INTERPRETED and tensor.device.type == "cpu")


def device_of(tensor: Tensor) -> AbstractContextManager[None]:
    """Makes the tensor's device the one that Triton launches on; without a GPU a kernel is traced at most."""
    return torch.cuda.device_of(tensor) if torch.cuda.is_available() else nullcontext()
