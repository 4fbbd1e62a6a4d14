"""Choosing operator and blocks for a budget: the mildest plan that is expected to be within it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from replfx.budget.asked import Budget
from replfx.budget.cost_model import Costs, Twin, counted, measured, measured_whole
from replfx.chains.find import find_chains
from replfx.chains.policy import ChoiceLike, policy_of
from replfx.chains.select import select
from replfx.errors import CaptureError, FusionError, NoChainError, PlanError
from replfx.fusion import Choice
from replfx.fusion.registry import AUTO
from replfx.modules.copying import faithful_copy, structural_copy
from replfx.operators.base import operators
from replfx.plans import Plan, has_regions
from replfx.reports.describe import describe_chains
from replfx.reports.expectation import Expectation, Figures
from replfx.reports.labels import listed, mebibytes
from replfx.rewrite.build import build, install
from replfx.rewrite.carry_out import carry_out, prepare_plan
from replfx.tracing import ExampleInputs, Inputs, capture_lazily, check_is_whole

__all__ = ["Chosen", "choose"]

_ORDER = ("block", "mixer", "light", "identity")
"""The operators from the one that keeps most of what a block does to the one that keeps nothing of it."""

_KEPT = 2  # blocks of a chain that stay at least: its ends
_CHECKS = 4  # plans that are run as a whole at most


@dataclass(frozen=True)
class Chosen:
    """What is within a budget."""

    operator: Choice  # of the replaced blocks, with the options that the user gave it; "auto" where none need be
    paths: tuple[str, ...]  # these; none where the untouched model is within it
    expected: Expectation  # what it costs


def choose(
    model: nn.Module,
    example_inputs: ExampleInputs | None,
    budget: Mapping[str, object],
    *,
    fusion: ChoiceLike = AUTO,
    operator: ChoiceLike = AUTO,
    split_at: str | Sequence[str] | None = None,
) -> Chosen:
    """Find the mildest plan that is expected to be within a budget; `model` is left as it is.

    It takes the first plan that fits, in this order: at most every second block replaced, by `block`, `mixer`, `light`,
    `identity`; then more of them, in the same order of operators. For one operator it takes the fewest blocks that do:
    those that save most of what is asked for, and of equal ones such that are spread over the depth.

    The model is in the mode in which it is to be trained. Options are as for `replfx.transform`; operator "auto" tries
    all.

    Raises:
        PlanError: the budget is malformed, or no plan is within it; then the message says what is possible.
        NoChainError: no block can be replaced.
        CaptureError: there are no example inputs, or nothing to train.
    """
    limits = Budget.of(budget)
    check_is_whole(model)
    inputs = Inputs.of(example_inputs, model)
    if not limits.measures:
        inputs = None
    elif inputs is None:
        raise CaptureError("to meet a budget of time or memory replfx needs example_inputs: steps are measured on them")
    base = faithful_copy(model) if limits.measures else structural_copy(model)
    with torch.random.fork_rng():
        found = _Found(base, example_inputs, model, fusion, split_at)
        twins, refused = found.twins(operator)
        costs = counted(base, found.report, twins) if inputs is None else measured(base, inputs, found.report, twins)
        device, given = str(next(base.parameters()).device), Choice.of(operator, "operator").options
        if costs.full.step_seconds is None and limits.needs_full:
            raise PlanError(
                f"budget: a step of the full model does not fit {device}, so that no share of it is known; "
                'give {"memory": …} in bytes'
            )
        search = _Search(type(model).__name__, device, limits, costs, twins, refused, given)
        chosen = search.found()
        for _ in range(_CHECKS):
            if not chosen.paths or inputs is None or costs.full.step_seconds is None:
                break
            whole = measured_whole(base, found.planned(chosen), inputs)
            if whole is None:
                break
            corrected = search.costs.corrected(chosen.operator.name, set(chosen.paths), *whole)
            before, search = chosen, replace(search, costs=corrected)
            chosen = search.found()
            if chosen.paths == before.paths:
                break
    return chosen


class _Found:
    """The chains of a model, from one look at `base`, which is a copy of it; options as for `choose`."""

    def __init__(
        self,
        base: nn.Module,
        example_inputs: ExampleInputs | None,
        model: nn.Module,
        fusion: ChoiceLike,
        split_at: str | Sequence[str] | None,
    ) -> None:
        self._base, self._example_inputs, self._fusion, self._split_at = base, example_inputs, fusion, split_at
        self._chains = find_chains(capture_lazily(base, example_inputs, model))
        self.report = describe_chains(self._chains, base)

    def twins(self, operator: ChoiceLike) -> tuple[list[Twin], dict[str, str]]:
        """The model with each operator in as many places as can be; and why others fit nowhere."""
        asked = Choice.of(operator, "operator")
        names = [name for name in _ORDER if name in operators] if asked.name == AUTO else [asked.name]
        twins, refused = [], dict[str, str]()
        for name in names:
            chosen = Choice(name, asked.options)
            try:
                everywhere = self._plan(chosen, keep=_KEPT)
                made, paths = self._replaced(everywhere), tuple(r.path for r in everywhere.replacements)
                first = {r.path for r in self._plan(chosen, every=2).replacements}
            except (NoChainError, FusionError) as error:
                refused[name] = error.reasons[0] if isinstance(error, NoChainError) else str(error)
                continue
            twins.append(Twin(name, made, paths, first & set(paths)))
        if not twins:
            raise NoChainError("; ".join(dict.fromkeys(refused.values())))
        return twins, refused

    def _plan(
        self, operator: Choice, *, every: int | None = None, keep: int | None = None, paths: Sequence[str] | None = None
    ) -> Plan:
        policy = policy_of(
            every=every, keep=keep, select=paths, operator=operator, fusion=self._fusion, split_at=self._split_at
        )
        selection = select(self._chains, policy)
        if selection.nothing is not None:
            raise NoChainError(*selection.nothing)
        return selection.plan

    def planned(self, chosen: Chosen) -> nn.Module:
        """The model with what was chosen; it shares its tensors with the base."""
        return self._replaced(self._plan(chosen.operator, paths=chosen.paths))

    def _replaced(self, plan: Plan) -> nn.Module:
        """A model that shares its tensors with the base, where it can be one."""
        twin = structural_copy(self._base)
        if has_regions(plan):
            return carry_out(prepare_plan(self._base, twin, self._example_inputs, plan))
        install(twin, build(twin, plan))
        return twin


@dataclass(frozen=True)
class _Search:
    """The search for the mildest plan."""

    model: str  # its name, as the device's, for messages
    device: str
    budget: Budget  # what is to be met
    costs: Costs  # of blocks and of the whole
    twins: Sequence[Twin]  # the operators, the mildest first
    refused: Mapping[str, str]  # operators that fit nowhere, and why
    given: Mapping[str, object]  # options of the operator

    def found(self) -> Chosen:
        """The mildest plan within the budget; a PlanError if there is none."""
        if self._fits(self._untouched):
            return self._chosen(AUTO, (), self._untouched)
        for twin, paths, planned in self._plans():
            if self._fits(planned):
                return self._chosen(twin.operator, paths, planned)
        raise PlanError(self._nothing())

    @property
    def _untouched(self) -> Figures:
        return self.costs.planned("", frozenset())

    def _fits(self, figures: Figures) -> bool:
        return all(needed <= 1 for needed in self.budget.needed(self.costs.full, figures).values())

    def _chosen(self, operator: str, paths: tuple[str, ...], planned: Figures) -> Chosen:
        expected = Expectation(self.budget.asked, self.device, self.costs.full, planned)
        return Chosen(Choice(operator, dict(self.given)), paths, expected)

    def _plans(self) -> Iterator[tuple[Twin, tuple[str, ...], Figures]]:
        """All plans in the order in which they are tried, with what they are expected to cost."""
        for halved in (True, False):
            for twin in self.twins:
                for paths in self._selections(twin, halved):
                    yield twin, paths, self.costs.planned(twin.operator, set(paths))

    def _selections(self, twin: Twin, halved: bool) -> Iterator[tuple[str, ...]]:
        """More and more blocks: of those that are replaced first, or all of these and more and more others."""
        first = [path for path in self.costs.order if path in twin.first]
        if halved:
            ranked, given = self._ranked(twin, first), []
        else:
            ranked, given = self._ranked(twin, [p for p in twin.paths if p not in twin.first]), first
        taken: list[str] = []
        for group in ranked:
            for count in range(1, len(group) + 1):
                chosen = {*given, *taken, *_spread(group, count)}
                yield tuple(path for path in self.costs.order if path in chosen)
            taken += group

    def _ranked(self, twin: Twin, paths: Sequence[str]) -> list[list[str]]:
        """Blocks by what replacing each of them saves of what is asked for, the most first; equal ones together."""
        groups: dict[object, list[str]] = {}
        for path in paths:
            key = (self.costs.kinds.get(path), self.costs.sizes["", path], self.costs.sizes[twin.operator, path])
            groups.setdefault(key, []).append(path)
        before = self.budget.needed(self.costs.full, self._untouched)

        def saved(group: Sequence[str]) -> float:
            after = self.budget.needed(self.costs.full, self.costs.planned(twin.operator, {group[0]}))
            return sum(before[name] - after[name] for name in before)

        return sorted(groups.values(), key=saved, reverse=True)

    def _nothing(self) -> str:
        """What is possible, where what was asked for is not."""
        best: dict[str, tuple[float, Twin, tuple[str, ...], Figures]] = {}
        for twin, paths, planned in self._plans():
            for name, needed in self.budget.needed(self.costs.full, planned).items():
                if name not in best or needed < best[name][0]:
                    best[name] = needed, twin, paths, planned
        said = [
            f"{self._least(name, planned)} (`{twin.operator}` in the place of {listed(paths)})"
            for name, (_, twin, paths, planned) in best.items()
        ]
        together = "; but not all of it at once" if all(needed <= 1 for needed, *_ in best.values()) else ""
        left_out = "".join(f"; {name} fits nowhere: {why}" for name, why in self.refused.items())
        return f"no plan of this {self.model} is within the budget: at best {', '.join(said)}{together}{left_out}"

    def _least(self, name: str, planned: Figures) -> str:
        full = self.costs.full
        if name == "memory":
            assert planned.peak_bytes is not None
            share = f" ({planned.peak_bytes / full.peak_bytes:.2f} of full)" if full.peak_bytes else ""
            return f"memory {mebibytes(planned.peak_bytes)} MiB{share}"
        if name == "time":
            assert planned.step_seconds is not None
            assert full.step_seconds is not None
            return f"time {planned.step_seconds / full.step_seconds:.2f} of full"
        return f"parameters {planned.parameters / full.parameters:.2f} of full"


def _spread(paths: Sequence[str], count: int) -> list[str]:
    """So many of the paths, spread evenly."""
    return [paths[(2 * i + 1) * len(paths) // (2 * count)] for i in range(count)]
