"""What the demo found, as a table, a plot and a JSON file."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich import box
from rich.table import Table

from replfx.demo.train import Run, Variant
from replfx.measure import MIB, StepCost

COLOURS = ("#4d4d4d", "#d55e00", "#0072b2", "#009e73")
"""Told apart by eyes that do not see all colours (Okabe and Ito)."""


@dataclass(frozen=True)
class Row:
    """One variant: what a step costs at the beginning, and a run a seed."""

    variant: Variant
    cost: StepCost
    runs: tuple[Run, ...]

    @property
    def losses(self) -> list[float]:
        """The final held-out loss of each seed."""
        return [run.losses[-1] for run in self.runs]

    @property
    def seconds(self) -> float:
        """Mean training time."""
        return statistics.mean(run.seconds[-1] for run in self.runs)


def spread(values: Sequence[float], sign: str = "") -> str:
    """Mean ± sample standard deviation."""
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.3f}{deviation}"


def table(rows: Sequence[Row], name: str, steps: int) -> Table:
    """Lay the rows out for the terminal: narrow enough for 80 columns."""
    full = rows[0]
    seeds = len(full.runs)
    result = Table(
        title=f"{name}: {seeds} seed{'s' if seeds > 1 else ''}",
        caption="Loss: held out, nats a byte, mean ± sd over the seeds; lower is better. Memory: peak of a step.",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    result.add_column("every second block", no_wrap=True)
    for head in ("trainable\nparameters", "time,\ns", "memory,\nMiB", "held-out\nloss", "− full,\npaired"):
        result.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        start, end = row.runs[0].parameters
        memory = [row.cost.peak_bytes / MIB, *([full.cost.peak_bytes / MIB] if start != end else [])]
        differences = [one - other for one, other in zip(row.losses, full.losses, strict=True)]
        result.add_row(
            f"{row.variant.name}\n{row.variant.steps_of(steps):,} steps",
            f"{start:,}" if start == end else f"{start:,}\n→ {end:,}",
            f"{row.seconds:.0f}",
            "\n→ ".join(f"{each:.1f}" for each in memory),
            spread(row.losses),
            "" if row is full else spread(differences, "+"),
        )
    return result


def record(rows: Sequence[Row], config: Mapping[str, object], environment: Mapping[str, object]) -> dict[str, object]:
    """All figures, ready for JSON."""
    return {
        "config": config,
        "environment": environment,
        "results": [
            {"variant": row.variant.name, "cost": row.cost.to_dict(), "runs": [asdict(run) for run in row.runs]}
            for row in rows
        ],
    }


def write(rows: Sequence[Row], record: Mapping[str, object], name: str, folder: Path) -> list[Path]:
    """Write ``demo.json`` and ``demo.png`` to the folder; returns where they are."""
    folder.mkdir(parents=True, exist_ok=True)
    data, picture = folder / "demo.json", folder / "demo.png"
    data.write_text(json.dumps(record, indent=2) + "\n")
    _plot(rows, name, picture)
    return [data, picture]


def _plot(rows: Sequence[Row], name: str, path: Path) -> None:
    """Plot the held-out loss against training time; a line a variant, and a band of one standard deviation."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    for row, colour in zip(rows, COLOURS, strict=True):
        times = [statistics.mean(at) for at in zip(*(run.seconds for run in row.runs), strict=True)]
        every = list(zip(*(run.losses for run in row.runs), strict=True))
        means = [statistics.mean(losses) for losses in every]
        ax.plot(times, means, color=colour, marker="o", markersize=3.5, label=row.variant.name)
        if len(row.runs) > 1:
            band = [statistics.stdev(losses) for losses in every]
            low, high = ([m + sign * b for m, b in zip(means, band, strict=True)] for sign in (-1, 1))
            ax.fill_between(times, low, high, color=colour, alpha=0.15, linewidth=0)
        switches = [run.switched for run in row.runs if run.switched is not None]
        if switches:
            at = statistics.mean(switches)
            ax.axvline(at, color=colour, linestyle=":", linewidth=1)
            ax.annotate("unroll", (at, 0.97), (4, 0), xycoords=("data", "axes fraction"), textcoords="offset points",
                        color=colour, va="top")  # fmt: skip
    lowest = min(min(run.losses) for row in rows for run in row.runs)
    highest = statistics.median(run.losses[min(1, len(run.losses) - 1)] for row in rows for run in row.runs)
    ax.set(xlabel="training time, s", ylabel="held-out loss, nats a byte", xlim=(0, None))
    ax.set_ylim(lowest - 0.05 * (highest - lowest), highest + 0.15 * (highest - lowest))
    ax.set_title(f"A language model of 12 blocks on {name}", fontsize=11)
    ax.grid(alpha=0.25)
    ax.legend(frameon=False)
    figure.savefig(path, dpi=150)
