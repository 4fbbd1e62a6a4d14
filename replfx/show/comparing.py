"""Comparing operators on one model: what each leaves of its costs, and whether it can be unrolled."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Unpack

import torch
from torch import nn

from replfx.api import report, transform
from replfx.chains.policy import Options, policy_of
from replfx.errors import CaptureError, FusionError, NoChainError, VerifyError
from replfx.measure import Sample, interleaved_times, pairwise_ratios, trainable_parameters, training_on
from replfx.modules.copying import faithful_copy
from replfx.operators.base import operators
from replfx.reports.labels import amount, mebibytes
from replfx.reports.report import Totals
from replfx.tracing import ExampleInputs, Inputs, costs_of

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

__all__ = ["FULL", "Compared", "Comparison", "compare"]

FULL = "full"
"""The name of the untouched model among the operators."""


@dataclass(frozen=True)
class Compared:
    """One operator on the model."""

    operator: str  # its name, or "full" for the untouched model
    replaced: int = 0  # how many blocks it replaces
    parameters: int | None = None  # trainable parameters that are left
    costs: Totals | None = None  # FLOPs of a forward pass, and bytes that it saves for backward
    step: Sample | None = None  # seconds of a training step, one value a repeat
    ratio: Sample | None = None  # each of them divided by that of the full model in the same repeat
    unrolls: bool | None = None  # whether `replfx.unroll` can give all blocks back at full depth
    reason: str | None = None  # why the operator replaces nothing; all the rest is None or 0 then

    def to_dict(self) -> dict[str, object]:
        """As plain JSON values."""
        samples = {name: None if s is None else s.to_dict() for name, s in (("step", self.step), ("ratio", self.ratio))}
        return {**asdict(self), **samples}


@dataclass(frozen=True)
class Comparison:
    """All operators on one model, on one batch."""

    model: str  # name of the model's class
    example: str  # the batch, as in `Report.example`
    device: str  # what the steps were timed on
    rows: Sequence[Compared]  # the full model first, then every operator

    def to_dict(self) -> dict[str, object]:
        """As plain JSON values."""
        return {**vars(self), "rows": [row.to_dict() for row in self.rows]}

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        from rich import box
        from rich.table import Table
        from rich.text import Text

        from replfx.reports.text import hanging

        table = Table(title=f"{self.model}, {self.example}", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        table.add_column("operator", vertical="bottom", no_wrap=True)
        for name in ("blocks\nreplaced", "para-\nmeters", "\nFLOPs", "saved\nMiB", "step\nms", "step\n/ full"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("can be\nunrolled", no_wrap=True)
        for row in self.rows:
            if row.reason is None:
                table.add_row(*_cells(row))
        yield table
        yield Text(f"step: forward, backward and SGD on {self.device}; median of repeats in turn")
        for row in self.rows:
            if row.reason is not None:
                yield hanging(f"{row.operator} replaces nothing: {row.reason}")


def compare(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    repeats: int = 5,
    **options: Unpack[Options],
) -> Comparison:
    """Carry out one policy with every operator, and measure what a training step costs. Leaves the model as it is.

    A step is forward, backward of the mean of all outputs, and SGD; the operators take turns, so that a slow spell of
    the machine meets all of them. All of the models and their gradients are in memory at once.

    Args:
        model: the untransformed model, in the mode in which steps are to be timed.
        example_inputs: a batch, as for `replfx.transform`.
        repeats: how many steps of each are timed.
        **options: the options of `replfx.transform` that choose blocks and their fusion.

    Returns:
        One row for the full model, and one for every registered operator; where one fits no block, with the reason.

    Raises:
        CaptureError: the model does not run, or has nothing to train.
        PlanError: an impossible selection.

    Example:
        >>> comparison = compare(torchvision.models.resnet18(), torch.rand(8, 3, 64, 64))
        >>> [row.operator for row in comparison.rows]
        ['full', 'block', 'identity', 'light', 'mixer']
    """
    policy_of(**options)  # an impossible policy is so for all operators
    inputs = Inputs.of(example_inputs, model)
    if inputs is None:
        raise CaptureError("to compare operators replfx needs example_inputs: steps are timed on them")
    if not trainable_parameters(model):
        raise CaptureError(f"{type(model).__name__} has no trainable parameters, so there is no training step to time")
    full = faithful_copy(model)
    models = {FULL: full}
    rows = {FULL: Compared(FULL, 0, trainable_parameters(full), Totals(*costs_of(full, inputs)))}
    example = ""
    for name in sorted(operators):
        try:
            options["operator"] = name
            made = transform(model, example_inputs, **options)
        except (NoChainError, FusionError, VerifyError) as error:
            why = "; ".join(error.reasons) if isinstance(error, NoChainError) else str(error)
            rows[name] = Compared(name, reason=why)
            continue
        found = report(made)
        models[name], example = made, found.example or example
        rows[name] = Compared(name, len(found.replaced), found.parameters_after, found.after, unrolls=found.unrolls)
    device = str(next(model.parameters()).device)
    return Comparison(type(model).__name__, example, device, _timed(rows, models, inputs, repeats))


def _timed(rows: dict[str, Compared], models: dict[str, nn.Module], inputs: Inputs, repeats: int) -> list[Compared]:
    with torch.random.fork_rng():
        # A rate of 0 leaves the weights where they are: the costs do not depend on them, and they cannot diverge.
        still = partial(torch.optim.SGD, lr=0.0)
        steps = {name: training_on(model, inputs, still).step for name, model in models.items()}
        samples = interleaved_times(steps, repeats)
    ratios = pairwise_ratios(samples, FULL)
    return [replace(row, step=samples.get(name), ratio=ratios.get(name)) for name, row in rows.items()]


def _cells(row: Compared) -> list[str]:
    assert row.parameters is not None
    assert row.step is not None
    assert row.ratio is not None
    costs = ("", "") if row.costs is None else (amount(row.costs.flops), mebibytes(row.costs.saved_bytes))
    return [
        row.operator,
        str(row.replaced or ""),
        amount(row.parameters),
        *costs,
        f"{1e3 * row.step.median:.1f}",
        f"{row.ratio.median:.2f}×",
        "" if row.unrolls is None else "yes" if row.unrolls else "no",
    ]
