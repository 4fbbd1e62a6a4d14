"""batch_synthesis: many syntheses of one shape run as one operation."""

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from torch import fx

from replfx.dynamo.matching import SynthesisNode, syntheses_in, synthesis_at
from replfx.dynamo.nodes import epochs, is_pure, is_untouched, value_of
from replfx.passes import Rewrite

__all__ = ["BatchSynthesis"]


@dataclass(frozen=True)
class BatchSynthesis(Rewrite[list[SynthesisNode]]):
    """Rewrite syntheses of one shape, dtype and device into one call, over Dynamo's graph.

    The call comes where the first of them was; what the others read is moved up to there, if it may be.

    Attributes:
        operation: (θ_prev, θ_next, a, b), lists of tensors → the list of all θ.
        max_bytes: groups are cut so that their θ together take no more, because all of them live from the first
            one's use on. A larger one is a group of its own.
        least: groups of fewer stay as they were.
    """

    operation: Callable[..., Any]
    max_bytes: int
    least: int = 2

    def find(self, graph: fx.Graph) -> Iterator[list[SynthesisNode]]:
        """All groups."""
        found, stretch = syntheses_in(graph), epochs(graph)

        def kind(synthesis: SynthesisNode) -> str:  # of one stretch, so that no mode changes between them
            return repr((synthesis.kind, stretch[synthesis.node]))

        for _, alike in groupby(sorted(found, key=kind), key=kind):  # sorting keeps the order among equals
            yield from self._groups(list(alike), {s.node for s in found})

    def is_worth_it(self, candidate: list[SynthesisNode]) -> bool:
        """Whether there are `least` and more."""
        return len(candidate) >= self.least

    def rewrite(self, graph: fx.Graph, candidate: list[SynthesisNode]) -> None:
        """One call for all of a group."""
        group = [_as_it_is_now(synthesis) for synthesis in candidate]
        anchor = group[0].node
        for synthesis in group[1:]:
            for node in _needed(synthesis, anchor):
                anchor.prepend(node)
        with graph.inserting_before(anchor):
            lists = tuple(list(column) for column in zip(*(synthesis.inputs for synthesis in group), strict=True))
            made = graph.call_function(self.operation, lists)
            made.meta.update(anchor.meta, example_value=[value_of(synthesis.node) for synthesis in group])
            for index, synthesis in enumerate(group):
                theta = graph.call_function(operator.getitem, (made, index))
                synthesis.node.replace_all_uses_with(theta, propagate_meta=True)
        for synthesis in group:
            _erase(graph, synthesis.node)

    def _groups(self, alike: Sequence[SynthesisNode], all_of_them: set[fx.Node]) -> Iterator[list[SynthesisNode]]:
        """Consecutive ones that fit under the bound, and that can be moved up to the first."""
        group: list[SynthesisNode] = []
        for synthesis in map(_as_it_is_now, alike):
            if group:
                fits = sum(s.size for s in group) + synthesis.size <= self.max_bytes
                if fits and _can_move(synthesis, group[0].node, all_of_them):
                    group.append(synthesis)
                    continue
                yield group
            group = [synthesis]
        yield group


def _as_it_is_now(found: SynthesisNode) -> SynthesisNode:
    """What it reads may be the result of a group that was rewritten since it was found."""
    synthesis = synthesis_at(found.node)
    assert synthesis is not None
    return synthesis


def _needed(synthesis: SynthesisNode, anchor: fx.Node) -> list[fx.Node]:
    """What the synthesis reads, directly or not, and comes after `anchor`."""
    found: dict[fx.Node, None] = {}
    todo = list(synthesis.inputs)
    while todo:
        node = todo.pop()
        if node not in found and node.op != "placeholder" and anchor < node:
            found[node] = None
            todo += node.all_input_nodes
    return sorted(found)


def _can_move(synthesis: SynthesisNode, anchor: fx.Node, all_of_them: set[fx.Node]) -> bool:
    """Whether all that it reads can be before `anchor`: pure, unwritten, and no synthesis."""
    needed = _needed(synthesis, anchor)
    reads_it = anchor in synthesis.inputs or any(anchor in node.all_input_nodes for node in needed)
    return not reads_it and all(
        is_pure(node) and node not in all_of_them and all(map(is_untouched, (node, *node.all_input_nodes)))
        for node in needed
    )


def _erase(graph: fx.Graph, node: fx.Node) -> None:
    """Erase a node that nothing uses, and what only it used."""
    inputs = node.all_input_nodes
    graph.erase_node(node)
    for before in inputs:
        if not before.users and is_pure(before):
            _erase(graph, before)
