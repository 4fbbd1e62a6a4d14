"""Live blocks: a replaced block remains the user's own object, and its matrices are computed as they are read."""

from replfx.live.classes import SUBMODULE
from replfx.live.synthesis import Synthesis, fusion_layers, synthesis_of

__all__ = ["SUBMODULE", "Synthesis", "fusion_layers", "synthesis_of"]
