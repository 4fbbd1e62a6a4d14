"""What a user may ask for with `budget=`."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from replfx.errors import PlanError
from replfx.reports.expectation import Figures

__all__ = ["Budget"]

_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_SIZE = re.compile(r"\s*(?P<number>\d+(?:\.\d*)?|\.\d+)\s*(?P<unit>[a-z]+)\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Budget:
    """Limits on what training may cost; None is no limit.

    Attributes:
        memory: peak bytes of a training step (an int), or their share of the full model's (a float).
        time: a step's time, as a share of the full model's.
        parameters: trainable parameters, as a share of the full model's.
    """

    memory: int | float | None = None
    time: float | None = None
    parameters: float | None = None

    @classmethod
    def of(cls, given: Mapping[str, object]) -> "Budget":
        """Read what a user gave.

        Raises:
            PlanError: no limit, an unknown one, or one that says nothing.

        Example:
            >>> Budget.of({"memory": "12GiB", "time": 0.75})
            Budget(memory=12884901888, time=0.75, parameters=None)
        """
        if not isinstance(given, Mapping):
            raise PlanError(f'budget must be a dict such as {{"memory": "12GiB"}}, not {type(given).__name__}')
        known = ("memory", "time", "parameters")
        if not given or (unknown := [name for name in given if name not in known]):
            what = f"budget has {unknown[0]!r}" if given else "budget is empty"
            raise PlanError(f"{what}: ask for {', '.join(known[:2])} or {known[2]}")
        memory = given.get("memory")
        return cls(
            None if memory is None else _memory(memory),
            *(None if given.get(name) is None else _share(name, given[name]) for name in known[1:]),
        )

    @property
    def asked(self) -> dict[str, int | float]:
        """The limits that there are, by their names."""
        return {name: limit for name, limit in vars(self).items() if limit is not None}

    @property
    def measures(self) -> bool:
        """Whether it takes a training step to know what is met."""
        return self.memory is not None or self.time is not None

    @property
    def needs_full(self) -> bool:
        """Whether it takes a step of the full model to know what is met."""
        return self.time is not None or isinstance(self.memory, float)

    def needed(self, full: Figures, found: Figures) -> dict[str, float]:
        """How much of each limit these costs take, by the limit's name: all at most 1 where they are within it."""
        needed = {}
        if self.parameters is not None:
            needed["parameters"] = found.parameters / (self.parameters * full.parameters)
        if self.memory is not None:
            assert full.peak_bytes is not None
            assert found.peak_bytes is not None
            limit = self.memory if isinstance(self.memory, int) else self.memory * full.peak_bytes
            needed["memory"] = found.peak_bytes / limit
        if self.time is not None:
            assert full.step_seconds is not None
            assert found.step_seconds is not None
            needed["time"] = found.step_seconds / (self.time * full.step_seconds)
        return needed


def _memory(value: object) -> int | float:
    """Bytes as an int, or a share as a float."""
    if isinstance(value, str):
        found = _SIZE.fullmatch(value)
        unit = found and _UNITS.get(found["unit"].lower())
        if not found or unit is None:
            raise PlanError(f'budget: memory={value!r} is no size; write it as "12GiB" or "800MB"')
        value = int(float(found["number"]) * unit)
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 1:
            raise PlanError(f"budget: memory={value} bytes is no room at all")
        return value
    return _share("memory", value)


def _share(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise PlanError(f"budget: {name} must be a share of the full model's such as 0.75, not {value!r}")
    if not 0 < value <= 1:
        raise PlanError(f"budget: {name}={value}: a share of the full model's is over 0 and at most 1")
    return float(value)
