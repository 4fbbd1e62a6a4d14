"""A residual block: its sum, the branches that are added to its input, and what each of them does.

Used by the operators `light`, `mixer` and `identity`. That the block is residual is read off its graph: its output is
a sum that has the input itself as a term. All else is measured, by running the block alone (`replfx.operators.probe`).
"""

import copy
import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Set
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn

from replfx.modules.structure import is_placeholder_module
from replfx.operators.base import Site
from replfx.operators.probe import (
    Probe,
    Unmeasured,
    activations_of,
    is_cast,
    is_layout,
    module_at,
    number_of,
    rounding_of,
)
from replfx.tracing import name_of

__all__ = [
    "ACTIVATIONS",
    "Branch",
    "Residual",
    "gives",
    "is_passing",
    "is_residual",
    "is_sum",
    "keeps_shape",
    "not_residual",
]

_SUMS = (operator.add, operator.iadd, torch.add, "add", "add_", "__add__", "__iadd__", "__radd__")
ACTIVATIONS = ("relu", "relu6", "gelu", "silu", "hardswish")  # of torch.nn.functional


# ---- the sum, as the graph has it


def not_residual(site: Site) -> str:
    """What to say of a block that is not."""
    module = module_at(site, site.output) if site.output in site.nodes else None
    if module is not None and number_of(module) and (module._modules or len(site.output.all_input_nodes) > 1):
        return f"it is not seen to be residual: {_called_whole(site.inside(site.output))}"
    slot = site.interface.main
    which = "its own input" if slot == "0" else f"its input `{slot}`, which comes from the block before,"
    return f"it is not residual: its output is not a sum with {which} as a term"


def _called_whole(path: str) -> str:
    if path:
        return f"its output comes from `{path}`, which is called whole"
    return "it is called whole, as its code branches on `training` or is compiled"


def is_residual(site: Site, *, layouts: bool = True) -> bool:
    """Whether the block is a sum that has its own input as a term, before an activation or not.

    Args:
        site: the block.
        layouts: it may lay its activation out anew before, or give it in another type.
    """
    node = _behind(site, site.output, layouts)
    if not is_sum(node) and _is_elementwise(site, node):
        node = _behind(site, activations_of(node)[0], layouts)
    pending = [node] if is_sum(node) and node in site.nodes else []
    while pending:
        for term in pending.pop().all_input_nodes:
            term = _behind(site, term, layouts)
            if term is site.input:
                return True
            if is_sum(term) and term in site.nodes:
                pending.append(term)
    return False


def _behind(site: Site, node: fx.Node, layouts: bool) -> fx.Node:
    """What is before modules that do nothing, and where layouts don't matter before these, casts and dropout."""
    while node in site.nodes and (
        type(module_at(site, node)) is nn.Identity or (layouts and (is_passing(site, node) or is_cast(node)))
    ):
        node = activations_of(node)[0]
    return node


def keeps_shape(site: Site) -> bool:
    """Whether the block keeps its activation's shape, as far as that can be told without knowing the shape.

    A residual block does if nothing in it lays its activation out anew; so does a window whose one layer maps as many
    channels as it gives, at stride 1.
    """
    if is_residual(site, layouts=False):
        return True
    layers = [m for m in site.block.modules() if any(p.dim() >= 2 for p in m._parameters.values() if p is not None)]
    if len(layers) != 1:
        return False
    (layer,) = layers
    inward, outward = (
        getattr(layer, f"{way}_features", getattr(layer, f"{way}_channels", None)) for way in ("in", "out")
    )
    return inward is not None and inward == outward and set(getattr(layer, "stride", (1,))) == {1}


def is_sum(node: fx.Node) -> bool:
    """Whether it adds."""
    return node.target in _SUMS


def _is_elementwise(site: Site, node: fx.Node) -> bool:
    """Whether it is an activation, dropout, or another function of one tensor without weights that keeps its shape."""
    if node not in site.nodes or len(activations_of(node)) != 1 or node.op == "get_attr":
        return False
    module = module_at(site, node)
    if module is not None:
        return number_of(module) == 0 and next(module.buffers(), None) is None and bool(site.inside(node))
    return name_of(node).rstrip("_") in (*ACTIVATIONS, "dropout")


# ---- its parts


@dataclass(frozen=True, eq=False)
class Branch:
    """What is added to the activation on its way through the block.

    Attributes:
        residual: the block.
        end: the node that is added.
        nodes: those that lead to it from the main path, in the order of the graph.
    """

    residual: "Residual"
    end: fx.Node
    nodes: tuple[fx.Node, ...]

    @cached_property
    def entries(self) -> list[fx.Node]:
        """The nodes of the main path that it reads, in the order in which it does."""
        read = (term for node in self.nodes for term in node.all_input_nodes)
        return list(dict.fromkeys(term for term in read if term in self.residual.main))

    @property
    def inputs(self) -> dict[fx.Node, Tensor]:
        """The values of its entries."""
        return {entry: self.residual.values[entry] for entry in self.entries}

    def gives(
        self,
        inputs: Mapping[fx.Node, Tensor] | None = None,
        *,
        watch: Collection[fx.Node] = (),
        training: bool = False,
        weights: Mapping[str, Tensor] | None = None,
    ) -> dict[fx.Node, Any]:
        """The values of its end, and of what is watched, where its entries have those of `inputs`."""
        start = self.inputs if inputs is None else inputs
        return self.residual.probe.replay(self.nodes, start, {self.end, *watch}, training=training, weights=weights)

    @cached_property
    def mixes_tokens(self) -> bool:
        """Whether a change of one token of its input reaches others.

        Raises:
            Unmeasured: its input has one token alone.
        """
        axes = {entry: self.residual.axis_of(entry) for entry in self.entries}
        with torch.no_grad():
            made = self.gives()[self.end]
            ending = self.residual.likely_axis(made, axes[self.entries[-1]])
            base = self._tokens(made, ending)
            count = len(self._tokens(self.inputs[self.entries[0]], axes[self.entries[0]]))
            if count < 2:
                raise Unmeasured(
                    "of one token alone nothing tells whether it reaches others; give example_inputs of more"
                )
            if len(base) != count:
                return True
            for position in sorted({0, count // 2, count - 1}):
                changed = {entry: self._changed(value, axes[entry], position) for entry, value in self.inputs.items()}
                # Experts get other numbers of tokens then, and what sums these up rounds in another way.
                moved = (self._tokens(self.gives(changed)[self.end], ending) - base).abs()
                apart = (moved > rounding_of(self.residual.probe.dtype) * base.abs().max()).any(1)
                apart[position] = False
                if bool(apart.any()):
                    return True
        return False

    def _tokens(self, value: Tensor, axis: int) -> Tensor:
        """The tokens of an activation as rows."""
        moved = value.movedim(axis, -1)
        return moved.reshape(-1, moved.shape[-1])

    def _changed(self, value: Tensor, axis: int, position: int) -> Tensor:
        moved = value.movedim(axis, -1).clone(memory_format=torch.contiguous_format)
        rows = moved.view(-1, moved.shape[-1])
        rows[position] = self.residual.probe.draw((rows.shape[1],), rows.dtype)
        return moved.movedim(-1, axis)


class Residual:
    """A residual block that can be run alone.

    Args:
        site: the block, of which `is_residual` holds.
        shape: of the activation to run it on; without it the one that the graph knows.

    Attributes:
        main: the nodes on the way from its input to its output.
        branches: what is added there, the last first.
        probe: runs it.
        axis: the dimension of its activation that holds channels.
        values: of the nodes of `main`, in one run.

    Raises:
        Unmeasured: it does not run alone.
    """

    def __init__(self, site: Site, shape: tuple[int, ...] | None = None) -> None:
        self.site = site
        self.main, ends = _way_through(site)
        self.branches = [Branch(self, end, _cone(site, end, self.main)) for end in ends]
        self.probe = Probe(site, shape)
        with torch.no_grad():
            self.values = self.probe.run(watch={*self.main, *ends})
        self.values[site.input] = self.probe.x
        self._axes: dict[fx.Node, int] = {}
        for end in ends:
            if isinstance(made := self.values[end], Tensor) and end not in self.main and not made.any():
                raise Unmeasured(f"what it adds at `{end.name}` is all zeros, on weights and inputs drawn at random")

    @classmethod
    def of(cls, site: Site) -> "Residual | str":
        """Read the block, or say why it can't be read."""
        if is_placeholder_module(site.block):
            return "its layers are functions in Dynamo's graph, and this operator takes over modules"
        if not is_residual(site):
            return not_residual(site)
        try:
            return cls(site)
        except Unmeasured as error:
            return f"it could not be run alone to see what its parts do: {error}"

    @property
    def width(self) -> int:
        """Channels of its activation."""
        return self.probe.x.shape[self.axis]

    @property
    def linear(self) -> bool:
        """Whether they are its last dimension."""
        return self.axis == self.probe.x.dim() - 1

    @cached_property
    def axis(self) -> int:
        """The dimension along which a norm's or a bias's weights act, or else along which a map gives its outputs.

        Raises:
            Unmeasured: no parameter tells.
        """
        read = [(node, *pair) for node in self.site.nodes for pair in self.probe.parameters_at(node)]
        for vectors in (True, False):
            for node, name, parameter in read:
                if (parameter.dim() == 1) is vectors and (found := self._axis_by(node, name, parameter)) is not None:
                    return found
        raise Unmeasured("none of its parameters tells which dimension of its activation holds the channels")

    def _axis_by(self, node: fx.Node, name: str, parameter: Tensor) -> int | None:
        """The dimension of the block's activation along which a parameter's entries act where a node reads it."""
        fitting = [axis for axis, size in enumerate(self.probe.x.shape) if axis and size == len(parameter)]
        if not fitting:
            return None
        way = self.site.input
        for branch in self.branches:
            if node in branch.nodes and branch.entries:
                way = branch.entries[0]
        found = self._axis_at(node, name, parameter, self.values[way].shape)
        leading = [axis for axis in fitting if found is not None and self._carried(way, axis) == found]
        return leading[0] if len(leading) == 1 else None

    def _axis_at(self, node: fx.Node, name: str, parameter: Tensor, shape: torch.Size) -> int | None:
        moved = parameter.detach().clone()
        moved[0] += 1.0
        with torch.no_grad():
            one, other = (self.probe.run(watch=(node,), weights=weights)[node] for weights in ({}, {name: moved}))
        if not isinstance(one, Tensor) or one.shape != shape:
            return None
        apart = (one != other).nonzero()
        constant = [
            axis for axis in range(one.dim()) if len(apart) and not apart[:, axis].any() and one.shape[axis] > 1
        ]
        return constant[0] if len(constant) == 1 else None

    def axis_of(self, node: fx.Node) -> int:
        """The dimension that holds channels in a value on the main path, which may lay its activation out anew.

        Raises:
            Unmeasured: after a layout no one dimension holds them.
        """
        if node not in self._axes:
            axis = self._carried(node, self.axis)
            if axis is None:
                raise Unmeasured(f"`{node.name}` lays its activation out so that no one dimension holds the channels")
            self._axes[node] = axis
        return self._axes[node]

    def _carried(self, node: fx.Node, axis: int) -> int | None:
        """Where a dimension of the block's activation is in a value on the main path; None if it is not in one."""
        if node is self.site.input:
            return axis
        before = next(term for term in node.all_input_nodes if term in self.main)
        found = self._carried(before, axis)
        return found if found is None or not is_layout(node) else self._axis_after(node, before, found)

    def _axis_after(self, node: fx.Node, before: fx.Node, axis: int) -> int | None:
        """Where a node puts a dimension: it gets an activation that differs along this one alone."""
        value = self.values[before]
        ramp = torch.arange(value.shape[axis], dtype=self.probe.dtype).view([-1, *[1] * (value.dim() - 1 - axis)])
        with torch.no_grad():
            made = self.probe.replay([node], {before: ramp.expand_as(value).clone()}, {node})[node]
        varying = [d for d, size in enumerate(made.shape) if size > 1 and bool((made.diff(dim=d) != 0).any())]
        return varying[0] if len(varying) == 1 else None

    def likely_axis(self, value: Tensor, axis: int) -> int:
        """The one dimension of a value that has as many channels; of several the likely one, if it has as many."""
        fitting = self.axes_of(value)
        return fitting[0] if len(fitting) == 1 else axis if axis in fitting or not fitting else fitting[-1]

    def axes_of(self, value: Tensor) -> list[int]:
        """The dimensions of a value that have as many channels as the activation."""
        return [d for d, size in enumerate(value.shape) if d and size == self.width]


def _way_through(site: Site) -> tuple[set[fx.Node], list[fx.Node]]:
    """The nodes from the block's input to its output, and what is added to them, the last first."""
    reached, order = {site.input}, {site.input: -1, **{node: i for i, node in enumerate(site.nodes)}}
    for node in site.nodes:
        inputs = node.all_input_nodes
        if is_sum(node):
            if any(term in reached for term in inputs):
                reached.add(node)
        elif inputs and inputs[0] in reached and (is_layout(node) or is_cast(node) or _is_elementwise(site, node)):
            reached.add(node)
    main, ends, node = {site.input}, list[fx.Node](), site.output
    while node is not site.input:
        main.add(node)
        terms = sorted((term for term in node.all_input_nodes if term in reached), key=order.__getitem__)
        # A sum of two that both come from the input without weights: the one that has gone further is the branch.
        if is_sum(node):
            ends += [term for term in reversed(node.all_input_nodes) if term is not terms[0]]
        node = terms[0]
    return main, [term for end in ends for term in _terms(site, end, main)]


def _terms(site: Site, node: fx.Node, main: Set[fx.Node]) -> Iterator[fx.Node]:
    """The terms of a sum of branches, each of which comes from the main path; what is no such sum is its only one."""
    inner = node
    while _is_elementwise(site, inner) and is_passing(site, inner):
        inner = activations_of(inner)[0]
    terms = inner.all_input_nodes if is_sum(inner) and inner in site.nodes else []
    if len(terms) != 2 or not all(_comes_from(site, term, main) for term in terms):
        yield node
        return
    for term in reversed(terms):
        yield from _terms(site, term, main)


def _comes_from(site: Site, node: fx.Node, main: Set[fx.Node]) -> bool:
    return any(term in main for each in _cone(site, node, main) for term in each.all_input_nodes)


def is_passing(site: Site, node: fx.Node) -> bool:
    """Whether it gives on what it gets when the block is not trained, in whatever order: dropout, layout."""
    module = module_at(site, node)
    return is_layout(node) or name_of(node) == "dropout" if module is None else _passes(module)


def _passes(module: nn.Module) -> bool:
    if number_of(module):  # which need not be copied
        return False
    x, twin = torch.linspace(-9, 9, 96, dtype=torch.float64), copy.deepcopy(module).eval()
    return gives(lambda: twin(x.view(2, 3, 4, 4).clone()).flatten().sort().values, x)


def gives(call: Callable[[], Tensor], wanted: Tensor) -> bool:
    """Whether a call gives what is wanted; one that fails does not."""
    try:
        with torch.no_grad():
            made = call()
    except Exception:  # it is not of the kind asked for
        return False
    if made.shape != wanted.shape or not made.dtype.is_floating_point:
        return made.shape == wanted.shape and torch.equal(made, wanted)
    return torch.allclose(made, wanted, atol=rounding_of(made.dtype))


def _cone(site: Site, end: fx.Node, main: Set[fx.Node]) -> tuple[fx.Node, ...]:
    """The nodes of the block that lead to `end` from the main path."""
    found, pending, inside = {end}, [end], set(site.nodes)
    unread = [node for node in site.nodes if not node.users and node not in main]
    while pending:
        for term in pending.pop().all_input_nodes:
            if term in inside and term not in main and term not in found:
                found.add(term)
                pending.append(term)
        if not pending:  # what nobody reads is there for what it writes into: `inverse[order] = positions`
            pending = [node for node in unread if node not in found and _written(node, inside, found)]
            found.update(pending)
    return tuple(node for node in site.nodes if node in found)


def _written(node: fx.Node, inside: Set[fx.Node], found: Set[fx.Node]) -> bool:
    """Whether what a node may write into, perhaps a part of it, is one of the nodes that were found."""
    while node.args and isinstance(target := node.args[0], fx.Node) and target in inside:
        if target in found:
            return True
        node = target
    return False
