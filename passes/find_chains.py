"""find_chains: the chains of like blocks in a captured graph, and why not where not."""

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

import networkx as nx
from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from replfx.fusion.interface import Interface
from replfx.passes.slots import input_slots, interface_of, output_slots
from replfx.passes.why_not import ancestors, why_not
from replfx.structure import Signature, signature, unfit_to_replace, unfit_to_share
from replfx.tracing import CaptureInfo, ModuleCall, info_of, nodes_in

__all__ = ["Chain", "Chains", "FindChains", "chains_of"]

Joined: TypeAlias = tuple[tuple[str, str], ...]  # (output slot, input slot of the next block), …

SHORTEST = 3  # a replaced block and a kept one on each side


@dataclass(frozen=True)
class Chain:
    """Blocks of one kind, each taking the one before's output.

    Attributes:
        calls: the call of each block.
        interfaces: how each is called.
        shape: shape of the main activation; None if no example inputs were given.
    """

    calls: tuple[ModuleCall, ...]
    interfaces: tuple[Interface, ...]
    shape: tuple[int, ...] | None

    @property
    def paths(self) -> list[str]:
        """The blocks' paths, in the order in which they run."""
        return [call.path for call in self.calls]


@dataclass(frozen=True)
class Chains:
    """The findings of the pass, kept at `graph_module.meta["replfx_chains"]`.

    Attributes:
        chains: all chains of three blocks and more, in the order in which they run.
        fixed: blocks of a chain that must stay, with the reason; their neighbours may still read them.
        refused: blocks that are in no chain, with the reason.
    """

    chains: list[Chain]
    fixed: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


def chains_of(graph_module: fx.GraphModule) -> Chains:
    """What `FindChains` found in this graph."""
    found = graph_module.meta["replfx_chains"]
    assert isinstance(found, Chains)
    return found


@dataclass(frozen=True)
class FindChains(PassBase):
    """Find maximal chains of blocks that have the same structure; changes nothing.

    Two blocks are of one kind when their parameter trees are alike (`replfx.structure.signature`) and their
    activations have the same shape. Where chains nest (stages of blocks), the level is taken that lets most
    parameters be replaced, the inner one if it is a tie.
    """

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Put `Chains` into the graph's meta."""
        graph_module.meta["replfx_chains"] = _Search(info_of(graph_module), graph_module.graph).run()
        return PassResult(graph_module, False)


class _Search:
    """The state of one search."""

    def __init__(self, info: CaptureInfo, graph: fx.Graph) -> None:
        self.info = info
        self.root = info.root
        self.modules = dict(self.root.named_modules(remove_duplicate=False))
        self.counts = Counter(call.path for call in info.calls)
        self.refused: dict[str, str] = {}
        self.flow: nx.DiGraph[fx.Node] = nx.DiGraph()
        self.flow.add_nodes_from(graph.nodes)
        self.flow.add_edges_from((source, node) for node in graph.nodes for source in node.all_input_nodes)
        self.signatures: dict[str, Signature] = {}

    def run(self) -> Chains:
        candidates = [call for call in self.info.calls if self._is_candidate(call)]
        chains = _outermost_worth_it(self._links_to_chains(candidates), self.modules)
        chains.sort(key=lambda chain: chain.calls[0].start)
        owners = _owners(self.root)
        in_chain = {path for chain in chains for path in chain.paths}
        fixed = {p: why for p in sorted(in_chain) if (why := unfit_to_replace(p, self.modules[p], owners))}
        reasons = why_not(self.modules, self.signature, self.counts, self.refused, in_chain)
        return Chains(chains, fixed, reasons)

    # ---- candidates

    def _is_candidate(self, call: ModuleCall) -> bool:
        """A block has parameters, runs once, and gives its result through its output alone."""
        module = self.modules.get(call.path)
        if module is None or not call.path or next(module.parameters(), None) is None:
            return False
        reason = self._unfit(call, module)
        if reason is not None:
            self.refused[call.path] = reason
        return reason is None

    def _unfit(self, call: ModuleCall, module: nn.Module) -> str | None:
        if self.counts[call.path] > 1:
            return f"it is called {self.counts[call.path]} times in one forward pass"
        return unfit_to_share(module) or self._leak(call)

    def _leak(self, call: ModuleCall) -> str | None:
        """Why the call's nodes are no region with its arguments as entry and its output as exit."""
        region = set(self.info.nodes[call.start : call.stop])
        outputs, arguments = set(nodes_in(call.output)), set(nodes_in((call.args, call.kwargs)))
        for inner, _ in nx.edge_boundary(self.flow, region):
            if inner not in outputs and inner.op != "get_attr" and not _is_flag(inner):
                return f"an intermediate result of it (`{inner.name}`) is used outside of it"
        for node in region:
            for outer in self.flow.predecessors(node):
                if outer not in region and outer not in arguments and outer.op != "get_attr" and not _is_flag(outer):
                    return f"it reads `{outer.name}`, which is not among its arguments"
        return None

    # ---- chains

    def _links_to_chains(self, candidates: list[ModuleCall]) -> Iterator[Chain]:
        """Longest paths among calls of one kind whose links join the same slots."""
        candidates = sorted(candidates, key=lambda call: (call.start, -call.stop))
        kinds: dict[Hashable, int] = {}
        kind_of = [kinds.setdefault(tuple(self.signature(c.path).items()), len(kinds)) for c in candidates]
        producers: dict[fx.Node, list[tuple[int, str]]] = defaultdict(list)
        for index, call in enumerate(candidates):
            given = set(input_slots(call).values())
            for slot, node in output_slots(call).items():
                if node not in given:  # a mask that a block hands through links it to none
                    producers[node].append((index, slot))
        networks: dict[tuple[int, Joined], nx.DiGraph[int]] = defaultdict(nx.DiGraph)
        for index, call in enumerate(candidates):
            links: dict[int, list[tuple[str, str]]] = defaultdict(list)
            for slot, node in input_slots(call).items():
                for source, out in producers.get(node, ()):
                    if kind_of[source] == kind_of[index] and candidates[source].stop <= call.start:
                        links[source].append((out, slot))
            for source, joined in links.items():
                networks[(kind_of[index], tuple(joined))].add_edge(source, index)
        for (_, joint), network in networks.items():
            for path in _longest_paths(network):
                yield from self._same_shape_runs(tuple(candidates[i] for i in path), joint)

    def _same_shape_runs(self, calls: tuple[ModuleCall, ...], joined: Joined) -> Iterator[Chain]:
        """Split a path where the shape of the activation changes, and build each part's interfaces."""
        run: list[ModuleCall] = []
        shape: tuple[int, ...] | None = None
        out, slot = joined[0]
        for call in (*calls, None):
            before = None if call is None else _shape(input_slots(call)[slot])
            after = None if call is None else _shape(output_slots(call)[out])
            if run and (call is None or before != shape or after != shape):
                yield Chain(tuple(run), tuple(interface_of(c, joined) for c in run), shape)
                run = []
            if call is not None and before == after:
                run.append(call)
                shape = before

    def signature(self, path: str) -> Signature:
        """The signature of the module at `path`, computed once."""
        if path not in self.signatures:
            self.signatures[path] = signature(self.modules[path])
        return self.signatures[path]


def _shape(node: fx.Node) -> tuple[int, ...] | None:
    return node.meta.get("shape")


def _is_flag(node: fx.Node) -> bool:
    return node.op == "call_module" and str(node.target).endswith("training_flag")


def _owners(root: nn.Module) -> dict[int, list[str]]:
    owners: dict[int, list[str]] = defaultdict(list)
    for name, parameter in root.named_parameters(remove_duplicate=False):
        owners[id(parameter)].append(name)
    return owners


def _longest_paths(network: "nx.DiGraph[int]") -> Iterator[list[int]]:
    """Disjoint longest paths, longest first, of each connected part."""
    for part in nx.weakly_connected_components(network):
        rest = network.subgraph(sorted(part)).copy()
        while len(rest) > 1:
            path = nx.dag_longest_path(rest)
            if len(path) < 2:
                break
            yield path
            rest.remove_nodes_from(path)


# ---- nesting


def _outermost_worth_it(chains: Iterable[Chain], modules: dict[str, nn.Module]) -> list[Chain]:
    """Of chains that lie inside each other's blocks, keep the level that lets most be replaced."""
    kept: dict[str, tuple[Chain, int]] = {}  # by the path of the first block
    inside: dict[str, set[str]] = defaultdict(set)  # block path → chains kept within it
    taken: set[str] = set()
    for chain in sorted(chains, key=lambda c: (-max(p.count(".") for p in c.paths), -len(c.calls), c.calls[0].start)):
        if len(chain.calls) < SHORTEST or not taken.isdisjoint(chain.paths):
            continue  # of chains through one block (joined by other slots) the longest counts
        taken.update(chain.paths)
        size = sum(p.numel() for p in modules[chain.paths[0]].parameters())
        worth = size * ((len(chain.calls) - 1) // 2)
        inner = {key for path in chain.paths for key in inside[path] if key in kept}
        if inner and worth <= sum(kept[key][1] for key in inner):
            continue
        for key in inner:
            del kept[key]
        name = chain.paths[0]
        kept[name] = (chain, worth)
        for path in chain.paths:
            for ancestor in ancestors(path):
                inside[ancestor].add(name)
    return [chain for chain, _ in kept.values()]
