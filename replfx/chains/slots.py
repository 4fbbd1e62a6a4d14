"""Slots: which node sits where among the inputs and the outputs of a module call."""

from collections.abc import Collection, Iterator, Mapping
from typing import TypeAlias

from torch import fx

from replfx.fusion.interface import Interface
from replfx.fusion.templates import leaves, name_of_class
from replfx.modules.tree import inner_path, parts_of
from replfx.tracing import ModuleCall, name_of
from replfx.tracing.info import OfClass

__all__ = ["Joined", "input_slots", "interface_of", "other_streams", "output_slots", "same_value"]

Joined: TypeAlias = tuple[tuple[str, str], ...]  # (output slot, input slot of the next block), …


def input_slots(call: ModuleCall) -> dict[str, fx.Node]:
    """The nodes that come into a call, by slot."""
    return dict([*_slots(call.args), *_slots(call.kwargs)])


def output_slots(call: ModuleCall) -> dict[str, fx.Node]:
    """The nodes that a call gives, by slot; the whole output is the empty slot."""
    slots = dict(_slots(call.output, named=True))
    nested = slots[""].meta.get("shape") if "" in slots else None
    if nested and isinstance(nested[0], tuple):  # one node that gives several tensors
        for user in slots[""].users:
            if name_of(user) == "getitem" and isinstance(user.args[1], int):
                slots[str(user.args[1])] = user
    return slots


def same_value(node: fx.Node) -> fx.Node:
    """The node whose very value it gives, at most in another layout."""
    while node.op == "call_method" and node.target == "contiguous":
        node = node.all_input_nodes[0]
    return node


def _slots(value: object, at: str = "", *, named: bool = False) -> Iterator[tuple[str, fx.Node]]:
    """The nodes in a value; those in named tuples by index, or by name as templates have them."""
    kind, held = _of_class(value)
    if named and kind is not None:
        value = held
    if isinstance(value, fx.Node):
        yield at, value
    elif isinstance(value, tuple | list | dict):
        for key, item in parts_of(value):
            if not isinstance(value, dict) or (isinstance(key, str) and key.isidentifier()):
                yield from _slots(item, inner_path(at, str(key)), named=named)


def interface_of(call: ModuleCall, nodes: Collection[fx.Node], entered: Joined, left: Joined) -> Interface:
    """How a call of a chain is made.

    Args:
        call: the call.
        nodes: those that were recorded in it.
        entered: pairs of the previous block's output slots and the input slots that they fill; the first is
            that of the main activation.
        left: pairs of its own output slots and the next block's input slots. One goes with the input slot of
            the same name, or else with the main one.
    """
    inputs, outputs = input_slots(call), output_slots(call)
    filled = list(dict.fromkeys(slot for _, slot in entered if slot in inputs)) or list(inputs)[:1]
    # A value that it only hands on, as a bias that the first block makes, is no activation.
    changed = {slot for _, slot in left}
    slots = (filled[0], *(slot for slot in filled[1:] if slot in changed))
    carried = {outputs[out]: slot if slot in slots else slots[0] for out, slot in reversed(left) if out in outputs}
    handed = {same_value(node): slot for slot, node in inputs.items()}
    inside = set(nodes)

    def template(value: object) -> object:
        if isinstance(value, fx.Node):
            slot = carried.get(value, handed.get(same_value(value)))
            if slot is not None:
                return {"input": slot}
            return {"computed" if any(user not in inside for user in value.users) else "unread": True}
        kind, held = _of_class(value)
        if kind is not None:
            name = name_of_class(kind, held)
            fields = {key: template(item) for key, item in held.items()}
            return {"computed": True} if name is None else {"object": {"class": name, "fields": fields}}
        if isinstance(value, tuple):
            return {"tuple": [template(item) for item in value]}
        if isinstance(value, list):
            return {"list": [template(item) for item in value]}
        if isinstance(value, dict) and all(isinstance(key, str) for key in value):
            return {"dict": {key: template(item) for key, item in value.items()}}
        return value if value is None or isinstance(value, bool | int | float | str) else {"computed": True}

    return Interface(slots, template(call.output))


def _of_class(value: object) -> tuple[type | None, Mapping[str, object]]:
    """The class of a dataclass or a named tuple, and what it holds by name."""
    if isinstance(value, OfClass):
        return value.kind, value
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return type(value), value._asdict()
    return None, {}


def other_streams(call: ModuleCall, interface: Interface) -> tuple[tuple[fx.Node, fx.Node], ...]:
    """The nodes before and after of each activation besides the main one that a call gives back changed."""
    inputs, outputs = input_slots(call), output_slots(call)
    found = [
        (inputs[slot], outputs.get(".".join(map(str, path)), inputs[slot]))
        for path, kind, slot in leaves(interface.output)
        if kind == "input" and slot != interface.main
    ]
    return tuple((before, after) for before, after in found if same_value(after) is not same_value(before))
