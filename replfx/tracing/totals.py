"""What a whole model costs in one forward pass, without a graph of it."""

import torch
from torch import nn

from replfx.errors import CaptureError
from replfx.tracing.capturing import ghost_of, real_twin
from replfx.tracing.costs import Meter
from replfx.tracing.inputs import Inputs
from replfx.tracing.leaks import Traces
from replfx.tracing.undisturbed import undisturbed

__all__ = ["costs_of"]


def costs_of(model: nn.Module, inputs: Inputs) -> tuple[int, int]:
    """FLOPs of a forward pass and the bytes that autograd keeps for backward.

    The model runs under fake tensors, at no compute; where it can't, a copy of it runs for real.

    Raises:
        CaptureError: the model does not run.
    """
    with undisturbed(model):
        try:
            with Traces(model) as traces:
                return _on_fakes(model, inputs, traces)
        except Exception:  # values are needed, or an operator has no fake form
            pass
        try:
            return _measured(*real_twin(model, inputs))
        except Exception as error:
            raise CaptureError(f"{type(model).__name__} does not run: {type(error).__name__}: {error}") from error


def _on_fakes(model: nn.Module, inputs: Inputs, traces: Traces) -> tuple[int, int]:
    mode, ghost, given = ghost_of(model, inputs, traces)
    with mode:
        return _measured(ghost, given)


def _measured(model: nn.Module, inputs: Inputs) -> tuple[int, int]:
    with torch.enable_grad(), Meter(model) as meter:
        model(*inputs.args, **inputs.kwargs)
        return meter.take()
