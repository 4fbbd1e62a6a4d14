"""Fusions: learnable maps from the parameters of two neighbours to those of the block between them."""

from replfx.fusion.fusions import Fusion, fusions, register_fusion
from replfx.fusion.interface import Interface
from replfx.fusion.registry import Choice

__all__ = ["Choice", "Fusion", "Interface", "fusions", "register_fusion"]
