"""select: from chains and a policy to a plan."""

from collections.abc import Hashable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import NamedTuple

from replfx.chains.chain import Block, Chain, Chains
from replfx.chains.policy import RULES, Policy
from replfx.chains.stages import cut_chains
from replfx.errors import FusionError, PlanError
from replfx.fusion import Choice, fusions
from replfx.fusion.fusions import LinearFusion
from replfx.modules.paths import is_named, named, some
from replfx.modules.structure import block_digest
from replfx.operators import Match, Site
from replfx.operators.base import operators
from replfx.operators.residual import is_residual
from replfx.operators.twins import twin_key
from replfx.plans import Plan, Replacement
from replfx.regions.obstacles import too_unlike
from replfx.regions.pieces import SHORTEST

__all__ = ["Nothing", "Selection", "reads", "select"]


class Nothing(NamedTuple):
    """Why nothing is replaced, as `NoChainError` takes it."""

    message: str
    note: str
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Selection:
    """What a policy makes of the chains of a model."""

    plan: Plan  # which blocks are replaced, and how; empty if `nothing` says why
    kept: Mapping[str, str]  # blocks of a chain that are not replaced, with the reason
    # Blocks that cannot be replaced, with the reason: those in no chain, and those that the operator does not fit.
    refused: Mapping[str, str]
    nothing: Nothing | None = None  # why nothing is replaced; None if something is


def select(found: Chains, policy: Policy) -> Selection:
    """Choose which blocks of each chain are replaced.

    Raises:
        PlanError: a block that the policy names cannot be replaced.
        FusionError: the operator does not fit it.
    """
    model = type(found.capture.root).__name__
    if not found.chains:
        return Selection(Plan(model, ()), {}, found.refused, _no_chain(found))
    wanted = None if policy.select is None else _wanted(policy.select, found)
    chooser, kept, replacements = _Chooser(policy, dict(found.refused)), dict[str, str](), list[Replacement]()
    chains = cut_chains(found, policy.split_at)
    for chain in chains:
        made = chooser.replace(chain, chooser.positions(chain) if wanted is None else _selected(wanted, chain))
        kept.update(chooser.kept(chain, made))
        replacements += made
    nothing = None if replacements else _nothing_left(policy, chains, found, chooser.refused)
    return Selection(Plan(model, tuple(replacements)), kept, chooser.refused, nothing)


class _Chooser:
    """One policy at work on one chain after the other; blocks that the operator does not fit join `refused`."""

    def __init__(self, policy: Policy, refused: dict[str, str]) -> None:
        self.policy, self.refused = policy, refused
        self.name, self.operator = policy.operator.name, operators[policy.operator.name]
        self._twins: dict[Hashable, Match] = {}

    def positions(self, chain: Chain) -> list[int]:
        """Which blocks of the chain, counted from 0, the policy asks for."""
        if self.policy.every is not None:
            return chain.every(self.policy.every)
        if self.policy.fraction is not None:
            return chain.fraction(self.policy.fraction)
        assert self.policy.keep is not None
        return chain.keep(self.policy.keep)

    def replace(self, chain: Chain, positions: Sequence[int]) -> list[Replacement]:
        """Replace those of the blocks that the operator fits; one that it does not fit stays, and others read it."""
        chosen, matches = set(positions), dict[int, Match]()
        if self.operator.needs_neighbours:
            for i in positions:
                _check_neighbours(chain, i, chosen)
        while unjudged := sorted(chosen - matches.keys()):
            i = unjudged[0]
            match = self._match(chain, i, chosen)
            if match:
                matches[i] = match
                continue
            path, why = chain.paths[i], f"operator {self.name!r} does not fit it: {match.reason}"
            if self.policy.select is not None:
                raise FusionError(f"`{path}`: {why}")
            self.refused[path] = why
            left = chosen - {i}
            matches = {j: m for j, m in matches.items() if _sides(j, left) == _sides(j, chosen)}
            chosen = left
        return [self._replacement(chain, i, chosen, matches[i]) for i in sorted(chosen)]

    def _match(self, chain: Chain, position: int, chosen: Set[int]) -> Match:
        """Whether the operator fits a block beside those that stay; of twins one is measured."""
        block, site = chain.blocks[position], _site(chain, position, chosen)
        if self.operator.needs_neighbours:
            sides = [chain.blocks[side] for side in _sides(position, chosen)]
            if why := too_unlike(site.block, *((side.path, side.site.block) for side in sides)):
                return Match(reason=why)
        if self.name == "identity" and (why := _not_kept(block, site)):
            return Match(reason=why)
        key = twin_key(site) if self.operator.matches_by_structure else None
        if key is not None and key in self._twins:
            return self._twins[key]
        match = self.operator.match(site)
        if match and key is not None:  # a refusal names nodes of its own
            self._twins[key] = match
        return match

    # ---- why the others stay

    def kept(self, chain: Chain, made: Sequence[Replacement]) -> dict[str, str]:
        """For each block of the chain that stays, the rule that keeps it."""
        replaced, read = {replacement.path for replacement in made}, reads(made)
        return {
            path: block.obstacle or read.get(path) or self.refused.get(path) or self._rule(chain, position)
            for position, (path, block) in enumerate(zip(chain.paths, chain.blocks, strict=True))
            if path not in replaced
        }

    def _rule(self, chain: Chain, position: int) -> str:
        block, end = chain.blocks[position], chain.end(position)
        if end is not None and (self.policy.select is None or self.operator.needs_neighbours):
            return end
        if self.policy.select is not None:
            return "the budget leaves it" if self.policy.budgeted else "select does not name it"
        if block.changing:
            return block.changing
        if self.policy.fraction is not None:
            return f"fraction={self.policy.fraction} leaves it"
        if self.policy.every is None:
            return f"keep={self.policy.keep} leaves it"
        number = chain.numbers(self.policy.every)[position]
        return f"every={self.policy.every} leaves it: it is number {number} in its stage"

    def _replacement(self, chain: Chain, position: int, chosen: Set[int], match: Match) -> Replacement:
        site = chain.blocks[position].site
        before, after = _sides(position, chosen)
        fusion = self.policy.fusion
        if self.operator.needs_neighbours:
            fusion = _by_distance(fusion, position - before, after - position)
        (previous, previous_kind), (next, next_kind) = (_named(chain, side) for side in (before, after))
        return Replacement(
            path=site.path,
            previous=previous,
            next=next,
            fusion=fusion,
            operator=Choice(self.name, {**match.options, **self.policy.operator.options}),
            interface=site.interface,
            kind=block_digest(site.block),
            previous_kind=previous_kind,
            next_kind=next_kind,
            neighbour_gradient=self.policy.neighbour_gradient,
        )


def reads(made: Sequence[Replacement]) -> dict[str, str]:
    """For each neighbour of replaced blocks that they need, why it stays: the first that is made from it."""
    reading = [r for r in reversed(made) if operators[r.operator.name].needs_neighbours]
    return {side: f"`{r.path}` is made from it" for r in reading for side in (r.previous, r.next) if side}


def _named(chain: Chain, position: int) -> tuple[str, str] | tuple[None, None]:
    """Path and structure of a block, if the chain has one there."""
    if not 0 <= position < len(chain.blocks):
        return None, None
    block = chain.blocks[position]
    return block.path, block_digest(block.site.block)


def _sides(position: int, chosen: Set[int]) -> tuple[int, int]:
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
        chain.blocks[p].site.block if 0 <= p < len(chain.blocks) else None for p in _sides(position, chosen)
    )
    return replace(chain.blocks[position].site, previous=before, next=after)


def _not_kept(block: Block, site: Site) -> str | None:
    """That a block gives another shape than it gets, or may; without example inputs a residual one is known not to."""
    if site.shape is None and not is_residual(site):
        return "whether it keeps its activation's shape is not known without example_inputs"
    return block.changing


# ---- select=


def _wanted(globs: Sequence[str], found: Chains) -> Set[str]:
    """The blocks of chains that the globs name."""
    in_chain = [path for chain in found.chains for path in chain.paths]

    def no_match(glob: str) -> str:
        if glob in found.refused:
            return f"`{glob}` cannot be replaced: {found.refused[glob]}"
        modules = [path for path, _ in found.capture.root.named_modules() if path and is_named(path, glob)]
        if modules:
            return f"select={glob!r} matches `{modules[0]}`, which is no block of a chain; blocks are: {some(in_chain)}"
        return f"select={glob!r} matches nothing; blocks that are in a chain: {some(in_chain)}"

    return set(named(globs, in_chain, "select", no_match))


def _selected(wanted: Set[str], chain: Chain) -> list[int]:
    positions = [i for i, path in enumerate(chain.paths) if path in wanted]
    for i in positions:
        if chain.blocks[i].obstacle is not None:
            raise PlanError(f"`{chain.paths[i]}` cannot be replaced: {chain.blocks[i].obstacle}")
    return positions


def _check_neighbours(chain: Chain, position: int, positions: Set[int]) -> None:
    """A replaced block needs a kept one on each side."""
    before, after = _sides(position, positions)
    if before >= 0 and after < len(chain.blocks):
        return
    end = 0 if before < 0 else len(chain.blocks) - 1
    why = chain.end(end)
    if end != position:
        why = f"`{chain.paths[end]}` is to be replaced too, and {why}"
    raise PlanError(f"`{chain.paths[position]}` has no kept block on each side: {why}; select others, or use every=")


# ---- messages


def _no_chain(found: Chains) -> Nothing:
    reasons = "; ".join(f"`{path}`: {why}" for path, why in list(found.refused.items())[:4])
    more = f" ({len(found.refused) - 4} more in replfx.inspect)" if len(found.refused) > 4 else ""
    note = f"no chain of {SHORTEST} blocks of one kind was found, so nothing can be replaced"
    if not reasons:
        note += "; the model has no repeated blocks"
    return Nothing(f"{note}: {reasons}{more}" if reasons else note, note)


def _nothing_left(policy: Policy, chains: Sequence[Chain], found: Chains, refused: Mapping[str, str]) -> Nothing:
    """Why nothing is left to replace: what the operator lacks in the blocks that were chosen, then what was known."""
    longest = max(len(chain.blocks) for chain in chains)
    declined = [(path, why) for path, why in refused.items() if path not in found.refused]
    obstacles = [(b.path, b.obstacle) for chain in found.chains for b in chain.blocks if b.obstacle]
    reasons = tuple(f"`{path}`: {why}" for path, why in (*declined, *obstacles, *found.refused.items()))[:4]
    if reasons:
        note = "nothing can be replaced"
        return Nothing(f"{note}: {'; '.join(reasons)}", note, reasons)
    asked = next(f"{name}={getattr(policy, name)}" for name in RULES if getattr(policy, name) is not None)
    part = " part of a chain in one pipeline stage" if any(c.before or c.after for c in chains) else " chain"
    note, least = f"{asked} replaces nothing", "every=2 replaces at least one of three"
    return Nothing(f"{note}: the longest{part} has {longest} blocks; {least}", note)
