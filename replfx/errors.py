"""Everything replfx raises on bad input: one base class, one subclass a stage.

A message says what was wrong, where (a module path wherever there is one) and what to do about it.
"""

import re
from collections.abc import Mapping, Sequence

__all__ = [
    "CalibrationError",
    "CaptureError",
    "CompileError",
    "FusionError",
    "NoChainError",
    "PlanError",
    "ReplfxError",
    "StateDictError",
    "VerifyError",
    "WrittenWeightsError",
    "of_options",
]


class ReplfxError(Exception):
    """Base of all errors that replfx raises on purpose; the user's model is left as it was."""


class CaptureError(ReplfxError):
    """The model could not be turned into a graph: it does not run, or it needs example inputs."""


class CalibrationError(ReplfxError):
    """Fusion layers cannot be fitted to the blocks that they replace on these batches."""


class CompileError(ReplfxError):
    """`torch.compile` cannot use the replfx backend like this: an option is unknown, or of the wrong type."""


class NoChainError(ReplfxError):
    """Nothing in the model can be replaced; the message gives the reason for the nearest candidates.

    Attributes:
        note: that nothing can be, in a few words.
        reasons: why, of the nearest candidates first.
    """

    def __init__(self, message: str, note: str | None = None, reasons: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.note, self.reasons = note or message, tuple(reasons) or (message,)


class PlanError(ReplfxError):
    """A plan or a selection of blocks is malformed, impossible, or made for another model."""


class FusionError(ReplfxError):
    """A fusion or an operator is unknown, or does not fit the block that it was asked for."""


class StateDictError(ReplfxError):
    """A state_dict belongs to the untransformed model, or to another plan."""


class VerifyError(ReplfxError):
    """The transformed model is not sound: a shape changed, or a parameter gets no gradient."""


class WrittenWeightsError(VerifyError):
    """The model writes to weights of a replaced block, which are computed anew each time that they are read.

    Attributes:
        names: path of the block → names in it of the parameters that are written.
    """

    def __init__(self, message: str, names: Mapping[str, Sequence[str]]) -> None:
        super().__init__(message)
        self.names = names


def of_options(error: Exception) -> str:
    """What an error of a constructor says of the options that it was given, in the words of who gave them."""
    said = re.sub(r"^\S+\(\) ", "", str(error))
    said = re.sub(r"^got an unexpected keyword argument (.*)$", r"there is no option \1", said)
    return re.sub(r"^missing \d+ required [\w-]+(?: [\w-]+)*: (.*)$", r"\1 must be given", said)
