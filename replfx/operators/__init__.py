"""Operators: what runs with the synthesised parameters, the block's own computation or a lighter one."""

from replfx.operators.base import Match, Operator, Site, Source, operators, register_operator
from replfx.operators.identity import IdentityOperator
from replfx.operators.light import LightOperator
from replfx.operators.mixer import MixerOperator

__all__ = [
    "IdentityOperator",
    "LightOperator",
    "Match",
    "MixerOperator",
    "Operator",
    "Site",
    "Source",
    "operators",
    "register_operator",
]
