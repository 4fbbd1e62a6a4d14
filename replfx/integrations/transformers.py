"""For transformers' Trainer: a callback that unrolls a model on the way."""

from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from replfx.rewrite.unroll import Start
from replfx.tracing import ExampleInputs
from replfx.training.schedule import Schedule, UnrollAt

__all__ = ["Unroll"]


class Unroll(TrainerCallback):
    """Unrolls the transformed model of a Trainer after a part of the training.

    A run that goes on (`resume_from_checkpoint=`) unrolls what the checkpoint has at full depth before its weights are
    loaded. A later checkpoint is one of the plain model.

    Args:
        unroll_at: as for `replfx.Schedule`; shares are of the Trainer's `max_steps`.
        example_inputs: as for `replfx.unroll`.
        start: as for `replfx.unroll`.

    Raises:
        PlanError: when the Trainer is made: its model is not transformed.

    Example:
        >>> model = replfx.transform(model, example_inputs, operator="identity")
        >>> trainer = Trainer(model, arguments, train_dataset=data, callbacks=[Unroll(unroll_at=0.4, start="copies")])
        >>> trainer.train()
    """

    def __init__(
        self, unroll_at: UnrollAt, example_inputs: ExampleInputs | None = None, *, start: Start = "outputs"
    ) -> None:
        self.unroll_at, self.example_inputs, self.start = unroll_at, example_inputs, start
        self.schedule: Schedule | None = None
        self._max_steps = 0

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Before weights are loaded and the optimizer is made."""
        model: nn.Module = kwargs["model"]
        self.schedule = Schedule(
            model,
            kwargs.get("optimizer"),
            unroll_at=self.unroll_at,
            total_steps=lambda: self._max_steps,
            example_inputs=self.example_inputs,
            start=self.start,
            follow=True,
        )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A Trainer with `model_init=` makes a new model for each training."""
        assert self.schedule is not None
        if all(module is not self.schedule.model for module in kwargs["model"].modules()):
            self.on_init_end(args, state, control, **kwargs)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Unroll when it is time; checkpoints are written after it."""
        assert self.schedule is not None
        optimizer: Optimizer = kwargs["optimizer"]
        self.schedule.optimizer, self._max_steps = optimizer, state.max_steps
        self.schedule.advance_to(state.global_step)
