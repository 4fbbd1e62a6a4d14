"""Layers: a stretch of a graph that repeats, cut into pieces that have one main activation in and one out."""

import re
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import TypeAlias

from torch import Tensor, fx, nn

from replfx.regions.flat_graph import FlatGraph
from replfx.regions.obstacles import unfit_piece
from replfx.regions.region import Piece

__all__ = ["SHORTEST", "Layers", "alike", "layers_in"]

SHORTEST = 3  # blocks of a chain: a replaced one and a kept one on each side
PHASES = 8  # how many places where a layer could begin are tried

Slot: TypeAlias = tuple[str, int]  # ("inside", offset), or ("parameter" | "buffer" | "outside", which of them)


@dataclass(eq=False)
class Layers:
    """The layers of one run.

    Attributes:
        period: how many nodes each has.
        chains: pieces each of which takes the output of the one before; three and more.
        refused: pieces that may be in no chain, with the reason, by the path of their first parameter.
    """

    period: int
    chains: list[list[Piece]] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)


def layers_in(stream: FlatGraph, start: int, stop: int, period: int) -> Layers:
    """Cut the run `[start, stop)` into layers of `period` nodes.

    Where a layer begins is often open: of `linear relu linear relu …` every cut is right. The cut is taken that
    gives most layers; of those the one whose layers have parameters of like names, `fc1.0 fc2.0` before
    `fc2.0 fc1.1`, and of like shapes; then one that begins with a node that has parameters; then the first.
    """
    best, best_score = Layers(period), _NO_SCORE
    for phase in _phases(stream, start, stop, period):
        found = _cut(stream, phase, stop, period)
        score = _score(stream, found, phase)
        if score > best_score or (not best.chains and not best.refused):
            best, best_score = found, score
    return best


# ---- where a layer can begin


def _phases(stream: FlatGraph, start: int, stop: int, period: int) -> list[int]:
    """The first places in the run where a layer could begin, the most promising ones first."""
    crossing = _crossing(stream, start, stop, period)
    ranked = []
    for phase in range(start, min(start + period, stop - SHORTEST * period + 1)):
        ends = range(phase + period, stop + 1, period)
        sound = sum(crossing[end - start] == 1 and not stream.grad_off[end] for end in ends)
        if sound >= SHORTEST - 1 and not stream.grad_off[phase]:
            ranked.append((-sound, not stream.has_parameters[phase], phase))
    return [phase for _, _, phase in sorted(ranked)[:PHASES]]


def _crossing(stream: FlatGraph, start: int, stop: int, period: int) -> list[int]:
    """How many values of the run are read on both sides of each place in it; what is read far away does not count."""
    change = [0] * (stop - start + 2)
    for position in range(start, stop):
        near, reach = position + 2 * period, stream.last[position]
        if reach >= near:
            users = (stream.position[user] for user in stream.nodes[position].users)
            reach = max((user for user in users if user < near), default=position)
        change[position + 1 - start] += 1
        change[min(reach, stop) + 1 - start] -= 1
    return list(accumulate(change))


# ---- layers held against one of them


class _Template:
    """What the arguments of one piece are, for others to be held against.

    Args:
        stream: the graph.
        start: where the piece begins; another one must lie before it.
        period: its length.
    """

    def __init__(self, stream: FlatGraph, start: int, period: int) -> None:
        self.stream = stream
        self.period = period
        self.slots: list[Slot] = []
        self.input: Slot | None = None  # None: the piece takes no single value from the one before
        self.result = -1  # offset of the output
        numbers: dict[tuple[str, Hashable], int] = {}
        counts: Counter[str] = Counter()
        before: dict[Slot, int] = {}
        for kind, key, node in _read(stream, start, start + period):
            if kind == "inside":
                assert isinstance(key, int)
                self.slots.append((kind, key))
                continue
            if (kind, key) not in numbers:
                numbers[kind, key] = counts[kind]
                counts[kind] += 1
            self.slots.append((kind, numbers[kind, key]))
            if kind == "outside" and start - period <= stream.position.get(node, -1) < start:
                before[self.slots[-1]] = stream.position[node] - (start - period)
        if len(before) == 1:
            ((slot, offset),) = before.items()
            shape = stream.nodes[start - period + offset].meta.get("shape")
            if not (shape and isinstance(shape[0], tuple)):  # else the node gives several tensors
                self.input, self.result = slot, offset

    def fit(self, start: int) -> Piece | None:
        """The piece that begins at `start`, if its arguments are of the same kind throughout."""
        assert self.input is not None
        bound: dict[Slot, tuple[Hashable, fx.Node]] = {}
        stop = start + self.period
        for slot, (kind, key, node) in zip(self.slots, _read(self.stream, start, stop), strict=True):
            if slot[0] != kind or (kind == "inside" and slot[1] != key):
                return None
            if kind != "inside" and bound.setdefault(slot, (key, node))[0] != key:
                return None
        if self.stream.grad_off[start] or self.stream.grad_off[stop]:
            return None
        return self._piece(start, stop, {slot: node for slot, (_, node) in sorted(bound.items())})

    def _piece(self, start: int, stop: int, bound: dict[Slot, fx.Node]) -> Piece:
        assert self.input is not None
        nodes = self.stream.nodes[start:stop]
        calls = [node for node in nodes if node.op == "call_module"]
        modules = {f"m{index}": str(node.target) for index, node in enumerate(calls)}
        parameters = {f"p{index}": str(node.target) for (kind, index), node in bound.items() if kind == "parameter"}
        for name, node in zip(modules, calls, strict=True):
            for inner, _ in self.stream.module(node).named_parameters():
                parameters[f"{name}.{inner}"] = f"{node.target}.{inner}"
        return Piece(
            start,
            stop,
            input=bound[self.input],
            output=nodes[self.result],
            extras=tuple(n for slot, n in bound.items() if slot[0] == "outside" and slot != self.input),
            parameters=parameters,
            buffers={f"b{index}": str(node.target) for (kind, index), node in bound.items() if kind == "buffer"},
            modules=modules,
        )


def _read(stream: FlatGraph, start: int, stop: int) -> Iterator[tuple[str, Hashable, fx.Node]]:
    """Every argument of every node in `[start, stop)`: its kind, what it is, and its node."""
    for arguments in stream.arguments[start:stop]:
        for node in arguments:
            if node.op != "get_attr":
                position = stream.position[node]
                yield ("outside", node, node) if position < start else ("inside", position - start, node)
                continue
            value, kind = stream.values[node], "outside"
            if isinstance(value, nn.Parameter):
                kind = "parameter"
            elif isinstance(value, Tensor) and stream.reads_only_in(value, start, stop):
                kind = "buffer"  # one that all read is an extra
            yield kind, str(node.target), node


def _cut(stream: FlatGraph, phase: int, stop: int, period: int) -> Layers:
    """The layers of a run if the first begins at `phase`."""
    found = Layers(period)
    starts = range(phase, stop - period + 1, period)
    template = _Template(stream, starts[len(starts) // 2], period)  # the first ones may read the model's input twice
    if template.input is None:
        return found
    chain: list[Piece] = []
    for start in starts:
        piece = template.fit(start)
        reason = None if piece is None else unfit_piece(stream, piece)
        back = None if piece is None or reason is not None else _reads_back(stream, chain, piece)
        if piece is not None and piece.parameters and (reason or back):
            found.refused[next(iter(piece.parameters.values()))] = reason or str(back)
        if chain and (piece is None or reason or back or piece.input is not chain[-1].output):
            found.chains.append(chain)
            chain = []
        if piece is not None and reason is None:
            chain.append(piece)
    found.chains.append(chain)
    found.chains = [chain for chain in found.chains if len(chain) >= SHORTEST]
    return found


# ---- what a piece must be


def _reads_back(stream: FlatGraph, chain: list[Piece], piece: Piece) -> str | None:
    """Why a piece cannot follow a chain although it takes its output, or None: then a new chain begins with it."""
    for extra in piece.extras:
        if chain and stream.position.get(extra, -1) >= chain[0].start:
            return f"it reads `{extra.name}` of an earlier piece, besides the output of the one before"
    return None


# ---- which cut is best

_NO_SCORE: tuple[int, ...] = (0,)


def _score(stream: FlatGraph, found: Layers, phase: int) -> tuple[int, ...]:
    pieces = [piece for chain in found.chains for piece in chain]
    if not pieces:
        return _NO_SCORE
    like_shapes = sum(_shapes(stream, one) == _shapes(stream, two) for one, two in pairwise(pieces))
    of_one_number = sum(len({_number(path) for path in piece.parameters.values()}) == 1 for piece in pieces)
    names = alike(pieces)
    return len(pieces), sum(names) + of_one_number, like_shapes, stream.has_parameters[phase], -phase


def _shapes(stream: FlatGraph, piece: Piece) -> list[tuple[int, ...]]:
    return [tuple(stream.root.get_parameter(path).shape) for path in piece.parameters.values()]


def _number(path: str) -> str | None:
    """The first number in a path: in most models it says which layer it is."""
    found = re.search(r"\d+", path)
    return found and found[0]


def alike(pieces: Sequence[Piece]) -> list[bool]:
    """Which pieces have the names of parameters that most of them have, numbers aside."""
    patterns = [tuple(re.sub(r"\d+", "#", path) for path in piece.parameters.values()) for piece in pieces]
    common, _ = Counter(patterns).most_common(1)[0]
    return [pattern == common for pattern in patterns]
