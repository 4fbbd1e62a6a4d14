"""What a step of each variant costs, beside full's: measured in turn, before any of them is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.accuracy.tasks import Subject
from benchmarks.accuracy.training import prepared
from benchmarks.accuracy.variants import Variant
from replfx import ReplfxError
from replfx.measure import Training, pairwise_ratios, training_costs

FULL = "full"
WARMUP = 2


def name_of(subject: Subject, variant: str) -> str:
    """The name of a cost's record."""
    return f"{subject.name}/{variant}/cost"


def measure(
    subject: Subject,
    variants: Sequence[Variant],
    device: torch.device,
    repeats: int,
    stamps: Mapping[str, Any],
    on_round: Callable[[], object] = lambda: None,
) -> list[dict[str, Any]]:
    """Measure a step of each variant, the optimizer's part included, in rounds with full's.

    Args:
        subject: the task at a budget; its data is on `device`.
        variants: what is measured; full is among them.
        device: where.
        repeats: rounds that are timed.
        stamps: versions and machine, for the records.
        on_round: called after each round.

    Returns:
        a record for each; one that does not fit the model has a "reason" and no figures.

    """
    batch = subject.data.batch(0, 0, subject.recipe.batch)
    trainings: dict[str, Training] = {}
    reasons: dict[str, str] = {}
    for variant in variants:
        try:
            model = prepared(subject, variant, 0, device)
        except ReplfxError as error:
            reasons[variant.name] = str(error)
            continue
        loss = partial(subject.data.loss, model, batch)
        trainings[variant.name] = Training(model, subject.recipe.optimizer_for(model), loss, device)
    costs = training_costs(trainings, repeats, warmup=WARMUP, on_round=on_round)
    ratios = pairwise_ratios({name: cost.step_seconds for name, cost in costs.items()}, FULL)
    rest = {"kind": "cost", "subject": subject.name, "environment": dict(stamps)}
    records = [
        {
            "name": name_of(subject, name),
            "variant": name,
            **rest,
            **cost.to_dict(),
            "step_over_full": ratios[name].to_dict(),
        }
        for name, cost in costs.items()
    ]
    refused = [{"name": name_of(subject, v), "variant": v, **rest, "reason": why} for v, why in reasons.items()]
    return records + refused
