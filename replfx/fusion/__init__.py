"""Fusion layers: a fusion makes parameters from two neighbours, an operator runs with them."""

from replfx.fusion.fusions import Fusion, fusions, register_fusion
from replfx.fusion.identity import IdentityOperator
from replfx.fusion.interface import Interface
from replfx.fusion.light import LightOperator
from replfx.fusion.mixer import MixerOperator
from replfx.fusion.operators import Match, Operator, Site, Source, operators, register_operator
from replfx.fusion.registry import Choice

__all__ = [
    "Choice",
    "Fusion",
    "IdentityOperator",
    "Interface",
    "LightOperator",
    "Match",
    "MixerOperator",
    "Operator",
    "Site",
    "Source",
    "fusions",
    "operators",
    "register_fusion",
    "register_operator",
]
