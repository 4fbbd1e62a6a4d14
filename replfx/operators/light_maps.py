"""What a light operator takes over of a residual block: its maps, its normalisation, its activation.

Nothing here looks at names of classes or parameters. Which parameters are value and output map of an attention is
measured on tokens that are all alike: then each gets the values of all, whatever the scores are, so what the output map
gets is what the value map makes, in the order in which the heads are joined and as often as their groups share it.
"""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from replfx.operators.base import Site
from replfx.operators.norms import Norm, first_norm, is_normalised, last_norm, nameless_norm, norm_behind
from replfx.operators.probe import Unmeasured, module_at, rounding_of
from replfx.operators.residual import ACTIVATIONS, Branch, Residual
from replfx.tracing import name_of

__all__ = ["LightMaps", "MapPair", "activation_of", "find_maps", "fits_alone"]

_Values: TypeAlias = dict[fx.Node, Tensor]

_CLOSE = 1e-6
_DRAWS = 4
_LARGE = 16


@dataclass(frozen=True)
class MapPair:
    """A map from d to h channels and one back.

    Attributes:
        first, last: names of the parameters.
        hidden: h.
        rows: the rows of the first that are read; None for all.
        taken: of these rows, the ranges that the last one gets, in its order; None for all as they are.
        columns: those of the two that have an output's weights in a column.
        proven: of tokens that are all alike, the branch computes just these two maps.
    """

    first: str
    last: str
    hidden: int
    rows: tuple[int, int] | None = None
    taken: tuple[tuple[int, int], ...] | None = None
    columns: tuple[str, ...] = ()
    proven: bool = False


@dataclass(frozen=True)
class LightMaps:
    """What `find_maps` found.

    Attributes:
        residual: the block, which can be run.
        depthwise: name of a depthwise kernel that is applied to the activation itself, or None.
        pair: the narrowest pair of maps, or None.
        norm: the normalisation, or None.
        activation: what follows the sum: "module:PATH", "function:NAME" of torch.nn.functional, or None.
    """

    residual: Residual
    depthwise: str | None
    pair: MapPair | None
    norm: Norm | None
    activation: str | None


def find_maps(site: Site) -> LightMaps | str:
    """The maps of the block at `site`, or the reason why it has none that a light operator could use."""
    residual = Residual.of(site)
    if isinstance(residual, str):
        return residual
    try:
        return _dissected(residual)
    except Unmeasured as error:
        reason = str(error)
    try:  # windows that reach over the edges hold padding too; the middle one of a larger picture holds tokens alone
        return _dissected(Residual(site, _larger(residual)))
    except Unmeasured:
        return reason


def _larger(residual: Residual) -> tuple[int, ...]:
    """The shape of a larger picture of the same channels.

    Raises:
        Unmeasured: it is no picture, or it is large enough.
    """
    shape = tuple(residual.probe.x.shape)
    made = tuple(n if d in (0, residual.axis) else n * math.ceil(_LARGE / n) for d, n in enumerate(shape))
    if len(shape) < 4 or made == shape:
        raise Unmeasured("it is no small picture")
    return made


def _dissected(residual: Residual) -> LightMaps:
    """The maps of a residual block.

    Raises:
        Unmeasured: it has none.
    """
    depthwise = _depthwise(residual)
    norms = {branch: _norm_of(branch) for branch in residual.branches if branch.entries}
    activation = _activation(residual.site)
    if depthwise is None:
        branch, pair = _narrowest(residual)
        return LightMaps(residual, None, pair, norms[branch], activation)
    name, node = depthwise
    branch = next(branch for branch in residual.branches if node in branch.nodes)
    return LightMaps(residual, name, None, norm_behind(residual, node) or norms[branch], activation)


def _norm_of(branch: Branch) -> Norm | None:
    """The normalisation of a branch that has one: that through which it gets all, or else the last that it applies.

    Raises:
        Unmeasured: something normalises it that is no module to take over.
    """
    norm = first_norm(branch) or last_norm(branch)
    if norm is None and is_normalised(branch):
        nameless = nameless_norm(branch.residual)
        raise Unmeasured(
            f"it normalises by `{nameless}`, which has no parameters of its own to take over"
            if nameless
            else f"its branch at `{branch.end.name}` is the same at any scale of its input, but no module is its norm"
        )
    return norm


def _activation(site: Site) -> str | None:
    """The activation after the sum.

    Raises:
        Unmeasured: what follows the sum is none.
    """
    node = site.output
    module = module_at(site, node)
    if module is not None:
        return f"module:{site.inside(node)}"
    name = name_of(node).rstrip("_")
    if name == "dropout":
        raise Unmeasured("dropout follows its sum, which only the block itself can do")
    return f"function:{name}" if name in ACTIVATIONS else None


def activation_of(block: nn.Module, name: str | None) -> object:
    """The callable that an `LightMaps.activation` names: a copy of a module, or a function."""
    if name is None:
        return None
    kind, _, where = name.partition(":")
    if kind not in ("module", "function") or (kind == "function" and where not in ACTIVATIONS):
        raise ValueError(f"there is no activation {name!r}")
    return copy.deepcopy(block.get_submodule(where)) if kind == "module" else getattr(F, where)


# ---- the maps


def _depthwise(residual: Residual) -> tuple[str, fx.Node] | None:
    """A kernel (d, 1, k, …) whose module is called on the activation itself, and keeps its shape."""
    site = residual.site
    for node in site.nodes:
        module = module_at(site, node) if node.all_input_nodes == [site.input] else None
        weight = None if module is None else module._parameters.get("weight")
        if weight is not None and weight.dim() >= 3 and tuple(weight.shape[:2]) == (residual.width, 1):
            name = f"{site.inside(node)}.weight"
            if fits_alone(residual, name):
                return name, node
    return None


def fits_alone(residual: Residual, name: str) -> bool:
    """Whether the layer with this kernel keeps the shape of the block's activation; with a stride it does not."""
    layer = residual.probe.block.get_submodule(name.rpartition(".")[0])
    with torch.no_grad():
        try:
            return bool(layer(residual.probe.x).shape == residual.probe.x.shape)
        except (RuntimeError, TypeError):  # no layer of one activation
            return False


def _narrowest(residual: Residual) -> tuple[Branch, MapPair]:
    """The pair of maps to be taken, and its branch: value and output map of an attention, or else the narrowest.

    Of several the narrowest, and of those the first.

    Raises:
        Unmeasured: there is none, or the value map of an attention cannot be told.
    """
    found: list[tuple[Branch, MapPair]] = []
    for branch in reversed(residual.branches):
        pair = _Maps(branch).pair() if branch.entries else None
        if pair is not None:
            found.append((branch, pair))
    if not found:
        raise Unmeasured(_no_pair(residual))
    return min(found, key=lambda each: (not each[1].proven, each[1].hidden))


def _no_pair(residual: Residual) -> str:
    """Why there is no pair of maps: what is last in each branch, and that nothing is seen to be its first."""
    lasts = [last.name for branch in reversed(residual.branches) if branch.entries and (last := _Maps(branch)._last())]
    if not lasts:
        return f"none of its weights is seen to be a map that gives its {residual.width} channels"
    names = " and ".join(f"`{name}`" for name in lasts)
    return (
        f"{names} gives its {residual.width} channels, but no weight is seen to be the one map that makes what it takes"
    )


@dataclass(frozen=True)
class _Reading:
    """A parameter that multiplies channels.

    Attributes:
        name: its own.
        node: what reads it.
        column: it has an output's weights in a column.
        axis: the dimension of what the node gives that holds the outputs, of the last map.
    """

    name: str
    node: fx.Node
    column: bool
    axis: int = -1


class _Maps:
    """The maps of a branch, found by its gradients on tokens that are all alike."""

    def __init__(self, branch: Branch) -> None:
        self.branch, self.residual = branch, branch.residual
        self.probe = branch.residual.probe
        self.norm = first_norm(branch)
        # Numbers that were drawn are apart by about their own size.
        self.close = max(_CLOSE, rounding_of(self.probe.dtype))
        readings = [(name, node) for node in branch.nodes for name, p in self.probe.parameters_at(node) if p.dim() >= 2]
        self.readers: dict[str, fx.Node] = dict(readings)

    def pair(self) -> MapPair | None:
        """The last map of the branch, and the one whose results it gets.

        Raises:
            Unmeasured: several could be the first, or it cannot be told in which order the last takes what it makes.
        """
        last = self._last()
        if last is None:
            return None
        starts = [self._alike() for _ in range(_DRAWS)]
        inner = [self._what_goes_in(last, start) for start in starts]
        firsts = [reading for name in self.readers if (reading := self._as_first(name, last, starts[0])) is not None]
        change = _differences(inner)
        for first in firsts:
            made = self._rows_of(first) @ _differences([self._normalised(start) for start in starts])
            order = _order(change, made, self.close) or self._row_by_row(first, last, len(change), starts[0])
            if order is not None:
                return replace(self._paired(first, last, order, len(made)), proven=True)
        return self._by_width(firsts, last, len(change), starts[0])

    def _row_by_row(self, first: _Reading, last: _Reading, hidden: int, start: _Values) -> list[int] | None:
        """The rows of which each of what the last map gets is a multiple, where heads weigh values in their own way.

        What reaches a row's gradient is scaled as the one input of the last map is that the row makes.
        """
        along, scales = self.probe.draw((self.residual.width,)), torch.linspace(1, 2, hidden, dtype=self.probe.dtype)
        weight = self.probe.block.get_parameter(last.name).detach()
        by_input = scales.unsqueeze(1) if last.column else scales.view(-1, *[1] * (weight.dim() - 2))
        before, after = (
            self._row_gradients(first, last, start, along, weights) for weights in ({}, {last.name: weight * by_input})
        )
        rows = (before.abs() > self.close * before.abs().max()).nonzero().flatten()
        if len(rows) != hidden or not self._is_linear_in(first, last, start):
            return None
        inputs = _order((after[rows] / before[rows]).unsqueeze(1), scales.unsqueeze(1), self.close)
        if inputs is None or len(set(inputs)) != hidden:
            return None
        return [int(rows[inputs.index(place)]) for place in range(hidden)]

    def _row_gradients(
        self, first: _Reading, last: _Reading, start: _Values, along: Tensor, weights: Mapping[str, Tensor]
    ) -> Tensor:
        gradient = self._gradient(first.name, last, start, along, weights)
        assert gradient is not None
        return (gradient.T if first.column else gradient) @ self._normalised(start)

    def _by_width(self, firsts: Sequence[_Reading], last: _Reading, hidden: int, start: _Values) -> MapPair | None:
        """The pair where the branch is no attention: layers with something between that is no matter of order."""
        if self._has_channels_last() and firsts and self.branch.mixes_tokens:
            names = " or ".join(f"`{first.name}`" for first in firsts)
            raise Unmeasured(
                f"which weights of {names} make the values that `{last.name}` takes cannot be told: of tokens that are "
                "all alike it gets something else than what they make"
            )
        fitting = [first for first in firsts if len(self._rows_of(first)) == hidden and self._is_pointwise(first, last)]
        if len(fitting) > 1:
            fitting = [first for first in fitting if self._is_linear_in(first, last, start)]
            if len(fitting) != 1:
                names = ", ".join(f"`{first.name}`" for first in firsts)
                raise Unmeasured(f"which of {names} makes the values that `{last.name}` takes cannot be told")
        return self._paired(fitting[0], last, list(range(hidden)), hidden) if fitting else None

    def _paired(self, first: _Reading, last: _Reading, order: Sequence[int], count: int) -> MapPair:
        columns = tuple(reading.name for reading in (first, last) if reading.column)
        low, high = (0, count) if first.column else (min(order), max(order) + 1)
        ranges = tuple(_ranges([index - low for index in order]))
        return MapPair(
            first.name,
            last.name,
            len(order),
            None if (low, high) == (0, count) else (low, high),
            None if ranges == ((0, high - low),) else ranges,
            columns,
        )

    def _is_pointwise(self, first: _Reading, last: _Reading) -> bool:
        """No kernel that mixes tokens comes before a map that mixes none: their product would be neither."""
        taps, kernel = (self.probe.block.get_parameter(r.name)[0, 0].numel() for r in (first, last))
        return taps == 1 or kernel > 1

    # ---- running the branch

    def _alike(self) -> _Values:
        """Activations of which all tokens are one drawn at random."""
        token = self.probe.draw((self.residual.width,), self.probe.x.dtype)
        start = {}
        for entry, value in self.branch.inputs.items():
            shape = [1] * value.dim()
            shape[self.residual.axis_of(entry)] = -1
            start[entry] = token.view(shape).expand_as(value).clone()
        return start

    def _normalised(self, start: _Values) -> Tensor:
        """What the maps get of such a token."""
        entry = self.branch.entries[0]
        value, axis = start[entry], self.residual.axis_of(entry)
        if self.norm is not None:
            module = self.probe.block.get_submodule(self.norm.path).eval()
            with torch.no_grad():
                value = module(value.movedim(axis, -1)).movedim(-1, axis) if self.norm.last_dim else module(value)
        return value.movedim(axis, -1).flatten(0, -2)[0]

    def _has_channels_last(self) -> bool:
        entry = self.branch.entries[0]
        return bool(self.residual.axis_of(entry) == self.residual.values[entry].dim() - 1)

    def _rows_of(self, reading: _Reading) -> Tensor:
        """A map with a row for each output; of a kernel with the sum of its taps."""
        weight = self.probe.block.get_parameter(reading.name).detach()
        weight = weight if weight.dim() == 2 else weight.flatten(2).sum(2)
        return weight.T if reading.column else weight

    def _gradient(
        self, name: str, last: _Reading, start: _Values, along: Tensor, weights: Mapping[str, Tensor] | None = None
    ) -> Tensor | None:
        """The gradient, for a parameter, of what the last map gives for one token along a direction of its channels.

        It is a token in the middle: what a block pads its activation with is another one than all the others.
        """
        parameter = self.probe.block.get_parameter(name)
        with torch.enable_grad():
            made = self.branch.gives(start, watch=[last.node], weights=weights)[last.node]
            tokens = made.movedim(last.axis, -1)
            token = tokens[tuple(size // 2 for size in tokens.shape[:-1])]
            (gradient,) = torch.autograd.grad((token * along).sum(), [parameter], allow_unused=True)
        return None if gradient is None else gradient if gradient.dim() == 2 else gradient.flatten(2).sum(2)

    def _last(self) -> _Reading | None:
        """The last parameter of the branch that maps to the channels of the activation, tokens apart."""
        start, along = self._alike(), self.probe.draw((self.residual.width,))
        values = self.branch.gives(start, watch=self.branch.nodes)
        for name, reader in reversed(self.readers.items()):
            for node in (reader, *reader.users):  # a module that is called whole may give more than one result
                made = values.get(node)
                if not isinstance(made, Tensor) or made.numel() != self.probe.x.numel():
                    continue
                for axis in self.residual.axes_of(made):
                    last = _Reading(name, node, column=False, axis=axis)
                    gradient = self._gradient(name, last, start, along)
                    column = None if gradient is None else _column(gradient, along, self.close, outward=True)
                    if column is not None:
                        return replace(last, column=column)
        return None

    def _what_goes_in(self, last: _Reading, start: _Values) -> Tensor:
        """What the last map gets: its gradient is that, times the direction."""
        along = self.probe.draw((self.residual.width,))
        gradient = self._gradient(last.name, last, start, along)
        assert gradient is not None
        return (gradient if last.column else gradient.T) @ along / (along @ along)

    def _as_first(self, name: str, last: _Reading, start: _Values) -> _Reading | None:
        """The parameter as a map that is applied to the normalised activation and changes what the last one gets."""
        if name == last.name:
            return None
        gradient = self._gradient(name, last, start, self.probe.draw((self.residual.width,)))
        if gradient is None or gradient.abs().max() < self.close:
            return None
        column = _column(gradient, self._normalised(start), self.close, outward=False)
        return None if column is None else _Reading(name, self.readers[name], column)

    def _is_linear_in(self, first: _Reading, last: _Reading, start: _Values) -> bool:
        """Whether what the last map gives is linear in the first one: the gate of a gated MLP is not."""
        weight = self.probe.block.get_parameter(first.name).detach()
        step = self.probe.draw(weight.shape)
        with torch.no_grad():
            made = [
                self.branch.gives(start, watch=[last.node], weights={first.name: weight + count * step})[last.node]
                for count in range(3)
            ]
        return torch.allclose(made[1] - made[0], made[2] - made[1], rtol=self.close, atol=self.close)


def _column(gradient: Tensor, vector: Tensor, close: float, *, outward: bool) -> bool | None:
    """Whether a map whose gradient is an outer product with a vector has its outputs in columns; None for no such map.

    Args:
        gradient: for the map.
        vector: of its outputs' gradient, or of its inputs.
        close: how far apart the two may be, as a share of the largest.
        outward: which of the two.
    """
    for column in (False, True):
        by_rows = gradient.T if outward != column else gradient
        if by_rows.shape[1] != len(vector):
            continue
        other = by_rows @ vector / (vector @ vector)
        if torch.allclose(torch.outer(other, vector), by_rows, rtol=close, atol=close * float(by_rows.abs().max())):
            return column
    return None


def _differences(vectors: Sequence[Tensor]) -> Tensor:
    """The vectors but the first, less the first, in columns: what is added to all of them, as a bias is, is gone."""
    return torch.stack([vector - vectors[0] for vector in vectors[1:]], 1)


def _order(taken: Tensor, made: Tensor, close: float) -> list[int] | None:
    """Which row of `made` each row of `taken` is; None if one of them is none.

    Of thousands of numbers some are closer to each other than rounding is: the columns together tell them apart.
    """
    reach = close * float(made.abs().max())
    values, indices = made[:, 0].contiguous().sort()
    start = torch.searchsorted(values, taken[:, 0] - reach)
    stop = torch.searchsorted(values, taken[:, 0] + reach, right=True)
    if bool((start == stop).any()):
        return None
    nearest, distance = start, torch.full_like(taken[:, 0], torch.inf)
    for step in range(int((stop - start).max())):
        place = torch.minimum(start + step, stop - 1)
        apart = (made[indices[place]] - taken).abs().amax(1)
        nearest, distance = torch.where(apart < distance, place, nearest), torch.minimum(apart, distance)
    return None if bool((distance > reach).any()) else [int(index) for index in indices[nearest]]


def _ranges(order: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Indices as runs from start to stop."""
    start = previous = order[0]
    for index in order[1:]:
        if index != previous + 1:
            yield start, previous + 1
            start = index
        previous = index
    yield start, previous + 1
