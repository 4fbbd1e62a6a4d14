"""The transfer benchmark's rows as a table and as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from benchmarks import names
from benchmarks.accuracy.report import Difference, difference_text
from benchmarks.drawing import list_rows, new_figure, save

BOUNDS = ("full", "removed")

HEADS = (
    "variant",
    "first half, replaced, %",
    "other half, fine-tuned, %",
    "− full [95 %]",
    "− removed [95 %]",
    "parameters",
)


@dataclass(frozen=True)
class Row:
    """One variant.

    Attributes:
        before: accuracy on the first half before any training.
        after: mean and standard deviation of the accuracy on the other half.
        to_full, to_removed: paired differences of that.
        parameters: trainable ones.
    """

    variant: str
    before: float
    after: tuple[float, float | None]
    to_full: Difference | None
    to_removed: Difference | None
    parameters: int

    def cells(self) -> tuple[str, ...]:
        """As texts, in the order of `HEADS`."""
        middle, spread = self.after
        after = f"{middle:.2f}" if spread is None else f"{middle:.2f} ± {spread:.2f}"
        differences = (difference_text(found, digits=2) for found in (self.to_full, self.to_removed))
        return self.variant, f"{self.before:.1f}", after, *differences, f"{self.parameters:,}"


def table(rows: Sequence[Row]) -> Table:
    """For the terminal."""
    made = Table(title="transfer")
    for position, head in enumerate(HEADS):
        made.add_column(head, justify="right" if position else "left")
    for row in rows:
        made.add_row(*row.cells())
    return made


def plot(rows: Sequence[Row], path: Path) -> None:
    """Accuracy after fine-tuning, a point a variant with its standard deviation."""
    figure = new_figure(
        8, 1.2 + 0.35 * len(rows), "Blocks of a pretrained ResNet replaced, then fine-tuned on other classes"
    )
    ax = figure.subplots()
    for place, row in enumerate(rows):
        ax.errorbar(row.after[0], place, xerr=row.after[1] or 0.0, fmt="o", color="C0", capsize=4)
    list_rows(ax, [names.variant(row.variant) if row.variant in BOUNDS else row.variant for row in rows])
    ax.set_xlabel("accuracy on the other five classes, % (mean and standard deviation over the seeds)")
    save(figure, path)
