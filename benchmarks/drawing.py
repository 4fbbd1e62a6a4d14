"""What more than one command writes: Markdown tables, plots of ratios, and the three files of its results."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from benchmarks import names
from replfx.measure import Sample

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]], words: int = 2) -> str:
    """Lay cells out as a Markdown table, all but the first columns, which have words, to the right."""
    lines = [heads, ["---"] * words + ["---:"] * (len(heads) - words), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def broken(heads: Sequence[str]) -> list[str]:
    """Heads with lines of their own for what comes behind a figure's name."""
    return [head.replace(" [", "\n[").replace(" / ", "/\n") for head in heads]


def terminal_table(
    heads: Sequence[str],
    rows: Iterable[Sequence[str]],
    words: int = 1,
    columns: Mapping[str, Any] = MappingProxyType({}),
    **style: Any,
) -> Table:
    """Lay cells out for the terminal, all but the first columns, which have words, to the right.

    Args:
        heads: of the columns.
        rows: the cells below them.
        words: how many columns have words.
        columns: rich's options of every column.
        style: rich's options of the table.
    """
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), **style)
    for index, head in enumerate(heads):
        table.add_column(head, justify="left" if index < words else "right", **columns)
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def missing(reasons: Mapping[str, str]) -> str | None:
    """What a table says below its figures: which variants do not exist, and why."""
    return escape("\n".join(f"{variant}: n/a: {reason}" for variant, reason in reasons.items() if reason)) or None


def write_files(
    folder: Path,
    name: str,
    record: Mapping[str, object],
    text: str,
    plot: Callable[[Path], None] | None,
    indent: int = 2,
) -> list[Path]:
    """Write ``NAME.json``, ``NAME.md`` and, with a plot, ``NAME.png`` to the folder; returns where they are."""
    folder.mkdir(parents=True, exist_ok=True)
    data, table, picture = (folder / f"{name}.{ending}" for ending in ("json", "md", "png"))
    data.write_text(json.dumps(record, indent=indent) + "\n")
    table.write_text(text)
    if plot is None:
        return [data, table]
    plot(picture)
    return [data, table, picture]


def new_figure(width: float, height: float, title: str | None = None) -> Figure:
    """A figure, to be saved; no window is opened."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    if title is not None:
        figure.suptitle(title, fontsize="large")
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write the figure as a PNG."""
    figure.savefig(path, dpi=130)


def list_rows(ax: Axes, texts: Sequence[str]) -> None:
    """Give each text a line of its own on the vertical axis, the first on top."""
    ax.set_yticks(range(len(texts)), texts)
    ax.set_ylim(len(texts) - 0.4, -0.6)
    ax.grid(axis="x", alpha=0.3)
    ax.set_axisbelow(True)


def plot_ratio(ax: Axes, ratio: Sample, place: float, **style: Any) -> None:
    """A ratio's median as a point, and its quartiles as a bar."""
    middle, (lower, upper) = ratio.median, ratio.quartiles
    spread = [[middle - lower], [upper - middle]]
    ax.errorbar(middle, place, xerr=spread, **{"fmt": "o", "color": "C0", "capsize": 3, "markersize": 5, **style})


def mark_missing(ax: Axes, place: float) -> None:
    """Say of a variant that the model's blocks do not have it."""
    ax.annotate("does not fit these blocks", (0.02, place), va="center", color="gray", fontsize="small")


def plot_ratios(groups: Mapping[str, Mapping[str, Sample | None]], title: str, label: str, path: Path) -> None:
    """Plot medians and quartiles of the ratios, one axis a group, four in a row.

    Args:
        groups: name → variant → its time over that of what it is compared with; None where there is no such variant.
        title: of the figure.
        label: of the horizontal axes.
        path: where the figure is written.
    """
    found = list(dict.fromkeys(variant for ratios in groups.values() for variant in ratios))
    columns, lines = min(4, len(groups)), -(-len(groups) // 4)
    figure = new_figure(2.2 + 3.2 * columns, 0.7 + lines * (0.9 + 0.27 * len(found)), title)
    axes = list(figure.subplots(lines, columns, sharey=True, squeeze=False).flat)
    for ax in axes[len(groups) :]:
        ax.remove()
    for ax, (name, ratios) in zip(axes, groups.items(), strict=False):
        for variant, ratio in ratios.items():
            place = found.index(variant)
            if ratio is None:
                mark_missing(ax, place)
            else:
                plot_ratio(ax, ratio, place)
        list_rows(ax, [names.variant(each) for each in found])
        ax.set_title(name, fontsize="medium")
        ax.set_xlim(left=0)
        ax.axvline(1, color="gray", linewidth=0.8)
    figure.supxlabel(label, fontsize="medium")
    save(figure, path)
