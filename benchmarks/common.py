"""What every command shares: options, devices, variants, and a training made of a model and a batch."""

from __future__ import annotations

import argparse
import subprocess
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import replfx
from benchmarks.models import SUBJECTS
from replfx import ReplfxError
from replfx.measure import Training


@dataclass(frozen=True)
class Variant:
    """How the blocks are replaced; without an operator the model is left whole.

    Attributes:
        name: of the row.
        operator: of the replaced blocks.
        fusion: the same.
        once: whether the micro-batches of a step share one synthesis.
    """

    name: str
    operator: str | None = None
    fusion: str = "scalar"
    once: bool = False


FULL = Variant("full")
REMOVED = Variant("removed", "identity")


def add_common_arguments(parser: argparse.ArgumentParser, out: str) -> None:
    """Declare the options that all commands take."""
    parser.add_argument(
        "--models",
        type=partial(model_names, known=SUBJECTS),
        default=list(SUBJECTS),
        metavar="NAME,…",
        help=f"which models, of {', '.join(SUBJECTS)} (default: all)",
    )
    add_device_argument(parser)
    parser.add_argument("--bf16", action="store_true", help="run forward under bfloat16 autocast")
    parser.add_argument("--every", type=int, default=2, metavar="K", help="replace every K-th block")
    parser.add_argument("--batch", type=int, metavar="N", help="batch size (default: the model's own)")
    parser.add_argument("--quick", action="store_true", help="two examples a batch: does it run at all?")
    parser.add_argument("--out", type=Path, default=Path("replfx-benchmarks", out), metavar="DIR")


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


def batch_size(args: argparse.Namespace, name: str, device: torch.device) -> int:
    """Choose the batch size of a model: asked for, tiny when quick, else the model's own."""
    return args.batch or (2 if args.quick else SUBJECTS[name].sizes[device.type])


def training_of(
    name: str,
    variant: Variant,
    *,
    every: int,
    batch: int,
    device: torch.device,
    bf16: bool,
    micro_batches: int = 1,
) -> Training:
    """Build a model from seed 0, replace its blocks and put it into training with AdamW.

    Args:
        name: of the model.
        variant: what is done to it.
        every: k, of which blocks.
        batch: examples a micro-batch.
        device: where.
        bf16: run forward under bfloat16 autocast.
        micro_batches: how many a step has.

    Raises:
        ReplfxError: the model's blocks do not have the variant's operator.

    """
    torch.manual_seed(0)
    subject = SUBJECTS[name]
    model: nn.Module = subject.build(device.type).train().to(device)
    inputs, targets = (t.to(device) for t in subject.batch(device.type, batch))
    if variant.operator is not None:
        model = replfx.transform(model, inputs[:2], every=every, fusion=variant.fusion, operator=variant.operator)
    made = in_training(model, model, inputs, targets, bf16=bf16)
    return replace(made, micro_batches=micro_batches, once=variant.once)


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
