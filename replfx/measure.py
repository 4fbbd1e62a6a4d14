"""What a training step costs: time, peak memory, bytes saved for backward, trainable parameters.

The demo and the benchmarks measure with these functions alone, so their figures mean the same thing.
"""

from __future__ import annotations

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile, record_function

from replfx.errors import CaptureError
from replfx.modules.structure import trainable_parameters
from replfx.modules.tree import tensors_in
from replfx.torch_internals import memory_id
from replfx.tracing import Inputs
from replfx.training.accumulation import synthesize_once
from replfx.version import __version__

__all__ = [
    "MIB",
    "Rise",
    "Sample",
    "StepCost",
    "Training",
    "clock_for",
    "environment",
    "interleaved",
    "interleaved_times",
    "mean_of_outputs",
    "memory_rises",
    "pairwise_ratios",
    "peak_training_bytes",
    "saved_activation_bytes",
    "saving_kept",
    "seconds_of",
    "trainable_parameters",
    "training_costs",
    "training_on",
    "training_tensors",
    "unique_storage_bytes",
]


MIB = 2**20
"""Bytes in a mebibyte."""

_MEASURED = "replfx.measure: measured step"

K = TypeVar("K")


@dataclass(frozen=True)
class Sample:
    """Repeated measurements of one quantity, in the order they were taken."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median of the values."""
        return statistics.median(self.values)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The first and the third quartile; of a single value, that value twice."""
        if len(self.values) == 1:
            return self.values[0], self.values[0]
        first, _, third = statistics.quantiles(self.values, n=4, method="inclusive")
        return first, third

    def to_dict(self) -> dict[str, object]:
        """Median, quartiles and the raw values, ready for JSON."""
        lower, upper = self.quartiles
        return {"median": self.median, "quartiles": [lower, upper], "raw": list(self.values)}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Sample:
        """Read what `to_dict` gave."""
        return cls(tuple(record["raw"]))


@dataclass(frozen=True)
class Training:
    """A model in training: what a step needs, and the step."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[[], Tensor]
    """Runs the model forward on a batch, to the loss."""
    device: torch.device
    micro_batches: int = 1
    """How many losses a step accumulates the gradients of."""
    once: bool = False
    """Whether they share one synthesis, as `replfx.synthesize_once` has it."""

    def step(self) -> None:
        """Take one step: clear the gradients, forward and backward of each micro-batch, update."""
        self.optimizer.zero_grad()
        with synthesize_once(self.model) if self.once else nullcontext():
            for _ in range(self.micro_batches):
                (self.loss() / self.micro_batches).backward()
        self.optimizer.step()


@dataclass(frozen=True)
class StepCost:
    """What training one model costs."""

    trainable_parameters: int
    saved_bytes: int
    """See `saved_activation_bytes`; the loss is part of the forward."""
    peak_bytes: int
    """See `peak_training_bytes`."""
    step_seconds: Sample

    def to_dict(self) -> dict[str, object]:
        """All figures, ready for JSON."""
        return {
            "trainable_parameters": self.trainable_parameters,
            "saved_activation_bytes": self.saved_bytes,
            "peak_training_bytes": self.peak_bytes,
            "step_seconds": self.step_seconds.to_dict(),
        }


def training_costs(
    trainings: Mapping[str, Training],
    repeats: int,
    *,
    warmup: int = 2,
    on_round: Callable[[], object] = lambda: None,
) -> dict[str, StepCost]:
    """Measure what a training step of each costs; the step times interleaved.

    Every training takes `repeats + warmup + 2` steps, so its weights are not what they were.
    """
    saved = {name: saved_activation_bytes(t.loss, t.model) for name, t in trainings.items()}
    peaks = {name: peak_training_bytes(t.step, t.model, t.optimizer, t.device) for name, t in trainings.items()}
    steps = {name: t.step for name, t in trainings.items()}
    times = interleaved_times(steps, repeats, warmup=warmup, on_round=on_round)
    return {
        name: StepCost(trainable_parameters(t.model), saved[name], peaks[name], times[name])
        for name, t in trainings.items()
    }


def training_on(
    model: nn.Module, inputs: Inputs, optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
) -> Training:
    """The training of a model on one batch, with `mean_of_outputs` for its loss."""
    made = optimizer([p for p in model.parameters() if p.requires_grad])
    return Training(model, made, lambda: mean_of_outputs(model, inputs), next(model.parameters()).device)


def mean_of_outputs(model: nn.Module, inputs: Inputs) -> Tensor:
    """A loss for models of which no other is known: the sum of the means of all outputs that have a gradient.

    Raises:
        CaptureError: there is no such output.
    """
    outputs = [t for t in tensors_in(model(*inputs.args, **inputs.kwargs)) if t.requires_grad]
    if not outputs:
        raise CaptureError(f"{type(model).__name__} gives nothing that has a gradient, so there is no step to time")
    return torch.stack([(torch.view_as_real(t) if t.is_complex() else t).float().mean() for t in outputs]).sum()


def unique_storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Add up the bytes of the storages behind the tensors; views of one storage count it once, in full."""
    return sum({memory_id(t.untyped_storage()): t.untyped_storage().nbytes() for t in tensors}.values())


def saved_activation_bytes(forward: Callable[[], object], model: nn.Module) -> int:
    """Count the bytes that autograd keeps for the backward pass of `forward()`.

    This counts the unique storages handed to `torch.autograd.graph.saved_tensors_hooks`: activations, masks,
    statistics, synthesised weights, and the input batch if a layer saves it. It leaves out parameters and buffers of
    `model`, and views of them, which are there anyway. It does not see what an autograd function keeps without
    `save_for_backward`.
    """
    owned = {memory_id(t.untyped_storage()) for t in chain(model.parameters(), model.buffers())}
    # Held until the count is done: a freed storage's address would otherwise be given to another.
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return unique_storage_bytes(t for t in saved if memory_id(t.untyped_storage()) not in owned)


def training_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """Yield what training holds between steps: parameters, gradients, buffers and optimizer state."""
    for parameter in model.parameters():
        yield parameter
        if parameter.grad is not None:
            yield parameter.grad
    yield from model.buffers()
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))


def peak_training_bytes(
    step: Callable[[], object], model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device
) -> int:
    """Peak bytes of tensor memory on `device` during a training step, what the step stands on included.

    The figure is the bytes of `training_tensors` when the step starts + the highest point, over the step, of bytes
    allocated minus bytes freed since. So it has parameters, buffers, gradients, optimizer state, activations and every
    temporary; it has neither the batch nor other models in the process.

    On the CPU the profiler tells what PyTorch's own allocator does; scratch space that a vendor library takes for
    itself is not in it. On CUDA `torch.cuda.max_memory_allocated` tells, which rounds each block up to 512 bytes.

    Args:
        step: one training step of `model` with `optimizer`, from clearing the gradients to the update.
            It runs twice; the second run counts, so that all state exists when it starts.
        model: its gradients are cleared first.
        optimizer: of the step.
        device: where the step runs.
    """
    # The profiler cannot tell the size of blocks that are older than itself: let the step free none of them.
    optimizer.zero_grad()
    base = 0

    def first() -> None:
        nonlocal base
        step()
        base = unique_storage_bytes(t for t in training_tensors(model, optimizer) if t.device.type == device.type)

    _, second = memory_rises([first, step], device)
    return base + second.peak


@dataclass(frozen=True)
class Rise:
    """Bytes of tensors that a piece of work allocated and not freed: at most, and at its end."""

    peak: int
    end: int


def memory_rises(phases: Sequence[Callable[[], object]], device: torch.device) -> list[Rise]:
    """Run pieces of work one after the other; of each, how the bytes allocated on `device` rise from its start on.

    See `peak_training_bytes` for what is counted. On the CPU no phase may free what is older than the first of them.
    """
    return (_rises_cuda if device.type == "cuda" else _rises_cpu)(phases)


def _rises_cuda(phases: Sequence[Callable[[], object]]) -> list[Rise]:
    rises = []
    for phase in phases:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        phase()
        torch.cuda.synchronize()
        rises.append(Rise(torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before))
    return rises


def _rises_cpu(phases: Sequence[Callable[[], object]]) -> list[Rise]:
    # The profiler, not a TorchDispatchMode: it also sees temporaries inside operators, and compiled code.
    with _quiet_profiler(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        for phase in phases:
            with record_function(_MEASURED):
                phase()
    results = recorded.profiler.kineto_results if recorded.profiler else None
    assert results is not None, "the profiler was entered, so it has results"
    changes: list[list[int]] = []
    for event in sorted(results.events(), key=lambda e: e.start_ns()):
        if event.name() == _MEASURED:
            changes.append([])
        elif event.name() == "[memory]" and changes:
            changes[-1].append(int(event.nbytes()))
    levels = [list(accumulate(found, initial=0)) for found in changes]
    return [Rise(max(level), level[-1]) for level in levels]


@contextmanager
def _quiet_profiler() -> Iterator[None]:
    """Keep the profiler's own log, such as a missing CUDA driver, off a user's terminal."""
    name = "KINETO_LOG_LEVEL"
    before = os.environ.get(name)
    os.environ[name] = before or "99"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]


def interleaved_times(
    steps: Mapping[str, Callable[[], object]],
    repeats: int,
    *,
    warmup: int = 2,
    on_round: Callable[[], object] = lambda: None,
    clock: Callable[[], float] | None = None,
) -> dict[str, Sample]:
    """Time the steps in turn, A B C A B C …, so that a slow spell of the machine meets all of them.

    Args:
        steps: name → one training step. They run on whatever device they use.
        repeats: how often each is timed.
        warmup: how often each runs untimed before.
        on_round: called after every round, timed or not; for a progress bar.
        clock: gives seconds; the default waits for the accelerator where there is one.
    """
    if repeats < 1:
        raise ValueError(f"repeats has to be at least 1, not {repeats}")
    for _ in range(warmup):
        for step in steps.values():
            step()
        on_round()
    readings = {name: partial(seconds_of, step, clock or _now) for name, step in steps.items()}
    return {name: Sample(values) for name, values in interleaved(readings, repeats, on_round).items()}


def interleaved(
    readings: Mapping[K, Callable[[], float]], rounds: int, on_round: Callable[[], object] = lambda: None
) -> dict[K, tuple[float, ...]]:
    """Take the readings in turn, as `interleaved_times` does."""
    taken: dict[K, list[float]] = {name: [] for name in readings}
    for _ in range(rounds):
        for name, read in readings.items():
            taken[name].append(read())
        on_round()
    return {name: tuple(values) for name, values in taken.items()}


def clock_for(device: torch.device) -> Callable[[], float]:
    """Seconds: of one thread on the CPU its own time, which other programs hardly disturb; else wall time."""
    if device.type == "cpu":
        return time.process_time if torch.get_num_threads() == 1 else time.perf_counter

    def waited() -> float:
        torch.accelerator.synchronize(device)
        return time.perf_counter()

    return waited


def _now() -> float:
    """As torch.utils.benchmark.timer, whose package prints a line when it is imported where CUDA is half installed."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def seconds_of(step: Callable[[], object], clock: Callable[[], float]) -> float:
    """Time a step, without a collection of garbage that it happens to trigger: that is not its cost."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        start = clock()
        step()
        return clock() - start
    finally:
        if collecting:
            gc.enable()


def pairwise_ratios(samples: Mapping[str, Sample], base: str) -> dict[str, Sample]:
    """Divide each sample by that of the name `base`, round by round: noise that both share cancels."""
    divisors = samples[base].values
    return {
        name: Sample(tuple(a / b for a, b in zip(sample.values, divisors, strict=True)))
        for name, sample in samples.items()
    }


def saving_kept(full: float, replaced: float, removed: float) -> float | None:
    """η = (full − replaced) / (full − removed): the share of the possible saving that is realised.

    1 is the limit, what deleting the blocks saves; 0 is no saving at all; below 0 the replaced model costs more than
    the full one. None if deleting the blocks saves nothing (removed ≥ full).
    """
    if removed >= full:
        return None
    return (full - replaced) / (full - removed)


def environment(device: torch.device) -> dict[str, object]:
    """Describe what a measurement depends on: versions, threads and the device's model."""
    return {
        "replfx": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
    }
