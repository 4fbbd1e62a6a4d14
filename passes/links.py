"""Links: which candidate comes after which, along the way of the data.

A candidate's *sources* are the nearest candidates of its family that its inputs descend from: directly, or
through what lies between them (a downsampling layer, a block of another family, a sum with a skip
connection). Longest paths over these links are the chains, and where ways part, likeness decides.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from itertools import pairwise
from typing import TypeAlias

from torch import fx

from replfx.passes.candidates import Candidate
from replfx.passes.slots import Joined, input_slots, output_slots, same_value

__all__ = ["Path", "paths_of"]

Path: TypeAlias = tuple[list[int], list[Joined]]  # indices of candidates, and what joins each to the next

_Origin: TypeAlias = tuple[int, str, bool]  # a candidate, its output slot, and whether nothing lies between
_Network: TypeAlias = dict[int, dict[int, float]]  # target → source, which comes before it, → weight of their link
_NEAREST = 4  # origins that a value remembers of each family: its residual stream alone has one a block


def paths_of(
    candidates: Sequence[Candidate],
    nodes: Sequence[fx.Node],
    families: Sequence[Hashable],
    likeness: Callable[[int, int], float],
) -> Iterator[Path]:
    """Disjoint longest paths through candidates of one family, each of two candidates at least.

    Args:
        candidates: in the order in which they begin.
        nodes: the graph's nodes in the order in which they run.
        families: the family of each candidate.
        likeness: how alike two candidates are, from 0 (no link) to 1.
    """
    networks: dict[Hashable, _Network] = defaultdict(dict)
    joints: dict[tuple[int, int], Joined] = {}
    for target, links in enumerate(_links(candidates, nodes, families)):
        for source, (joined, direct) in links.items():
            alike = likeness(source, target)
            if alike > 0:
                # Two links between unlike blocks don't outweigh one between like ones: attention goes with
                # attention, not with the MLP between.
                weight = 2.0 * alike + 0.25 * direct if alike == 1 else 0.8 * alike + 0.1 * direct
                networks[families[target]].setdefault(target, {})[source] = weight
                joints[source, target] = joined
    for network in networks.values():
        for path in _heaviest_paths(network):
            yield path, [joints[edge] for edge in pairwise(path)]


def _links(
    candidates: Sequence[Candidate], nodes: Sequence[fx.Node], families: Sequence[Hashable]
) -> list[dict[int, tuple[Joined, bool]]]:
    """For each candidate its sources, with what joins them and whether they are joined directly."""
    origins = _Origins(candidates, families)
    origins.spread(nodes)
    found = []
    for index, candidate in enumerate(candidates):
        slots: dict[int, list[tuple[str, str]]] = defaultdict(list)
        direct: dict[int, bool] = defaultdict(bool)
        for slot, node in input_slots(candidate.call).items():
            for source, out, near in origins.of(node, families[index]):
                if candidates[source].call.stop <= candidate.call.start:
                    slots[source].append((out, slot))
                    direct[source] |= near
        found.append({source: (tuple(joined), direct[source]) for source, joined in slots.items()})
    return found


class _Origins:
    """From which candidates of each family every node's value descends."""

    def __init__(self, candidates: Sequence[Candidate], families: Sequence[Hashable]) -> None:
        self._given: dict[fx.Node, dict[Hashable, _Origin]] = defaultdict(dict)
        for index, candidate in enumerate(candidates):
            handed = set(map(same_value, input_slots(candidate.call).values()))
            for slot, node in output_slots(candidate.call).items():
                if same_value(node) not in handed:  # a mask that a block hands through comes from none
                    self._given[node][families[index]] = (index, slot, True)
        self._of: dict[fx.Node, dict[Hashable, tuple[_Origin, ...]]] = {}

    def of(self, node: fx.Node, family: Hashable) -> tuple[_Origin, ...]:
        """The nearest candidates of a family that a node descends from, the latest last."""
        return self._of.get(node, {}).get(family, ())

    def spread(self, nodes: Sequence[fx.Node]) -> None:
        """Go through the graph once; a candidate's output descends from it alone."""
        for node in nodes:
            gathered: dict[Hashable, set[tuple[int, str]]] = {}
            for source in node.all_input_nodes:
                for family, origins in self._of.get(source, {}).items():
                    gathered.setdefault(family, set()).update(origin[:2] for origin in origins)
            merged = {f: tuple((*o, False) for o in sorted(found)[-_NEAREST:]) for f, found in gathered.items()}
            for family, origin in self._given.get(node, {}).items():
                merged[family] = (origin,)
            if merged:
                self._of[node] = merged


def _heaviest_paths(network: _Network) -> Iterator[list[int]]:
    """Disjoint heaviest paths of two or more, heaviest first in each connected part."""
    for part in _parts(network):
        while len(part) > 1 and (path := _heaviest(part, network)):
            yield path
            part = [node for node in part if node not in path]


def _parts(network: _Network) -> Iterator[list[int]]:
    """The connected parts, whichever way the links point, each in rising order."""
    beside: dict[int, set[int]] = defaultdict(set)
    for target, sources in network.items():
        for source in sources:
            beside[source].add(target)
            beside[target].add(source)
    while beside:
        part, ahead = set(), {min(beside)}
        while ahead:
            node = ahead.pop()
            part.add(node)
            ahead |= beside.pop(node) - part
        yield sorted(part)


def _heaviest(part: Sequence[int], network: _Network) -> list[int]:
    """The heaviest path through some of the nodes, in rising order; empty if no two are linked."""
    best: dict[int, tuple[float, int]] = {}  # the heaviest way to a node, and the node before it there
    for node in part:
        ways = [(best[source][0] + w, source) for source, w in network.get(node, {}).items() if source in best]
        best[node] = max(ways, key=lambda way: way[0], default=(0.0, node))
    path = [max(best, key=lambda node: best[node][0])]
    while (before := best[path[-1]][1]) != path[-1]:
        path.append(before)
    return path[::-1] if len(path) > 1 else []
