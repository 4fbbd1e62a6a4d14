"""The cost model: a whole step of the untouched model, and what single blocks cost with and without each operator."""

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median
from typing import TypeAlias

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from replfx.budget.block_costs import BlockCost, Work
from replfx.errors import ReplfxError
from replfx.measure import (
    Training,
    clock_for,
    interleaved,
    interleaved_times,
    pairwise_ratios,
    peak_training_bytes,
    seconds_of,
    training_on,
)
from replfx.modules.paths import block_at, head_of, is_region, parameters_of
from replfx.modules.structure import block_digest
from replfx.reports.expectation import Figures
from replfx.reports.report import Report
from replfx.tracing import Inputs, calls_of, costs_of

__all__ = ["Costs", "Twin", "counted", "measured", "measured_whole"]

Key: TypeAlias = tuple[str, object]
"""An operator, or "" for the untouched block, and a kind of block."""

_STEP: Key = ("", "step")
_UPDATE: Key = ("", "update")
_ROUNDS = (7, 41)  # timed: at least, and as many as take two seconds of whole steps
_STATES = 2  # tensors that AdamW holds for each parameter
_STILL = partial(torch.optim.AdamW, lr=0.0, fused=True)  # which leaves the weights where they are: costs do not care


@dataclass(frozen=True)
class Twin:
    """The model with one operator in the place of every block that it can replace."""

    operator: str
    model: nn.Module  # shares its tensors with the model that was measured whole
    paths: Sequence[str]  # of the blocks that it has replaced, as they run
    first: Set[str]  # those of them that are to be replaced first, of which no two are neighbours


@dataclass(frozen=True)
class Costs:
    """What is known of a model's costs."""

    full: Figures  # the untouched model's; without peak and time where a step of it was not measured
    order: tuple[str, ...]  # the paths of all blocks of chains, as they run
    bytes: int  # of the trainable parameters of the model
    saved: int = 0  # what is kept for backward outside of the blocks, in bytes
    steps: tuple[float, ...] = ()  # seconds of a whole step, one value a round; none where it does not fit the device
    updates: tuple[float, ...] = ()  # of them, those of the optimizer
    kinds: Mapping[str, object] = field(default_factory=dict)  # path → blocks of one kind have the same costs
    # (operator, kind) → cost; the untouched block's under the operator "".
    blocks: Mapping[Key, BlockCost] = field(default_factory=dict)
    # (operator, path) → trainable parameters, and their bytes; the untouched block's under "".
    sizes: Mapping[tuple[str, str], tuple[int, int]] = field(default_factory=dict)
    # Operator → bytes of the peak, and share of the step's time, that a replaced block costs beyond what its parts say,
    # as a whole plan has shown.
    errors: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def planned(self, operator: str, replaced: Set[str]) -> Figures:
        """What the model is expected to cost with `operator` in the place of these blocks."""
        peak, seconds = None, None
        more_bytes, more_time = (len(replaced) * error for error in self.errors.get(operator, (0.0, 0.0)))
        if self.blocks:
            peak = self._raw_peak(operator, replaced) + round(more_bytes)
            if self.full.peak_bytes is not None:
                peak += self.full.peak_bytes - self._raw_peak("", frozenset())
        if self.full.step_seconds is not None:
            seconds = self.full.step_seconds * (self._time_ratio(operator, replaced) + more_time)
        return Figures(self.full.parameters - self._less(operator, replaced)[0], peak, seconds)

    def corrected(self, operator: str, replaced: Set[str], peak: int, ratio: float) -> "Costs":
        """The same, knowing what a whole plan costs: its peak, and its step's time as a share of full's."""
        plain = replace(self, errors={}).planned(operator, replaced)
        assert plain.peak_bytes is not None
        assert plain.step_seconds is not None
        assert self.full.step_seconds is not None
        more = peak - plain.peak_bytes, ratio - plain.step_seconds / self.full.step_seconds
        return replace(self, errors={**self.errors, operator: (more[0] / len(replaced), more[1] / len(replaced))})

    def _less(self, operator: str, replaced: Set[str]) -> tuple[int, int]:
        """How many trainable parameters are gone, and their bytes."""
        pairs = [(self.sizes["", path], self.sizes[operator, path]) for path in replaced]
        return sum(a[0] - b[0] for a, b in pairs), sum(a[1] - b[1] for a, b in pairs)

    def _time_ratio(self, operator: str, replaced: Set[str]) -> float:
        """The planned step over the full one's, round by round: noise that both share cancels."""
        if not self.full.parameters:
            return 1.0
        gone = self._less(operator, replaced)[0] / self.full.parameters
        kinds = [self.kinds[path] for path in replaced]
        ratios = []
        for index, step in enumerate(self.steps):
            saved = gone * self.updates[index]
            for kind in kinds:
                saved += self.blocks["", kind].seconds[index] - self.blocks[operator, kind].seconds[index]
            ratios.append(1 - saved / step)
        return median(ratios)

    def _raw_peak(self, operator: str, replaced: Set[str]) -> int:
        """The highest point of a step, all that is outside of blocks taken to be kept from the beginning on."""
        weights = self.bytes - self._less(operator, replaced)[1]
        level = highest = (1 + _STATES) * weights + self.saved
        costs = []
        for path in self.order:
            name = operator if path in replaced else ""
            costs.append((self.blocks[name, self.kinds[path]], self.sizes[name, path][1]))
        for cost, _ in costs:
            highest = max(highest, level + cost.forward.peak)
            level += cost.forward.end
        highest = max(highest, level)
        for cost, gradients in reversed(costs):
            highest = max(highest, level + cost.backward.peak)
            level += gradients - cost.forward.end
        return max(highest, (2 + _STATES) * weights)


def counted(base: nn.Module, report: Report, twins: Sequence[Twin]) -> Costs:
    """What is known without running anything: parameters. The report is of all chains of the model."""
    # A region is no module yet; its parameters are taken to be floats.
    sizes = {
        ("", b.path): (b.parameters, 4 * b.parameters) if is_region(b.path) else _block_size(base, b.path)
        for b in report.blocks
    }
    for twin in twins:
        sizes |= {(twin.operator, path): _block_size(twin.model, path) for path in twin.paths}
    count, size = _size(base.parameters())
    return Costs(Figures(count), tuple(block.path for block in report.blocks), size, sizes=sizes)


def measured(base: nn.Module, inputs: Inputs, report: Report, twins: Sequence[Twin]) -> Costs:
    """The same, with time and memory; `base` is a copy of the user's model, as it trains on the batch.

    Raises:
        ReplfxError: the blocks are no modules, or a block is never called.
    """
    known = counted(base, report, twins)
    device = next(base.parameters()).device
    kinds = _kinds(base, report)
    works = _works(base, inputs, kinds, twins)
    clock = clock_for(device)
    for work in works.values():
        work.warm_up(clock)
    rises = {key: work.rises(device) for key, work in works.items()}
    readings: dict[Key, Callable[[], float]] = {key: partial(work.seconds, clock) for key, work in works.items()}
    training = training_on(base, inputs, _STILL)
    peak = _peak(training)
    if peak is not None:
        readings[_STEP] = partial(seconds_of, training.step, clock)
        readings[_UPDATE] = partial(seconds_of, training.optimizer.step, clock)
    taken = interleaved(readings, _rounds(training, clock) if peak is not None else _ROUNDS[0])
    outside = costs_of(base, inputs)[1] - sum(block.saved_bytes or 0 for block in report.blocks)
    return replace(
        known,
        full=Figures(known.full.parameters, peak, None if peak is None else median(taken[_STEP])),
        saved=max(0, outside),
        steps=taken.get(_STEP, ()),
        updates=taken.get(_UPDATE, ()),
        kinds=kinds,
        blocks={key: BlockCost(taken[key], *rises[key]) for key in works},
    )


def measured_whole(base: nn.Module, planned: nn.Module, inputs: Inputs) -> tuple[int, float] | None:
    """What a plan costs: the peak of a step, and its time as a share of the step of `base`, the untouched model.

    The two may share tensors. None if they do not fit the device together.
    """
    full, other = training_on(base, inputs, _STILL), training_on(planned, inputs, _STILL)
    try:
        peak = peak_training_bytes(other.step, planned, other.optimizer, other.device)
        clock = clock_for(full.device)
        steps = {"full": full.step, "planned": other.step}
        times = interleaved_times(steps, _rounds(full, clock), warmup=1, clock=clock)
    except torch.OutOfMemoryError:
        return None
    return peak, pairwise_ratios(times, "full")["planned"].median


def _kinds(base: nn.Module, report: Report) -> dict[str, object]:
    """Path → what blocks of equal costs have in common."""
    if regions := [block.path for block in report.blocks if is_region(block.path)]:
        raise ReplfxError(
            f"budget: the blocks of this {type(base).__name__} are no modules (`{regions[0]}`), so that none can be "
            'timed alone: only {"parameters": …} can be met'
        )
    return {
        b.path: b.path if b.flops is None else (block_digest(block_at(base, b.path)), b.flops, b.saved_bytes)
        for b in report.blocks
    }


def _works(base: nn.Module, inputs: Inputs, kinds: Mapping[str, object], twins: Sequence[Twin]) -> dict[Key, Work]:
    """A block of every kind, and what takes its place under every operator."""
    first = {kind: path for path, kind in reversed(list(kinds.items()))}
    blocks = {path: base.get_submodule(head_of(base, path)) for path in first.values()}
    with torch.enable_grad(), saved_tensors_hooks(lambda tensor: None, lambda nothing: nothing):  # no step follows
        calls = calls_of(base, inputs, blocks)
    if silent := [path for path in first.values() if path not in calls]:
        raise ReplfxError(f"budget: `{silent[0]}` is not called on these inputs, so its costs cannot be measured")
    works = {("", kind): Work(base, path, calls[path]) for kind, path in first.items()}
    for twin in twins:
        replaced = {kinds[path]: path for path in twin.paths}
        works |= {(twin.operator, kind): Work(twin.model, path, calls[first[kind]]) for kind, path in replaced.items()}
    return works


def _peak(training: Training) -> int | None:
    """The peak of a whole step; None where that does not fit the device."""
    try:
        return peak_training_bytes(training.step, training.model, training.optimizer, training.device)
    except torch.OutOfMemoryError:
        training.optimizer.zero_grad()
        return None


def _rounds(training: Training, clock: Callable[[], float]) -> int:
    least, most = _ROUNDS
    return min(most, max(least, int(2 / max(seconds_of(training.step, clock), 1e-6))))


def _block_size(model: nn.Module, path: str) -> tuple[int, int]:
    return _size(parameters_of(model, path).values())


def _size(parameters: Iterable[nn.Parameter]) -> tuple[int, int]:
    """How many of them are trainable, each counted once, and their bytes."""
    trained = [p for p in dict.fromkeys(parameters) if p.requires_grad]
    return sum(p.numel() for p in trained), sum(p.nbytes for p in trained)
