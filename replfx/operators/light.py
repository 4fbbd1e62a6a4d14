"""The light operator: one residual synthesised map in place of a whole residual block. All formulas are ours.

Which map is read off the block's structure, not its class:

- `depthwise` (ConvNeXt): the block has a depthwise kernel D on its activation's own d channels;
  y = x + N(D ∗ x).
- `conv` (basic ResNet block): the residual branch ends in a k×k convolution K from d to d channels;
  y = φ(x + N(K ∗ x)).
- `product` (pre-norm transformer blocks, bottleneck and inverted residual blocks): a map W_in of d to h
  channels, later followed by W_out back to d. In an attention these are W_V and W_O, the path that a token
  takes if all tokens are alike; in a bottleneck the two 1×1 convolutions; in an MLP W_1 and W_2. An attention's
  pair is taken before an MLP's, else that with the smallest h. Where the block's normalisation follows its maps,
  y = φ(x + N(W_out W_in x)); where it comes first, y = φ(x + g ⊙ (W_out W_in N(x)) + c). Where several heads share a
  value, W_in has its rows as often as they do; `replfx.operators.light_maps` says how value and output map are found.

N is the block's own normalisation, φ its own activation after the sum (nothing where it has none), g and c
are own vectors of length d, and D, K, W are synthesised from both neighbours. Where 2h > d, W_out W_in is
formed once a call as one d×d matrix: for more tokens than channels that is fewer operations than two maps.
A block with LayerScale loses it: g takes its place.
"""

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from replfx.errors import FusionError
from replfx.fusion.interface import Interface
from replfx.fusion.pairing import pair
from replfx.fusion.sharded import linear
from replfx.modules.copying import structural_copy
from replfx.operators.base import Match, Operator, Site, Source, operators
from replfx.operators.light_fold import light_fold, restore_light
from replfx.operators.light_maps import activation_of, find_maps
from replfx.operators.light_recipe import LightRecipe
from replfx.operators.plain import plain_module
from replfx.tracing.symbolic import is_leaf

__all__ = ["LightOperator"]

_CONVOLUTIONS = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


@operators.register("light")
class LightOperator(Operator):
    """One residual synthesised map; the module's docstring has the formulas.

    Args:
        block, interface: as for every operator.
        initial_gain: start of all g; where N follows the map and there is no g, the factor on N's own weight at
            the start. A small one starts the block near the identity, which trained better than 1 in our trials.
        **options: the fields of `LightRecipe`, found by `match`.
    """

    matches_by_structure = True

    def __init__(self, block: nn.Module, interface: Interface, *, initial_gain: float = 0.1, **options: Any) -> None:
        super().__init__(block, interface)
        self.recipe = recipe = LightRecipe.read(options)
        first, *rest = recipe.maps
        self.sources = {first: Source(first, recipe.rows), **{name: Source(name) for name in rest}}
        weight = block.get_parameter(recipe.maps[-1])
        self.dims = weight.dim() if recipe.dims is None else recipe.dims
        self.linear = self.dims == 2  # the activation has its channels last
        if recipe.rows and recipe.rows[1] > len(block.get_parameter(first)):
            raise FusionError(f"`{first}` has {len(block.get_parameter(first))} rows, rows={list(recipe.rows)}")
        self.norm = None if recipe.norm is None else structural_copy(block.get_submodule(recipe.norm))
        if self.norm is not None and not recipe.norm_first:
            _scale_weight(self.norm, initial_gain)
        self.activation: Any = activation_of(block, recipe.activation)
        owner, _, self.leaf = first.rpartition(".")
        self.map = None
        if recipe.kind != "product":  # the convolution without its kernel: stride, padding, dilation, bias are its own
            self.map = structural_copy(block.get_submodule(owner))
            self.map._parameters[self.leaf] = None
        own = recipe.kind == "product" and (recipe.norm_first or self.norm is None)
        width = weight.shape[1 if recipe.maps[-1] in recipe.columns else 0]
        start = torch.full((width,), float(initial_gain), dtype=weight.dtype, device=weight.device)
        self.gain = nn.Parameter(start) if own else None
        self.bias = nn.Parameter(torch.zeros_like(start)) if own else None

    @classmethod
    def match(cls, site: Site) -> Match:
        maps = find_maps(site)
        if isinstance(maps, str):
            return Match(reason=maps)
        if site.interface.computed() or len(site.interface.inputs) != 1:
            return Match(reason="it gives more than one activation")
        recipe = LightRecipe.choose(maps, site.block)
        if isinstance(recipe, str):
            return Match(reason=recipe)
        lacking = sorted(set(recipe.maps) & set(site.without_counterpart()))
        if lacking:
            return Match(reason=f"neither neighbour has its like of `{lacking[0]}`")
        if unlike := _unlike_parts(site, recipe):
            return Match(reason=unlike)
        return Match(asdict(replace(recipe, fold=light_fold(maps.residual, recipe))))

    def forward(self, theta: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = self.interface.activation(args, kwargs)
        y = _residual(x, self.recipe, self.norm, lambda h: self._apply_maps(h, theta), self.activation)
        return self.interface.result(args, kwargs, y)

    def mapped(self, x: Tensor, theta: dict[str, Tensor], *, normalised: bool) -> Tensor:
        """What the maps make of the activation, without bias and gain; through N where it comes first.

        Args:
            x: the main activation.
            theta: the synthesised parameters.
            normalised: through N too where it comes after the maps.
        """
        h = _normalise(x, self.recipe, self.norm) if self.recipe.norm_first else x
        if self.map is not None:
            bias = self.map.bias
            none = {"bias": torch.zeros_like(bias)} if isinstance(bias, Tensor) else {}
            h = self._convolve(self.map, h, theta, **none)
        else:
            for name in self.recipe.maps:
                h = self._apply_matrix(h, self.recipe.matrix(name, theta[name]), None)
        return _normalise(h, self.recipe, self.norm) if normalised and not self.recipe.norm_first else h

    def _convolve(self, bare: nn.Module, h: Tensor, theta: dict[str, Tensor], **own: Tensor) -> Tensor:
        if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            # It finds no weights but those that modules own.
            raise FusionError(
                f"torch.jit.trace cannot follow a {type(bare).__name__} that runs with synthesised weights in the "
                "place of a block: trace replfx.materialize(model)"
            )
        weights = {self.leaf: theta[self.recipe.maps[0]], **own}
        made: Tensor = torch.func.functional_call(bare, weights, (h,), tie_weights=False)
        return made

    def _apply_maps(self, h: Tensor, theta: dict[str, Tensor]) -> Tensor:
        if self.map is not None:
            return self._convolve(self.map, h, theta)
        *before, last = self.matrices(theta)
        for matrix in before:
            h = self._apply_matrix(h, matrix, None)
        return self._apply_matrix(h, last, self.bias)

    def factors(self, theta: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """W_in (h, d) and g ⊙ W_out (d, h)."""
        inward, outward = (self.recipe.matrix(name, theta[name]) for name in self.recipe.maps)
        return inward, outward if self.gain is None else self.gain.unsqueeze(1) * outward

    def matrices(self, theta: dict[str, Tensor]) -> list[Tensor]:
        """The maps as they are applied in turn: the product as one d×d matrix if 2h > d, else both."""
        inward, outward = self.factors(theta)
        return [outward @ inward] if 2 * inward.shape[0] > inward.shape[1] else [inward, outward]

    def _apply_matrix(self, h: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
        if self.linear:
            return linear(h, matrix, bias)
        return _CONVOLUTIONS[h.dim()](h, matrix.view(*matrix.shape, *[1] * (h.dim() - 2)), bias)

    def restore(self, theta: dict[str, Tensor], block: nn.Module, inputs: Tensor | None) -> None:
        if isinstance(self.recipe.fold, str):
            raise FusionError(f"the light operator cannot go back into the full block: {self.recipe.fold}")
        restore_light(self, self.recipe.fold, theta, block, inputs)

    def plain(self, theta: dict[str, Tensor]) -> nn.Module:
        if self.map is not None:
            self.map._parameters[self.leaf] = nn.Parameter(theta[self.recipe.maps[0]])
            maps: list[nn.Module] = [self.map]
        else:
            *before, last = self.matrices(theta)
            maps = [*(_plain_map(matrix, None, self.dims) for matrix in before), _plain_map(last, self.bias, self.dims)]
        body = _Body(self.recipe, self.norm, nn.Sequential(*maps), self.activation)
        graph = fx.Graph()  # a fresh one: the traced one would carry our tracer's class into every pickle
        graph.output(graph.graph_copy(_LeafTracer().trace(body), {}))
        return plain_module(fx.GraphModule(body, graph, "Light"), self.interface)


def _unlike_parts(site: Site, recipe: LightRecipe) -> str | None:
    """Why the parts of W_in that are taken are not known in a neighbour's; of thirds, the last is the last of all."""
    name, rows = recipe.maps[0], recipe.rows
    own = site.block.get_parameter(name).shape
    third = rows is None or (3 * rows[0] == 2 * own[0] and rows[1] == own[0])
    if recipe.taken is None and third:
        return None
    for side in (site.previous, site.next):
        theirs = None if side is None else pair(site.block, side).get(name)
        if side is not None and theirs is not None and side.get_parameter(theirs).shape != own:
            return f"which part of a neighbour's `{theirs}` makes its values is not known: it has another shape"
    return None


def _scale_weight(norm: nn.Module, factor: float) -> None:
    """Give the normalisation a weight of its own, `factor` times the one that it shares with the block."""
    weight = norm._parameters.get("weight")
    if weight is not None:
        norm._parameters["weight"] = nn.Parameter(weight.detach() * factor, requires_grad=weight.requires_grad)


def _residual(
    x: Tensor,
    recipe: LightRecipe,
    norm: nn.Module | None,
    maps: Callable[[Tensor], Tensor],
    activation: Callable[[Tensor], Tensor] | None,
) -> Tensor:
    """Y = φ(x + maps(N(x))) or φ(x + N(maps(x)))."""
    h = maps(_normalise(x, recipe, norm)) if recipe.norm_first else _normalise(maps(x), recipe, norm)
    return x + h if activation is None else activation(x + h)


def _normalise(x: Tensor, recipe: LightRecipe, norm: nn.Module | None) -> Tensor:
    if norm is None:
        return x
    normed: Tensor = norm(x.movedim(1, -1)).movedim(-1, 1) if recipe.norm_last_dim else norm(x)
    return normed


def _plain_map(matrix: Tensor, bias: Tensor | None, dims: int) -> nn.Module:
    """A 1×1 map of torch.nn with these weights."""
    rows, columns = matrix.shape
    layer: Any = {2: nn.Linear, 3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[dims]
    sizes = (columns, rows) if dims == 2 else (columns, rows, 1)
    made: nn.Module = layer(*sizes, bias=bias is not None, device="meta")
    made._parameters["weight"] = nn.Parameter(matrix.view(*matrix.shape, *[1] * (dims - 2)))
    if bias is not None:
        made._parameters["bias"] = nn.Parameter(bias.detach())
    return made


class _Body(nn.Module):
    """A light operator with weights of its own, to be traced into a plain GraphModule."""

    def __init__(self, recipe: LightRecipe, norm: nn.Module | None, maps: nn.Module, activation: Any) -> None:
        super().__init__()
        self.recipe, self.norm, self.maps, self.activation = recipe, norm, maps, activation

    def forward(self, x: Tensor) -> Tensor:
        return _residual(x, self.recipe, self.norm, self.maps, self.activation)


class _LeafTracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_leaf(m)
