"""How a block is called: where its activation comes in, and what it gives back."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from replfx.errors import PlanError
from replfx.fusion.caches import Filled

__all__ = ["Interface", "read_slot"]


@dataclass(frozen=True)
class Interface:
    """Of a block in a chain.

    A *slot* names an input: "0" the first positional one, "hidden_states" one by keyword, "0.1" an item of
    a tuple in the first.

    Attributes:
        inputs: the slots that the previous block of the chain fills; the first is the main activation.
        output: what the block gives, as plain JSON: `{"input": slot}` where an activation is carried or an
            input is handed through, `{"computed": true}` what only the block itself knows, `{"unread": true}` the
            same where nobody reads it (the weights of an attention): None in what takes the block's place,
            `{"tuple": [...]}`, `{"list": [...]}`, `{"dict": {...}}` and constants.
        fills: the caches of keys and values among its inputs that it fills.
        effects: it puts something else into an object that it is given, or what it fills is read by others.
    """

    inputs: tuple[str, ...]
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

    def computed(self) -> bool:
        """Whether the block gives something besides its activations that a light operator cannot know."""
        return self.effects or _any_computed(self.output)

    def main_of(self, result: Any) -> Any:
        """The main activation in what a call gave."""
        for path in _places(self.output, self.main):
            for key in path:
                result = result[key]
            return result
        raise PlanError(f"the plan's output template {self.output!r} names no activation")

    def result(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], main: Any) -> Any:
        """What takes the block's place gives: `with_main`; and caches are kept in step."""
        for filled in self.fills:
            filled.pass_over(args, kwargs, main)
        return self.with_main(args, kwargs, main)

    def with_main(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], main: Any) -> Any:
        """The block's output with `main` for the main activation and the other inputs handed through."""
        return _build(self.output, args, kwargs, self.main, main)


def read_slot(slot: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The value of an input slot in a call."""
    first, *rest = slot.split(".")
    value = args[int(first)] if first.isdigit() else kwargs[first]
    for key in rest:
        value = value[int(key)] if key.isdigit() else value[key]
    return value


def _any_computed(template: object) -> bool:
    if isinstance(template, Mapping):
        if "computed" in template:
            return True
        if "unread" in template:
            return False
        (inner,) = template.values()
        parts = inner.values() if isinstance(inner, Mapping) else inner
        return not isinstance(parts, str) and any(_any_computed(part) for part in parts)
    return False


def _places(template: object, slot: str) -> Iterator[tuple[Any, ...]]:
    """Where a template names the slot: the keys that lead there."""
    if not isinstance(template, Mapping):
        return
    if template.get("input") == slot:
        yield ()
    for kind in ("tuple", "list", "dict"):
        if kind in template:
            parts = template[kind]
            for key, part in parts.items() if kind == "dict" else enumerate(parts):
                yield from ((key, *rest) for rest in _places(part, slot))


def _build(template: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], slot: str, main: Any) -> Any:
    if not isinstance(template, Mapping):
        return template
    if "unread" in template:
        return None
    if "input" in template:
        return main if template["input"] == slot else read_slot(template["input"], args, kwargs)
    if "tuple" in template:
        return tuple(_build(part, args, kwargs, slot, main) for part in template["tuple"])
    if "list" in template:
        return [_build(part, args, kwargs, slot, main) for part in template["list"]]
    if "dict" in template:
        return {key: _build(part, args, kwargs, slot, main) for key, part in template["dict"].items()}
    raise PlanError(f"the plan's output template has {template!r}, which no operator can give")
