"""Regions: pieces of a graph that are like blocks but are no modules; as modules of their own, and replaced."""

import operator
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor, fx, nn

from replfx.modules.structure import attribute_at, pass_for_like
from replfx.tracing import CaptureInfo

__all__ = ["Piece", "Region", "Regions", "put_value", "region_module", "replace_regions", "root_of"]


@dataclass(frozen=True, eq=False)
class Region:
    """A piece of a graph with one main activation in and one out.

    Attributes:
        nodes: in the graph's order, without gaps but for `get_attr` nodes of others; its own are among them.
        input: the main activation that comes in: the output of the region before, or what feeds the first.
        output: the node of the region that gives its result; the only one that the rest of the graph reads.
        extras: what else it reads from outside, such as a mask; in the same order in all regions of a chain.
        parameters: canonical name → path in the root, of the parameters that it alone reads: "p0", "p1", … in the
            order in which they are read, "m0.weight" for one of a called module. The names are the same in every
            region of a chain.
        buffers: the same for the buffers that it alone reads through `get_attr`: "b0", ….
        modules: the same for the leaf modules that it calls, one name a call: "m0", ….
        module: the module whose every node it is, if there is one and the tracer noted it.
        aside: what else it gives, to the graph's caller alone: the keys and values that it puts into a cache.
    """

    nodes: tuple[fx.Node, ...]
    input: fx.Node
    output: fx.Node
    extras: tuple[fx.Node, ...]
    parameters: dict[str, str]
    buffers: dict[str, str] = field(default_factory=dict)
    modules: dict[str, str] = field(default_factory=dict)
    module: str | None = None
    aside: tuple[fx.Node, ...] = ()

    @property
    def name(self) -> str:
        """The path of its module, or of the first parameter that it reads."""
        return self.module or next(iter(self.parameters.values()))


@dataclass(frozen=True, eq=False)
class Piece:
    """The nodes `[start, stop)` of a stream that may be a region, with what they read and give as a `Region` has it."""

    start: int
    stop: int
    input: fx.Node
    output: fx.Node
    extras: tuple[fx.Node, ...]
    parameters: dict[str, str]
    buffers: dict[str, str]
    modules: dict[str, str]


@dataclass(frozen=True, eq=False)
class Regions:
    """What `find_regions` found.

    Attributes:
        chains: of three regions and more of one kind, each of which takes the output of the one before as its main
            activation; the chain with the most parameters first; no two share a node.
        refused: pieces that repeat but are in no chain, with the reason; the key is the path of the first
            parameter that the piece reads.
    """

    chains: list[tuple[Region, ...]]
    refused: dict[str, str] = field(default_factory=dict)


def root_of(graph_module: fx.GraphModule) -> nn.Module:
    """What the targets of a captured graph refer to; of any other graph, the GraphModule itself."""
    info = graph_module.meta.get("replfx")
    return info.root if isinstance(info, CaptureInfo) else graph_module


# ---- a region as a module


def region_module(region: Region, root: nn.Module, like: nn.Module | None = None) -> fx.GraphModule:
    """Make a module that computes what the region does: `module(activation, *extras)` gives its output.

    If the region gives something aside, the module gives a tuple, the output first.

    Its parameters, buffers and called modules are the very objects of `root`, under their canonical names, so
    that the parameters of all regions of a chain have the same names. It is in training mode if `root` is.

    Args:
        region: as `find_regions` gave it; the graph must not have been rewritten since.
        root: what the region's paths refer to (`root_of` of its graph).
        like: the module that it was, or its placeholder, whose names for them its parameters have; it passes for it.

    Raises:
        AttributeError: `root` lacks something that the region reads.
    """
    holder = nn.Module()
    holder.training = root.training
    for name, path in {**region.modules, **region.buffers, **region.parameters}.items() if like is None else ():
        if "." not in name:  # else it came with its module
            put_value(holder, name, attribute_at(root, path))
    graph = fx.Graph()
    names = {path: name for name, path in (*region.buffers.items(), *region.parameters.items())}
    calls = iter(region.modules)
    activation = graph.placeholder("activation")
    made = {node: graph.placeholder(f"extra_{index}") for index, node in enumerate(region.extras)}
    made[region.input] = activation  # also where an extra is the same node, as in `x = layer(x, x0)` the first time
    for node in region.nodes:
        made[node] = graph.node_copy(node, made.__getitem__)
        if node.op == "get_attr":
            made[node].target = names[str(node.target)]
        elif node.op == "call_module":
            made[node].target = next(calls)
    graph.output((made[region.output], *(made[node] for node in region.aside)) if region.aside else made[region.output])
    if like is None:
        return fx.GraphModule(holder, graph, "Region")
    module = fx.GraphModule(like, graph, "Region").train(root.training)
    pass_for_like(module, like)
    return module


def put_value(holder: nn.Module, name: str, value: object) -> None:
    """Register a module, a parameter or a buffer, or set what is none of them."""
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        holder.register_buffer(name, value)
    else:
        setattr(holder, name, value)


# ---- regions replaced


def replace_regions(graph_module: fx.GraphModule, replacements: Iterable[tuple[Region, str, nn.Module]]) -> None:
    """Let one call of a module take the place of each region's nodes, in place.

    The module is called with `(activation, *extras)`. Afterwards the nodes of these regions are gone, and the
    `input` of a region that follows one of them no longer is a node of the graph: replace all at once.

    Args:
        graph_module: the graph that the regions were found in.
        replacements: region, path of the new module in `graph_module`, and the module.

    Raises:
        ValueError: the path is taken by something that is not a module.
    """
    graph = graph_module.graph
    renamed: dict[fx.Node, fx.Node] = {}
    for region, path, module in replacements:
        _add_submodule(graph_module, path, module)
        with graph.inserting_after(region.nodes[-1]):
            made = graph.call_module(path, tuple(renamed.get(node, node) for node in (region.input, *region.extras)))
        given = _given(region, made)
        for node, value in given.items():
            value.meta.update(node.meta)
            node.replace_all_uses_with(value)  # in the region too, whose nodes go now
        renamed[region.output] = given[region.output]
        for node in reversed(region.nodes):
            graph.erase_node(node)
    graph_module.recompile()


def _given(region: Region, made: fx.Node) -> dict[fx.Node, fx.Node]:
    """For each value that a region gives, the one that a call in its place gives."""
    if not region.aside:
        return {region.output: made}
    with made.graph.inserting_before(made.next):
        return {
            node: made.graph.call_function(operator.getitem, (made, index))
            for index, node in enumerate((region.output, *region.aside))
        }


def _add_submodule(graph_module: fx.GraphModule, path: str, module: nn.Module) -> None:
    try:
        added = graph_module.add_submodule(path, module)
    except KeyError:
        added = False
    if not added:
        raise ValueError(f"`{path}` is taken by something that is not a module; choose another path")
