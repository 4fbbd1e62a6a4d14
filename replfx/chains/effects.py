"""effects: what a block puts into objects that it is given, beside what it gives back."""

from collections import defaultdict
from collections.abc import Mapping, Set
from typing import Any

from torch import fx

from replfx.fusion.caches import Filled
from replfx.modules.tree import is_cache
from replfx.tracing import ModuleCall, Place
from replfx.tracing.rebuild import Rebuild

__all__ = ["effects_of"]

_LAYERS = "layers"  # of a cache: what holds the keys and the values of one block each


def effects_of(call: ModuleCall, nodes: Set[fx.Node], activation: fx.Node) -> tuple[tuple[Filled, ...], bool]:
    """The caches that a call fills, and whether it has other effects too.

    Args:
        call: a block's.
        nodes: those recorded during the call.
        activation: the node of its main activation.

    Returns:
        The caches to which keys and values made of the activation are appended, that are as long as it; and whether
        the call puts anything else into an object, or others than who called the model read what it puts there.
    """
    parts: dict[Place, dict[object, fx.Node]] = defaultdict(dict)
    others = any(not _is_given_back(node, nodes) for node in call.filled.values())
    for place, node in call.filled.items():
        at = place.index(_LAYERS) + 2 if _LAYERS in place else 0
        if not at or len(place) != at + 1 or not is_cache(_class_at(call, place[0])):
            others = True
        elif node.meta.get("shape") != ():  # a counter, which the cache keeps itself
            parts[place[:at]][place[at]] = node
    fills = []
    for place, held in parts.items():
        if not any(_descends(node, activation, nodes) for node in held.values()):
            continue  # of an encoder's output, as in cross attention: it is as long as that, and nobody asks
        filled = _filled(place, held, activation)
        if filled is None:
            others = True
        else:
            fills.append(filled)
    return tuple(fills), others


def _filled(place: Place, held: Mapping[object, fx.Node], activation: fx.Node) -> Filled | None:
    """What is filled at a place, if it is keys and values of (batch, heads, tokens, width) for (batch, tokens, …)."""
    slot, at, layer = place[0], place[1:-2], place[-1]
    shape: Any = activation.meta.get("shape") or ()
    sizes: dict[object, Any] = {name: node.meta.get("shape", ()) for name, node in held.items()}
    if sizes.keys() != {"keys", "values"} or len(shape) != 3 or not isinstance(layer, int):
        return None
    if any(len(size) != 4 or size[0] != shape[0] for size in sizes.values()):
        return None
    keys, values = sizes["keys"], sizes["values"]
    return Filled(str(slot), tuple(map(str, at)), layer, (keys[1], keys[3]), (values[1], values[3]))


def _class_at(call: ModuleCall, name: object) -> object:
    """The class of an argument; the recorder has kept it in mind instead of the object."""
    given = call.args[name] if isinstance(name, int) else call.kwargs[str(name)]
    return given if isinstance(given, type) else type(given)


def _is_given_back(node: fx.Node, nodes: Set[fx.Node]) -> bool:
    """Whether outside of `nodes` nobody reads it but who called the model."""
    return all(user in nodes or _is_output(user) for user in node.users)


def _is_output(node: fx.Node) -> bool:
    return node.op == "output" or (isinstance(node.target, Rebuild) and all(map(_is_output, node.users)))


def _descends(node: fx.Node, source: fx.Node, nodes: Set[fx.Node]) -> bool:
    """Whether a value is made of another, within these nodes."""
    seen, pending = {node}, [node]
    while pending:
        for before in pending.pop().all_input_nodes:
            if before is source:
                return True
            if before in nodes and before not in seen:
                seen.add(before)
                pending.append(before)
    return False
