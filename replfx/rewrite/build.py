"""Building: from a plan to replaced blocks. Needs no graph."""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import nn

from replfx.chains.chain import Chains
from replfx.errors import FusionError, PlanError, of_options
from replfx.fusion import Fusion, fusions
from replfx.fusion.alignment import AlignedFusion, Alignment, layout_of
from replfx.fusion.magnitude import is_finite
from replfx.fusion.pairing import Counterparts, counterparts, pair
from replfx.live.blocks import Snapshot, replace_block, strip_block
from replfx.live.skeletons import Skeleton
from replfx.live.synthesis import Reading, Readings, Synthesis, syntheses_of
from replfx.modules.copying import structural_copy
from replfx.modules.paths import block_at, head_of, is_region, members_of, parent_of, put_blocks
from replfx.modules.structure import block_digest
from replfx.operators import Operator
from replfx.operators.base import operators
from replfx.passes.insert_fusion import InsertFusion, Insertion
from replfx.plans import Plan, Replacement

__all__ = ["Built", "build", "insertion", "install", "refuse_transformed"]


@dataclass(frozen=True)
class Built:
    """A block as it is in its model, and the synthesis that it will have."""

    path: str
    block: nn.Module
    synthesis: Synthesis


def build(model: nn.Module, plan: Plan, blocks: Mapping[str, nn.Module] | None = None) -> list[Built]:
    """Make what `plan` needs for `model`, without changing that.

    Args:
        model: the model of the plan.
        plan: what to replace.
        blocks: by path, those that are no modules of the model.

    Raises:
        PlanError: the plan was made for another model, or the model is transformed already.
        FusionError: an unknown fusion or operator, options that it does not have, non-finite weights.
    """
    refuse_transformed(model)
    replaced = {replacement.path for replacement in plan.replacements}
    return [_Builder(model, plan.model, replaced, blocks or {}, r).build() for r in plan.replacements]


def refuse_transformed(model: nn.Module) -> None:
    """Raise a PlanError if the model has replaced blocks."""
    for path in syntheses_of(model):
        raise PlanError(
            f"the model is transformed already: `{path}` is a replaced block; "
            "transform the original model, or call replfx.materialize or replfx.unroll first"
        )


def install(model: nn.Module, built: Sequence[Built]) -> Snapshot:
    """Replace the blocks in their model, in place; gives what makes it what it was, as it is after an error.

    Raises:
        FusionError: a block that cannot do with synthesised weights.
    """
    parents = (parent_of(each.path) for each in built)
    holders = (model.get_submodule(parent) for parent in parents if parent is not None)
    snapshot = Snapshot(*(each.block for each in built), *holders)
    try:
        for each in built:
            try:
                _install(model, each)
            except FusionError as error:
                raise FusionError(f"`{each.path}` cannot be replaced: {error}") from error
    except Exception:
        snapshot.restore()
        raise
    return snapshot


def _install(model: nn.Module, built: Built) -> None:
    path, block, synthesis = built.path, built.block, built.synthesis
    members = members_of(model, path)
    window = members != [path]
    if window:
        synthesis.names = _homes(block, members)
    if synthesis.operator.keeps_block:
        synthesis.operator.prepare(block)  # type: ignore[operator]
        replace_block(block, synthesis, model.get_submodule(members[0]) if window else None)
    elif window:  # what its members had in common is a module of its own now
        holder = nn.Module().train(block.training)
        strip_block(holder, synthesis)
        put_blocks(model, {path: holder})
    else:
        strip_block(block, synthesis)


def _homes(window: nn.Module, members: Sequence[str]) -> dict[str, str]:
    """Where the parameters of a window are in the model, by their names in the window."""
    inside = (name for name, _ in window.named_parameters(remove_duplicate=False))
    return {name: ".".join((members[int(index)], rest)) for name in inside for index, _, rest in [name.partition(".")]}


def insertion(model: nn.Module, found: Chains, plan: Plan) -> InsertFusion:
    """The pass that carries out a plan whose blocks are regions of a captured graph; raises as `build` does."""
    blocks = found.blocks
    built = build(model, plan, {path: block.site.block for path, block in blocks.items()})
    insertions = [
        Insertion(region, head_of(model, each.path), _stand_for_region(each), each.synthesis)
        for each in built
        if (region := blocks[each.path].region) is not None
    ]
    regions = [(block.region, block.site.block) for block in blocks.values() if block.region is not None]
    return InsertFusion(insertions, regions)


def _stand_for_region(built: Built) -> nn.Module:
    """The module that is called in the place of a region, which was none."""
    made = structural_copy(built.block, hooks=True)
    if built.synthesis.operator.keeps_block:
        built.synthesis.operator.prepare(made)  # type: ignore[operator]
        replace_block(made, built.synthesis)
        return made
    holder = nn.Module().train(made.training)
    strip_block(holder, built.synthesis)
    return holder


@dataclass(frozen=True)
class _Builder:
    """Builds the layer of one replacement."""

    model: nn.Module
    made_for: str  # the name of the plan's model
    replaced: Set[str]  # the paths of all blocks that the plan replaces
    blocks: Mapping[str, nn.Module]  # those that are no modules of the model
    replacement: Replacement

    @property
    def path(self) -> str:
        return self.replacement.path

    def build(self) -> Built:
        block = self._block(self.path, self.replacement.kind)
        made = self._operator(block)
        synthesis = self._synthesis(block, made)
        synthesis.training = made.training = block.training  # what is inside keeps its own: a frozen norm
        return Built(self.path, block, synthesis)

    def _synthesis(self, block: nn.Module, made: Operator) -> Synthesis:
        replacement, path = self.replacement, self.path
        skeleton = None if made.unrolls or is_region(path) else Skeleton(block)
        if not made.sources and made.needs_neighbours:
            raise FusionError(
                f"`{path}`: operator {replacement.operator.name!r} has nothing to synthesise: all weights of the block "
                "stay its own, because neither neighbour has their like or the model reads them itself"
            )
        sides = ((replacement.previous, replacement.previous_kind), (replacement.next, replacement.next_kind))
        for side, _ in sides:
            if side in self.replaced:
                raise PlanError(f"`{path}`: its neighbour `{side}` is replaced in the same plan")
        neighbours = tuple(self._block(side, kind) for side, kind in sides if side is not None)
        if not made.sources:
            return Synthesis(made, None, ({}, {}), skeleton=skeleton, neighbours=() if skeleton is None else neighbours)
        if replacement.previous is None or replacement.next is None:
            raise PlanError(f"`{path}`: operator {replacement.operator.name!r} needs two neighbours, the plan has none")
        previous, next = neighbours
        _check_finite(((replacement.previous, previous), (path, block), (replacement.next, next)))
        readings = self._readings(made, block, previous, next)
        fusion = self._fusion(made, block, readings)
        return Synthesis(
            made,
            fusion.train(block.training),
            readings,
            neighbour_gradient=replacement.neighbour_gradient,
            neighbours=(previous, next),
            places=(replacement.previous, replacement.next),
            skeleton=skeleton,
        )

    def _block(self, path: str, kind: str | None) -> nn.Module:
        """The block at `path`, which must be of the kind that the plan was made for."""
        name = type(self.model).__name__
        advice = f"the plan was made for {self.made_for}; make one for this model with replfx.plan"
        try:
            block = self.blocks.get(path) or (block_at(self.model, path) if path else None)
        except AttributeError:
            block = None
        if block is None:
            raise PlanError(f"{name} has no module `{path}`: {advice}")
        if block_digest(block) != kind:
            raise PlanError(f"`{path}` of {name} has other parameters than the plan's: {advice}")
        return block

    def _operator(self, block: nn.Module) -> Operator:
        choice = self.replacement.operator
        try:
            return operators[choice.name](block, self.replacement.interface, **choice.options)
        except (TypeError, AttributeError, ValueError, PlanError) as error:
            raise FusionError(
                f"`{self.path}`: operator {choice.name!r} does not take the options {dict(choice.options)}: "
                f"{of_options(error)}"
            ) from error

    def _readings(
        self, made: Operator, block: nn.Module, previous: nn.Module, next: nn.Module
    ) -> tuple[Readings, Readings]:
        """What is read of each neighbour."""
        wanted = {source.path for source in made.sources.values()}
        before, after = counterparts(pair(block, previous), pair(block, next), wanted)
        if missing := wanted - before.keys():
            raise FusionError(
                f"`{self.path}`: its neighbours lack what the operator reads: neither has the like of "
                f"`{sorted(missing)[0]}`"
            )
        sides = {
            "previous": self._side(self.replacement.previous, previous),
            "next": self._side(self.replacement.next, next),
        }
        return _readings_of(made, block, before, sides), _readings_of(made, block, after, sides)

    def _side(self, path: str | None, block: nn.Module) -> "_Side":
        """Where the parameters of a neighbour are looked up: in itself, or where it is no module, in what holds it."""
        if path is None or path in self.blocks or (parent := parent_of(path)) is None:
            return block, {}
        names = {str(index): member.rpartition(".")[2] for index, member in enumerate(members_of(self.model, path))}
        return self.model.get_submodule(parent), names

    def _fusion(self, made: Operator, block: nn.Module, readings: tuple[Readings, Readings]) -> Fusion:
        choice = self.replacement.fusion
        like = next(block.parameters())
        shapes = {n: _part(block.get_parameter(s.path).shape, s.rows) for n, s in made.sources.items()}
        try:
            rule = fusions[choice.name](shapes, dtype=like.dtype, device=like.device, **choice.options)
        except TypeError as error:
            raise FusionError(
                f"`{self.path}`: fusion {choice.name!r} does not take the options {dict(choice.options)}: "
                f"{of_options(error)}"
            ) from error
        sides = [{name: _part(r.tensor().shape, r.rows) for name, r in side.items()} for side in readings]
        if sides == [shapes, shapes]:
            return rule
        owners = {name: block.get_submodule(s.path.rpartition(".")[0]) for name, s in made.sources.items()}
        aligned = []
        for side, read in zip(sides, readings, strict=True):
            layouts = {n: layout_of(read[n].owner(), owners[n], side[n], shape) for n, shape in shapes.items()}
            aligned.append(Alignment(side, shapes, layouts, dtype=like.dtype, device=like.device))
        return AlignedFusion(rule, *aligned)


_Side: TypeAlias = tuple[nn.Module, Mapping[str, str]]
"""A module, and the names in it of a neighbour's children where those are others."""


def _readings_of(made: Operator, block: nn.Module, found: Counterparts, sides: Mapping[str, _Side]) -> Readings:
    readings = {}
    for name, source in made.sources.items():
        side, theirs = found[source.path]
        base, names = sides[side]
        *path, leaf = theirs.split(".")
        if path and path[0] in names:
            path[0] = names[path[0]]
        reading, rows = Reading(base, tuple(path), leaf, base.get_submodule(".".join(path))), source.rows
        if rows is not None:  # the value part of a wider or narrower neighbour's fused projection is its own
            own, other = len(block.get_parameter(source.path)), len(reading.tensor())
            rows = (rows[0] * other // own, rows[1] * other // own)
        readings[name] = reading._replace(rows=rows)
    return readings


def _part(shape: torch.Size, rows: tuple[int, int] | None) -> torch.Size:
    return shape if rows is None else torch.Size((rows[1] - rows[0], *shape[1:]))


def _check_finite(blocks: tuple[tuple[str, nn.Module], ...]) -> None:
    for path, block in blocks:
        for name, parameter in block.named_parameters():
            if not is_finite(parameter):
                raise FusionError(
                    f"`{path}.{name}` has weights that are not finite; a fusion would spread them: load sound ones"
                )
