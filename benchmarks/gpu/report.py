"""The report of a session with a GPU: one page of tables, and one plot."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import names
from benchmarks.compiling.output import KERNEL_HEADS, KernelRow
from benchmarks.drawing import markdown, new_figure, save
from benchmarks.gpu.jobs import VARIANTS
from benchmarks.gpu.workers import Record
from replfx.measure import MIB

COLOURS = ("#4d4d4d", "#999999", "#d55e00", "#0072b2", "#009e73", "#cc79a7")
_JUDGED = {"python": "held-out loss, nats a byte"}
_LEARNED = ("variant", "steps", "", "step alone, ms", "time alone, s", "peak, MiB", "parameters", "− full")
_STEPS = ("model", "variant", "step, ms", "/ Inductor full", "launches", "peak, MiB", "compile, s")


def write(records: Sequence[Record], folder: Path) -> list[Path]:
    """Write ``gpu.md`` and ``gpu.png`` to the folder; returns where they are."""
    folder.mkdir(parents=True, exist_ok=True)
    runs = _runs(records)
    text, picture = folder / "gpu.md", folder / "gpu.png"
    written = [text]
    if runs:
        _plot(runs, picture)
        written.append(picture)
    text.write_text("\n".join(_page(records, runs, folder)))
    return written


def _runs(records: Sequence[Record]) -> dict[str, dict[str, Record]]:
    """Task → variant → its record, with the time that its steps take with the device to themselves."""
    alone: dict[str, Record] = {}
    for record in records:
        if record["kind"] == "plan":
            alone.update(record["alone"])
    runs: dict[str, dict[str, Record]] = {}
    for record in records:
        if record["kind"] == "run" and record["curve"]:
            task, _, variant = record["name"].partition("/")
            own = alone.get(record["name"], {})
            full = next((f for name, f in alone.items() if name.startswith(f"{task}/full")), own)
            grows = _grows_at(variant)
            points = [
                {**point, "alone": _seconds(point["step"], record["steps"], grows, own, full)}
                for point in record["curve"]
            ]
            runs.setdefault(task, {})[variant] = {**record, "figures": own, "curve": points}
    return {task: {v: found[v] for v in VARIANTS[task] if v in found} for task, found in runs.items()}


def _grows_at(variant: str) -> float | None:
    """The share of the steps after which a variant is at full depth."""
    given = (option.partition("=") for option in variant.split(":")[1:])
    return next((float(value) for key, _, value in given if key in ("unroll", "at")), None)


def _seconds(step: int, steps: int, grows: float | None, own: Record, full: Record) -> float | None:
    """What so many steps take alone: once a model has grown, what full's take."""
    if not own or not full:
        return None
    before = step if grows is None else min(step, int(grows * steps))
    return float(before * own["seconds"]["median"] + (step - before) * full["seconds"]["median"])


def _page(records: Sequence[Record], runs: dict[str, dict[str, Record]], folder: Path) -> Iterator[str]:
    session = next(record for record in records if record["kind"] == "session")
    yield f"# {session['device']}, {session['date']}\n"
    said = "torch", "python", "replfx", "platform", "commit"
    quick = " **Quick: small models and few steps, to see that it runs; no figure here says anything.**"
    yield f"{', '.join(f'{name} {session[name]}' for name in said)}.{quick * session['quick']}\n"
    for task, variants in runs.items():
        yield from _learned(task, variants)
    if runs:
        yield "![curves](gpu.png)\n"
    yield from _stepped([record for record in records if record["kind"] == "step"])
    yield from _kernels(session["device"] != "cpu", folder / "kernels" / "compile.json")
    done = {r["name"] for r in records if r["kind"] == "step" or r.get("status") == "done"}
    ran = {record["part"] for record in records if record["kind"] in ("run", "plan")}
    for record in records:
        if record["kind"] == "command":
            yield f"{record['part']}: {record['status']}: {record['last']}\n"
        elif record["kind"] == "left out" and record["part"] not in ran:
            yield f"{record['part']}: left out: {record['reason']}\n"
        elif record["kind"] == "failed" and not {record["of"], f"step/{record['of']}"} & done:
            yield f"{record['part']}: {record['of']} failed: {record['reason']}\n"


def _learned(task: str, variants: dict[str, Record]) -> Iterator[str]:
    yield f"## {task}\n"
    judged = _JUDGED.get(task, "test accuracy, %")
    lower = task in _JUDGED
    finals = {name: record["curve"][-1]["metric"] for name, record in variants.items() if record["status"] == "done"}
    fulls = [metric for name, metric in finals.items() if name.startswith("full")]
    best = (min(fulls) if lower else max(fulls)) if fulls else None
    rows = []
    for name, record in variants.items():
        last, figures = record["curve"][-1], record["figures"]
        known = bool(figures)
        rows.append(
            [
                name,
                f"{last['step']:,}" + ("" if record["status"] == "done" else f" of {record['steps']:,}, cut"),
                f"{last['metric']:.4f}" if lower else f"{last['metric']:.2f}",
                f"{1e3 * figures['seconds']['median']:.2f}" if known else "–",
                f"{last['alone']:.0f}" if last["alone"] is not None else "–",
                f"{figures['peak_training_bytes'] / MIB:,.0f}" if known else "–",
                f"{figures['trainable_parameters']:,}" if known else "–",
                f"{finals[name] - best:+.3f}".replace("-", "−") if best is not None and name in finals else "–",
            ]
        )
    yield markdown((*_LEARNED[:2], judged, *_LEARNED[3:]), rows, words=1)
    yield "One seed. Processes side by side, same batches; a step was timed with the device to itself.\n"


def _stepped(records: Sequence[Record]) -> Iterator[str]:
    if not records:
        return
    yield "## Steps\n"
    full = {r["model"]: r for r in records if r["name"].endswith(" full")}
    rows = []
    for record in records:
        seconds = record["seconds"]["median"]
        bound = full.get(record["model"])
        rows.append(
            [
                record["model"],
                record["name"].rpartition("/")[2],
                f"{1e3 * seconds:.2f}",
                "–" if bound is None else f"{seconds / bound['seconds']['median']:.2f}",
                "–" if record["launches"] is None else str(record["launches"]),
                f"{record['peak_training_bytes'] / MIB:,.0f}",
                f"{record['compiled']:.0f}",
            ]
        )
    yield markdown(_STEPS, rows)


def _kernels(judged: bool, path: Path) -> Iterator[str]:
    if not path.is_file():
        return
    found = json.loads(path.read_text())["kernels"]
    if found:
        yield "## Kernels\n"
        yield markdown(KERNEL_HEADS, [KernelRow(**row).cells() for row in found])
        yield from (f"**{line}**\n" for line in _losers(found) if judged)


def _losers(found: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Pieces of work that our kernels don't win."""
    works: dict[str, dict[str, float]] = {}
    for row in found:
        works.setdefault(row["work"], {})[row["provider"]] = row["seconds"]
    for work, by in works.items():
        if {"replfx", "Inductor"} <= by.keys() and by["replfx"] >= by["Inductor"]:
            yield f"{work}: ours does not win, at {by['replfx'] / by['Inductor']:.2f} of Inductor's time"


def _plot(runs: dict[str, dict[str, Record]], path: Path) -> None:
    """Plot what each task is judged by, against steps and against the time that these take alone."""
    figure = new_figure(10, 3.6 * len(runs))
    grid = figure.subplots(len(runs), 2, squeeze=False)
    for row, (task, variants) in zip(grid, runs.items(), strict=True):
        for ax, key, label in zip(row, ("step", "alone"), ("steps", "seconds of steps alone"), strict=True):
            for colour, (name, record) in zip(COLOURS, variants.items(), strict=False):
                points = [point for point in record["curve"] if point[key] is not None]
                x, y = [p[key] for p in points], [p["metric"] for p in points]
                ax.plot(x, y, "o-", color=colour, markersize=3, label=names.variant(name))
                grows = _grows_at(name)
                if grows is not None and key == "step":
                    ax.axvline(grows * record["steps"], color=colour, linestyle=":", linewidth=1)
            metrics = sorted(point["metric"] for record in variants.values() for point in record["curve"])
            if task in _JUDGED and len(metrics) > 12:
                low, high = metrics[0], metrics[int(0.85 * len(metrics))]
                ax.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
            ax.set(xlabel=label, ylabel=_JUDGED.get(task, "test accuracy, %"), title=task, xlim=(0, None))
            ax.grid(alpha=0.25)
        row[0].legend(frameon=False, fontsize=8)
    save(figure, path)
