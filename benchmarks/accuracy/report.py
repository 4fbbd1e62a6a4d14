"""From records to rows: means over seeds, paired differences with their intervals, savings, time to a target."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean, stdev
from typing import Any

from benchmarks.accuracy.tasks import Metric
from replfx.measure import saving_kept

Record = Mapping[str, Any]
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """Mean of differences paired by seed, with its interval by Student's t.

    Attributes:
        mean: of the variant's metric less the other's.
        error: standard error of that mean; None with fewer than two pairs.
        interval: of 95 % confidence; None with fewer than two pairs.
        pairs: how many seeds both have.
    """

    mean: float
    error: float | None
    interval: tuple[float, float] | None
    pairs: int

    @classmethod
    def of(cls, metrics: Mapping[int, float], others: Mapping[int, float]) -> Difference | None:
        """Of two variants' metrics by seed; None where they share no seed."""
        differences = [metrics[seed] - others[seed] for seed in sorted(metrics.keys() & others.keys())]
        if not differences:
            return None
        middle, count = mean(differences), len(differences)
        if count < 2:
            return cls(middle, None, None, count)
        error = stdev(differences) / math.sqrt(count)
        from scipy import stats  # takes a second

        half = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)) * error
        return cls(middle, error, (middle - half, middle + half), count)

    def to_dict(self) -> dict[str, object]:
        """All figures, ready for JSON."""
        return {"mean": self.mean, "standard_error": self.error, "interval": self.interval, "pairs": self.pairs}


def difference_text(difference: Difference | None, digits: int) -> str:
    """As a table shows it, with its interval where it has one."""
    if difference is None:
        return "–"
    texts = [f"{value:+.{digits}f}" for value in (difference.mean, *(difference.interval or ()))]
    return texts[0] if len(texts) == 1 else f"{texts[0]} [{texts[1]}, {texts[2]}]"


@dataclass(frozen=True)
class Row:
    """What is known of one variant of a subject.

    Attributes:
        variant: its name.
        metrics: seed → metric at the end of training.
        over_full, over_removed: differences to the two bounds; None for the bound itself, and without runs.
        cost: of a step, as `benchmarks.accuracy.costs` records it; None if it was not measured.
        eta_time, eta_peak: the share of the saving that `removed` realises; see `replfx.measure.saving_kept`.
        seconds: seed → total training time.
        to_target: seed → training time until the target was met; None where it never was.
        target: the metric to meet; None without a run of full.
        curves: seed → evaluations.
        reason: why there is no such variant, where there is none.
    """

    variant: str
    metrics: dict[int, float] = field(default_factory=dict)
    over_full: Difference | None = None
    over_removed: Difference | None = None
    cost: Record | None = None
    eta_time: float | None = None
    eta_peak: float | None = None
    seconds: dict[int, float] = field(default_factory=dict)
    to_target: dict[int, float | None] = field(default_factory=dict)
    target: float | None = None
    curves: dict[int, list[dict[str, float]]] = field(default_factory=dict)
    reason: str = ""

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation of the metric over the seeds; None with fewer than two."""
        return stdev(self.metrics.values()) if len(self.metrics) > 1 else None

    def to_dict(self) -> dict[str, object]:
        """All figures but the curves, ready for JSON."""
        return {
            "variant": self.variant,
            "reason": self.reason or None,
            "mean": mean(self.metrics.values()) if self.metrics else None,
            "deviation": self.deviation,
            "metrics": self.metrics,
            "over_full": self.over_full and self.over_full.to_dict(),
            "over_removed": self.over_removed and self.over_removed.to_dict(),
            "eta": {"time": self.eta_time, "peak": self.eta_peak},
            "train_seconds": self.seconds,
            "target": self.target,
            "seconds_to_target": self.to_target,
        }


def rows_of(records: Sequence[Record], variants: Sequence[str], metric: Metric, target: float | None) -> list[Row]:
    """Set the variants beside the bounds.

    Full is the one of those with rates of their own (`full:lr=…`) that ends best. Which `removed` bounds a variant is
    that of the same blocks: `removed:select=…` where it has a `select` (or another policy) of its own, else `removed`.

    Args:
        records: of one subject, costs and runs.
        variants: names, in the order of the rows.
        metric: what the task is judged by.
        target: the metric to reach in `to_target`; None takes the worst that full comes to.

    """
    runs: dict[str, dict[int, Record]] = {}
    costs: dict[str, Record] = {}
    for record in records:
        if record["kind"] == "cost":
            costs[record["variant"]] = record
        else:
            runs.setdefault(record["variant"], {})[record["seed"]] = record
    known = dict.fromkeys((*variants, *runs))
    metrics = {name: {seed: float(run["metric"]) for seed, run in runs.get(name, {}).items()} for name in known}
    best = best_full(metrics, metric)
    full = metrics.get(best, {})
    if target is None and full:
        target = min(full.values()) if metric.higher_is_better else max(full.values())
    return [_row(name, best, metrics, costs, runs.get(name, {}), metric, target) for name in variants]


def best_full(metrics: Mapping[str, Mapping[int, float]], metric: Metric) -> str:
    """The name of full at the learning rate that suits it best, of those that were tried with most seeds."""
    tried = [name for name in metrics if name.split(":")[0] == "full" and ":length=" not in name and metrics[name]]
    sign = 1 if metric.higher_is_better else -1
    return max(tried, key=lambda name: (len(metrics[name]), sign * mean(metrics[name].values())), default="full")


def removed_like(variant: str) -> str:
    """The name of the variant that deletes the blocks which this one replaces."""
    method, *options = variant.split(":")
    if method in ("same-time", "full"):
        return "removed"
    policy = [o for o in options if o.partition("=")[0] in ("select", "every", "fraction", "keep")]
    if method == "rule2024" and not policy:
        policy = ["every=4"]
    return ":".join(["removed", *policy])


def _row(
    name: str,
    full: str,
    metrics: Mapping[str, dict[int, float]],
    costs: Mapping[str, Record],
    runs: Mapping[int, Record],
    metric: Metric,
    target: float | None,
) -> Row:
    bound = removed_like(name)
    cost = costs.get(name)
    if cost is not None and "reason" in cost:
        return Row(name, reason=str(cost["reason"]))
    return Row(
        name,
        metrics[name],
        None if name == full else Difference.of(metrics[name], metrics.get(full, {})),
        None if name == bound else Difference.of(metrics[name], metrics.get(bound, {})),
        cost,
        _eta(costs, name, bound, lambda c: float(c["step_over_full"]["median"])),
        _eta(costs, name, bound, lambda c: float(c["peak_training_bytes"])),
        {seed: float(run["train_seconds"]) for seed, run in runs.items()},
        {} if target is None else {seed: _reached(run["curve"], metric, target) for seed, run in runs.items()},
        target,
        {seed: run["curve"] for seed, run in runs.items()},
    )


def _eta(costs: Mapping[str, Record], name: str, bound: str, figure: Any) -> float | None:
    """The share of the saving of `bound`; None where it, or a cost, is missing."""
    found = [costs.get(each) for each in ("full", name, bound)]
    if any(cost is None or "reason" in cost for cost in found):
        return None
    full, own, removed = map(figure, found)
    return saving_kept(full, own, removed)


def _reached(curve: Sequence[Mapping[str, float]], metric: Metric, target: float) -> float | None:
    """Training time at the first evaluation that is as good as the target."""
    for point in curve:
        if (point["metric"] >= target) if metric.higher_is_better else (point["metric"] <= target):
            return point["seconds"]
    return None
