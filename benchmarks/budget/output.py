"""The budget benchmark's rows as a table, as Markdown, as JSON and as a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.drawing import markdown, new_figure, save, terminal_table, write_files
from replfx.measure import Sample
from replfx.reports.expectation import Expectation

HEADS = ("model", "budget", "plan", "memory", "error", "time [quartiles]", "error", "parameters", "error")
GOAL = 0.1
"""How far what is asked for may be from what was expected."""


@dataclass(frozen=True)
class Row:
    """One budget on one model.

    Attributes:
        asked, share: the budget.
        operators, replaced, blocks: the plan, and how many blocks of chains there are.
        expected: before.
        parameters, peaks: measured, of the full model and the planned one.
        times, ratios: measured, seconds of the planned model's step, and them over full's, round by round.
        reason: why there is no plan.
    """

    model: str
    asked: str
    share: float
    operators: Sequence[str] = ()
    replaced: Sequence[str] = ()
    blocks: int = 0
    expected: Expectation | None = None
    parameters: tuple[int, int] = (0, 0)
    peaks: tuple[int, int] = (0, 0)
    times: Sample | None = None
    ratios: Sample | None = None
    reason: str = ""
    kinds: tuple[str, ...] = field(default=("memory", "time", "parameters"), repr=False)

    def shares(self) -> dict[str, tuple[float, float]]:
        """Of memory, time and parameters the share of full's that is expected, and that which was measured."""
        if self.expected is None or self.ratios is None:
            return {}
        full, planned = self.expected.full, self.expected.planned
        shares = {"parameters": (planned.parameters / full.parameters, self.parameters[1] / self.parameters[0])}
        if full.peak_bytes and planned.peak_bytes is not None:
            shares["memory"] = (planned.peak_bytes / full.peak_bytes, self.peaks[1] / self.peaks[0])
        if full.step_seconds and planned.step_seconds is not None:
            shares["time"] = (planned.step_seconds / full.step_seconds, self.ratios.median)
        return shares

    def errors(self) -> dict[str, float]:
        """By how much each is beside what was expected."""
        return {name: found / expected - 1 for name, (expected, found) in self.shares().items()}

    def to_dict(self) -> dict[str, object]:
        """All figures, ready for JSON."""
        if self.expected is None or self.times is None or self.ratios is None:
            return {"model": self.model, "budget": {self.asked: self.share}, "reason": self.reason}
        return {
            "model": self.model,
            "budget": {self.asked: self.share},
            "operators": list(self.operators),
            "replaced": list(self.replaced),
            "blocks": self.blocks,
            "expected": asdict(self.expected),
            "parameters": self.parameters,
            "peak_bytes": self.peaks,
            "step_seconds": self.times.to_dict(),
            "step_over_full": self.ratios.to_dict(),
            "shares": self.shares(),
            "errors": self.errors(),
        }

    def cells(self) -> list[str]:
        """The row under `HEADS`: expected → measured, as shares of full's."""
        asked = f"{self.asked} ≤ {self.share:g}"
        if self.ratios is None:
            return [self.model, asked, f"n/a: {self.reason}", *[""] * (len(HEADS) - 3)]
        plan = f"{', '.join(self.operators)}: {len(self.replaced)} of {self.blocks}" if self.replaced else "full"
        cells = [self.model, asked, plan]
        shares, errors = self.shares(), self.errors()
        for name in self.kinds:
            if name not in shares:
                cells += ["–", ""]
                continue
            expected, found = shares[name]
            low, high = self.ratios.quartiles
            spread = f" [{low:.2f}–{high:.2f}]" if name == "time" else ""
            cells += [f"{expected:.2f} → {found:.2f}{spread}", f"{100 * errors[name]:+.1f} %".replace("-", "−")]
        return cells


def table(rows: Sequence[Row]) -> Table:
    """Lay the rows out for the terminal."""
    return terminal_table(HEADS, [row.cells() for row in rows], 3, title="shares of full: expected → measured")


def write(rows: Sequence[Row], environment: Mapping[str, object], folder: Path) -> list[Path]:
    """Write ``budget.json``, ``budget.md`` and ``budget.png`` to the folder; returns where they are."""
    record = {"environment": environment, "results": [row.to_dict() for row in rows]}
    text = "Shares of the full model's: expected → measured.\n\n" + markdown(HEADS, [r.cells() for r in rows], words=3)
    return write_files(folder, "budget", record, text, lambda path: plot(record, path))


def plot(record: Mapping[str, Any], path: Path) -> None:
    """Plot measured over expected of what was asked for, beside the goal, from what `write` records."""
    figure = new_figure(5.4, 5.2, "Budgets: what was asked for (grey: within 10 %)")
    ax = figure.subplots()
    points: dict[str, list[tuple[float, float]]] = {"memory": [], "time": [], "parameters": []}
    for row in record["results"]:
        (asked,) = row["budget"]
        if asked in row.get("shares", {}):
            points[asked].append(tuple(row["shares"][asked]))
    ends = (min([0.5, *(value for found in points.values() for point in found for value in point)]) - 0.05, 1.0)
    ax.fill_between(ends, [e * (1 - GOAL) for e in ends], [e * (1 + GOAL) for e in ends], color="0.9")
    ax.plot(ends, ends, color="0.6", linewidth=0.8)
    for (name, found), marker in zip(points.items(), "so^", strict=True):
        if found:
            ax.plot(*zip(*found, strict=True), marker, label=name, markersize=5)
    ax.set(xlabel="expected share of full depth's", ylabel="measured share of full depth's", xlim=ends, ylim=ends)
    ax.set_aspect("equal")
    ax.grid(alpha=0.3)
    ax.legend(frameon=False, loc="upper left")
    save(figure, path)
