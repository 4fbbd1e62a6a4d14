"""How a block is called: where its activation comes in, and what it gives back."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from replfx.errors import PlanError
from replfx.fusion.caches import Filled
from replfx.fusion.templates import Field, fill, is_slot, leaves
from replfx.plain_data import Rule

__all__ = ["Interface", "read_slot"]


@dataclass(frozen=True)
class Interface:
    """How a block of a chain is called.

    A *slot* names an input: "0" the first positional one, "hidden_states" one by keyword, "0.1" an item of
    a tuple in the first.

    Attributes:
        inputs: the slots that the previous block of the chain fills; the first is the main activation.
        output: what the block gives, as plain JSON: `{"input": slot}` where an activation is carried or an
            input is handed through, `{"computed": true}` what only the block itself knows, `{"unread": true}` the
            same where nobody reads it (the weights of an attention): None in what takes the block's place,
            `{"tuple": [...]}`, `{"list": [...]}`, `{"dict": {...}}`, `{"object": {"class": "module:Name", "fields":
            {...}}}` for dataclasses and named tuples, and constants.
        fills: the caches of keys and values among its inputs that it fills.
        effects: it puts something else into an object that it is given, or what it fills is read by others.
    """

    inputs: Annotated[tuple[str, ...], Rule("a list of slot names", lambda slots: slots and all(map(is_slot, slots)))]
    output: object
    fills: tuple[Filled, ...] = ()
    effects: bool = False

    def to_dict(self) -> dict[str, object]:
        """As plain JSON values; what few blocks have is named only where one has it."""
        few: dict[str, object] = {"fills": [f.to_dict() for f in self.fills], "effects": self.effects}
        return {"inputs": list(self.inputs), "output": self.output, **{k: v for k, v in few.items() if v}}

    @property
    def main(self) -> str:
        """The slot of the main activation."""
        return self.inputs[0]

    def activation(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The main activation among the arguments of a call."""
        return read_slot(self.main, args, kwargs)

    def computed(self) -> bool:
        """Whether the block gives something besides its activations that a light operator cannot know."""
        return self.effects or any(kind == "computed" for _, kind, _ in leaves(self.output))

    def main_of(self, result: Any) -> Any:
        """The main activation in what a call gave."""
        for path, kind, slot in leaves(self.output):
            if (kind, slot) == ("input", self.main):
                for key in path:
                    result = getattr(result, key) if isinstance(key, Field) else result[key]
                return result
        raise PlanError(f"the plan's output template {self.output!r} names no activation")

    def result(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], main: Any) -> Any:
        """The output of what takes the block's place, which keeps the caches in step too."""
        for filled in self.fills:
            filled.pass_over(args, kwargs, main)
        return self.with_main(args, kwargs, main)

    def with_main(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], main: Any) -> Any:
        """The block's output with `main` for the main activation and the other inputs handed through."""

        def give(kind: str, slot: Any) -> Any:
            if kind == "computed":
                raise PlanError(f"the plan's output template has {{{kind!r}: {slot}}}, which no operator can give")
            if kind == "unread":
                return None
            return main if slot == self.main else read_slot(slot, args, kwargs)

        return fill(self.output, give)


def read_slot(slot: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The value of an input slot in a call."""
    first, *rest = slot.split(".")
    value = args[int(first)] if first.isdigit() else kwargs[first]
    for key in rest:
        value = value[int(key)] if key.isdigit() else value[key]
    return value
