"""find_chains: the chains of like blocks in a captured graph, and why not where not."""

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence, Set
from dataclasses import replace
from itertools import groupby

from torch import fx, nn

from replfx.chains.candidates import Candidate, Candidates, is_layer
from replfx.chains.chain import Block, Chain, Chains
from replfx.chains.effects import effects_of
from replfx.chains.links import Path, paths_of
from replfx.chains.slots import Joined, input_slots, interface_of, other_streams, output_slots
from replfx.chains.traced_candidates import TracedCandidates
from replfx.chains.why_not import why_not
from replfx.fusion.interface import Interface
from replfx.fusion.pairing import LEAST_SHARE, first_unpaired, pair, share_paired
from replfx.modules.paths import ancestors, is_window, members_of, parameters_of, region_path
from replfx.modules.structure import class_of, family, signature
from replfx.modules.tree import inner_path
from replfx.operators import Site
from replfx.operators.outer_sum import is_branch
from replfx.operators.residual import is_residual, keeps_shape
from replfx.regions.obstacles import too_unlike, unfit_to_replace
from replfx.regions.pieces import SHORTEST
from replfx.regions.region import Region, region_module
from replfx.regions.search import find_regions
from replfx.tracing import ModuleCall, info_of

__all__ = ["find_chains"]


def find_chains(graph_module: fx.GraphModule) -> Chains:
    """Find maximal chains of blocks of one family in a captured graph.

    Blocks are of one family when their modules are of one class. Two of them follow each other when the later
    one's input descends from the earlier one's output and at least half of its weights have a counterpart
    there (`replfx.fusion.pairing`). Of nested chains (blocks in stages) the search keeps the level that lets most
    parameters be replaced. It tries windows of siblings ([Conv, BN, ReLU] × n) where no module is a block, and regions
    of the graph that repeat (`replfx.regions.search`) where there are no windows either.
    """
    return _Search(graph_module).run()


class _Search:
    """The state of one search."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.graph_module = graph_module
        self.info = info_of(graph_module)
        self.root = self.info.root
        by_dynamo = self.info.tracer == "dynamo"
        self.candidates = TracedCandidates(self.info, graph_module) if by_dynamo else Candidates(self.info)
        self.positions = {node: position for position, node in enumerate(self.info.nodes)}
        self.kinds = _Kinds()
        self.owners: dict[int, list[str]] = defaultdict(list)
        for prefix, module in self.root.named_modules():  # one that goes by two names shares nothing with itself
            for name, parameter in module._parameters.items():
                self.owners[id(parameter)].append(inner_path(prefix, name))

    def run(self) -> Chains:
        dropped: dict[str, str] = {}
        chains = self._search(self.candidates.blocks(), dropped)
        if not any(chain.replaceable() for chain in chains):
            windows = self._search(self.candidates.windows(), dropped)
            chains = windows if not chains or any(chain.replaceable() for chain in windows) else chains
        if not any(chain.replaceable() for chain in chains):
            regions = find_regions(self.graph_module)
            chains = [self._region_chain(found) for found in regions.chains] or chains
            dropped.update({region_path(name): why for name, why in regions.refused.items()})
        chains.sort(key=lambda chain: chain.blocks[0].call.start)
        in_chain = {path for chain in chains for path in chain.paths}
        known = {**dropped, **self.candidates.refused}
        refused = why_not(self.candidates.modules, self._difference, self.candidates.counts, known, in_chain)
        chains = [Chain(tuple(map(self.candidates.placed, chain.blocks))) for chain in chains]
        return Chains(self.info, chains, {self.candidates.path(path): why for path, why in refused.items()})

    def _search(self, candidates: list[Candidate], dropped: dict[str, str]) -> list[Chain]:
        """The chains among these candidates; blocks of those that can't be used go to `dropped` with the reason."""
        kinds = [self.kinds.of(candidate.module) for candidate in candidates]
        families = [_family(candidate) for candidate in candidates]
        paths = paths_of(
            candidates, self.info.nodes, families, lambda one, other: self.kinds.likeness(kinds[one], kinds[other])
        )
        found = []
        for path in paths:
            if len(path[0]) < SHORTEST:
                one, other = (candidates[index].path for index in path[0])
                few = f"no three like it in a row, only `{one}` and `{other}`: a block is replaced between two others"
                dropped.update({one: few, other: few})
                continue
            chain = self._chain(candidates, kinds, path)
            if any(block.unlike is None for block in chain.blocks[1:-1]):
                found.append(chain)
            else:
                dropped.update({block.path: block.unlike or _at_the_end(block, chain) for block in chain.blocks})
        return _levels_worth_it(_steady_if_any(found, dropped))

    def _chain(self, candidates: Sequence[Candidate], kinds: Sequence[int], path: Path) -> Chain:
        indices, joins = path
        blocks: list[Block] = []
        for position, index in enumerate(indices):
            entered = joins[position - 1] if position else joins[0]
            left = joins[position] if position < len(joins) else joins[-1]
            block = self._block(candidates[index], entered, left)
            if position:
                alike = kinds[indices[position - 1]] == kinds[index]
                adjacent = entered and self._adjacent(candidates[indices[position - 1]], candidates[index], entered)
                block = replace(block, new_stage=not alike and not adjacent)
            if 0 < position < len(indices) - 1:
                before, after = (candidates[indices[position + step]] for step in (-1, 1))
                block = self._judged(block, before, after)
            blocks.append(block)
        return Chain(tuple(blocks))

    def _block(self, candidate: Candidate, entered: Joined, left: Joined) -> Block:
        call = candidate.call
        nodes = tuple(self.info.nodes[call.start : call.stop])
        interface = interface_of(call, nodes, entered, left)
        given = interface.activation(call.args, call.kwargs)
        # The last of a chain may give nothing on: what it ends with is what it computes then.
        gives = output_slots(call).get(left[0][0], nodes[-1])
        assert isinstance(given, fx.Node)
        members = members_of(self.root, call.path)
        names = {call.path: ""} if members == [call.path] else {path: str(i) for i, path in enumerate(members)}
        if call.filled:
            fills, effects = effects_of(call, set(nodes), given)
            interface = replace(interface, fills=fills, effects=effects)
        others = other_streams(call, interface)
        site = Site(call.path, candidate.module, interface, _shape(gives), nodes, given, gives, names, others=others)
        return Block(call, site)

    def _region_chain(self, regions: Sequence[Region]) -> Chain:
        """Regions of the graph as blocks: all of one kind, and nothing but their weights is their own."""
        blocks = []
        for position, region in enumerate(regions):
            path = region_path(region.name)
            interface = Interface(("0",), {"input": "0"})
            start, stop = (self.positions[region.nodes[end]] for end in (0, -1))
            call = ModuleCall(path, (region.input, *region.extras), {}, start, stop + 1, region.output)
            names = {target: name for name, target in region.modules.items()}
            module = region_module(region, self.root)
            site = Site(
                path, module, interface, _shape(region.output), region.nodes, region.input, region.output, names
            )
            block = Block(call, site, region=region)
            if 0 < position < len(regions) - 1:
                block = replace(block, shape_change=_shape_change(site, alike=True))
            blocks.append(block)
        return Chain(tuple(blocks))

    @staticmethod
    def _adjacent(before: Candidate, after: Candidate, joined: Joined) -> bool:
        """Whether the one's very output is the other's input."""
        outputs, inputs = output_slots(before.call), input_slots(after.call)
        return any(outputs[out] is inputs[slot] for out, slot in joined)

    def _judged(self, block: Block, before: Candidate, after: Candidate) -> Block:
        """The block with what speaks against replacing it."""
        unlike = too_unlike(block.site.block, (before.path, before.module), (after.path, after.module))
        alike = self.kinds.of(before.module) == self.kinds.of(block.site.block) == self.kinds.of(after.module)
        fixed = unfit_to_replace(parameters_of(self.root, block.path), self.owners)
        return replace(block, shape_change=_shape_change(block.site, alike), fixed=fixed, unlike=unlike)

    def _difference(self, path: str, other: str) -> str | None:
        return self.kinds.difference(self.candidates.modules[path], self.candidates.modules[other])


class _Kinds:
    """Numbers the kinds of blocks, and compares them once a pair of kinds."""

    def __init__(self) -> None:
        self._known: dict[nn.Module, int] = {}
        self._numbers: dict[Hashable, int] = {}
        self._examples: list[nn.Module] = []
        self._likeness: dict[tuple[int, int], float] = {}

    def of(self, module: nn.Module) -> int:
        """The number of the module's kind: the same for modules of equal signatures."""
        if module not in self._known:
            key = tuple(signature(module).items())
            if key not in self._numbers:
                self._numbers[key] = len(self._examples)
                self._examples.append(module)
            self._known[module] = self._numbers[key]
        return self._known[module]

    def difference(self, one: nn.Module, other: nn.Module) -> str | None:
        """The first thing for which two modules cannot follow each other in a chain; None if they can."""
        alike = self.likeness(self.of(one), self.of(other)) > 0
        return None if alike else first_unpaired(one, other) or first_unpaired(other, one)

    def likeness(self, one: int, other: int) -> float:
        """The larger share of either's weights that has a counterpart in the other; 0 if it is under a half."""
        if one == other:
            return 1.0
        key = (min(one, other), max(one, other))
        if key not in self._likeness:
            a, b = (self._examples[kind] for kind in key)
            share = max(share_paired(a, pair(a, b)), share_paired(b, pair(b, a)))
            self._likeness[key] = 0.9 * share if share >= LEAST_SHARE else 0.0
        return self._likeness[key]


def _family(candidate: Candidate) -> Hashable:
    """Windows are of one family when they begin with the same kind of layer."""
    if is_window(candidate.path) or is_layer(candidate.module):
        first = candidate.module if is_layer(candidate.module) else next(candidate.module.children())
        return ("window", class_of(first))
    return family(candidate.module)


def _shape(node: fx.Node) -> tuple[int, ...] | None:
    return node.meta.get("shape")


def _shape_change(site: Site, alike: bool) -> str | None:
    """How the block changes the shape of its activation; without example inputs, as far as its structure tells."""
    before, after = _shape(site.input), _shape(site.output)
    if before is not None and after is not None:
        return None if before == after else f"{before} → {after}"
    if alike or keeps_shape(site):
        return None
    return "as far as is known without example_inputs"


def _steady_if_any(chains: list[Chain], dropped: dict[str, str]) -> list[Chain]:
    """Drop the chains all of whose blocks change the shape of their activation, if there are others."""
    steady = [chain for chain in chains if any(chain.blocks[i].shape_change is None for i in chain.replaceable())]
    for chain in chains if steady else ():
        if chain not in steady and chain.replaceable():
            dropped.update({block.path: block.changing or _at_the_end(block, chain) for block in chain.blocks})
    return [chain for chain in chains if chain in steady or not chain.replaceable()] if steady else chains


def _at_the_end(block: Block, chain: Chain) -> str:
    """Why a block stays that is the first or the last of a chain that nothing can be made of."""
    end = "first" if block is chain.blocks[0] else "last"
    return f"it is the {end} of {len(chain.blocks)} like blocks in a row, and none of those between can be replaced"


# ---- nesting


def _levels_worth_it(chains: Iterable[Chain]) -> list[Chain]:
    """Keep one level of chains that lie inside each other's blocks: the one that lets most be replaced.

    If that is the outer one, the parts of the inner chain outside of its blocks stay chains.
    """
    kept: dict[str, Chain] = {}  # by the path of the first block
    inside: dict[str, set[str]] = defaultdict(set)  # block path → chains kept that have blocks within it
    for chain in _inner_first(list(chains)):
        own = set(chain.paths)
        blocks = {path for each in kept.values() for path in each.paths}
        if any(above in blocks for path in own for above in ancestors(path)):
            continue  # each lies in a block of the other, and the other was first
        inner = {key for path in own for key in inside[path] if key in kept}
        rest = {key: _outside(kept[key], own) for key in inner}
        lost = sum(_worth(kept[key]) - sum(map(_worth, parts)) for key, parts in rest.items())
        if inner and not _is_level(chain, [kept[key] for key in inner], lost):
            continue
        for key in inner:
            del kept[key]
        for new in (chain, *(part for key in sorted(rest) for part in rest[key])):
            first = new.blocks[0].path
            kept[first] = new
            for path in new.paths:
                for ancestor in ancestors(path):
                    inside[ancestor].add(first)
    return list(kept.values())


def _inner_first(chains: Sequence[Chain]) -> list[Chain]:
    """Each chain before those that have blocks around its own; else the deepest first, and then the first to run."""
    import networkx as nx  # a fifth of a second, which `import replfx` does without

    holder = {path: index for index, chain in enumerate(chains) for path in chain.paths}
    order: nx.DiGraph[int] = nx.DiGraph()
    order.add_nodes_from(range(len(chains)))
    for path, index in holder.items():
        order.add_edges_from((index, holder[above]) for above in ancestors(path) if holder.get(above, index) != index)

    def place(index: int) -> tuple[int, int]:
        return -max(path.count(".") for path in chains[index].paths), chains[index].blocks[0].call.start

    around = nx.condensation(order)  # chains that lie in each other's blocks are one node of it
    members = nx.get_node_attributes(around, "members")
    steps = nx.lexicographical_topological_sort(around, key=lambda node: min(map(place, members[node])))
    return [chains[index] for node in steps for index in sorted(members[node], key=place)]


def _outside(chain: Chain, blocks: Set[str]) -> list[Chain]:
    """The stretches of a chain, of three blocks and more, that lie in none of `blocks`."""
    free = groupby(chain.blocks, key=lambda block: blocks.isdisjoint(ancestors(block.path)))
    stretches = [tuple(stretch) for outside, stretch in free if outside]
    return [Chain(stretch) for stretch in stretches if len(stretch) >= SHORTEST]


def _is_level(chain: Chain, inner: Sequence[Chain], lost: int) -> bool:
    """Whether to keep the outer level of nested chains, where so much could be replaced inside.

    A class of its own is, unless twice as much can be replaced inside; a container only if less can, and so is a stage.
    """
    worth = _worth(chain)
    container = issubclass(class_of(chain.blocks[0].site.block), nn.Sequential)
    return worth > lost if container or _are_stages(chain, inner) else 2 * worth >= lost


def _are_stages(chain: Chain, inner: Iterable[Chain]) -> bool:
    """Whether most blocks of a chain hold three and more like blocks each, which add to what passes through them."""
    adding = [each for each in inner if is_residual(site := each.blocks[1].site) or is_branch(site)]
    held = [Counter(above for path in each.paths for above in ancestors(path)) for each in adding]
    stages = [path for path in chain.paths if any(counts[path] >= SHORTEST for counts in held)]
    return 2 * len(stages) > len(chain.blocks)


def _worth(chain: Chain) -> int:
    """How many parameters every second block has, or else the largest one that can be replaced."""

    def size(position: int) -> int:
        return sum(p.numel() for p in chain.blocks[position].site.block.parameters())

    chosen = chain.every(2)
    return sum(map(size, chosen)) if chosen else max(map(size, chain.replaceable()), default=0)
