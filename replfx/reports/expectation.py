"""What a budget's plan is expected to cost, beside the untouched model: part of a report."""

from collections.abc import Mapping
from dataclasses import dataclass

from replfx.reports.labels import amount, mebibytes

__all__ = ["Expectation", "Figures"]


@dataclass(frozen=True)
class Figures:
    """What training a model costs.

    Attributes:
        parameters: trainable ones.
        peak_bytes: peak of a training step's tensors, parameters, gradients and AdamW's state included; None where it
            was not asked for.
        step_seconds: of that step; None likewise.
    """

    parameters: int
    peak_bytes: int | None = None
    step_seconds: float | None = None


@dataclass(frozen=True)
class Expectation:
    """What a plan was chosen for, and what it is expected to cost.

    Attributes:
        budget: what was asked for: "memory" in bytes (an int) or as a share of the full model's (a float), "time" and
            "parameters" as shares.
        device: what was measured on.
        full: the untouched model's costs, measured.
        planned: the transformed model's, expected.
    """

    budget: Mapping[str, int | float]
    device: str
    full: Figures
    planned: Figures

    def lines(self) -> list[str]:
        """For people, what was asked for first."""
        asked = ", ".join(f"{name} ≤ {_asked(value)}" for name, value in self.budget.items())
        full, planned = self.full, self.planned
        figures = [f"parameters {amount(planned.parameters)} ({planned.parameters / full.parameters:.2f} of full)"]
        if full.peak_bytes and planned.peak_bytes is not None:
            ratio = planned.peak_bytes / full.peak_bytes
            figures.append(f"peak memory of a step {mebibytes(planned.peak_bytes)} MiB ({ratio:.2f})")
        if full.step_seconds and planned.step_seconds is not None:
            ratio = planned.step_seconds / full.step_seconds
            figures.append(f"step {1e3 * planned.step_seconds:.1f} ms ({ratio:.2f})")
        return [f"budget: {asked}; expected on {self.device}, with AdamW:", *(f"  {figure}" for figure in figures)]


def _asked(value: int | float) -> str:
    return f"{mebibytes(value)} MiB" if isinstance(value, int) else f"{value:g} of full"
