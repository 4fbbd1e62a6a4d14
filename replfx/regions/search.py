"""find_regions: chains of like pieces of a graph that are no modules of their own.

Every node has a token (`replfx.regions.tokens`) that says what it does but not to what, and `get_attr` nodes
have none. Where the tokens repeat (`replfx.regions.repeats`), layers may: of the places where a layer could begin
those are taken that one value alone crosses, the layers are held against one of them argument by argument, and
what may not be replaced is taken out. All of it is near-linear in the size of the graph.
"""

from torch import fx

from replfx.regions.flat_graph import FlatGraph
from replfx.regions.pieces import SHORTEST, Layers, alike, layers_in
from replfx.regions.region import Piece, Region, Regions
from replfx.regions.repeats import Repeat, runs

__all__ = ["find_regions"]

MULTIPLES = 3  # how many times the tokens' period the layers' may be, where the arguments alternate


def find_regions(graph_module: fx.GraphModule) -> Regions:
    """Find maximal chains of like regions in a captured graph, or in any other; changes nothing.

    Args:
        graph_module: a graph by `replfx.capture`, by `torch.fx.symbolic_trace`, or made by hand.

    Returns:
        Chains of three regions and more that share no node, that with the most parameters first. The regions of a chain
        agree in what is computed and in the number of dimensions of their parameters, not in sizes. A region reads
        a parameter of two dimensions or more; its parameters are trainable and read by it alone; nothing but
        its output is read outside of it.
    """
    stream = FlatGraph(graph_module)
    found = [layers for run in runs(stream.tokens) if (layers := _layers(stream, run)) is not None]
    chains = _without_overlaps(stream, [(chain, layers.period) for layers in found for chain in layers.chains])
    taken = {path for chain in chains for piece in chain for path in piece.parameters.values()}
    refused = {path: why for layers in found for path, why in layers.refused.items() if path not in taken}
    return Regions([tuple(_region_of(stream, piece) for piece in chain) for chain in chains], refused)


def _layers(stream: FlatGraph, run: Repeat) -> Layers | None:
    """The layers of a run; None if it reads no parameter of two dimensions or more."""
    if stream.matrices[run.start] == stream.matrices[run.start + run.period]:
        return None
    first: Layers | None = None
    for multiple in range(1, MULTIPLES + 1):
        if run.length < SHORTEST * multiple * run.period:
            break
        found = layers_in(stream, run.start, run.stop, multiple * run.period)
        if found.chains:
            return found
        first = first or found
    return first


def _region_of(stream: FlatGraph, piece: Piece) -> Region:
    """A piece of a stream as a region of its graph."""
    nodes = stream.nodes[piece.start : piece.stop]
    own = {*piece.parameters.values(), *piece.buffers.values()}
    read = {argument for arguments in stream.arguments[piece.start : piece.stop] for argument in arguments}
    reading = [node for node in read if node.op == "get_attr" and str(node.target) in own]
    return Region(
        nodes=tuple(sorted((*nodes, *reading), key=stream.order.__getitem__)),
        input=piece.input,
        output=piece.output,
        extras=piece.extras,
        parameters=piece.parameters,
        buffers=piece.buffers,
        modules=piece.modules,
    )


# ---- chains that overlap


def _without_overlaps(stream: FlatGraph, chains: list[tuple[list[Piece], int]]) -> list[list[Piece]]:
    """Chains that share no node: those with most parameters first, of equal ones that of the smaller pieces.

    Two neighbouring parts of a model often look alike for a piece or two. So first every chain takes only the
    pieces whose parameters have the names that most of its pieces have, and then what is left over.
    """
    ranked = sorted(chains, key=lambda chain: (-_size(stream, chain[0]), chain[1], chain[0][0].start))
    taken = bytearray(len(stream.nodes))
    kept: list[tuple[list[Piece], int, int]] = []  # all pieces of a chain, and which of them are in
    for chain, _ in ranked:
        wanted = alike(chain)
        wanted = wanted if _stretches(wanted) else [True] * len(chain)
        free = [want and not _is_taken(taken, piece) for want, piece in zip(wanted, chain, strict=True)]
        for first, last in _stretches(free):
            kept.append((chain, first, last))
            _take(taken, chain[first:last])
    result = []
    for chain, first, last in kept:
        while first and not _is_taken(taken, chain[first - 1]):
            first -= 1
            _take(taken, chain[first : first + 1])
        while last < len(chain) and not _is_taken(taken, chain[last]):
            _take(taken, chain[last : last + 1])
            last += 1
        result.append(chain[first:last])
    return sorted(result, key=lambda chain: (-_size(stream, chain), chain[0].start))


def _stretches(wanted: list[bool]) -> list[tuple[int, int]]:
    """The longest stretches `[first, last)` of three wanted ones and more."""
    found, first = [], 0
    for index, want in enumerate((*wanted, False)):
        if not want:
            if index - first >= SHORTEST:
                found.append((first, index))
            first = index + 1
    return found


def _size(stream: FlatGraph, chain: list[Piece]) -> int:
    paths = (path for piece in chain for path in piece.parameters.values())
    return sum(stream.root.get_parameter(path).numel() for path in paths)


def _is_taken(taken: bytearray, piece: Piece) -> bool:
    """Whether another piece has one of its nodes; `taken` has a byte for each node of the stream."""
    return taken.find(1, piece.start, piece.stop) >= 0


def _take(taken: bytearray, pieces: list[Piece]) -> None:
    """Note that these pieces have their nodes."""
    for piece in pieces:
        taken[piece.start : piece.stop] = b"\1" * (piece.stop - piece.start)
