"""What a training run asks of a data set, whatever it holds."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from replfx.tracing import ExampleInputs


class Data(Protocol):
    """A data set: batches as functions of seed and step, the loss of one, and the metric.

    What a batch is, the set knows alone: it makes them, takes their loss and says what of them a model is called with.
    """

    channels_last: ClassVar[bool]
    """Whether models of it run on images, which they do best with the channels last in memory."""

    def to(self, device: torch.device) -> Data:
        """The same set, with its batches on a device."""
        ...

    def batch(self, seed: int, step: int, size: int) -> Any:
        """The batch of a step: a function of its arguments alone, so that a run can go on anywhere.

        Raises:
            ReplfxError: there is too little data for one batch.

        """
        ...

    def inputs(self, batch: Any) -> ExampleInputs:
        """What of a batch a model in training is called with; `replfx.transform` takes it as example inputs."""
        ...

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The loss of a batch, a scalar."""
        ...

    def metric(self, model: nn.Module, final: bool) -> float:
        """What the task is judged by, on data that is not trained on; `model` is in evaluation mode."""
        ...
