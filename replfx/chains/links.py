"""Links: which candidate comes after which, along the way of the data.

A candidate's *sources* are the nearest candidates of its family that its inputs descend from: directly, or
through what lies between them (a downsampling layer, a block of another family, a sum with a skip
connection). Longest paths over these links are the chains, and where ways part, likeness decides.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeAlias

from torch import fx

from replfx.chains.candidates import Candidate
from replfx.chains.slots import Joined, input_slots, output_slots, same_value

if TYPE_CHECKING:
    import networkx as nx

__all__ = ["Path", "paths_of"]

Path: TypeAlias = tuple[list[int], list[Joined]]  # indices of candidates, and what joins each to the next

_Origin: TypeAlias = tuple[int, str, bool]  # a candidate, its output slot, and whether nothing lies between
_NEAREST = 4  # origins that a value remembers of each family: its residual stream alone has one a block


def paths_of(
    candidates: Sequence[Candidate],
    nodes: Sequence[fx.Node],
    families: Sequence[Hashable],
    likeness: Callable[[int, int], float],
) -> Iterator[Path]:
    """Disjoint longest paths through candidates of one family, each of two candidates at least.

    Candidates are in the order in which they begin; `likeness` of two of them is from 0 (no link) to 1.
    """
    import networkx as nx  # a fifth of a second, which `import replfx` does without

    networks: dict[Hashable, nx.DiGraph[int]] = defaultdict(nx.DiGraph)
    for target, links in enumerate(_links(candidates, nodes, families)):
        for source, (joined, direct) in links.items():
            alike = likeness(source, target)
            if alike > 0:
                # Two links between unlike blocks don't outweigh one between like ones: attention goes with
                # attention, not with the MLP between.
                weight = 2.0 * alike + 0.25 * direct if alike == 1 else 0.8 * alike + 0.1 * direct
                networks[families[target]].add_edge(source, target, joined=joined, weight=weight)
    for network in networks.values():
        for path in _longest_paths(network):
            yield path, [network.edges[edge]["joined"] for edge in nx.utils.pairwise(path)]


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
    """The candidates of each family that every node's value descends from."""

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


def _longest_paths(network: "nx.DiGraph[int]") -> Iterator[list[int]]:
    """Disjoint heaviest paths, heaviest first, of each connected part."""
    import networkx as nx

    for part in nx.weakly_connected_components(network):
        rest = network.subgraph(sorted(part)).copy()
        while len(rest) > 1:
            path = nx.dag_longest_path(rest, weight="weight")
            if len(path) < 2:
                break
            yield path
            rest.remove_nodes_from(path)
