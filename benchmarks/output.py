"""The step benchmark's rows as a table, as Markdown, as JSON and as a plot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from benchmarks.drawing import markdown, write_files
from replfx.measure import MIB, Sample, StepCost

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
        result = Table(title=model, box=None, pad_edge=False, padding=(0, 1, 0, 0))
        for index, head in enumerate(HEADS[1:]):
            result.add_column(head.replace(" ", "\n"), justify="right" if index else "left", no_wrap=True)
        missing = []
        for row in group:
            if row.cost is None:
                missing.append(f"{row.variant}: n/a: {row.reason}")
            else:
                result.add_row(*map(escape, cells(row)[1:]))
        result.caption = escape("\n".join(missing)) or None
        yield result


def write(
    rows: Sequence[Row], config: Mapping[str, object], environment: Mapping[str, object], folder: Path
) -> list[Path]:
    """Write ``step.json``, ``step.md`` and ``step.png`` to the folder; returns where they are."""
    record = {"config": config, "environment": environment, "results": [row.to_dict() for row in rows]}
    text = markdown(HEADS, [cells(row) for row in rows])
    return write_files(folder, "step", record, text, lambda path: _plot(rows, path))


def _plot(rows: Sequence[Row], path: Path) -> None:
    """Plot each variant's time and memory as a share of full's, one axis a model."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    models = {m: list(group) for m, group in groupby(rows, key=lambda row: row.model)}
    figure = Figure(figsize=(max(6.5, 4.2 * len(models)), 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
    for ax, (model, group) in zip(axes, models.items(), strict=True):
        for place, row in enumerate(group):
            if row.time_ratio is None:
                ax.annotate("n/a", (0.05, place), va="center", color="gray")
                continue
            middle, (lower, upper) = row.time_ratio.median, row.time_ratio.quartiles
            spread = [[middle - lower], [upper - middle]]
            label = place == 0
            ax.errorbar(
                middle,
                place,
                xerr=spread,
                fmt="o",
                color="C0",
                capsize=3,
                label="step time" if label else None,
            )
            ax.plot(row.peak_ratio, place, "s", color="C1", label="peak memory" if label else None)
            ax.plot(row.saved_ratio, place, "^", color="C2", label="saved activations" if label else None)
        ax.set(title=model, xlabel="share of full", yticks=range(len(group)))
        ax.set_yticklabels([row.variant for row in group])
        ax.set_xlim(left=0)
        ax.axvline(1, color="gray", linewidth=0.8)
        ax.grid(axis="x", alpha=0.3)
    axes[0].invert_yaxis()
    # Outside of the axes, where it covers no point.
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=130)
