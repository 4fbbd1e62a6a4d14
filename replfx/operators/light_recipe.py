"""What a light operator is made of: which maps of a block, which rows of them, and where its normalisation comes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias

import torch
from torch import Tensor, nn

from replfx.errors import FusionError
from replfx.operators.folding import Fold
from replfx.operators.light_maps import LightMaps, fits_alone
from replfx.plain_data import Rule, read_dataclass

__all__ = ["LightRecipe"]

_KINDS = ("depthwise", "conv", "product")
_Range: TypeAlias = Annotated[tuple[int, int], Rule("a range of rows", lambda rows: 0 <= rows[0] < rows[1])]


@dataclass(frozen=True)
class LightRecipe:
    """What a light operator is made of; plain data that travels in a plan.

    Attributes:
        kind: which of the three formulas.
        maps: names of the synthesised parameters: (kernel,) or (W_in, W_out).
        rows: rows of W_in that are synthesised: the value part of a fused query-key-value projection.
        taken: of these rows, the ranges that W_out takes, in its order; None for all as they are.
        columns: those of the maps that have an output's weights in a column.
        dims: of a product, dimensions of the activation if it has its channels second, or 2 if it has them last;
            None in older plans, where it is as many as the last map has.
        norm: path of the normalisation N in the block, or None.
        norm_first: N comes before the map.
        norm_last_dim: N wants channels last although the activation has them second.
        activation: φ, as `LightMaps.activation` names it.
        fold: where the map goes when the full block is given back, or why it has no place there.
    """

    kind: str
    maps: tuple[str, ...]
    rows: _Range | None
    norm: Annotated[str | None, Rule("a path in the block", lambda path: path != "")]
    norm_first: bool
    norm_last_dim: bool
    activation: str | None
    taken: tuple[_Range, ...] | None = None
    columns: tuple[str, ...] = ()
    dims: int | None = None
    fold: Fold | str = "its plan was made before light operators could be unrolled"

    @classmethod
    def read(cls, options: Mapping[str, Any]) -> "LightRecipe":
        """From a plan's JSON.

        Raises:
            PlanError: it is not a recipe.
            FusionError: there is no such operator.
        """
        recipe = read_dataclass(cls, options, "what it is made of")
        if recipe.kind not in _KINDS or len(recipe.maps) != 1 + (recipe.kind == "product"):
            raise FusionError(f"the light operator has no kind {recipe.kind!r} with {len(recipe.maps)} maps")
        return recipe

    @classmethod
    def choose(cls, maps: LightMaps, block: nn.Module) -> "LightRecipe | str":
        """The formula for a block, or why there is none."""
        norm, pair, residual = maps.norm, maps.pair, maps.residual
        path, first, last_dim = (norm.path, norm.first, norm.last_dim) if norm else (None, False, False)
        rest = path, first, last_dim, maps.activation
        if maps.depthwise is not None:
            return cls("depthwise", (maps.depthwise,), None, *rest)
        assert pair is not None  # find_maps gives one or the other
        taps = block.get_parameter(pair.last)[0, 0].numel()
        if residual.axis != 1 and (taps > 1 or not residual.linear):
            return f"`{pair.last}` takes channels elsewhere than in dimension {residual.axis}, where the block has them"
        if taps > 1:
            if block.get_parameter(pair.last).shape[:2] != (residual.width, residual.width):
                return f"its map `{pair.last}` is grouped"
            if not fits_alone(residual, pair.last):
                return f"the layer of its map `{pair.last}` gives an activation of another shape than the block's"
            return cls("conv", (pair.last,), None, *rest)
        dims = 2 if residual.linear else residual.probe.x.dim()
        return cls("product", (pair.first, pair.last), pair.rows, *rest, pair.taken, pair.columns, dims)

    def matrix(self, name: str, weight: Tensor) -> Tensor:
        """A map with a row for each output: of W_in those that W_out takes, in its order."""
        rows = weight.T if name in self.columns else weight.flatten(1)
        if self.taken is None or name != self.maps[0]:
            return rows
        return torch.cat([rows[start:stop] for start, stop in self.taken])
