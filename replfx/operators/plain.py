"""Plain modules for what is left of a replaced block once its weights are materialized."""

from torch import fx, nn

from replfx.fusion.interface import Interface, read_slot
from replfx.fusion.templates import leaves

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
    args = tuple(fx.Proxy(graph.placeholder(f"arg_{position}")) for position in range(positions))
    graph.placeholder("*args")
    needed, given = (sorted(n for n in names if not n.isdigit() and (n in caches) is late) for late in (False, True))
    kwargs = {name: fx.Proxy(graph.placeholder(name)) for name in needed}
    kwargs.update({name: fx.Proxy(graph.placeholder(name, default_value=None)) for name in given})
    graph.placeholder("**kwargs")
    main = interface.activation(args, kwargs)
    result = fx.Proxy(graph.call_module("body", (main.node,)))
    for filled in interface.fills:
        filled.emit(graph, read_slot(filled.slot, args, kwargs).node, result.node)
    graph.output(result.tracer.create_arg(interface.with_main(args, kwargs, result)))
    nothing = {"nothing": slice} if interface.fills else {}  # takes three arguments and does nothing with them
    return fx.GraphModule({"body": body, **nothing}, graph, "Plain")
