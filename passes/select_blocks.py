"""select_blocks: from chains and a policy to a plan."""

from collections.abc import Hashable, Sequence, Set
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from replfx.blocks import is_named
from replfx.errors import FusionError, NoChainError, PlanError
from replfx.fusion import Choice, Match, Site, fusions, operators
from replfx.fusion.fusions import LinearFusion
from replfx.fusion.pairing import too_unlike
from replfx.fusion.residual import is_residual
from replfx.fusion.twins import twin_key
from replfx.passes.chains import SHORTEST, Chain, Chains, chains_of
from replfx.passes.stages import cut_chains
from replfx.plans import Plan, Replacement
from replfx.structure import block_digest
from replfx.tracing import info_of

__all__ = ["SelectBlocks", "plan_of"]

_MEASURING = frozenset(("identity", "light", "mixer"))
"""Operators that run a block alone to see whether they fit it, and look at no weight's value."""


def plan_of(graph_module: fx.GraphModule) -> Plan:
    """The plan that `SelectBlocks` made for this graph."""
    plan = graph_module.meta["replfx_plan"]
    assert isinstance(plan, Plan)
    return plan


@dataclass(frozen=True)
class SelectBlocks(PassBase):
    """Choose which blocks of each chain are replaced; changes nothing.

    Exactly one of `every`, `fraction`, `select` and `keep` is given. A replaced block is made from the nearest kept
    block on each side.

    Attributes:
        every: k ≥ 2 replaces blocks k, 2k, … of each chain, never its last. They are counted from 1, anew from
            each block that changes the shape of its activation or begins a new stage; those that change it stay.
        fraction: 0 < f ≤ ½ replaces that part of each chain, spread evenly, never two in a row.
        select: paths or globs ("blocks.1", "layer3.*"); every match is replaced.
        keep: a number of blocks of each chain that stay, or the share of them; the rest is replaced.
        fusion, operator: what takes a replaced block's place.
        neighbour_gradient: factor 0 ≤ λ ≤ 1 on the gradient into the neighbours.
        split_at: paths of the modules with which a pipeline stage begins: blocks are chosen in each stage as if it
            were a model of its own.
    """

    every: int | None = None
    fraction: float | None = None
    select: tuple[str, ...] | None = None
    keep: int | float | None = None
    fusion: Choice = field(default_factory=lambda: Choice("scalar"))
    operator: Choice = field(default_factory=lambda: Choice("block"))
    neighbour_gradient: float = 1.0
    split_at: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        given = [name for name in _RULES if getattr(self, name) is not None]
        if len(given) != 1:
            raise PlanError(f"give one of {', '.join(f'{n}=' for n in _RULES)}, not {' and '.join(given) or 'none'}")
        if self.every is not None and (isinstance(self.every, bool) or not isinstance(self.every, int)):
            raise PlanError(f"every must be a whole number, not {self.every!r}")
        if self.every is not None and self.every < 2:
            raise PlanError(f"every={self.every}: a replaced block needs a kept one on each side, so at least 2")
        for name in ("fraction", "keep", "neighbour_gradient"):
            value = getattr(self, name)
            said = value is not None or name == "neighbour_gradient"
            if said and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise PlanError(f"{name} must be a number, not {value!r}")
        if self.fraction is not None and not 0 < self.fraction <= 0.5:
            raise PlanError(f"fraction={self.fraction}: must be over 0 and at most 0.5, half of a chain's blocks")
        if isinstance(self.keep, int) and self.keep < 2:
            raise PlanError(f"keep={self.keep}: the first and the last block of a chain always stay, so at least 2")
        if isinstance(self.keep, float) and not 0 < self.keep < 1:
            raise PlanError(f"keep={self.keep}: a share of the blocks is between 0 and 1; a number of them is an int")
        if not 0 <= self.neighbour_gradient <= 1:
            raise PlanError(f"neighbour_gradient={self.neighbour_gradient}: must be between 0 and 1")
        if not all(isinstance(path, str) for path in self.split_at):
            raise PlanError(f"split_at must be a module path or a sequence of them, not {self.split_at!r}")
        fusions[self.fusion.name], operators[self.operator.name]  # an unknown name raises here

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Put a `Plan` into the graph's meta; blocks that the operator does not fit join `Chains.refused`.

        Raises:
            NoChainError: there is nothing to replace.
            PlanError: a selected block cannot be replaced.
            FusionError: a selected block has no such operator.
        """
        found = chains_of(graph_module)
        if not found.chains:
            raise NoChainError(_no_chain(found))
        wanted = None if self.select is None else _matches(self.select, graph_module, found)
        replacements: list[Replacement] = []
        known = set(found.refused)
        chains = cut_chains(graph_module, found, self.split_at)
        for chain in chains:
            positions = self._positions(chain) if wanted is None else _selected(wanted, chain)
            made = self._replace(chain, positions, found)
            found.kept.update(self._kept(chain, made, found))
            replacements += made
        if not replacements:
            raise NoChainError(_nothing_left(self, chains, found, known))
        model = type(info_of(graph_module).root).__name__
        graph_module.meta["replfx_plan"] = Plan(model, tuple(replacements))
        return PassResult(graph_module, False)

    def _positions(self, chain: Chain) -> list[int]:
        """Which blocks of the chain, counted from 0, the policy asks for."""
        if self.every is not None:
            return chain.every(self.every)
        if self.fraction is not None:
            return chain.fraction(self.fraction)
        assert self.keep is not None
        return chain.keep(self.keep)

    def _replace(self, chain: Chain, positions: Sequence[int], found: Chains) -> list[Replacement]:
        """Replace those of the blocks that the operator fits; one that it does not fit stays, and others read it."""
        chosen, matches, twins = set(positions), dict[int, Match](), dict[Hashable, Match]()
        for i in positions:
            if operators[self.operator.name].needs_neighbours:
                _check_neighbours(chain, i, chosen)
        while unjudged := sorted(chosen - matches.keys()):
            i = unjudged[0]
            match = self._match(chain, i, chosen, twins)
            if match:
                matches[i] = match
                continue
            found.refused[chain.blocks[i].path] = f"operator {self.operator.name!r} does not fit it: {match.reason}"
            if self.select is not None:
                raise FusionError(f"`{chain.blocks[i].path}`: {found.refused[chain.blocks[i].path]}")
            left = chosen - {i}
            matches = {j: m for j, m in matches.items() if _sides(chain, j, left) == _sides(chain, j, chosen)}
            chosen = left
        return [self._replacement(chain, i, chosen, matches[i]) for i in sorted(chosen)]

    def _match(self, chain: Chain, position: int, chosen: Set[int], twins: dict[Hashable, Match]) -> Match:
        """Whether the operator fits a block beside those that stay; of twins one is measured (`twins`)."""
        block, site = chain.blocks[position], _site(chain, position, chosen)
        operator = operators[self.operator.name]
        if operator.needs_neighbours:
            sides = [chain.blocks[side] for side in _sides(chain, position, chosen)]
            if why := too_unlike(site.block, *((side.path, side.site.block) for side in sides)):
                return Match(reason=why)
        key = twin_key(site) if self.operator.name in _MEASURING else None
        if key is not None and key in twins:
            return twins[key]
        match = operator.match(site) if site.shape or self.operator.name != "identity" else _unmeasured(site)
        if match and self.operator.name == "identity" and block.turn is not None:
            return Match(reason=f"it changes the shape of its activation: {block.turn}")
        if match and key is not None:  # a refusal names nodes of its own
            twins[key] = match
        return match

    # ---- why the others stay

    def _kept(self, chain: Chain, made: Sequence[Replacement], found: Chains) -> dict[str, str]:
        """For each block of the chain that stays, the rule that keeps it."""
        replaced = {replacement.path for replacement in made}
        readers = {side: r.path for r in reversed(made) for side in (r.previous, r.next) if side}
        kept = {}
        for position, block in enumerate(chain.blocks):
            if block.path in replaced:
                continue
            read = f"`{readers[block.path]}` is made from it" if block.path in readers else None
            kept[block.path] = block.obstacle or read or found.refused.get(block.path) or self._rule(chain, position)
        return kept

    def _rule(self, chain: Chain, position: int) -> str:
        block, end = chain.blocks[position], chain.end(position)
        if end is not None and (self.select is None or operators[self.operator.name].needs_neighbours):
            return end
        if self.select is not None:
            return "select does not name it"
        if block.turn is not None:
            return f"it changes the shape of its activation: {block.turn}"
        if self.fraction is not None:
            return f"fraction={self.fraction} leaves it"
        if self.every is None:
            return f"keep={self.keep} leaves it"
        return f"every={self.every} leaves it: it is number {chain.numbers(self.every)[position]} in its stage"

    def _replacement(self, chain: Chain, position: int, chosen: Set[int], match: Match) -> Replacement:
        site = _site(chain, position, chosen)
        sides: list[tuple[str | None, str | None]] = [(None, None), (None, None)]
        fusion = self.fusion
        if operators[self.operator.name].needs_neighbours:
            before, after = _sides(chain, position, chosen)
            fusion = _by_distance(fusion, position - before, after - position)
            neighbours = (chain.blocks[side] for side in (before, after))
            sides = [(block.path, block_digest(block.site.block)) for block in neighbours]
        (previous, previous_kind), (next, next_kind) = sides
        return Replacement(
            path=site.path,
            previous=previous,
            next=next,
            fusion=fusion,
            operator=Choice(self.operator.name, {**match.options, **self.operator.options}),
            interface=site.interface,
            kind=block_digest(site.block),
            previous_kind=previous_kind,
            next_kind=next_kind,
            neighbour_gradient=float(self.neighbour_gradient),
        )


_RULES = ("every", "fraction", "select", "keep")


def _sides(chain: Chain, position: int, chosen: Set[int]) -> tuple[int, int]:
    """The nearest blocks on each side that stay; beyond the chain where there is none."""
    before, after = position - 1, position + 1
    while before in chosen:
        before -= 1
    while after in chosen:
        after += 1
    return before, after


def _by_distance(fusion: Choice, before: int, after: int) -> Choice:
    """The fusion with coefficients that start by how far the neighbours are, the nearer one's the larger."""
    if before == after or "initial" in fusion.options or not issubclass(fusions[fusion.name], LinearFusion):
        return fusion
    initial = [after / (before + after), before / (before + after)]
    return Choice(fusion.name, {**fusion.options, "initial": initial})


def _site(chain: Chain, position: int, chosen: Set[int]) -> Site:
    """The block's site, with its neighbours."""
    before, after = (
        chain.blocks[p].site.block if 0 <= p < len(chain.blocks) else None for p in _sides(chain, position, chosen)
    )
    return replace(chain.blocks[position].site, previous=before, next=after)


def _unmeasured(site: Site) -> Match:
    """Without example inputs nobody knows that a block keeps the shape of its activation, unless it must."""
    if is_residual(site):
        return operators["identity"].match(site)
    return Match(reason="whether it keeps its activation's shape is not known without example_inputs")


# ---- select=


def _matches(globs: Sequence[str], graph_module: fx.GraphModule, found: Chains) -> set[str]:
    """The blocks of chains that the globs name; each glob must name at least one."""
    if not globs or isinstance(globs, str) or not all(isinstance(glob, str) for glob in globs):
        raise PlanError(f"select must be a path or a glob, or a sequence of them, not {globs!r}")
    in_chain = [path for chain in found.chains for path in chain.paths]
    chosen: set[str] = set()
    for glob in globs:
        matched = [path for path in in_chain if is_named(path, glob)]
        if not matched:
            raise PlanError(_no_match(glob, graph_module, in_chain, found))
        chosen.update(matched)
    return chosen


def _no_match(glob: str, graph_module: fx.GraphModule, in_chain: list[str], found: Chains) -> str:
    if glob in found.refused:
        return f"`{glob}` cannot be replaced: {found.refused[glob]}"
    modules = [p for p, _ in info_of(graph_module).root.named_modules() if p and fnmatchcase(p, glob)]
    if modules:
        return f"select={glob!r} matches `{modules[0]}`, which is no block of a chain; blocks are: {_some(in_chain)}"
    return f"select={glob!r} matches nothing; blocks that are in a chain: {_some(in_chain)}"


def _selected(wanted: set[str], chain: Chain) -> list[int]:
    positions = [i for i, path in enumerate(chain.paths) if path in wanted]
    for i in positions:
        if chain.blocks[i].obstacle is not None:
            raise PlanError(f"`{chain.paths[i]}` cannot be replaced: {chain.blocks[i].obstacle}")
    return positions


def _check_neighbours(chain: Chain, position: int, positions: Set[int]) -> None:
    """A replaced block needs a kept one on each side."""
    before, after = _sides(chain, position, positions)
    if before < 0 or after >= len(chain.blocks):
        raise PlanError(_lonely(chain, position, positions))


# ---- messages


def _some(paths: Sequence[str], most: int = 12) -> str:
    more = f", … ({len(paths) - most} more)" if len(paths) > most else ""
    return ", ".join(paths[:most]) + more


def _lonely(chain: Chain, position: int, positions: Set[int]) -> str:
    path, (before, _) = chain.paths[position], _sides(chain, position, positions)
    end = 0 if before < 0 else len(chain.blocks) - 1
    why = chain.end(end)
    if end != position:
        why = f"`{chain.paths[end]}` is to be replaced too, and {why}"
    return f"`{path}` has no kept block on each side: {why}; select others, or use every="


def _no_chain(found: Chains) -> str:
    reasons = "; ".join(f"`{path}`: {why}" for path, why in list(found.refused.items())[:4])
    more = f" ({len(found.refused) - 4} more in replfx.inspect)" if len(found.refused) > 4 else ""
    return (
        f"no chain of {SHORTEST} blocks of one kind was found, so nothing can be replaced"
        f"{': ' + reasons if reasons else '; the model has no repeated blocks'}{more}"
    )


def _nothing_left(policy: SelectBlocks, chains: Sequence[Chain], found: Chains, known: Set[str]) -> str:
    """Why nothing is left to replace: what the operator lacks in the blocks that were chosen, then what was known."""
    longest = max(len(chain.blocks) for chain in chains)
    declined = [(path, why) for path, why in found.refused.items() if path not in known]
    obstacles = [(b.path, b.obstacle) for chain in found.chains for b in chain.blocks if b.obstacle]
    others = [(path, why) for path, why in found.refused.items() if path in known]
    reasons = [f"`{path}`: {why}" for path, why in (*declined, *obstacles, *others)]
    if reasons:
        return f"nothing can be replaced: {'; '.join(reasons[:4])}"
    asked = next(f"{name}={getattr(policy, name)}" for name in _RULES if getattr(policy, name) is not None)
    part = " part of a chain in one pipeline stage" if any(c.before or c.after for c in chains) else " chain"
    return f"{asked} replaces nothing: the longest{part} has {longest} blocks; every=2 replaces at least one of three"
