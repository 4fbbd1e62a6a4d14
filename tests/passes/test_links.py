"""The search for heaviest paths, against networkx's."""

from itertools import pairwise

import networkx as nx
from hypothesis import given
from hypothesis import strategies as st

from replfx.passes.links import _heaviest_paths

Links = dict[int, dict[int, float]]


@st.composite
def networks(draw: st.DrawFn) -> Links:
    """Few weights, so that there are ties."""
    size = draw(st.integers(2, 9))
    edges = draw(st.sets(st.tuples(st.integers(0, size), st.integers(0, size)).filter(lambda edge: edge[0] < edge[1])))
    found: Links = {}
    for source, target in sorted(edges):
        found.setdefault(target, {})[source] = draw(st.sampled_from([0.25, 0.5, 2.0, 2.25]))
    return found


def weight_of(path: list[int], network: Links) -> float:
    return sum(network[target][source] for source, target in pairwise(path))


@given(networks())
def test_each_path_is_the_heaviest_of_what_its_part_has_left(network: Links) -> None:
    graph = nx.DiGraph()
    for target, sources in network.items():
        graph.add_weighted_edges_from((source, target, weight) for source, weight in sources.items())
    parts = [set(part) for part in nx.weakly_connected_components(graph)]
    for path in _heaviest_paths(network):
        part = next(part for part in parts if part >= set(path))
        longest = nx.dag_longest_path_length(graph.subgraph(part), weight="weight")
        assert len(path) > 1
        assert weight_of(path, network) == longest
        part -= set(path)
    assert all(graph.subgraph(part).number_of_edges() == 0 for part in parts)
