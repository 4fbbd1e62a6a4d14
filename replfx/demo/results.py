"""What the demo found, as a table, a plot and a JSON file."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from rich import box
from rich.table import Table

from replfx.measure import MIB, Cost


@dataclass(frozen=True)
class Row:
    """One variant of one model: its cost, and its accuracy on held-out images, one value a seed."""

    model: str
    variant: str
    cost: Cost
    accuracies: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean accuracy over the seeds."""
        return statistics.mean(self.accuracies)

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation over the seeds; None for a single one."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else None

    @property
    def accuracy(self) -> str:
        """Mean ± standard deviation, in percent."""
        spread = "" if self.deviation is None else f" ± {100 * self.deviation:.1f}"
        return f"{100 * self.mean:.1f}{spread}"


def table(rows: Sequence[Row], dataset: str, seeds: int) -> Table:
    """Lay the rows out for the terminal, the models apart."""
    # Narrow enough for a terminal of 80 columns.
    result = Table(
        title=f"{dataset}, {seeds} seed{'s' if seeds > 1 else ''}",
        caption="Step: median of interleaved steps, optimizer included. Accuracy: held out, mean ± sd.",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    result.add_column("model")
    result.add_column("variant", no_wrap=True)
    for head in (
        "trainable\nparameters",
        "step\ntime,\nms",
        "peak\ntraining\nmemory, MiB",
        "saved\nactivations,\nMiB",
        "accuracy,\n%",
    ):
        result.add_column(head, justify="right", no_wrap=True)
    for model, group in groupby(rows, key=lambda row: row.model):
        for row in group:
            cost = row.cost
            result.add_row(
                model,
                row.variant,
                f"{cost.trainable_parameters:,}",
                f"{1e3 * cost.step_seconds.median:.1f}",
                f"{cost.peak_bytes / MIB:.1f}",
                f"{cost.saved_bytes / MIB:.1f}",
                row.accuracy,
            )
        result.add_section()
    return result


def write(
    rows: Sequence[Row], config: Mapping[str, object], environment: Mapping[str, object], folder: Path
) -> list[Path]:
    """Write ``demo.json`` and ``demo.png`` to the folder; returns where they are."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "config": config,
        "environment": environment,
        "results": [
            {"model": r.model, "variant": r.variant, "accuracies": r.accuracies, **r.cost.to_dict()} for r in rows
        ],
    }
    data = folder / "demo.json"
    data.write_text(json.dumps(record, indent=2) + "\n")
    picture = folder / "demo.png"
    _plot(rows, str(config["dataset"]), picture)
    return [data, picture]


def _plot(rows: Sequence[Row], dataset: str, path: Path) -> None:
    """Plot accuracy against parameters and against step time, one row of axes a model."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    models = {model: list(group) for model, group in groupby(rows, key=lambda row: row.model)}
    figure = Figure(figsize=(9, 3.6 * len(models)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(models), 2, squeeze=False)
    for (model, group), line in zip(models.items(), axes, strict=True):
        for row, marker in zip(group, "osD^", strict=True):
            cost = row.cost
            for ax, x in zip(line, (cost.trainable_parameters / 1e3, 1e3 * cost.step_seconds.median), strict=True):
                spread = 100 * (row.deviation or 0)
                ax.errorbar(x, 100 * row.mean, yerr=spread, fmt=marker, markersize=8, capsize=4, label=row.variant)
        for ax, label in zip(line, ("trainable parameters, thousands", "step time, ms"), strict=True):
            ax.set(xlabel=label, ylabel="held-out accuracy, %", title=f"{model} on {dataset}")
            ax.set_xlim(0, 1.08 * ax.dataLim.x1)
            ax.grid(alpha=0.3)
    # Outside of the axes, where it covers no point.
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    figure.savefig(path, dpi=130)
