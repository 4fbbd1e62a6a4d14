"""select_blocks: from chains and a policy to a plan."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from replfx.errors import FusionError, NoChainError, PlanError
from replfx.fusion import Choice, Match, Site, fusions, operators
from replfx.fusion.anatomy import is_residual
from replfx.fusion.interface import read_slot
from replfx.passes.find_chains import SHORTEST, Chain, Chains, chains_of
from replfx.plans import Plan, Replacement
from replfx.structure import block_digest
from replfx.tracing import info_of, nodes_in

__all__ = ["SelectBlocks", "plan_of"]


def plan_of(graph_module: fx.GraphModule) -> Plan:
    """The plan that `SelectBlocks` made for this graph."""
    plan = graph_module.meta["replfx_plan"]
    assert isinstance(plan, Plan)
    return plan


@dataclass(frozen=True)
class SelectBlocks(PassBase):
    """Choose which blocks of each chain are replaced; changes nothing.

    Exactly one of `every`, `fraction` and `select` is given.

    Attributes:
        every: k ≥ 2 replaces blocks k, 2k, … of each chain, counted from 1, never its last.
        fraction: 0 < f ≤ ½ replaces that part of each chain, spread evenly, never two in a row.
        select: paths or globs ("blocks.1", "layer3.*"); every match is replaced.
        fusion, operator: what takes a replaced block's place.
        neighbour_gradient: factor 0 ≤ λ ≤ 1 on the gradient into the neighbours.
    """

    every: int | None = None
    fraction: float | None = None
    select: tuple[str, ...] | None = None
    fusion: Choice = field(default_factory=lambda: Choice("scalar"))
    operator: Choice = field(default_factory=lambda: Choice("block"))
    neighbour_gradient: float = 1.0

    def __post_init__(self) -> None:
        given = [name for name in ("every", "fraction", "select") if getattr(self, name) is not None]
        if len(given) != 1:
            raise PlanError(f"give one of every=, fraction= and select=, not {' and '.join(given) or 'none'}")
        if self.every is not None and (isinstance(self.every, bool) or not isinstance(self.every, int)):
            raise PlanError(f"every must be a whole number, not {self.every!r}")
        if self.every is not None and self.every < 2:
            raise PlanError(f"every={self.every}: a replaced block needs a kept one on each side, so at least 2")
        for name in ("fraction", "neighbour_gradient"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise PlanError(f"{name} must be a number, not {value!r}")
        if self.fraction is not None and not 0 < self.fraction <= 0.5:
            raise PlanError(f"fraction={self.fraction}: must be over 0 and at most 0.5, half of a chain's blocks")
        if not 0 <= self.neighbour_gradient <= 1:
            raise PlanError(f"neighbour_gradient={self.neighbour_gradient}: must be between 0 and 1")
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
        for chain in found.chains:
            positions = self._positions(chain, found) if wanted is None else _selected(wanted, chain, found)
            replacements += self._replace(graph_module, chain, positions, found)
        if not replacements:
            raise NoChainError(_nothing_left(self, found))
        model = type(info_of(graph_module).root).__name__
        graph_module.meta["replfx_plan"] = Plan(model, tuple(replacements))
        return PassResult(graph_module, False)

    def _positions(self, chain: Chain, found: Chains) -> list[int]:
        """Which blocks of the chain, counted from 0, the policy asks for."""
        length = len(chain.calls)
        if self.every is not None:
            chosen = range(self.every - 1, length - 1, self.every)
            return [i for i in chosen if chain.paths[i] not in found.fixed]
        assert self.fraction is not None
        count = min(int(self.fraction * length + 0.5), (length - 1) // 2)
        if count == 0:
            return []
        step = (length - 1) / count  # at least 2, so no two are adjacent and neither end is chosen
        spread = [max(int(step * (i + 0.5)), 1) for i in range(count)]
        return [i for i in spread if chain.paths[i] not in found.fixed]

    def _replace(
        self, graph_module: fx.GraphModule, chain: Chain, positions: Sequence[int], found: Chains
    ) -> list[Replacement]:
        operator = operators[self.operator.name]
        made: list[Replacement] = []
        for i in positions:
            path = chain.paths[i]
            kept = [j for j in range(len(chain.calls)) if j not in positions]
            if operator.needs_neighbours and not {i - 1, i + 1} <= set(kept):
                raise PlanError(_lonely(chain, i, positions))
            site = _site(graph_module, chain, i)
            match = operator.match(site) if chain.shape or self.operator.name != "identity" else _unmeasured(site)
            if not match:
                found.refused[path] = f"operator {self.operator.name!r} does not fit it: {match.reason}"
                if self.select is not None:
                    raise FusionError(f"`{path}`: {found.refused[path]}")
                continue
            made.append(
                Replacement(
                    path=path,
                    previous=chain.paths[i - 1] if operator.needs_neighbours else None,
                    next=chain.paths[i + 1] if operator.needs_neighbours else None,
                    fusion=self.fusion,
                    operator=Choice(self.operator.name, {**match.options, **self.operator.options}),
                    interface=chain.interfaces[i],
                    kind=block_digest(site.block),
                    neighbour_gradient=float(self.neighbour_gradient),
                )
            )
        return made


def _site(graph_module: fx.GraphModule, chain: Chain, position: int) -> Site:
    info, call, interface = info_of(graph_module), chain.calls[position], chain.interfaces[position]
    source = read_slot(interface.main, call.args, call.kwargs)
    outputs = nodes_in(call.output)
    assert isinstance(source, fx.Node)
    return Site(
        path=call.path,
        block=info.root.get_submodule(call.path),
        interface=interface,
        shape=chain.shape,
        nodes=tuple(info.nodes[call.start : call.stop]),
        input=source,
        output=outputs[0],
    )


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
        matched = [path for path in in_chain if fnmatchcase(path, glob)]
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


def _selected(wanted: set[str], chain: Chain, found: Chains) -> list[int]:
    positions = [i for i, path in enumerate(chain.paths) if path in wanted]
    for i in positions:
        if chain.paths[i] in found.fixed:
            raise PlanError(f"`{chain.paths[i]}` cannot be replaced: {found.fixed[chain.paths[i]]}")
    return positions


# ---- messages


def _some(paths: Sequence[str], most: int = 12) -> str:
    more = f", … ({len(paths) - most} more)" if len(paths) > most else ""
    return ", ".join(paths[:most]) + more


def _lonely(chain: Chain, position: int, positions: Sequence[int]) -> str:
    path = chain.paths[position]
    if position == 0:
        why = "it is the first block of its chain"
    elif position == len(chain.calls) - 1:
        why = "it is the last block of its chain"
    else:
        twin = next(i for i in (position - 1, position + 1) if i in positions)
        why = f"its neighbour `{chain.paths[twin]}` is to be replaced too"
    return f"`{path}` has no kept block on each side: {why}; select others, or use every="


def _no_chain(found: Chains) -> str:
    reasons = "; ".join(f"`{path}`: {why}" for path, why in list(found.refused.items())[:4])
    more = f" ({len(found.refused) - 4} more in replfx.inspect)" if len(found.refused) > 4 else ""
    return (
        f"no chain of {SHORTEST} blocks of one kind was found, so nothing can be replaced"
        f"{': ' + reasons if reasons else '; the model has no repeated blocks'}{more}"
    )


def _nothing_left(policy: SelectBlocks, found: Chains) -> str:
    longest = max(len(chain.calls) for chain in found.chains)
    reasons = [f"`{path}`: {why}" for path, why in (*found.fixed.items(), *found.refused.items())]
    if reasons:
        return f"nothing can be replaced: {'; '.join(reasons[:4])}"
    asked = f"every={policy.every}" if policy.every is not None else f"fraction={policy.fraction}"
    return f"{asked} replaces nothing: the longest chain has {longest} blocks; every=2 replaces at least one of three"
