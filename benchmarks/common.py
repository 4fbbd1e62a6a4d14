"""What several commands share: options, devices, and a training made of a model and a batch."""

from __future__ import annotations

import argparse
import subprocess
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from replfx import ReplfxError
from replfx.measure import Training


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    """Declare --device, which `device_of` reads."""
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")


def model_names(text: str, known: Collection[str]) -> list[str]:
    """Read names with commas between them.

    Raises:
        ArgumentTypeError: a name that is not known.

    """
    names = text.split(",")
    if unknown := [name for name in names if name not in known]:
        raise argparse.ArgumentTypeError(f"no model {', '.join(unknown)}; there are {', '.join(known)}")
    return names


def device_of(args: argparse.Namespace) -> torch.device:
    """Find the device that was asked for, or the best there is."""
    available = torch.cuda.is_available()
    if args.device == "cuda" and not available:
        raise ReplfxError("--device cuda: PyTorch finds no CUDA device here")
    return torch.device(args.device or ("cuda" if available else "cpu"))


def first_reason(error: ReplfxError) -> str:
    """Why a variant is not for a model, of the first of its blocks: the others mostly say the same."""
    return str(error).partition("; `")[0]


def commit() -> str:
    """The commit of this checkout; with a + where files have been changed since."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def in_training(
    model: nn.Module, called: Callable[[Tensor], Tensor], inputs: Tensor, targets: Tensor, *, bf16: bool
) -> Training:
    """Put a model into training on one batch with AdamW and the cross-entropy of what `called` gives.

    Args:
        model: owns the parameters.
        called: the model, or what a compiler made of it.
        inputs: a batch, on the model's device.
        targets: their labels, or a label for each of their tokens.
        bf16: run forward under bfloat16 autocast.

    """
    device = inputs.device

    def autocast() -> AbstractContextManager[object]:
        return torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()

    def loss() -> Tensor:
        with autocast():
            logits = called(inputs)
            return F.cross_entropy(logits.flatten(0, -2), targets.flatten())

    return Training(model, torch.optim.AdamW(model.parameters(), fused=True), loss, device)
