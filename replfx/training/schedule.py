"""When blocks are unrolled: share weights early, train at full depth late."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, TypeAlias

from torch import nn

from replfx.errors import PlanError, StateDictError
from replfx.modules.paths import named, some
from replfx.rewrite.optimizers import Optimizers, checked
from replfx.rewrite.state import placed_blocks, state_of
from replfx.rewrite.unroll import Start, check_unrolls, unroll
from replfx.tracing import ExampleInputs

__all__ = ["Schedule", "UnrollAt", "When"]

When: TypeAlias = float | int
"""A number of steps, or a share of all of them."""

UnrollAt: TypeAlias = When | Sequence[When] | Mapping[When, str | Sequence[str]]
"""One time, several, or which blocks at which."""


class Schedule:
    """Unrolls the replaced blocks of a model after some of its training, once or a part of them at a time.

    Args:
        model: from `replfx.transform`, or what wraps that (DDP, FSDP2, `torch.compile`).
        optimizer: gets the new parameters, as `replfx.unroll` has it.
        unroll_at: a number of optimizer steps (an int), or a share of `total_steps` (a float between 0 and 1). Several
            of them, in a sequence, unroll as many equal parts of the blocks, each spread over the depth; a mapping
            from them to paths or globs says which.
        total_steps: of the whole training; needed for shares. Or a function that gives it, for trainers that know it
            late.
        example_inputs: as for `replfx.unroll`.
        start: as for `replfx.unroll`.
        averages: copies of the model with averaged weights (EMA), which are unrolled with it.
        follow: whether a state_dict with blocks at full depth, loaded into the model while these are replaced, unrolls
            them. For trainers that load a model's weights before anything else; without it that is an error.

    Attributes:
        model: as it was given.
        optimizer: may be set later, where it is made after the model's weights are loaded.

    Raises:
        PlanError: the model is not transformed, or `unroll_at` cannot be met.
        FusionError: a block that could not be unrolled, or an optimizer whose parameters cannot be exchanged, now
            rather than in the middle of the training.

    Example:
        >>> model = replfx.transform(model, x, operator="identity")
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> schedule = replfx.Schedule(model, optimizer, unroll_at=0.4, start="copies", total_steps=10_000)
        >>> for batch in batches:
        ...     loss(model, batch).backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        ...     schedule.step()
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizers = None,
        *,
        unroll_at: UnrollAt,
        total_steps: int | Callable[[], int] | None = None,
        example_inputs: ExampleInputs | None = None,
        start: Start = "outputs",
        averages: Iterable[nn.Module] = (),
        follow: bool = False,
    ) -> None:
        self._paths = list(placed_blocks(model)[1])
        check_unrolls(model, example_inputs, start)
        self.model, self._averages = model, self._checked_averages(model, averages)
        self._example_inputs, self._start = example_inputs, start
        self.optimizer = optimizer
        self._unroll_at, self._total = unroll_at, total_steps
        _parts(unroll_at, 1_000_000 if callable(total_steps) else total_steps, self._paths)  # it may be impossible
        self._steps = 0
        self._done: list[list[str]] = []
        if follow:
            state_of(model).follow = self._unroll

    @property
    def optimizer(self) -> Optimizers:
        """What gets the new parameters."""
        return self._optimizer

    @optimizer.setter
    def optimizer(self, given: Optimizers) -> None:
        checked(given)
        self._optimizer = given

    def _checked_averages(self, model: nn.Module, averages: Iterable[nn.Module]) -> list[nn.Module]:
        if isinstance(averages, nn.Module) or not isinstance(averages, Iterable):
            raise PlanError(f"averages must be a list of copies of the model, not {type(averages).__name__}")
        given = list(averages)
        for index, average in enumerate(given):
            copied = isinstance(average, nn.Module) and list(placed_blocks(average)[1]) == self._paths
            if not copied or any(average is other for other in (model, *given[:index])):
                raise PlanError(
                    f"averages[{index}] is a {type(average).__name__} that has not the model's replaced blocks, or is "
                    "there twice: give copies of the transformed model"
                )
        return given

    @property
    def steps(self) -> int:
        """How many steps were taken."""
        return self._steps

    @property
    def is_done(self) -> bool:
        """Whether all blocks are at full depth."""
        return sum(map(len, self._done)) == len(self._paths)

    def step(self) -> list[str]:
        """Count a step; call it after each of the optimizer's.

        Returns:
            the paths of the blocks that were unrolled now; empty for nearly all steps.
        """
        return self.advance_to(self._steps + 1)

    def advance_to(self, steps: int) -> list[str]:
        """Take note that so many steps were taken in all, for trainers that count them themselves.

        Returns:
            as `step` does.
        """
        self._steps = steps
        if self.is_done:
            return []
        known = {path for part in self._done for path in part}
        due = []
        for at, paths in self._parts:
            if at <= steps and (left := [path for path in paths if path not in known]):
                self._unroll(left)
                due += left
        return due

    @cached_property
    def _parts(self) -> list[tuple[int, list[str]]]:
        """After how many steps which blocks are unrolled; a trainer is asked for all steps once, in its first."""
        total = self._total() if callable(self._total) else self._total
        return _parts(self._unroll_at, total, self._paths)

    def _unroll(self, paths: Sequence[str]) -> None:
        unroll(self.model, self.optimizer, self._example_inputs, blocks=paths, start=self._start)
        for average in self._averages:
            unroll(average, None, self._example_inputs, blocks=paths, start=self._start)
        self._done.append(list(paths))

    def state_dict(self) -> dict[str, Any]:
        """How far it is: the number of steps, and the blocks that are unrolled; ready for JSON."""
        return {"steps": self._steps, "unrolled": [list(paths) for paths in self._done]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there: unrolls what was unrolled, so that the state_dicts of model and optimizer fit after it.

        Load it before them.

        Raises:
            StateDictError: it is of another plan, or of a time before this model was unrolled.
        """
        try:
            steps, unrolled = int(state["steps"]), [list(part) for part in state["unrolled"]]
        except (KeyError, TypeError, ValueError) as error:
            raise StateDictError(f"it is not the state of a replfx.Schedule: {error!r}") from error
        here = {path for part in self._done for path in part}
        wanted = {path for part in unrolled for path in part}
        if foreign := sorted(wanted.difference(self._paths)):
            raise StateDictError(f"it has unrolled `{foreign[0]}`, which was not replaced in this model")
        if ahead := sorted(here - wanted):
            raise StateDictError(
                f"it is of a time when `{ahead[0]}` was still replaced, and this model has it at full depth: transform "
                "a new model, and load the state into a Schedule of that"
            )
        for part in unrolled:
            if missing := [path for path in part if path not in here]:
                self._unroll(missing)
        self._steps = steps


def _parts(unroll_at: UnrollAt, total: int | None, paths: Sequence[str]) -> list[tuple[int, list[str]]]:
    """After how many steps which blocks are unrolled, the first first."""
    if isinstance(unroll_at, Mapping):
        found = [(_step(at, total), named(globs, paths, "unroll_at")) for at, globs in unroll_at.items()]
        twice = [path for path in paths if sum(path in part for _, part in found) > 1]
        left = [path for path in paths if not any(path in part for _, part in found)]
        if twice or left:
            what = f"unrolls `{twice[0]}` twice" if twice else f"never unrolls `{left[0]}`"
            raise PlanError(f"unroll_at {what}: name each replaced block once, of {some(paths)}")
        return sorted(found, key=lambda part: part[0])
    several = isinstance(unroll_at, Sequence) and not isinstance(unroll_at, str | bytes)
    times: list[Any] = list(unroll_at) if several else [unroll_at]  # type: ignore[arg-type]
    if not times or len(times) > len(paths):
        raise PlanError(f"unroll_at has {len(times)} times for {len(paths)} replaced blocks: give one to as many")
    steps = sorted(_step(at, total) for at in times)
    return [(at, list(paths[index :: len(steps)])) for index, at in enumerate(steps)]


def _step(at: When, total: int | None) -> int:
    if isinstance(at, bool) or not isinstance(at, int | float):
        raise PlanError(f"unroll_at must be a number of steps or a share of them, not {at!r}")
    if isinstance(at, int):
        if at < 1:
            raise PlanError(f"unroll_at={at}: at least one step, or a share as a float")
        return at
    if not 0 < at < 1:
        raise PlanError(f"unroll_at={at}: a share of the steps is between 0 and 1; a number of steps is an int")
    if total is None:
        raise PlanError(f"unroll_at={at} is a share of the steps: say how many there are with total_steps=")
    if isinstance(total, bool) or not isinstance(total, int) or total < 1:
        raise PlanError(f"total_steps must be a number of steps from 1 up, not {total!r}")
    return max(1, round(at * total))
