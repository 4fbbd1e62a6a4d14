"""Which pipeline stage runs now."""

import sys

from torch import nn

__all__ = ["running_stage"]


def running_stage() -> nn.Module | None:
    """The module of the `torch.distributed.pipelining` stage that called what runs now; None if none did.

    PyTorch tells a module nothing of the stage that it is in, so the calls that led here are gone through. Where
    nobody has imported pipelines, that is not done.
    """
    pipelining = sys.modules.get("torch.distributed.pipelining.stage")
    frame = None if pipelining is None else sys._getframe(1)
    while frame is not None:
        if frame.f_globals is vars(pipelining):
            stage = getattr(frame.f_locals.get("self"), "submod", None)
            if isinstance(stage, nn.Module):
                return stage
        frame = frame.f_back
    return None
