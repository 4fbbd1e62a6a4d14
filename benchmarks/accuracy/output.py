"""The rows of the accuracy benchmark as a table, as Markdown, as JSON and as a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from rich.markup import escape
from rich.table import Table

from benchmarks.accuracy.report import Row, difference_text
from benchmarks.accuracy.tasks import Metric
from benchmarks.drawing import markdown, write_files
from replfx.measure import MIB

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
    result.caption = escape("\n".join(f"{row.variant}: n/a: {row.reason}" for row in rows if row.reason)) or None
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
    return write_files(out, stem, document, text, lambda path: _plot(rows, name, metric, path), indent=1)


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


def _plot(rows: Sequence[Row], name: str, metric: Metric, path: Path) -> None:
    """Plot the metric against training time: the mean over the seeds, and the spread at the end."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    for index, row in enumerate(row for row in rows if row.curves):
        points = list(zip(*row.curves.values(), strict=True))
        times = [mean(point["seconds"] for point in at_once) for at_once in points]
        means = [mean(point["metric"] for point in at_once) for at_once in points]
        colour = f"C{index % 10}"
        ax.plot(times, means, color=colour, linestyle=("-", "--", ":")[index // 10 % 3], label=row.variant, linewidth=1)
        ax.errorbar(times[-1], means[-1], yerr=row.deviation or 0, fmt="o", color=colour, markersize=5, capsize=3)
    clocks = "training time, s"
    ax.set(xlabel=clocks, ylabel=metric.name, title=name)
    if not metric.higher_is_better:
        ax.set_yscale("log")
    ax.set_xlim(left=0)
    ax.grid(alpha=0.3)
    # Outside of the axes, where it covers no point.
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    figure.savefig(path, dpi=130)
