"""What `operator="auto"` and `fusion="auto"` stand for; docs/auto.md has the table with what was measured."""

from typing import Any

from replfx.errors import FusionError
from replfx.fusion.fusions import fusions
from replfx.fusion.registry import AUTO, Choice, Registry
from replfx.operators.base import operators

__all__ = ["resolve_auto"]


def resolve_auto(operator: Choice, fusion: Choice) -> tuple[Choice, Choice]:
    """Put in what our measurements speak for where the choice was left to them.

    Raises:
        FusionError: there is none of this name, or there are options although it is not known for what.

    Example:
        >>> resolve_auto(Choice("auto"), Choice("channel"))
        (Choice(name='block', options={}), Choice(name='channel', options={}))
    """
    # For every kind of block that was measured, so that the block at hand need not be asked.
    return _resolve(operator, operators, "block"), _resolve(fusion, fusions, "scalar")


def _resolve(choice: Choice, registry: Registry[Any], auto: str) -> Choice:
    what = registry.what
    if choice.name != AUTO:
        if choice.name not in registry:
            raise FusionError(f"unknown {what} {choice.name!r}; there are: {', '.join([AUTO, *registry])}")
        return choice
    if choice.options:
        raise FusionError(f"{what} {AUTO!r} takes no options, so not {min(choice.options)!r}: name the {what}")
    return Choice(auto)
