"""What `operator="auto"` and `fusion="auto"` stand for at a block; docs/auto.md says what was measured."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from replfx.errors import FusionError
from replfx.fusion.operators import Match
from replfx.fusion.registry import AUTO, Choice, Registry

__all__ = ["RULES", "Rule", "Settled", "check_choice", "settle"]


@dataclass(frozen=True)
class Rule:
    """What is chosen for blocks of a kind.

    Attributes:
        blocks: which, in words.
        operator, fusion: names out of the registries.
        neighbour_gradient: factor on the gradient into the neighbours.
        light: of blocks that have a light operator, its formula and whether their normalisation comes first
            (`replfx.fusion.light`); None for blocks of any kind.
    """

    blocks: str
    operator: str
    fusion: str
    neighbour_gradient: float
    light: tuple[str, bool] | None = None


RULES = (
    Rule("basic residual blocks", "light", "channel", 0.0, ("conv", False)),
    Rule(
        "residual blocks that start with their normalisation (transformers, mixers)",
        "light",
        "scalar",
        1.0,
        ("product", True),
    ),
    Rule("bottlenecks and inverted residual blocks", "light", "channel", 0.0, ("product", False)),
    Rule(
        "residual blocks that start with a depthwise convolution (ConvNeXt)",
        "light",
        "channel",
        0.0,
        ("depthwise", False),
    ),
    Rule("all others", "block", "scalar", 1.0),
)
"""The first rule that has a block's kind holds."""


@dataclass(frozen=True)
class Settled:
    """What is put in a block's place: an operator with what its match found, a fusion, and λ."""

    operator: Choice
    fusion: Choice
    neighbour_gradient: float


def settle(
    operator: Choice, fusion: Choice, neighbour_gradient: float | None, match: Callable[[str], Match]
) -> Settled | str:
    """Choose what was left to the evidence.

    Args:
        operator: what was asked for; `AUTO` leaves it to `RULES`.
        fusion: the same.
        neighbour_gradient: None leaves it to `RULES` where the operator is left to them, and else is 1.
        match: whether the operator of a name fits the block.

    Returns:
        the choice, or why the operator does not fit.
    """
    light = match("light") if AUTO in (operator.name, fusion.name) else Match(reason="nobody asked")
    rule = next(rule for rule in RULES if _holds(rule, light))
    chosen = Choice(rule.operator) if operator.name == AUTO else operator
    found = light if chosen.name == "light" and light else match(chosen.name)
    if not found:
        return f"operator {chosen.name!r} does not fit it: {found.reason}"
    if neighbour_gradient is None:
        neighbour_gradient = rule.neighbour_gradient if operator.name == AUTO else 1.0
    # Nothing says how another operator than the rule's would best be fused.
    usual = rule.fusion if chosen.name == rule.operator else RULES[-1].fusion
    return Settled(
        Choice(chosen.name, {**found.options, **chosen.options}),
        Choice(usual) if fusion.name == AUTO else fusion,
        float(neighbour_gradient),
    )


def _holds(rule: Rule, light: Match) -> bool:
    if rule.light is None:
        return True
    return bool(light) and (light.options["kind"], light.options["norm_first"]) == rule.light


def check_choice(choice: Choice, registry: Registry[Any]) -> None:
    """Whether there is such an operator or fusion, or the choice is left to the rules.

    Raises:
        FusionError: there is none of this name, or options for no matter which.
    """
    what = registry.what
    if choice.name != AUTO and choice.name not in registry:
        raise FusionError(f"unknown {what} {choice.name!r}; there are: {', '.join([AUTO, *registry])}")
    if choice.name == AUTO and choice.options:
        raise FusionError(f"{what} {AUTO!r} takes no options, so not {min(choice.options)!r}: name the {what}")
