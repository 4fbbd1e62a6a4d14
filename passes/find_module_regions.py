"""find_module_regions: chains of like modules in a graph that has no modules any more, but says what ran in which.

That is Dynamo's graph. Modules are alike here if they are of one class and read parameters of the same names and
shapes; what they compute may differ, as a drop-path that the first of them has not, since each keeps its own.
"""

from collections import defaultdict
from collections.abc import Hashable, Iterator, Set
from dataclasses import dataclass

from torch import Tensor, fx, nn

from replfx.passes.find_regions import is_taken, region_of, take
from replfx.passes.layers import SHORTEST, Piece, reads_back, unfit
from replfx.passes.regions import RegionChain, Regions
from replfx.passes.stream import Place, Stream

__all__ = ["find_module_regions"]


@dataclass(frozen=True, eq=False)
class _Member:
    """A module that may be a block."""

    path: str
    piece: Piece
    kind: type[nn.Module]
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    size: int

    @property
    def is_container(self) -> bool:
        """Whether it only holds others."""
        return issubclass(self.kind, nn.Sequential | nn.ModuleList | nn.ModuleDict)

    @property
    def is_layer(self) -> bool:
        """Whether it is a single layer of PyTorch's."""
        return self.kind.__module__.startswith("torch.nn")


def find_module_regions(graph_module: fx.GraphModule) -> Regions:
    """Find maximal chains of like modules in a graph by Dynamo; changes nothing.

    Args:
        graph_module: with parameters as attributes, and `nn_module_stack` in the nodes' meta.

    Returns:
        Chains of three modules and more; where they nest, the outer ones, unless these are mere containers.
    """
    stream, refused = Stream(graph_module, same_shapes=True), dict[str, str]()
    siblings: dict[tuple[str, Hashable], list[_Member]] = defaultdict(list)
    given: dict[str, set[fx.Node]] = defaultdict(set)  # by container: what its modules gave so far
    for path, place in sorted(stream.places.items(), key=lambda item: item[1].start):
        parent = path.rpartition(".")[0]
        member = _member(stream, path, place, given[parent])
        if isinstance(member, str):
            refused[path] = member
        elif member is not None:
            given[parent].add(member.piece.output)
            siblings[parent, (member.kind, member.shapes)].append(member)
    stretches = [chain for members in siblings.values() for chain in _chains(stream, members, refused)]
    for member in (member for chain in stretches if len(chain) < SHORTEST for member in chain):
        if not member.is_layer:
            refused[member.path] = f"no three {member.kind.__name__} of its shapes in a row"
    found = [chain for chain in stretches if len(chain) >= SHORTEST]
    found.sort(key=lambda chain: (chain[0].is_container, -sum(member.size for member in chain)))
    taken, chains = bytearray(len(stream.nodes)), []
    for chain in found:
        if not any(is_taken(taken, member.piece) for member in chain):
            take(taken, [member.piece for member in chain])
            chains.append(RegionChain(tuple(region_of(stream, member.piece, member.path) for member in chain)))
    return Regions(chains, refused)


def _chains(stream: Stream, members: list[_Member], refused: dict[str, str]) -> Iterator[list[_Member]]:
    """Stretches of siblings each of which takes the output of the one before."""
    chain: list[_Member] = []
    for member in members:
        reason = unfit(stream, member.piece)
        back = reads_back(stream, [each.piece for each in chain], member.piece) if chain else None
        if reason or back:
            refused[member.path] = reason or str(back)
        if chain and (reason or back or member.piece.input is not chain[-1].piece.output):
            yield chain
            chain = []
        if reason is None:
            chain.append(member)
    yield chain


def _member(stream: Stream, path: str, place: Place, given: Set[fx.Node]) -> _Member | str | None:
    """The module as a piece with one activation in and one out, or why it is none; None if it has no matrix."""
    span = slice(place.start, place.stop)
    outputs = [n for n in stream.nodes[span] if stream.last[stream.position[n]] >= place.stop]
    read = list(dict.fromkeys(node for arguments in stream.arguments[span] for node in arguments))
    values = {node: stream.values[node] for node in read if node.op == "get_attr"}
    parameters = {node: value for node, value in values.items() if isinstance(value, nn.Parameter)}
    tensors = {node: value for node, value in values.items() if isinstance(value, Tensor) and node not in parameters}
    buffers = [node for node, value in tensors.items() if stream.reads_only_in(value, place.start, place.stop)]
    outside = [n for n in read if n not in values and stream.position[n] < place.start]
    if all(value.dim() < 2 for value in parameters.values()) or not outside:
        return None
    if len(outputs) != 1:
        return f"{len(outputs)} of its results are used outside of it, and not one"
    if any(node.op == "call_module" for node in stream.nodes[span]):
        return "it calls a module that Dynamo did not look into"
    # What a module of its container gave last is what it goes on with, and all else is an extra.
    source = max(outside, key=lambda node: (node in given, stream.position[node]))
    extras = [n for n in (*outside, *values) if n is not source and n not in parameters and n not in buffers]
    names = _names(path, list(parameters))
    piece = Piece(
        place.start,
        place.stop,
        input=source,
        output=outputs[0],
        extras=tuple(extras),
        parameters={name: str(node.target) for name, node in names.items()},
        buffers={name: str(node.target) for name, node in _names(path, buffers).items()},
        modules={},
    )
    shapes = tuple((name, tuple(parameters[node].shape)) for name, node in names.items())
    return _Member(path, piece, place.kind, shapes, sum(value.numel() for value in parameters.values()))


def _names(path: str, nodes: list[fx.Node]) -> dict[str, fx.Node]:
    """Names without dots for what a module reads: those that they have in it, and the same in each of its like."""
    found: dict[str, fx.Node] = {}
    for node in sorted(nodes, key=lambda node: str(node.target)):
        name = str(node.target).removeprefix(f"{path}.").replace(".", "_")
        while name in found:
            name += "_"
        found[name] = node
    return found
