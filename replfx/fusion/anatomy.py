"""The parts of a residual block, found by its structure: its sum, its maps, its normalisation.

Used by the light operator alone. Nothing here looks at class names: a residual block is one whose output is
a sum that has the input itself as a term; a map is a parameter of the right shape; a normalisation is a
childless module with an `eps` and one value a channel.
"""

import copy
import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx, nn
from torch.nn import functional as F

from replfx.fusion.operators import Site
from replfx.structure import is_stand_in

__all__ = [
    "Anatomy",
    "MapPair",
    "Norm",
    "activation_of",
    "dissect",
    "is_norm",
    "is_residual",
    "is_sum",
    "keeps_shape",
    "name_of",
]

_ACTIVATIONS = ("relu", "relu6", "gelu", "silu", "hardswish")  # of torch.nn.functional
_NORMS = ("layer_norm", "rms_norm", "group_norm", "batch_norm", "instance_norm")  # the same
_SUMS = (operator.add, operator.iadd, torch.add, "add", "add_", "__add__", "__iadd__", "__radd__")


@dataclass(frozen=True)
class MapPair:
    """A map from d to h channels and one back: parameter names, h, and the rows of the first that count."""

    first: str
    last: str
    hidden: int
    rows: tuple[int, int] | None


@dataclass(frozen=True)
class Norm:
    """The block's normalisation.

    Attributes:
        path: where it is in the block.
        first: it is applied to the activation itself.
        last_dim: it wants channels last although the activation has them second.
    """

    path: str
    first: bool
    last_dim: bool


@dataclass(frozen=True)
class Anatomy:
    """What `dissect` found.

    Attributes:
        width: channels d of the activation.
        linear: channels are its last dimension (else its second).
        depthwise: name of a depthwise kernel that is applied to the activation itself, or None.
        pair: the narrowest pair of maps, or None.
        norm: the normalisation, or None.
        activation: what follows the sum: "module:PATH", "function:NAME" of torch.nn.functional, or None.
    """

    width: int
    linear: bool
    depthwise: str | None
    pair: MapPair | None
    norm: Norm | None
    activation: str | None


def dissect(site: Site) -> Anatomy | str:
    """The anatomy of the block at `site`, or the reason why it has none that a light operator could use."""
    if is_stand_in(site.block):
        return "its layers are functions in Dynamo's graph, and a light operator takes over modules"
    residual = _residual(site)
    if residual is None:
        return "it is not residual: its output is not a sum with its own input as a term"
    maps = {n: tuple(p.shape) for n, p in site.block.named_parameters() if p.dim() >= 2}
    width, linear = _layout(site, maps)
    if width is None:
        return "none of its parameters maps the channels of its activation"
    pair = _narrowest_pair(site.block, maps, width, linear)
    depthwise = _depthwise(site, width)
    if pair is None and depthwise is None:
        return f"it has no map from its {width} channels and back to them"
    norm = _norm(site, width, linear)
    if norm is None and (hidden := _norm_without_parameters(site)):
        return f"it normalises by `{hidden}`, which has no parameters of its own to take over"
    return Anatomy(width, linear, depthwise, pair, norm, residual[0])


# ---- the sum


def is_residual(site: Site) -> bool:
    """Whether the block is a sum that has its own input as a term, so that it keeps its shape."""
    return _residual(site) is not None


def keeps_shape(site: Site) -> bool:
    """Whether the block keeps its activation's shape, as far as that can be told without knowing the shape.

    A residual block does; so does a window whose one layer maps as many channels as it gives, at stride 1.
    """
    if is_residual(site):
        return True
    layers = [m for m in site.block.modules() if any(p.dim() >= 2 for p in m._parameters.values() if p is not None)]
    if len(layers) != 1:
        return False
    (layer,) = layers
    inward, outward = (
        getattr(layer, f"{way}_features", getattr(layer, f"{way}_channels", None)) for way in ("in", "out")
    )
    return inward is not None and inward == outward and set(getattr(layer, "stride", (1,))) == {1}


def _residual(site: Site) -> tuple[str | None] | None:
    """A one-tuple with the activation after the sum; None if the block is no sum with its input."""
    node, activation = site.output, None
    if not is_sum(node):
        activation = _elementwise(site, node)
        if activation is None or not node.all_input_nodes:
            return None
        node = node.all_input_nodes[0]
    return (activation,) if _reaches_input(site, node) else None


def is_sum(node: fx.Node) -> bool:
    """Whether the node adds."""
    return node.target in _SUMS


def name_of(node: fx.Node) -> str:
    """What a node calls: the name of a function, a method or a module."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _reaches_input(site: Site, node: fx.Node) -> bool:
    """Whether the input itself is a term of the sum `node`."""
    pending = [node] if is_sum(node) else []
    while pending:
        for term in pending.pop().all_input_nodes:
            term = _behind_identity(site, term)
            if term is site.input:
                return True
            if is_sum(term) and term in site.nodes:
                pending.append(term)
    return False


def _behind_identity(site: Site, node: fx.Node) -> fx.Node:
    while node.op == "call_module" and node in site.nodes and type(_module(site, node)) is nn.Identity:
        node = node.all_input_nodes[0]
    return node


def _elementwise(site: Site, node: fx.Node) -> str | None:
    """Name the activation that `node` applies, if that is what it does."""
    if len(node.all_input_nodes) != 1 or node not in site.nodes:
        return None
    if node.op == "call_module":
        module = _module(site, node)
        plain = next(iter((*module.parameters(), *module.buffers())), None) is None
        return f"module:{site.inside(node)}" if plain and site.inside(node) else None
    name = name_of(node).rstrip("_")
    return f"function:{name}" if node.op != "get_attr" and name in _ACTIVATIONS else None


def _module(site: Site, node: fx.Node) -> nn.Module:
    return site.block.get_submodule(site.inside(node))


# ---- the maps


def _layout(site: Site, maps: dict[str, tuple[int, ...]]) -> tuple[int | None, bool]:
    """Channels of the activation, and whether they are its last dimension."""
    convolved = _convolved_channels(site)
    if convolved is not None:
        return convolved, False
    dense = [shape for shape in maps.values() if shape[1] > 1 and len(shape) != 3]
    if site.shape is None:  # no example inputs: the first map takes the activation
        return (dense[0][1], len(dense[0]) == 2) if dense else (None, False)
    for shape in dense:
        if len(shape) == 2 and shape[1] == site.shape[-1]:
            return shape[1], True
        if len(shape) == len(site.shape) and shape[1] == site.shape[1]:
            return shape[1], False
    if any(s[1] == 1 and len(s) == len(site.shape) and s[0] == site.shape[1] for s in maps.values()):
        return site.shape[1], False
    return None, False


def _convolved_channels(site: Site) -> int | None:
    """Channels that a convolution applied to the activation itself takes; None if there is no such.

    It alone tells for sure: a width or height may equal the channels of a linear map further inside.
    """
    for node in site.nodes:
        if node.op == "call_module" and node.all_input_nodes == [site.input]:
            module = _module(site, node)
            weight, channels = module._parameters.get("weight"), getattr(module, "in_channels", None)
            if weight is not None and weight.dim() >= 3 and isinstance(channels, int):
                return channels
    return None


def _narrowest_pair(block: nn.Module, maps: dict[str, tuple[int, ...]], width: int, linear: bool) -> MapPair | None:
    """The pair with the smallest h: first over the block's parts, and the last one within a part.

    Within an attention with separate projections the last pair of square maps is value and output, as all
    common code registers them (query, key, value, output); a fused one gives its last third.
    """
    best: MapPair | None = None
    for part in _parts(block, maps):
        pair = _last_pair({n: maps[n] for n in part}, width, linear)
        if pair is not None and (best is None or pair.hidden < best.hidden):
            best = pair
    return best


def _parts(block: nn.Module, maps: dict[str, tuple[int, ...]]) -> Iterator[list[str]]:
    """The block's maps by the child that holds them; maps of childless children belong to the block."""
    groups: dict[str, list[str]] = {}
    for name in maps:
        child = name.split(".")[0]
        module = block._modules.get(child)
        groups.setdefault(child if module is not None and module._modules else "", []).append(name)
    yield from groups.values()


def _last_pair(maps: dict[str, tuple[int, ...]], width: int, linear: bool) -> MapPair | None:
    names = [n for n, shape in maps.items() if (len(shape) == 2) == linear and len(shape) != 3]
    found: MapPair | None = None
    for position, last in enumerate(names):
        out, hidden, *kernel = maps[last]
        if out != width:
            continue
        for first in reversed(names[:position]):
            rows, columns, *taps = maps[first]
            if columns != width or rows not in (hidden, 3 * hidden):
                continue
            if math.prod(taps) > 1 and math.prod(kernel) == 1:
                continue
            part = (2 * hidden, 3 * hidden) if rows == 3 * hidden else None
            if found is None or hidden <= found.hidden:
                found = MapPair(first, last, hidden, part)
            break
    return found


def _depthwise(site: Site, width: int) -> str | None:
    """A kernel (d, 1, k, …) whose module is called on the activation itself."""
    for node in site.nodes:
        if node.op == "call_module" and node.all_input_nodes == [site.input]:
            module = _module(site, node)
            weight = module._parameters.get("weight")
            if weight is not None and weight.dim() >= 3 and tuple(weight.shape[:2]) == (width, 1):
                return f"{site.inside(node)}.weight"
    return None


# ---- the normalisation


def _norm(site: Site, width: int, linear: bool) -> Norm | None:
    """The normalisation that takes the activation itself, or else the last one that the block applies."""
    called = [n for n in site.nodes if n.op == "call_module" and site.inside(n)]
    norms = [n for n in called if is_norm(_module(site, n), width)]
    if not norms:
        return None
    first = next((n for n in norms if _behind_identity(site, n.all_input_nodes[0]) is site.input), None)
    node = first or norms[-1]
    dims = max(p.dim() for p in site.block.parameters())  # those of a convolution's kernel are the activation's
    last_dim = not linear and not _takes_channels_second(_module(site, node), width, dims)
    return Norm(site.inside(node), first is not None, last_dim)


def is_norm(module: nn.Module, width: int) -> bool:
    """Whether it is a normalisation of so many channels: an `eps`, and one value a channel."""
    parameters = list(module.parameters())
    return hasattr(module, "eps") and bool(parameters) and all(p.shape == (width,) for p in parameters)


def _norm_without_parameters(site: Site) -> str | None:
    """A normalisation that is a function, or a module with none: without it the block would be another one."""
    for node in site.nodes:
        name = getattr(node.target, "__name__", "")
        if node.op == "call_function" and name in _NORMS:
            return name
        if node.op == "call_module" and hasattr(module := _module(site, node), "eps") and not [*module.parameters()]:
            return type(module).__name__
    return None


def _takes_channels_second(norm: nn.Module, width: int, dims: int) -> bool:
    """Ask the module itself, on a shape that no last dimension can fit."""
    probe = copy.deepcopy(norm).to("meta")
    try:
        probe(torch.empty(2, width, *range(width + 1, width + dims - 1), device="meta"))
    except (RuntimeError, ValueError, IndexError):
        return False
    return True


def activation_of(block: nn.Module, name: str | None) -> object:
    """The callable that an `Anatomy.activation` names: a copy of a module, or a function."""
    if name is None:
        return None
    kind, _, where = name.partition(":")
    if kind not in ("module", "function") or (kind == "function" and where not in _ACTIVATIONS):
        raise ValueError(f"there is no activation {name!r}")
    return copy.deepcopy(block.get_submodule(where)) if kind == "module" else getattr(F, where)
