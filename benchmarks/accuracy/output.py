"""The rows of the accuracy benchmark as a table, as Markdown, as JSON and as a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from benchmarks import names
from benchmarks.accuracy.report import Row, difference_text
from benchmarks.accuracy.tasks import Metric
from benchmarks.drawing import list_rows, markdown, missing, new_figure, save, write_files
from replfx.measure import MIB

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HEADS = (
    "variant",
    "{metric}",
    "− full [95 %]",
    "− removed [95 %]",
    "seeds",
    "params",
    "step/full",
    "η time",
    "peak, MiB",
    "η peak",
    "total, s",
    "to target, s",
)


def cells(row: Row) -> list[str]:
    """Format a row under `HEADS`."""
    if row.reason:
        return [row.variant, f"n/a: {row.reason}", *[""] * (len(HEADS) - 2)]
    cost = row.cost
    return [
        row.variant,
        _spread(list(row.metrics.values()), row.deviation),
        difference_text(row.over_full, digits=3),
        difference_text(row.over_removed, digits=3),
        str(len(row.metrics)),
        "–" if cost is None else f"{cost['trainable_parameters']:,}",
        "–" if cost is None else f"{cost['step_over_full']['median']:.2f}",
        _share(row.eta_time),
        "–" if cost is None else f"{cost['peak_training_bytes'] / MIB:.1f}",
        _share(row.eta_peak),
        f"{mean(row.seconds.values()):.0f}" if row.seconds else "–",
        _to_target(row),
    ]


def _spread(values: Sequence[float], deviation: float | None) -> str:
    if not values:
        return "–"
    return _figure(mean(values)) + ("" if deviation is None else f" ± {_figure(deviation)}")


def _figure(value: float) -> str:
    """Four digits that count for a loss, two decimals for percentages and perplexities."""
    return f"{value:.2f}" if abs(value) >= 10 else f"{value:.3f}"


def _share(eta: float | None) -> str:
    return "–" if eta is None else f"{eta:.2f}"


def _to_target(row: Row) -> str:
    """The mean over the seeds if all of them get there, else how many do."""
    times = [seconds for seconds in row.to_target.values() if seconds is not None]
    if not row.to_target:
        return "–"
    return f"{mean(times):.0f}" if len(times) == len(row.to_target) else f"{len(times)} of {len(row.to_target)}"


def table(rows: Sequence[Row], metric: Metric) -> Table:
    """Lay the rows out for the terminal: what counts most; the files have the rest."""
    result = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), caption_justify="left")
    shown = [HEADS.index(head) for head in ("variant", "{metric}", "− full [95 %]", "− removed [95 %]", "step/full")]
    for place, index in enumerate(shown):
        head = HEADS[index].format(metric=metric.name).replace(" [", "\n[").replace(", ", ",\n")
        result.add_column(head, justify="right" if place else "left", no_wrap=place > 0, overflow="fold")
    for row in rows:
        if not row.reason:
            texts = cells(row)
            result.add_row(*(escape(texts[index].replace(" [", "\n[")) for index in shown))
    result.caption = missing({row.variant: row.reason for row in rows})
    return result


def write(
    rows: Sequence[Row], records: Sequence[Mapping[str, Any]], name: str, metric: Metric, out: Path
) -> list[Path]:
    """Write ``NAME.json`` with all records, ``NAME.md`` and ``NAME.png`` to a folder; returns where they are."""
    shown = {row.variant for row in rows}
    document = {
        "subject": name,
        "metric": metric.name,
        "higher_is_better": metric.higher_is_better,
        "rows": [row.to_dict() for row in rows],
        "records": [record for record in records if record["variant"] in shown],
    }
    heads = [head.format(metric=metric.name) for head in HEADS]
    text = markdown(heads, [cells(row) for row in rows], words=1) + _depth(rows, metric)
    stem = name.replace("/", "-")
    return write_files(out, stem, document, text, lambda path: plot(rows, name, metric, path), indent=1)


def _depth(rows: Sequence[Row], metric: Metric) -> str:
    """Say of each set of deleted blocks whether full is better by enough: else nothing can be shown to replace them."""
    lines = []
    for row in rows:
        gap = row.over_full
        if row.variant.partition(":")[0] == "removed" and gap is not None and gap.error:
            gain = (-gap.mean if metric.higher_is_better else gap.mean) / gap.error
            how = "better" if gain > 0 else "worse"
            lines.append(f"Full is {abs(gain):.1f} standard errors {how} than `{row.variant}` ({gap.pairs} seeds).\n")
    return "".join(f"\n{line}" for line in lines)


def plot(rows: Sequence[Row], name: str, metric: Metric, path: Path) -> None:
    """Plot the metric against training time, and at the end: means over the seeds, and standard deviations.

    A variant has one colour in both, so that the list on the right is the legend.
    """
    shown = [row for row in rows if row.metrics]
    height = max(4.0, 1.3 + 0.26 * len(shown))
    seeds = sorted({len(row.metrics) for row in shown})
    counted = f"{seeds[0]}{f'–{seeds[-1]}' if len(seeds) > 1 else ''} seed{'' if seeds == [1] else 's'}"
    figure = new_figure(12.5, height, f"{names.subject(name)}, {counted}")
    curves, ends = figure.subplots(1, 2, width_ratios=(1.15, 1))
    for place, row in enumerate(shown):
        colour = _colour(row.variant, place)
        if row.curves:
            _plot_curve(curves, row, colour)
        ends.errorbar(mean(row.metrics.values()), place, xerr=row.deviation or 0, fmt="o", color=colour, capsize=3)
    list_rows(ends, [names.variant(row.variant) for row in shown])
    for place, label in enumerate(ends.get_yticklabels()):
        label.set_color(_colour(shown[place].variant, place))
    ends.yaxis.tick_right()
    better = "higher" if metric.higher_is_better else "lower"
    ends.set_xlabel(f"{metric.name} ({better} is better)")
    ends.set_title("at the end: mean and standard deviation", fontsize="medium")
    curves.set(xlabel="training time, s", ylabel=metric.name)
    curves.set_title("on the way: mean", fontsize="medium")
    curves.set_xlim(left=0)
    _leave_the_start_out(curves, shown, metric)
    curves.grid(alpha=0.3)
    save(figure, path)


def _colour(variant: str, place: int) -> Any:
    """Black and grey for the bounds; the others are told apart."""
    if variant in ("full", "removed"):
        return "black" if variant == "full" else "gray"
    from matplotlib import colormaps

    told_apart = [  # without its greys
        colour for index, colour in enumerate(colormaps["tab20"](range(20))) if index not in (14, 15)
    ]
    return told_apart[place % len(told_apart)]


def _plot_curve(ax: Axes, row: Row, colour: Any) -> None:
    points = list(zip(*row.curves.values(), strict=True))
    times = [mean(point["seconds"] for point in at_once) for at_once in points]
    means = [mean(point["metric"] for point in at_once) for at_once in points]
    width = 2.0 if row.variant in ("full", "removed") else 1.2
    ax.plot(times, means, color=colour, linewidth=width, marker="o", markersize=2.5)
    ax.errorbar(times[-1], means[-1], yerr=row.deviation or 0, fmt="o", color=colour, markersize=5, capsize=3)


def _leave_the_start_out(ax: Axes, rows: Sequence[Row], metric: Metric) -> None:
    """Of a loss, which falls steeply at first: the differences at the end would not be seen."""
    if metric.higher_is_better:
        return
    every = [[point["metric"] for point in curve] for row in rows for curve in row.curves.values()]
    if not every:
        return
    lowest = min(map(min, every))
    early = sorted(curve[min(2, len(curve) - 1)] for curve in every)[len(every) // 2]
    ax.set_ylim(lowest - 0.08 * (early - lowest), early + 0.25 * (early - lowest))
