"""What more than one command writes: Markdown tables, plots of ratios, and the three files of its results."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from replfx.measure import Sample


class Compared(Protocol):
    """A row of figures, one variant of one model."""

    @property
    def variant(self) -> str:
        """Its name."""

    @property
    def ratio(self) -> Sample | None:
        """Its time over that of what it is compared with, round by round; None where there is no such variant."""


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]], words: int = 2) -> str:
    """Lay cells out as a Markdown table, all but the first columns, which have words, to the right."""
    lines = [heads, ["---"] * words + ["---:"] * (len(heads) - words), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write_files(
    folder: Path, name: str, record: Mapping[str, object], text: str, plot: Callable[[Path], None], indent: int = 2
) -> list[Path]:
    """Write ``NAME.json``, ``NAME.md`` and ``NAME.png`` to the folder; returns where they are."""
    folder.mkdir(parents=True, exist_ok=True)
    data, table, picture = (folder / f"{name}.{ending}" for ending in ("json", "md", "png"))
    data.write_text(json.dumps(record, indent=indent) + "\n")
    table.write_text(text)
    plot(picture)
    return [data, table, picture]


def plot_ratios(groups: Mapping[str, Sequence[Compared]], label: str, path: Path) -> None:
    """Plot medians and quartiles of the ratios, one axis a group, four in a row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row.variant for rows in groups.values() for row in rows))
    columns, lines = min(4, len(groups)), -(-len(groups) // 4)
    size = (max(6.5, 3.6 * columns), lines * max(3.4, 0.35 * len(names)))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(lines, columns, sharey=True, squeeze=False).flat)
    for ax in axes[len(groups) :]:
        ax.remove()
    for ax, (title, rows) in zip(axes, groups.items(), strict=False):
        for row in rows:
            place = names.index(row.variant)
            if row.ratio is None:
                ax.annotate("n/a", (0.05, place), va="center", color="gray")
                continue
            middle, (lower, upper) = row.ratio.median, row.ratio.quartiles
            ax.errorbar(middle, place, xerr=[[middle - lower], [upper - middle]], fmt="o", color="C0", capsize=3)
        ax.set(title=title, xlabel=label, yticks=range(len(names)))
        ax.set_yticklabels(names)
        ax.set_xlim(left=0)
        ax.axvline(1, color="gray", linewidth=0.8)
        ax.grid(axis="x", alpha=0.3)
    axes[0].invert_yaxis()
    figure.savefig(path, dpi=130)
