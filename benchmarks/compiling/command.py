"""What does compiling make of fusion layers: eager, Inductor and our backend, and the kernels alone?"""

from __future__ import annotations

import argparse
import gc
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch._inductor import config as inductor
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import timer
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import add_device_argument, commit, device_of, model_names
from benchmarks.compiling.kernels import cases, copy_rate, gemm_rate, seconds
from benchmarks.compiling.output import KernelRow, StepRow, tables, write
from benchmarks.compiling.subjects import SUBJECTS, WAYS, Subject, training_of, ways_on
from replfx import ReplfxError
from replfx.measure import StepCost, Training, environment, pairwise_ratios, training_costs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add = parser.add_argument
    add("--models", type=_names, default=list(SUBJECTS), metavar="NAME,…", help=f"of {', '.join(SUBJECTS)} (all)")
    add_device_argument(parser)
    add("--operator", default="auto", metavar="NAME", help="of the replaced blocks (auto)")
    add("--repeats", type=int, metavar="N", help="timed rounds (10; quick: 2)")
    add("--quick", action="store_true", help="small models, two examples a batch: does it run at all?")
    add("--float32", action="store_true", help="on CUDA: no bfloat16")
    add("--no-kernels", action="store_true", help="leave the kernels alone out")
    add("--out", type=Path, default=Path("replfx-benchmarks", "compile"), metavar="DIR")


def _names(text: str) -> list[str]:
    return model_names(text, SUBJECTS) if text else []  # none: the kernels alone


def run(args: argparse.Namespace) -> int:
    """Measure, print the tables, and write files after each model, so that a run that is cut leaves some."""
    device, console = device_of(args), Console()
    dtype = torch.bfloat16 if device.type == "cuda" and not args.float32 else torch.float32
    rate = gemm_rate(device, dtype, args.quick)
    stamps = {
        **environment(device),
        "commit": commit(),
        "dtype": str(dtype),
        "quick": args.quick,
        "gemm_flops_a_second": rate,
    }
    kernels: list[KernelRow] = []
    steps: list[StepRow] = []
    with Progress(console=console) as progress:
        task = progress.add_task("", total=len(args.models) + (not args.no_kernels))
        if not args.no_kernels:
            progress.update(task, description="kernels")
            kernels = list(_kernels(device, dtype, args.quick))
            progress.advance(task)
        written = write(steps, kernels, stamps, args.out)
        for name in args.models:
            progress.update(task, description=name)
            steps += _steps(name, args, device, dtype, rate)
            written = write(steps, kernels, stamps, args.out)
            progress.advance(task)
    for table in tables(steps, kernels):
        console.print(table)
    for path in written:
        console.print(f"wrote {path}", soft_wrap=True, highlight=False)
    return 0


def _kernels(device: torch.device, dtype: torch.dtype, quick: bool) -> Iterator[KernelRow]:
    copied = copy_rate(device, quick)
    # Each backward runs again and again on what one forward saved.
    with torch._functorch.config.patch(donated_buffer=False):
        for case in cases(device, dtype, quick):
            bound = case.bytes_moved / copied
            for provider, call in case.providers.items():
                yield KernelRow(
                    case.name, provider, seconds(call, 0.02 if quick else 0.3), bound, launches(call, device)
                )


def _steps(name: str, args: argparse.Namespace, device: torch.device, dtype: torch.dtype, rate: float) -> list[StepRow]:
    subject = SUBJECTS[name]
    trainings: dict[str, Training] = {}
    first: dict[str, float] = {}
    reasons: dict[str, str] = {}
    batch = 2 if args.quick else subject.sizes[device.type]
    for way in ways_on(device):
        torch._dynamo.reset()
        made = {"batch": batch, "quick": args.quick, "bf16": dtype is torch.bfloat16}
        try:
            training = training_of(subject, way, args.operator, device, **made)
        except ReplfxError as error:
            reasons[way.name] = str(error)
            continue
        # Each compiles all of its own code; PyTorch warns that what it learned of shapes is not kept either.
        with inductor.patch(force_disable_caches=True), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="dynamo_pgo force disabled")
            start = timer()
            training.step()
            first[way.name] = timer() - start
        trainings[way.name] = training
    costs = training_costs(trainings, args.repeats or (2 if args.quick else 10), warmup=1)
    counted = {way: launches(training.step, device) for way, training in trainings.items()}
    extra = _extra_flops(subject, args, device, batch)
    rows = _rows(name, costs, first, counted, extra / rate)
    del trainings
    gc.collect()
    return rows + [StepRow(name, way, reason=reason) for way, reason in reasons.items()]


def launches(call: Any, device: torch.device) -> int | None:
    """How many kernels a call starts on an accelerator; None on the CPU, where nothing is launched."""
    if device.type != "cuda":
        return None
    call()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        call()
        torch.cuda.synchronize()
    kernels = [e for e in found.events() or () if e.device_type == DeviceType.CUDA]
    return sum(not event.name.startswith(("Memcpy", "Memset")) for event in kernels)


def _extra_flops(subject: Subject, args: argparse.Namespace, device: torch.device, batch: int) -> float:
    """What the operator does beyond deleting the blocks: FLOPs of an eager step, less those of removed."""
    counts = []
    for way in (WAYS[1], WAYS[3]):
        training = training_of(
            subject, replace(way, compiler=None), args.operator, device, batch=batch, quick=args.quick, bf16=False
        )
        with FlopCounterMode(display=False) as counter:
            training.loss().backward()
        counts.append(counter.get_total_flops())
    return float(counts[0] - counts[1])


def _rows(
    model: str,
    costs: dict[str, StepCost],
    first: dict[str, float],
    counted: dict[str, int | None],
    operator_seconds: float,
) -> list[StepRow]:
    ratios = pairwise_ratios({way: cost.step_seconds for way, cost in costs.items()}, "Inductor full")
    bound = 1.02 * costs["Inductor removed"].step_seconds.median + operator_seconds
    return [
        StepRow(
            model,
            way,
            cost,
            ratios[way],
            counted[way],
            None if way.startswith("eager") else max(0.0, first[way] - cost.step_seconds.median),
            bound if way == "backend replfx" else None,
        )
        for way, cost in costs.items()
    ]
