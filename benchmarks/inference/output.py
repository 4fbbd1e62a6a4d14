"""The inference benchmark's rows as tables, as Markdown, as JSON and as a plot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks import names
from benchmarks.drawing import broken, markdown, missing, plot_ratios, terminal_table, write_files
from replfx.measure import MIB, Sample

HEADS = ("model", "variant", "batch", "weights, MiB", "latency, ms [quartiles]", "examples a second", "latency / full")


@dataclass(frozen=True)
class Row:
    """One model, made ready one way, at one batch size.

    Attributes:
        weight_bytes: of parameters and buffers; None where there is no such variant.
        latency: seconds of a call.
        ratio: latency over full's, round by round.
        reason: why there is no such variant.
    """

    model: str
    variant: str
    batch: int
    weight_bytes: int | None = None
    latency: Sample | None = None
    ratio: Sample | None = None
    reason: str = ""

    @property
    def throughput(self) -> Sample | None:
        """Images or sequences a second, round by round."""
        return None if self.latency is None else Sample(tuple(self.batch / value for value in self.latency.values))

    def to_dict(self) -> dict[str, object]:
        """All figures, ready for JSON."""
        named: dict[str, object] = {"model": self.model, "variant": self.variant, "batch": self.batch}
        if self.latency is None or self.ratio is None or self.throughput is None:
            return {**named, "reason": self.reason}
        return {
            **named,
            "weight_bytes": self.weight_bytes,
            "latency_seconds": self.latency.to_dict(),
            "examples_a_second": self.throughput.to_dict(),
            "latency_over_full": self.ratio.to_dict(),
        }

    def cells(self) -> list[str]:
        """The row under `HEADS`; of a variant that does not exist, only why."""
        named = [self.model, self.variant, str(self.batch)]
        if self.latency is None or self.ratio is None or self.throughput is None or self.weight_bytes is None:
            return [*named, f"n/a: {self.reason}", *[""] * (len(HEADS) - len(named) - 1)]
        return [
            *named,
            f"{self.weight_bytes / MIB:.1f}",
            _spread(self.latency, 1e3, 1),
            f"{self.throughput.median:.1f}",
            _spread(self.ratio, 1, 2),
        ]


def _spread(sample: Sample, factor: float, digits: int) -> str:
    middle, lower, upper = (f"{factor * value:.{digits}f}" for value in (sample.median, *sample.quartiles))
    return f"{middle} [{lower}–{upper}]"


def _title(row: Row) -> str:
    return f"{row.model}, batch {row.batch}"


def tables(rows: Sequence[Row]) -> Iterator[Table]:
    """Lay the rows out for the terminal, a table for each model and batch size; what does not exist is listed below."""
    for title, group in groupby(rows, key=_title):
        found = list(group)
        yield terminal_table(
            ["variant", *broken(HEADS[3:])],
            [[row.variant, *row.cells()[3:]] for row in found if row.latency is not None],
            columns={"no_wrap": True},
            title=title,
            caption=missing({row.variant: row.reason for row in found}),
        )


def write(
    rows: Sequence[Row], config: Mapping[str, object], environment: Mapping[str, object], folder: Path
) -> list[Path]:
    """Write ``inference.json``, ``inference.md`` and ``inference.png`` to the folder; returns where they are."""
    record = {"config": config, "environment": environment, "results": [row.to_dict() for row in rows]}
    text = markdown(HEADS, [row.cells() for row in rows])
    return write_files(folder, "inference", record, text, lambda path: plot(record, path))


def plot(record: Mapping[str, Any], path: Path) -> None:
    """Plot the latencies over full's, one axis for each model and batch size, from what `write` records."""
    groups: dict[str, dict[str, Sample | None]] = {}
    for row in record["results"]:
        ratio = Sample.from_dict(row["latency_over_full"]) if "latency_over_full" in row else None
        groups.setdefault(f"{names.model(row['model'])}, batch {row['batch']}", {})[row["variant"]] = ratio
    title = f"Latency of a trained model over full depth's ({names.setting(record['config'])})"
    plot_ratios(groups, title, "latency / full depth's: median and quartiles", path)
