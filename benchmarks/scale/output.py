"""The figures of the pass as tables, as Markdown, as JSON and as a plot."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rich.table import Table

from benchmarks import names
from benchmarks.drawing import list_rows, markdown, new_figure, plot_ratio, save, terminal_table, write_files
from benchmarks.scale.subjects import MODELS, TOWERS
from benchmarks.scale.trial import PHASES, Memory, Timing
from replfx.measure import MIB, Sample, pairwise_ratios

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Growth", "ModelRow", "Results", "slope", "tables", "write"]

HEADS = (
    "model",
    "inputs",
    "capture",
    "replaced",
    "step, s",
    "whole, s",
    "whole / step",
    "passes / step",
    "extra, MiB",
    "% of model",
)
NAME = "scale"
CAPTION = "whole: replfx.transform. passes: capture, chains, plan, insertion. extra: peak memory beyond a copy"
GROWTH_HEADS = (
    "tower",
    "inputs",
    "capture",
    "blocks",
    "whole, s",
    "ms / block",
    "slope",
    "steepest phase",
)


def slope(seconds: Mapping[int, float]) -> float:
    """The exponent p of the power law t = c·nᵖ that fits best: least squares of log t over log n.

    Args:
        seconds: n → t; two and more, all above zero.

    """
    return statistics.linear_regression([math.log(n) for n in seconds], [math.log(t) for t in seconds.values()]).slope


@dataclass(frozen=True)
class ModelRow:
    """The cost of the pass on one model, with or without example inputs."""

    model: str
    inputs: bool
    timing: Timing
    memory: Memory
    commit: str = ""

    @property
    def key(self) -> tuple[str, bool]:
        """What tells it from others."""
        return self.model, self.inputs

    @property
    def in_steps(self) -> Sample:
        """`transform` over a training step, round by round."""
        assert self.timing.step is not None
        return pairwise_ratios({"transform": self.timing.transform, "step": self.timing.step}, "step")["transform"]

    def phase_in_steps(self, phase: str) -> float:
        """The median of a phase over that of a step."""
        assert self.timing.step is not None
        return self.timing.phases[phase].median / self.timing.step.median

    @property
    def passes_in_steps(self) -> float:
        """Capture, chains, plan and insertion, without copying and verifying, over a training step."""
        return sum(map(self.phase_in_steps, ("capture", "find chains", "select", "insert")))

    @property
    def share(self) -> float:
        """Peak extra memory over the model's bytes."""
        return self.memory.extra_bytes / self.memory.model_bytes

    def to_dict(self) -> dict[str, object]:
        """All figures, ready for JSON."""
        return {
            "model": self.model,
            "inputs": self.inputs,
            "commit": self.commit,
            **self.timing.to_dict(),
            "transform_over_step": self.in_steps.to_dict(),
            "passes_over_step": self.passes_in_steps,
            **asdict(self.memory),
            "extra_over_model": self.share,
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> ModelRow:
        """Read what `to_dict` gave."""
        memory = Memory(**{each.name: record[each.name] for each in fields(Memory)})
        return cls(record["model"], record["inputs"], Timing.from_dict(record), memory, record["commit"])


@dataclass(frozen=True)
class Growth:
    """The cost of the pass on one kind of tower, by the number of blocks."""

    tower: str
    inputs: bool
    timings: dict[int, Timing]
    commit: str = ""

    @property
    def key(self) -> tuple[str, bool]:
        """What tells it from others."""
        return self.tower, self.inputs

    @property
    def seconds(self) -> dict[int, float]:
        """Blocks → seconds of `transform`."""
        return {blocks: timing.transform.median for blocks, timing in self.timings.items()}

    @property
    def slope(self) -> float:
        """See `slope`; of `transform` as a whole."""
        return slope(self.seconds)

    @property
    def phase_slopes(self) -> dict[str, float]:
        """The same of each phase."""
        return {
            phase: slope({blocks: timing.phases[phase].median for blocks, timing in self.timings.items()})
            for phase in PHASES
        }

    def to_dict(self) -> dict[str, object]:
        """All figures, ready for JSON."""
        return {
            "tower": self.tower,
            "inputs": self.inputs,
            "commit": self.commit,
            "slope": self.slope,
            "phase_slopes": self.phase_slopes,
            "blocks": {blocks: timing.to_dict() for blocks, timing in self.timings.items()},
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Growth:
        """Read what `to_dict` gave."""
        timings = {int(blocks): Timing.from_dict(timing) for blocks, timing in record["blocks"].items()}
        return cls(record["tower"], record["inputs"], timings, record["commit"])


Row = TypeVar("Row", ModelRow, Growth)


@dataclass
class Results:
    """All rows of a folder, those of earlier runs with the same settings among them."""

    config: Mapping[str, object]
    environment: Mapping[str, object]
    models: list[ModelRow] = field(default_factory=list)
    growths: list[Growth] = field(default_factory=list)

    def read(self, folder: Path) -> None:
        """Take over the rows that are there already, if they were measured with the same settings."""
        path = folder / f"{NAME}.json"
        record = json.loads(path.read_text()) if path.exists() else {"config": {}}
        if self.config.items() <= record["config"].items():
            self.models = [ModelRow.from_dict(row) for row in record["models"]]
            self.growths = [Growth.from_dict(row) for row in record["growth"]]

    def add(self, row: ModelRow | Growth) -> None:
        """Put a row with its like, in the place of an earlier one of the same."""
        if isinstance(row, ModelRow):
            self.models = _ordered(self.models, row, list(MODELS))
        else:
            self.growths = _ordered(self.growths, row, list(TOWERS))

    def to_dict(self) -> dict[str, object]:
        """All figures and what the subjects are, ready for JSON."""
        models = {row.model: MODELS[row.model].about for row in self.models}
        towers = {growth.tower: TOWERS[growth.tower].about for growth in self.growths}
        return {
            "config": {**self.config, "models": models, "towers": towers},
            "environment": self.environment,
            "models": [row.to_dict() for row in self.models],
            "growth": [growth.to_dict() for growth in self.growths],
        }


def _ordered(rows: Sequence[Row], new: Row, names: Sequence[str]) -> list[Row]:
    merged = {**{row.key: row for row in rows}, new.key: new}
    return sorted(merged.values(), key=lambda row: (names.index(row.key[0]), not row.key[1]))


# ---- tables


def _inputs(given: bool) -> str:
    return "with" if given else "without"


def _model_cells(row: ModelRow) -> list[str]:
    assert row.timing.step is not None
    return [
        row.model,
        _inputs(row.inputs),
        row.timing.capture,
        f"{row.timing.replaced:,}",
        f"{row.timing.step.median:.2f}",
        f"{row.timing.transform.median:.2f}",
        f"{row.in_steps.median:.2f}",
        f"{row.passes_in_steps:.2f}",
        f"{row.memory.extra_bytes / MIB:.0f}",
        f"{100 * row.share:.1f}",
    ]


def _growth_cells(growth: Growth) -> list[str]:
    first, *_, last = growth.seconds
    steepest = max(growth.phase_slopes.items(), key=lambda item: item[1])
    return [
        growth.tower,
        _inputs(growth.inputs),
        growth.timings[last].capture,
        f"{first:,} … {last:,}",
        f"{growth.seconds[first]:.2f} … {growth.seconds[last]:.1f}",
        f"{1e3 * growth.seconds[last] / last:.1f}",
        f"{growth.slope:.2f}",
        f"{steepest[0]} {steepest[1]:.2f}",
    ]


def _grids(results: Results) -> Iterator[tuple[Sequence[str], list[list[str]], int]]:
    """Heads, rows, and how many columns are words."""
    if results.models:
        yield HEADS, [_model_cells(row) for row in results.models], 3
    if results.growths:
        yield GROWTH_HEADS, [_growth_cells(growth) for growth in results.growths], 3


def tables(results: Results) -> Iterator[Table]:
    """Lay the figures out for the terminal."""
    for heads, rows, words in _grids(results):
        broken, style = [head.replace(" ", "\n") for head in heads], {"caption": CAPTION, "caption_justify": "left"}
        yield terminal_table(broken, rows, words, {"overflow": "fold"}, **style)


def write(results: Results, folder: Path) -> list[Path]:
    """Write ``scale.json``, ``scale.md`` and ``scale.png`` to the folder; returns where they are."""
    text = "\n".join([*(markdown(*grid) for grid in _grids(results)), f"{CAPTION}.\n"])
    draw = partial(plot, results.models, results.growths)
    return write_files(folder, NAME, results.to_dict(), text, draw)


# ---- plot


def plot(models: Sequence[ModelRow], growths: Sequence[Growth], path: Path) -> None:
    """Plot growth with and without inputs, log–log, and what the phases cost in steps."""
    figure = new_figure(16, 5.2, "What the transformation itself costs (one CPU core)")
    axes = figure.subplots(1, 3, width_ratios=(1, 1, 1.25))
    axes[1].sharey(axes[0])
    for ax, inputs in zip(axes, (True, False), strict=False):
        _plot_growth(ax, [growth for growth in growths if growth.inputs is inputs])
        ax.set_title(f"transform {_inputs(inputs)} example inputs", fontsize="medium")
    _plot_steps(axes[2], models)
    save(figure, path)


def _plot_growth(ax: Axes, growths: Sequence[Growth]) -> None:
    ax.set(xscale="log", yscale="log", xlabel="blocks of the model", ylabel="CPU seconds")
    ax.grid(which="major", alpha=0.3)
    towers = list(TOWERS)
    for growth in growths:
        kind = towers.index(growth.tower)
        ax.plot(
            *zip(*growth.seconds.items(), strict=True),
            marker="os^D"[kind],
            color=f"C{kind}",
            label=f"{growth.tower}: slope {growth.slope:.2f}",
        )
    if not growths:
        return
    heights = list(growths[0].seconds)
    start = 0.6 * min(growth.seconds[heights[0]] for growth in growths)
    for power, style in ((1.0, ":"), (1.1, "--")):
        line = [start * (n / heights[0]) ** power for n in heights]
        ax.plot(heights, line, style, color="gray", linewidth=1, label=f"slope {power:.1f}")
    ax.set_xticks(heights, [f"{n:,}" for n in heights])
    ax.minorticks_off()
    ax.legend(fontsize="small")


def _plot_steps(ax: Axes, models: Sequence[ModelRow]) -> None:
    for place, row in enumerate(models):
        left = 0.0
        for index, phase in enumerate(PHASES):
            width = row.phase_in_steps(phase)
            ax.barh(place, width, left=left, color=f"C{index}", label=phase if place == 0 else None)
            left += width
        whole = row.in_steps
        plot_ratio(ax, whole, place, fmt="D", color="black", markersize=4, label="transform" if place == 0 else None)
    ax.set_title("each phase; transform as a whole: median and quartiles", fontsize="medium")
    ax.set_xlabel("CPU time / that of a training step of the model")
    list_rows(ax, [f"{names.model(row.model)}, {_inputs(row.inputs)} inputs" for row in models])
    ax.set_xlim(left=0)
    if models:
        ax.legend(fontsize="small")
