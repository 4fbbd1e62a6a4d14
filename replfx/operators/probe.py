"""Runs a block's part of a captured graph alone, on numbers drawn at random, to see what its structure does not prove.

Nothing of the model's own numbers is used: weights that are zero at the start, as those of many branches are, would
hide what depends on what; and a model on the meta device has none. All floats are of double precision, or of single
precision where the block has operations that know no other (grouped matrix products of experts).
"""

from collections.abc import Collection, Iterable, Mapping
from itertools import product
from typing import Any

import torch
from torch import Tensor, fx, nn

from replfx.errors import CaptureError
from replfx.modules.copying import structural_copy
from replfx.modules.structure import attribute_at, is_wrapped
from replfx.operators.base import Site
from replfx.tracing import is_flag, name_of

__all__ = [
    "Probe",
    "Unmeasured",
    "activations_of",
    "is_cast",
    "is_layout",
    "is_vector",
    "makers_of",
    "module_at",
    "modules_around",
    "number_of",
    "rounding_of",
]

_SEED = 7
_LAYOUT = ("reshape", "view", "flatten", "contiguous", "permute", "transpose", "unflatten", "squeeze", "unsqueeze", "t")
_FLOATS = ("float", "half", "bfloat16", "double")
_CASTS = (*_FLOATS, "to", "type_as")
_HANDLES = ("getattr", "detach", *_CASTS)  # which leave a weight what it is
_MOVES = ("cpu", "cuda")
_DEPTH = 32
_ROUNDINGS = 2.0**10


class Unmeasured(Exception):  # noqa: N818 - an answer, not an error
    """The block could not be run alone; the message says why."""


class Probe:
    """A block with weights drawn at random, to be run on activations drawn at random.

    Args:
        site: the block.
        shape: of its main activation, if it is not to be the one that the graph knows.

    Attributes:
        block: a copy of the block with these weights.
        x: its main activation, of what the operations before the block can give: behind a ReLU it is not negative.
        dtype: of all floats.

    Raises:
        Unmeasured: it does not run alone.
    """

    def __init__(self, site: Site, shape: tuple[int, ...] | None = None) -> None:
        self.site = site
        self._wanted = shape
        if any(is_wrapped(p) for p in site.block.parameters()):
            raise Unmeasured("its weights are of a class of their own")
        for dtype in (torch.float64, torch.float32):
            reason = self._starts_in(dtype)
            if reason is None:
                return
        raise Unmeasured(reason)

    def _starts_in(self, dtype: torch.dtype) -> str | None:
        """Draw all numbers in one precision; gives the reason why the block does not run on them."""
        self.dtype = dtype
        self._draw = torch.Generator().manual_seed(_SEED)
        self._given: dict[fx.Node, Any] = {}
        self._masked: bool | None = None
        self._whole = 1
        self.block = self._with_numbers(self.site.block)
        return self._find_input()

    # ---- numbers

    def draw(self, shape: Iterable[int], dtype: torch.dtype | None = None) -> Tensor:
        """Numbers at random, of any sign; floats of any `dtype` are drawn in the precision of this probe."""
        dtype = dtype or self.dtype
        if dtype == torch.bool:
            return self._mask(tuple(shape))
        if not (dtype.is_floating_point or dtype.is_complex):
            return torch.full(tuple(shape), self._whole, dtype=dtype)
        return torch.randn(tuple(shape), generator=self._draw, dtype=self._precise(dtype))

    def _precise(self, dtype: torch.dtype) -> torch.dtype:
        """The type of this probe's precision in place of another one."""
        return self.dtype if dtype.is_floating_point else self.dtype.to_complex() if dtype.is_complex else dtype

    def _mask(self, shape: tuple[int, ...]) -> Tensor:
        """A mask in which everything sees itself, whichever of its values means that it may."""
        if self._masked is not None:
            return torch.full(shape, self._masked)
        drawn = torch.rand(shape, generator=self._draw) < 0.7
        return drawn | torch.eye(*shape[-2:], dtype=torch.bool) if len(shape) > 1 else drawn

    def _with_numbers(self, block: nn.Module) -> nn.Module:
        weights = {id(p) for p in block.parameters()}

        def number(tensor: Tensor) -> Tensor:
            if id(tensor) in weights:
                fan = max(1, tensor[0].numel()) if tensor.dim() > 1 else 1
                drawn = self.draw(tensor.shape, tensor.dtype)
                drawn = drawn / fan**0.5 if tensor.dim() > 1 else 0.5 + drawn.abs()
                return nn.Parameter(drawn, requires_grad=drawn.is_floating_point() or drawn.is_complex())
            return self._constant(tensor)

        try:
            return structural_copy(block, number, plain=self._constant)
        except (CaptureError, RuntimeError) as error:
            raise Unmeasured(str(error)) from error

    def _constant(self, tensor: Tensor) -> Tensor:
        """A buffer as it is if there is a value; running statistics that nobody took are drawn too."""
        if type(tensor) in (Tensor, nn.Parameter) and tensor.device.type != "meta":
            value = tensor.detach().cpu().clone()
            return value.to(self._precise(value.dtype))
        drawn = self.draw(tensor.shape, tensor.dtype)
        return 0.5 + drawn.abs() if drawn.is_floating_point() else drawn

    # ---- what comes in

    def _find_input(self) -> str | None:
        """Draw an activation on which the block runs; gives the reason why there is none."""
        failure: Exception | None = None
        for shape in self._shapes():
            # Whole numbers are masks, of which 1 is the value that lets pass, or indices, of which 0 is always one.
            for self._whole, self._masked in product((1, 0), (None, True, False)):
                self._given.clear()
                try:
                    self.x = self._drawn_input(shape)
                    made = self.run()[self.site.output]
                    if isinstance(made, Tensor) and bool(made.isfinite().all()):
                        return None
                    failure = ValueError("it gives what is not finite")
                except Unmeasured:
                    raise
                except Exception as error:  # whatever a model's code raises
                    failure = error
                if not any(isinstance(v, Tensor) and not v.dtype.is_floating_point for v in self._given.values()):
                    break
        text = str(failure).splitlines()[0] if str(failure) else type(failure).__name__
        return text if self.site.input.meta.get("shape") else f"{text}; give example_inputs"

    def _shapes(self) -> list[tuple[int, ...]]:
        known = self._wanted or self.site.input.meta.get("shape")
        if known:
            return [tuple(known)]
        widths = dict.fromkeys(p.shape[1] for p in self.site.block.parameters() if p.dim() > 1)
        widths.update(dict.fromkeys(p.shape[0] for p in self.site.block.parameters() if p.dim()))
        found: list[tuple[int, ...]] = []
        for width in widths:
            found += [(2, side, width) for side in widths if side != width]  # tokens that a map mixes
            found += [(2, 7, width), (2, width, 7), (2, width, 7, 6), (2, 7, 6, width)]  # the likely ones first
            found += [(2, width), (2, width, 7, 6, 5)]
        return found

    def _drawn_input(self, shape: tuple[int, ...]) -> Tensor:
        """What the parameterless operations before the block make of numbers drawn at random."""
        makers = makers_of(self.site.input)
        for count in range(len(makers), -1, -1):
            value: Any = self.draw(
                shape if count == 0 else makers[count - 1].all_input_nodes[0].meta.get("shape", shape)
            )
            try:
                for maker in reversed(makers[:count]):
                    value = self._call(maker, {maker.all_input_nodes[0]: value})
            except Exception:  # it needs another shape, which is not known
                continue
            if isinstance(value, Tensor) and value.shape == shape:
                return value.detach().clone()
        return self.draw(shape)

    def outside(self, node: fx.Node, depth: int = 0) -> Any:
        """The value of a node that is no part of the block."""
        if node is self.site.input:
            return self.x
        if node not in self._given:
            self._given[node] = self._made_up(node, depth)
        return self._given[node]

    def _made_up(self, node: fx.Node, depth: int) -> Any:
        if is_flag(node):
            return False
        if node.op == "get_attr":
            value = _at(node.graph.owning_module, str(node.target))
            return self._constant(value) if isinstance(value, Tensor) else value
        shape, dtype = node.meta.get("shape"), node.meta.get("dtype")
        if isinstance(dtype, torch.dtype):
            assert shape is not None
            return self.draw(shape, dtype)
        if isinstance(dtype, tuple):
            return [self.draw(*pair) for pair in zip(shape or (), dtype, strict=True)]
        if node.op == "placeholder" or depth > _DEPTH:
            raise Unmeasured(f"it reads `{node.name}`, of which no shape is known; give example_inputs")
        values = {each: self.outside(each, depth + 1) for each in node.all_input_nodes}
        return self._call(node, values)

    # ---- what nodes read

    def parameters_at(self, node: fx.Node) -> list[tuple[str, nn.Parameter]]:
        """The block's parameters that a node reads: those of the module that it calls, or its arguments."""
        if node.op == "call_module" and self.site.holds(str(node.target)):
            path = self.site.inside(node)
            return list(self.block.get_submodule(path).named_parameters(prefix=path))
        if node.op == "get_attr" or is_layout(node) or name_of(node) in _HANDLES:
            return []
        known = dict(self.block.named_parameters())
        names = [name for term in node.all_input_nodes if (name := self.parameter_behind(term)) is not None]
        return [(name, known[name]) for name in names if name in known]

    def parameter_behind(self, node: fx.Node) -> str | None:
        """The name of the block's parameter that a node reads, perhaps in another layout."""
        node = self.handles(node)[0]
        return self.site.inside(node) if node.op == "get_attr" else None

    @staticmethod
    def handles(node: fx.Node) -> list[fx.Node]:
        """The nodes from what a node lays out, or gives in another type, to the node."""
        found = [node]
        while is_layout(found[0]) or name_of(found[0]) in _HANDLES:
            found.insert(0, found[0].all_input_nodes[0])
        return found

    # ---- running

    def run(
        self,
        *,
        watch: Collection[fx.Node] = (),
        training: bool = False,
        weights: Mapping[str, Tensor] | None = None,
    ) -> dict[fx.Node, Any]:
        """Run the block on its main activation.

        Args:
            watch: nodes whose values are wanted too, as they are when they are made.
            training: in which mode.
            weights: other values for parameters, by name.

        Returns:
            The values of the output and of what is watched.
        """
        start = {self.site.input: self.x}
        return self.replay(self.site.nodes, start, {*watch, self.site.output}, training=training, weights=weights)

    def replay(
        self,
        nodes: Iterable[fx.Node],
        start: Mapping[fx.Node, Any],
        watch: Collection[fx.Node],
        *,
        training: bool = False,
        weights: Mapping[str, Tensor] | None = None,
    ) -> dict[fx.Node, Any]:
        """Run some of the block's nodes, with the values of others given in `start`."""
        values = {node: _clone(value) for node, value in start.items()}
        seen = {node: _clone(value) for node, value in start.items() if node in watch}
        before = torch.is_grad_enabled()
        self.block.train(training)
        try:
            with torch.random.fork_rng(devices=[]):
                for node in nodes:
                    if node in values:
                        continue
                    for each in node.all_input_nodes:
                        if each not in values:
                            values[each] = _clone(self.outside(each))
                    values[node] = self._call(node, values, training, weights)
                    if node in watch:
                        seen[node] = _clone(values[node])
        finally:
            torch.set_grad_enabled(before)
        return seen

    def _call(
        self,
        node: fx.Node,
        values: Mapping[fx.Node, Any],
        training: bool = False,
        weights: Mapping[str, Tensor] | None = None,
    ) -> Any:
        target, weights = str(node.target), weights or {}
        if node.op == "get_attr":
            return self._attribute(node, weights)
        args, kwargs = self._mapped((node.args, node.kwargs), values)
        if not training and name_of(node) == "scaled_dot_product_attention":
            args, kwargs = _without_dropout(args, kwargs)
        if node.op == "call_module":
            if is_flag(node):
                return training
            if not self.site.holds(target):
                return _at(node.graph.owning_module, target)(*args, **kwargs)
            path = self.site.inside(node)
            inner = {n[len(path) + 1 :]: w for n, w in weights.items() if n.startswith(f"{path}.")}
            return torch.func.functional_call(self.block.get_submodule(path), inner, args, kwargs)
        if node.op == "call_method":
            if target in _MOVES:
                return args[0]
            if target in _FLOATS:
                return args[0].to(self.dtype)
            return getattr(args[0], target)(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)

    def _mapped(self, tree: Any, values: Mapping[fx.Node, Any]) -> Any:
        """Arguments with values for nodes, in the precision of this probe and on the CPU."""

        def leaf(value: Any) -> Any:
            if isinstance(value, fx.Node):
                return values[value]
            if isinstance(value, torch.dtype):
                return self._precise(value)
            return torch.device("cpu") if isinstance(value, torch.device) else value

        return fx.node.map_aggregate(tree, leaf)

    def _attribute(self, node: fx.Node, weights: Mapping[str, Tensor]) -> Any:
        name = self.site.inside(node)
        if name in weights:
            return weights[name]
        own = dict((*self.block.named_parameters(), *self.block.named_buffers()))
        if self.site.holds(str(node.target)) or name in own:
            return own[name] if name in own else _at(self.block, name)
        return self.outside(node)


def makers_of(node: fx.Node) -> list[fx.Node]:
    """The functions of one tensor without weights that made a value, the last first, as far back as a probe looks."""
    found: list[fx.Node] = []
    while len(found) < _DEPTH and _is_bare(node):
        found.append(node)
        node = node.all_input_nodes[0]
    return found


def _is_bare(node: fx.Node) -> bool:
    if node.op not in ("call_module", "call_function", "call_method") or len(node.all_input_nodes) != 1:
        return False
    root = node.graph.owning_module
    return node.op != "call_module" or (root is not None and number_of(root.get_submodule(str(node.target))) == 0)


def _without_dropout(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of `scaled_dot_product_attention`, to which Python code gives a rate as its own mode is."""
    place = 4  # of `dropout_p`
    if len(args) > place:
        args = (*args[:place], 0.0, *args[place + 1 :])
    return args, {name: 0.0 if name == "dropout_p" else value for name, value in kwargs.items()}


def rounding_of(dtype: torch.dtype) -> float:
    """How far apart two results may be that would be equal without rounding, as a share of the largest.

    A thousand times the distance of neighbouring numbers: a sum of n products is off by about √n of it, and none of
    those that are measured has a million terms.
    """
    return _ROUNDINGS * torch.finfo(dtype).eps


def is_layout(node: fx.Node) -> bool:
    """Whether it only reshapes."""
    return node.op in ("call_method", "call_function") and name_of(node) in _LAYOUT


def module_at(site: Site, node: fx.Node) -> nn.Module | None:
    """The module that a node calls."""
    return site.block.get_submodule(site.inside(node)) if node.op == "call_module" else None


def modules_around(site: Site, node: fx.Node) -> list[str]:
    """The modules inside of the block that were running when a node was recorded, the outermost first."""
    stack = [str(path) for path, _ in node.meta.get("nn_module_stack", {}).values()]
    if node.op == "call_module":
        stack.append(str(node.target))
    within = [site.name(path) for path in stack if site.holds(path)]
    return [name for name in dict.fromkeys(within) if name]


def activations_of(node: fx.Node) -> list[fx.Node]:
    """What a node takes, but for flags that capturing put in."""
    return [term for term in node.all_input_nodes if not is_flag(term)]


def is_cast(node: fx.Node) -> bool:
    """Whether it gives the same numbers in another type."""
    return node.op == "call_method" and name_of(node) in _CASTS


def number_of(module: nn.Module) -> int:
    """How many parameters a module has."""
    return sum(1 for _ in module.parameters())


def is_vector(tensor: Tensor) -> bool:
    """Whether it has a value a channel: at most one dimension that counts."""
    return sum(size > 1 for size in tensor.shape) <= 1


def _clone(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _at(root: Any, path: str) -> Any:
    try:
        return attribute_at(root, path)
    except AttributeError as error:
        raise Unmeasured(f"nothing is known of `{path}`") from error
