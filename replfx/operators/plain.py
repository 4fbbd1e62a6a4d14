"""Plain modules for what is left of a replaced block once its weights are materialized."""

import operator
from typing import Any

from torch import fx, nn

from replfx.fusion.interface import Interface
from replfx.fusion.templates import fill, leaves

__all__ = ["plain_module"]


def plain_module(body: nn.Module, interface: Interface) -> nn.Module:
    """Wrap `body`, a module from activation to activation, so that it is called as the block was.

    The wrapper is a `torch.fx.GraphModule`: it needs no replfx to run, to pickle or to be copied.
    """
    graph = fx.Graph()
    read = [slot for _, kind, slot in leaves(interface.output) if kind == "input"]
    caches = {filled.slot for filled in interface.fills}
    names = {slot.split(".")[0] for slot in (*interface.inputs, *read)} | caches
    positions = max([int(name) for name in names if name.isdigit()], default=-1) + 1
    args = [graph.placeholder(f"arg_{position}") for position in range(positions)]
    graph.placeholder("*args")
    needed, given = (sorted(n for n in names if not n.isdigit() and (n in caches) is late) for late in (False, True))
    kwargs = {name: graph.placeholder(name) for name in needed}
    kwargs.update({name: graph.placeholder(name, default_value=None) for name in given})
    graph.placeholder("**kwargs")
    main = _node_of_slot(graph, interface.main, args, kwargs)
    result = graph.call_module("body", (main,))
    for filled in interface.fills:
        filled.emit(graph, _node_of_slot(graph, filled.slot, args, kwargs), result)

    def give(kind: str, slot: Any) -> fx.Node | None:
        if kind == "unread":
            return None
        return result if slot == interface.main else _node_of_slot(graph, slot, args, kwargs)

    graph.output(fill(interface.output, give))
    nothing = {"nothing": slice} if interface.fills else {}  # takes three arguments and does nothing with them
    return fx.GraphModule({"body": body, **nothing}, graph, "Plain")


def _node_of_slot(graph: fx.Graph, slot: str, args: list[fx.Node], kwargs: dict[str, fx.Node]) -> fx.Node:
    first, *rest = slot.split(".")
    node = args[int(first)] if first.isdigit() else kwargs[first]
    for key in rest:
        node = graph.call_function(operator.getitem, (node, int(key) if key.isdigit() else key))
    return node
