"""The compile benchmark's rows as tables, as Markdown, as JSON and as a plot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks import names
from benchmarks.drawing import broken, markdown, plot_ratios, terminal_table, write_files
from replfx.measure import MIB, Sample, StepCost

STEP_HEADS = (
    "model",
    "variant",
    "step, ms",
    "step / Inductor full [quartiles]",
    "launches a step",
    "peak, MiB",
    "compile, s",
    "goal, ms",
)
KERNEL_HEADS = ("work", "by", "µs", "share of the copy rate", "launches")


@dataclass(frozen=True)
class StepRow:
    """One model, replaced and compiled one way.

    Attributes:
        cost: of a training step; None where there is no such variant.
        ratio: step time over Inductor full's, round by round.
        launches: kernels a step starts on an accelerator.
        compile_seconds: what the first step took beyond another one.
        goal: seconds that a step may take: 1.02 times Inductor removed, and the operator's own FLOPs at the rate of a
            large matrix product.
        reason: why there is no such variant.
    """

    model: str
    variant: str
    cost: StepCost | None = None
    ratio: Sample | None = None
    launches: int | None = None
    compile_seconds: float | None = None
    goal: float | None = None
    reason: str = ""

    def to_dict(self) -> dict[str, object]:
        """All figures, ready for JSON."""
        if self.cost is None or self.ratio is None:
            return {"model": self.model, "variant": self.variant, "reason": self.reason}
        return {
            "model": self.model,
            "variant": self.variant,
            **self.cost.to_dict(),
            "step_over_inductor_full": self.ratio.to_dict(),
            "launches": self.launches,
            "compile_seconds": self.compile_seconds,
            "goal_seconds": self.goal,
        }

    def cells(self) -> list[str]:
        """The row under `STEP_HEADS`."""
        if self.cost is None or self.ratio is None:
            return [self.model, self.variant, f"n/a: {self.reason}", *[""] * (len(STEP_HEADS) - 3)]
        lower, upper = self.ratio.quartiles
        return [
            self.model,
            self.variant,
            f"{1e3 * self.cost.step_seconds.median:.1f}",
            f"{self.ratio.median:.2f} [{lower:.2f}–{upper:.2f}]",
            "–" if self.launches is None else str(self.launches),
            f"{self.cost.peak_bytes / MIB:.0f}",
            "–" if self.compile_seconds is None else f"{self.compile_seconds:.1f}",
            "–" if self.goal is None else f"{1e3 * self.goal:.1f}",
        ]


@dataclass(frozen=True)
class KernelRow:
    """One piece of work, done by one provider.

    Attributes:
        seconds: median of a call.
        bound: seconds that moving its bytes takes at the rate of a large copy.
        launches: kernels a call starts on an accelerator.
    """

    work: str
    provider: str
    seconds: float
    bound: float
    launches: int | None

    def cells(self) -> list[str]:
        """The row under `KERNEL_HEADS`."""
        count = "–" if self.launches is None else str(self.launches)
        return [
            self.work,
            self.provider,
            f"{1e6 * self.seconds:.0f}",
            f"{100 * self.bound / self.seconds:.0f} %",
            count,
        ]


def tables(steps: Sequence[StepRow], kernels: Sequence[KernelRow]) -> Iterator[Table]:
    """Lay the rows out for the terminal: a table a model, and one for each piece of work."""
    for model, group in groupby(steps, key=lambda row: row.model):
        yield terminal_table(broken(STEP_HEADS[1:]), [row.cells()[1:] for row in group], title=model)
    for work, rows in groupby(kernels, key=lambda row: row.work):
        yield terminal_table(broken(KERNEL_HEADS[1:]), [row.cells()[1:] for row in rows], title=work)


def write(
    steps: Sequence[StepRow], kernels: Sequence[KernelRow], stamps: Mapping[str, object], folder: Path
) -> list[Path]:
    """Write ``compile.json``, ``compile.md`` and ``compile.png`` to the folder; returns where they are."""
    record: dict[str, Any] = {
        "environment": stamps,
        "steps": [row.to_dict() for row in steps],
        "kernels": [asdict(row) for row in kernels],
    }
    parts = [(STEP_HEADS, [row.cells() for row in steps]), (KERNEL_HEADS, [row.cells() for row in kernels])]
    text = "\n".join(markdown(heads, rows) for heads, rows in parts if rows)
    draw = partial(plot, record) if any(row.ratio for row in steps) else None
    return write_files(folder, "compile", record, text, draw)


def plot(record: Mapping[str, Any], path: Path) -> None:
    """Plot step times over those of full under Inductor, one axis a model, from what `write` records."""
    key = "step_over_inductor_full"
    groups: dict[str, dict[str, Sample | None]] = {}
    for row in record["steps"]:
        ratio = Sample.from_dict(row[key]) if key in row else None
        groups.setdefault(names.model(row["model"]), {})[row["variant"]] = ratio
    title = f"Training step over full depth's under Inductor ({record['environment']['device'].upper()})"
    plot_ratios(groups, title, "step time / full depth's under Inductor: median and quartiles", path)
