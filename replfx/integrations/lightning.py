"""For Lightning: a callback that unrolls a model on the way."""

from contextlib import nullcontext, suppress
from typing import Any, cast

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError:  # the older name of the same package
    from pytorch_lightning import Callback, LightningModule, Trainer  # type: ignore[assignment]

from replfx.errors import PlanError
from replfx.rewrite.unroll import Start
from replfx.tracing import ExampleInputs
from replfx.training.schedule import Schedule, UnrollAt

__all__ = ["Unroll"]

_AVERAGING = ("WeightAveraging", "StochasticWeightAveraging")


class Unroll(Callback):
    """Unrolls the transformed model in a LightningModule after a part of the training.

    A run that goes on from a checkpoint (`ckpt_path=`) unrolls what the checkpoint has at full depth before its weights
    are loaded. A later checkpoint is one of the plain model.

    Args:
        unroll_at: as for `replfx.Schedule`; shares are of `trainer.estimated_stepping_batches`. Where a module has
            several optimizers, a step is one of each of them.
        example_inputs: as for `replfx.unroll`.
        start: as for `replfx.unroll`.

    Raises:
        PlanError: when training starts: there is no transformed model, or another callback averages weights.

    Example:
        >>> module.model = replfx.transform(module.model, example_inputs, operator="identity")
        >>> trainer = Trainer(max_epochs=10, callbacks=[Unroll(unroll_at=0.4, start="copies")])
        >>> trainer.fit(module, loader)
    """

    def __init__(
        self, unroll_at: UnrollAt, example_inputs: ExampleInputs | None = None, *, start: Start = "outputs"
    ) -> None:
        self.unroll_at, self.example_inputs, self.start = unroll_at, example_inputs, start
        self.schedule: Schedule | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Before weights are loaded and optimizers are made."""
        if self.schedule is not None and self.schedule.is_done and self.schedule.model is pl_module:
            return  # it is trained for longer
        for callback in getattr(trainer, "callbacks"):  # noqa: B009 (its stubs lack it)
            if any(base.__name__ in _AVERAGING for base in type(callback).__mro__):
                raise PlanError(
                    f"{type(callback).__name__} averages parameters by their positions, which change when blocks are "
                    "unrolled: give an AveragedModel of torch.optim.swa_utils to replfx.Schedule(averages=)"
                )
        with nullcontext() if stage == "fit" else suppress(PlanError):  # a plain model may be tested
            self.schedule = Schedule(
                pl_module,
                unroll_at=self.unroll_at,
                total_steps=lambda: cast(int, trainer.estimated_stepping_batches),  # inf is refused
                example_inputs=self.example_inputs,
                start=self.start,
                follow=True,
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the optimizers."""
        assert self.schedule is not None
        self.schedule.optimizer = trainer.optimizers

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Unroll when it is time; checkpoints are written after it."""
        assert self.schedule is not None
        self.schedule.advance_to(trainer.global_step // len(trainer.optimizers))
