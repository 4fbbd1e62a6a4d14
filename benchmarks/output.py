"""The step benchmark's rows as a table, as Markdown, as JSON and as a plot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from benchmarks import names
from benchmarks.drawing import (
    list_rows,
    mark_missing,
    markdown,
    missing,
    new_figure,
    plot_ratio,
    save,
    terminal_table,
    write_files,
)
from replfx.measure import MIB, Sample, StepCost

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HEADS = (
    "model",
    "variant",
    "params, M",
    "step, ms",
    "step/full [quartiles]",
    "η time",
    "peak, MiB",
    "η peak",
    "saved, MiB",
    "η saved",
)


@dataclass(frozen=True)
class Row:
    """One variant of one model: its cost beside full's and removed's, or why it has none."""

    model: str
    variant: str
    cost: StepCost | None = None
    time_ratio: Sample | None = None
    """Step time over full's, round by round."""
    eta_time: float | None = None
    eta_peak: float | None = None
    eta_saved: float | None = None
    peak_ratio: float | None = None
    saved_ratio: float | None = None
    reason: str = ""
    """Why the variant does not exist, where it does not."""

    def to_dict(self) -> dict[str, object]:
        """All figures, ready for JSON."""
        if self.cost is None or self.time_ratio is None:
            return {"model": self.model, "variant": self.variant, "reason": self.reason}
        return {
            "model": self.model,
            "variant": self.variant,
            **self.cost.to_dict(),
            "step_over_full": self.time_ratio.to_dict(),
            "peak_over_full": self.peak_ratio,
            "saved_over_full": self.saved_ratio,
            "eta": {"time": self.eta_time, "peak": self.eta_peak, "saved": self.eta_saved},
        }


def cells(row: Row) -> list[str]:
    """Format a row under `HEADS`; of a variant that does not exist, only why."""
    if row.cost is None or row.time_ratio is None:
        return [row.model, row.variant, f"n/a: {row.reason}", *[""] * (len(HEADS) - 3)]
    lower, upper = row.time_ratio.quartiles
    return [
        row.model,
        row.variant,
        f"{row.cost.trainable_parameters / 1e6:.2f}",
        f"{1e3 * row.cost.step_seconds.median:.0f}",
        f"{row.time_ratio.median:.2f} [{lower:.2f}–{upper:.2f}]",
        _share(row.eta_time),
        f"{row.cost.peak_bytes / MIB:.0f}",
        _share(row.eta_peak),
        f"{row.cost.saved_bytes / MIB:.0f}",
        _share(row.eta_saved),
    ]


def _share(eta: float | None) -> str:
    return "–" if eta is None else f"{eta:.2f}"


def tables(rows: Sequence[Row]) -> Iterator[Table]:
    """Lay the rows out for the terminal, a table a model; what does not exist is listed below the figures."""
    for model, group in groupby(rows, key=lambda row: row.model):
        found = list(group)
        yield terminal_table(
            [head.replace(" ", "\n") for head in HEADS[1:]],
            [cells(row)[1:] for row in found if row.cost is not None],
            columns={"no_wrap": True},
            title=model,
            caption=missing({row.variant: row.reason for row in found}),
        )


def write(
    rows: Sequence[Row], config: Mapping[str, object], environment: Mapping[str, object], folder: Path
) -> list[Path]:
    """Write ``step.json``, ``step.md`` and ``step.png`` to the folder; returns where they are."""
    record = {"config": config, "environment": environment, "results": [row.to_dict() for row in rows]}
    text = markdown(HEADS, [cells(row) for row in rows])
    return write_files(folder, "step", record, text, lambda path: plot(record, path))


MEASURES = (
    ("step time, median and quartiles", "o", -0.25),
    ("peak memory", "s", 0.0),
    ("saved activations", "^", 0.25),
)
"""What the plot shows of each variant: its name, its marker, and how far below the row's middle it is."""


def plot(record: Mapping[str, Any], path: Path) -> None:
    """Plot each variant's time and memory as a share of full's, one axis a model, from what `write` records."""
    models = {m: list(group) for m, group in groupby(record["results"], key=lambda row: row["model"])}
    variants = list(dict.fromkeys(row["variant"] for row in record["results"]))
    config = record["config"]
    parts = f", {config['accumulate']} micro-batches a step" if config.get("accumulate", 1) > 1 else ""
    title = f"Cost of a training step over full depth's ({names.setting(config)}{parts})"
    figure = new_figure(2.2 + 3.2 * len(models), 1.5 + 0.42 * len(variants), title)
    axes = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
    for ax, (model, group) in zip(axes, models.items(), strict=True):
        for row in group:
            _plot_row(ax, row, variants.index(row["variant"]))
        batch = config.get("batch", {}).get(model)
        list_rows(ax, [names.variant(name) for name in variants])
        ax.set_title(names.model(model) + (f", batch {batch}" if batch else ""), fontsize="medium")
        ax.set_xlim(left=0)
        ax.set_xlabel("share of full depth's")
        ax.axvline(1, color="gray", linewidth=0.8)
    # Outside of the axes, where it covers no point.
    handles = [
        axes[0].plot([], [], marker, color=f"C{index}", label=label)[0]
        for index, (label, marker, _) in enumerate(MEASURES)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    save(figure, path)


def _plot_row(ax: Axes, row: Mapping[str, Any], place: int) -> None:
    if "step_over_full" not in row:
        mark_missing(ax, place)
        return
    (_, marker, below), *others = MEASURES
    plot_ratio(ax, Sample.from_dict(row["step_over_full"]), place + below, fmt=marker)
    for index, ((_, marker, below), key) in enumerate(zip(others, ("peak", "saved"), strict=True), 1):
        ax.plot(row[f"{key}_over_full"], place + below, marker, color=f"C{index}", markersize=5)
