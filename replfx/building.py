"""Building: from a plan to fusion layers. Needs no graph."""

from collections.abc import Mapping

import torch
from torch import nn

from replfx.blocks import block_at
from replfx.errors import FusionError, PlanError, of_options
from replfx.fusion import Fusion, FusionLayer, Operator, fusions, operators
from replfx.fusion.alignment import AlignedFusion, Alignment, layout_of
from replfx.fusion.layer import Readings
from replfx.fusion.magnitude import is_finite
from replfx.fusion.pairing import Counterparts, counterparts, pair
from replfx.plans import Plan, Replacement
from replfx.state import fusion_layers
from replfx.structure import block_digest

__all__ = ["build_layers"]


def build_layers(model: nn.Module, plan: Plan, blocks: Mapping[str, nn.Module] | None = None) -> dict[str, FusionLayer]:
    """Make the fusion layers of `plan` for `model`, without putting them there.

    Args:
        model: the model of the plan.
        plan: what to replace.
        blocks: the blocks by their paths, for those that are no modules of the model.

    Returns:
        The layers, by the paths of the blocks that they replace.

    Raises:
        PlanError: the plan was made for another model, or the model is transformed already.
        FusionError: an unknown fusion or operator, options that it does not have, non-finite weights.
    """
    for path in fusion_layers(model):
        raise PlanError(
            f"the model is transformed already: `{path}` is a fusion layer; "
            "transform the original model, or call replfx.materialize or replfx.unroll first"
        )
    replaced = {replacement.path for replacement in plan.replacements}
    return {r.path: _Builder(model, plan.model, replaced, blocks or {}, r).build() for r in plan.replacements}


class _Builder:
    """Builds the layer of one replacement."""

    def __init__(
        self,
        model: nn.Module,
        made_for: str,
        replaced: set[str],
        blocks: Mapping[str, nn.Module],
        replacement: Replacement,
    ) -> None:
        self.model, self.made_for, self.replaced, self.blocks = model, made_for, replaced, blocks
        self.replacement = replacement
        self.path = replacement.path

    def build(self) -> FusionLayer:
        replacement, path = self.replacement, self.path
        block = self._block(path, replacement.kind)
        made = self._operator(block)
        if not made.sources and made.needs_neighbours:
            raise FusionError(
                f"`{path}`: operator {replacement.operator.name!r} has nothing to synthesise: all weights of the block "
                "stay its own, because neither neighbour has their like or the model reads them itself"
            )
        if not made.sources:
            return FusionLayer(made, None, None, replaced=block)
        if replacement.previous is None or replacement.next is None:
            raise PlanError(f"`{path}`: operator {replacement.operator.name!r} needs two neighbours, the plan has none")
        for side in (replacement.previous, replacement.next):
            if side in self.replaced:
                raise PlanError(f"`{path}`: its neighbour `{side}` is replaced in the same plan")
        previous = self._block(replacement.previous, replacement.previous_kind)
        next = self._block(replacement.next, replacement.next_kind)
        _check_finite(((replacement.previous, previous), (path, block), (replacement.next, next)))
        if not 0 <= replacement.neighbour_gradient <= 1:
            raise PlanError(f"`{path}`: neighbour_gradient={replacement.neighbour_gradient} is not between 0 and 1")
        readings = self._readings(made, block, previous, next)
        fusion = self._fusion(made, block, readings)
        return FusionLayer(
            made,
            fusion,
            readings,
            neighbour_gradient=replacement.neighbour_gradient,
            replaced=block,
            neighbours=(previous, next),
            places=(replacement.previous, replacement.next),
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
        except (TypeError, AttributeError, ValueError) as error:
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
        sides = {"previous": previous, "next": next}
        return _readings_of(made, block, before, sides), _readings_of(made, block, after, sides)

    def _fusion(self, made: Operator, block: nn.Module, readings: tuple[Readings, Readings]) -> Fusion:
        choice = self.replacement.fusion
        like = next(block.parameters())
        shapes = {
            name: _part(_parameter(block, source.path).shape, source.rows) for name, source in made.sources.items()
        }
        try:
            rule = fusions[choice.name](shapes, dtype=like.dtype, device=like.device, **choice.options)
        except TypeError as error:
            raise FusionError(
                f"`{self.path}`: fusion {choice.name!r} does not take the options {dict(choice.options)}: "
                f"{of_options(error)}"
            ) from error
        sides = [{n: _part(_read(o, leaf).shape, rows) for n, (o, leaf, rows) in side.items()} for side in readings]
        if sides == [shapes, shapes]:
            return rule
        owners = {name: block.get_submodule(s.path.rpartition(".")[0]) for name, s in made.sources.items()}
        aligned = []
        for side, read in zip(sides, readings, strict=True):
            layouts = {n: layout_of(read[n][0], owners[n], side[n], shape) for n, shape in shapes.items()}
            aligned.append(Alignment(side, shapes, layouts, dtype=like.dtype, device=like.device))
        return AlignedFusion(rule, *aligned)


def _readings_of(made: Operator, block: nn.Module, found: Counterparts, sides: Mapping[str, nn.Module]) -> Readings:
    readings = {}
    for name, source in made.sources.items():
        side, theirs = found[source.path]
        path, _, leaf = theirs.rpartition(".")
        owner, rows = sides[side].get_submodule(path), source.rows
        if rows is not None:  # the value part of a wider or narrower neighbour's fused projection is its own
            own, other = len(_parameter(block, source.path)), len(_read(owner, leaf))
            rows = (rows[0] * other // own, rows[1] * other // own)
        readings[name] = (owner, leaf, rows)
    return readings


def _read(owner: nn.Module, leaf: str) -> torch.Tensor:
    value = getattr(owner, leaf)
    assert isinstance(value, torch.Tensor)
    return value


def _parameter(block: nn.Module, path: str) -> nn.Parameter:
    return block.get_parameter(path)


def _part(shape: torch.Size, rows: tuple[int, int] | None) -> torch.Size:
    return shape if rows is None else torch.Size((rows[1] - rows[0], *shape[1:]))


def _check_finite(blocks: tuple[tuple[str, nn.Module], ...]) -> None:
    for path, block in blocks:
        for name, parameter in block.named_parameters():
            if not is_finite(parameter):
                raise FusionError(
                    f"`{path}.{name}` has weights that are not finite; a fusion would spread them: load sound ones"
                )
