"""Live blocks: a replaced block remains the user's own object, and its matrices are computed as they are read."""

from replfx.live.classes import SUBMODULE
from replfx.live.synthesis import Synthesis, syntheses_of, synthesis_of

__all__ = ["SUBMODULE", "Synthesis", "syntheses_of", "synthesis_of"]
