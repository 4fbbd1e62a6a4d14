"""Folding a light operator back into the full block that it stood for, with the outputs unchanged. Ours.

A residual block is its input and branches, summed. Given back, it is to compute what its light operator computed,
with all of its own parameters there to be trained:

- A branch is *silenced*: weight and bias of its last layer start at zero, as those of residual branches often do.
- `product`, y = x + U V N(x) + c: all branches but the MLP are silenced, and W_2 a(W_1 N(x) + b_1) + b_2 carries the
  map. For the activations a in use and every z, a(z) − a(−z) = z: they are z·Φ(z) with Φ(z) + Φ(−z) = 1 (ReLU, GELU
  and its tanh form, SiLU, hard swish). So 2r hidden channels carry a map of rank r exactly:
  W_1 = [V; −V; …], b_1 = [0; 0; …], W_2 = [U, −U, 0], b_2 = c. The other rows of W_1 stay as they were.
- `depthwise`, y = x + N(D ∗ x): the block's own D and N, and U = V = I in its MLP.
- `conv`, y = φ(x + N(K ∗ x)) with x ≥ 0: the first convolution is the identity (δ), its batch normalisation gives
  back the mean and the deviation that it takes (weight √(σ² + ε), bias μ, of a batch of inputs), the activation has
  nothing to do, and the second convolution is K.

A scale on the branch that carries the map (LayerScale) starts at one.
"""

import copy
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from replfx.errors import FusionError
from replfx.fusion.anatomy import is_norm, is_residual, is_sum, name_of
from replfx.fusion.operators import Site

__all__ = ["Branch", "Fold", "branches", "fold_of", "is_layout", "is_product", "is_scale", "set_linear", "silence"]

_LAYOUT = ("reshape", "view", "flatten", "contiguous", "permute", "transpose", "unflatten")
_PRODUCTS = ("mul", "mul_", "imul")
_PATHS = ("norm", "first", "inner", "last", "entry")


@dataclass(frozen=True)
class Fold:
    """Where in a block its operator goes; plain data that travels in a plan.

    Attributes:
        silenced: layers whose weight and bias start at zero, one for each branch that carries nothing.
        norm: the normalisation of the branch that carries the light map: before its layers, or after them.
        first, last: the layers of that branch; None if all branches are silenced.
        inner: the normalisation between them.
        entry: the depthwise layer before `norm`.
        scales: parameters that scale that branch.
    """

    silenced: tuple[str, ...]
    norm: str | None = None
    first: str | None = None
    inner: str | None = None
    last: str | None = None
    entry: str | None = None
    scales: tuple[str, ...] = ()

    @classmethod
    def read(cls, options: Mapping[str, Any]) -> "Fold":
        """From a plan's JSON.

        Raises:
            FusionError: it is not a fold.
        """
        try:
            fold = cls(**{**options, "silenced": tuple(options["silenced"]), "scales": tuple(options["scales"])})
        except (KeyError, TypeError) as error:
            raise FusionError(f"the fold is malformed: {error!r}") from error
        paths = [path for name in _PATHS if (path := getattr(fold, name)) is not None]
        if not all(isinstance(path, str) for path in (*fold.silenced, *fold.scales, *paths)):
            raise FusionError(f"the fold is malformed: {fold}")
        return fold


# ---- finding it


def fold_of(site: Site, carrier: str | None) -> Fold | str:
    """How an operator for the block at `site` folds back into it, or why it cannot.

    Args:
        site: a residual block.
        carrier: what is to carry the operator's map: "mlp" (layers behind a normalisation), "convolutions" (each
            with its normalisation behind it), or None if there is no map.
    """
    if not is_residual(site):
        return "it is not residual"
    silenced, carrying = [], None
    for branch in branches(site):
        if carrier is not None and carrying is None:
            carrying = branch.as_mlp() if carrier == "mlp" else branch.as_convolutions()
            if carrying is not None:
                continue
        last = branch.last_layer()
        if last is None:
            return f"nothing with a weight ends its branch at `{branch.end.name}`"
        silenced.append(last)
    if carrier is None:
        return Fold(tuple(silenced))
    if carrying is None:
        return f"none of its branches is {_WANTED[carrier]}"
    return Fold(tuple(silenced), **carrying)


_WANTED = {
    "mlp": "a normalisation and two linear layers with ReLU, GELU, SiLU or hard swish between them",
    "convolutions": "two convolutions with batch normalisations and a ReLU between them",
}


def branches(site: Site) -> "list[Branch]":
    """The branches of a residual block, the last first."""
    main = _main_path(site)
    return [Branch(site, end, main) for end in _branch_ends(site, main)]


def _branch_ends(site: Site, main: Set[fx.Node]) -> list[fx.Node]:
    """What is added on the way from the block's input to its output, the last first."""
    ends: list[fx.Node] = []
    node = site.output
    while node is not site.input:
        terms = [term for term in node.all_input_nodes if term in main]
        if is_sum(node):
            ends += [term for term in node.all_input_nodes if term not in main]
        node = terms[0]
    return ends


def _main_path(site: Site) -> set[fx.Node]:
    """The input, and what is made of it by sums, by layout and by what has no parameters."""
    found = {site.input}
    for node in site.nodes:
        inputs = node.all_input_nodes
        if inputs and (any(term in found for term in inputs) if is_sum(node) else inputs[0] in found):
            module = _module(site, node)
            bare = module is not None and next(module.parameters(), None) is None
            if is_sum(node) or is_layout(node) or bare or _is_elementwise(node):
                found.add(node)
    return found


def _module(site: Site, node: fx.Node) -> nn.Module | None:
    return site.block.get_submodule(site.inside(node)) if node.op == "call_module" else None


def is_layout(node: fx.Node) -> bool:
    """Whether it only reshapes."""
    return node.op in ("call_method", "call_function") and name_of(node) in _LAYOUT


def is_product(node: fx.Node) -> bool:
    """Whether it multiplies."""
    return name_of(node) in _PRODUCTS


def _keeps_zero(node: fx.Node) -> bool:
    return is_layout(node) or name_of(node) in ("getitem", "roll", "dropout", *_PRODUCTS)


def _is_elementwise(node: fx.Node) -> bool:
    return node.op == "call_function" and callable(node.target) and _folds(_applied(node))


def _applied(node: fx.Node) -> Callable[[Tensor], Tensor]:
    """The function of one tensor that a node applies; it raises where the node has other inputs."""
    assert callable(node.target)
    target, kwargs = node.target, {k: v for k, v in node.kwargs.items() if not isinstance(v, fx.Node)}
    rest = [argument for argument in node.args[1:] if not isinstance(argument, fx.Node)]
    return lambda z: target(z, *rest, **kwargs)


def _folds(activation: Callable[[Tensor], Tensor]) -> bool:
    """Whether a(z) − a(−z) = z, tried on numbers."""
    z = torch.linspace(-9, 9, 181, dtype=torch.float64)
    return _gives(lambda: activation(z.clone()) - activation(-z), z)


def _passes(module: nn.Module) -> bool:
    """Whether it gives on what it gets when it is not trained, in whatever order: dropout, a permutation of axes."""
    x = torch.linspace(-9, 9, 96, dtype=torch.float64)
    return _gives(lambda: copy.deepcopy(module).eval()(x.view(2, 3, 4, 4).clone()).flatten().sort().values, x)


def _gives(call: Callable[[], Tensor], wanted: Tensor) -> bool:
    try:
        with torch.no_grad():
            made = call()
    except Exception:  # it is not of the kind asked for
        return False
    return isinstance(made, Tensor) and made.shape == wanted.shape and torch.allclose(made, wanted, atol=1e-12)


class Branch:
    """A branch of a residual block, read backwards from its end."""

    def __init__(self, site: Site, end: fx.Node, main: Set[fx.Node]) -> None:
        self.site, self.end, self.main = site, end, main

    def last_layer(self) -> str | None:
        """The path of the last layer with a weight, in a composite module that of its last weight.

        None if what comes behind it might make something of nothing.
        """
        node: fx.Node | None = self.end
        while node is not None and node not in self.main:
            module = _module(self.site, node)
            names = [name for term in node.all_input_nodes if (name := self._parameter(term))]
            if module is not None and next(module.parameters(), None) is not None and not is_scale(module):
                weights = [n for n, _ in module.named_parameters() if n.rpartition(".")[2] == "weight"]
                path = weights[-1].rpartition(".")[0] if weights else None
                return None if path is None else ".".join(filter(None, (self.site.inside(node), path)))
            if module is None and node.target is F.linear and names:
                return names[0].rpartition(".")[0]
            if not (_keeps_zero(node) or (module is not None and (is_scale(module) or _passes(module)))):
                return None
            node = self._before(node)
        return None

    def _before(self, node: fx.Node) -> fx.Node | None:
        """What a node's main input is; of a product with a parameter the other factor."""
        inputs = [term for term in node.all_input_nodes if self._parameter(term) is None]
        return inputs[0] if inputs else None

    def _parameter(self, node: fx.Node) -> str | None:
        """The block's parameter that a node reads, perhaps in another layout."""
        while is_layout(node) and node.all_input_nodes:
            node = node.all_input_nodes[0]
        return self.site.inside(node) if node.op == "get_attr" else None

    def as_mlp(self) -> dict[str, Any] | None:
        """Read it as norm → layer → activation → layer → scale; None if it is anything else."""
        node, scales = self._behind(self.end)
        last, node = self._layer(node)
        node, between = self._behind(node)
        if last is None or between or node is None or not self._is_activation(node):
            return None
        first, node = self._layer(self._behind(node.all_input_nodes[0])[0])
        node, more = self._behind(node)
        norm = None if node is None else self._norm(node)
        if first is None or more or node is None or norm is None:
            return None
        entry, before = None, self._behind(node.all_input_nodes[0])[0]
        if before is not None and before not in self.main:
            entry, before = self._layer(before)
        if before not in self.main:
            return None
        return {"norm": norm, "first": first, "last": last, "entry": entry, "scales": tuple(scales)}

    def as_convolutions(self) -> dict[str, Any] | None:
        """Read it as layer → norm → activation → layer → norm; None if it is anything else."""
        node, scales = self._behind(self.end)
        norm = None if node is None else self._norm(node)
        if norm is None or scales or node is None:
            return None
        last, node = self._layer(node.all_input_nodes[0])
        if last is None or node is None or not self._is_activation(node):
            return None
        node = self._behind(node.all_input_nodes[0])[0]
        inner = None if node is None else self._norm(node)
        if inner is None or node is None:
            return None
        first, node = self._layer(node.all_input_nodes[0])
        if first is None or node not in self.main:
            return None
        return {"norm": norm, "first": first, "inner": inner, "last": last}

    def _behind(self, node: fx.Node | None) -> tuple[fx.Node | None, list[str]]:
        """Go back over dropout, layout and scales; gives the node that is there, and the scales."""
        scales: list[str] = []
        while node is not None and node not in self.main:
            module = _module(self.site, node)
            factors = [name for term in node.all_input_nodes if (name := self._parameter(term))]
            if module is not None and is_scale(module):
                scales += [f"{self.site.inside(node)}.{name}" for name, _ in module.named_parameters()]
            elif len(factors) == 1 and name_of(node) in _PRODUCTS:
                scales += factors
            elif not (is_layout(node) or (module is not None and _passes(module))):
                break
            node = self._before(node)
        return node, scales

    def _layer(self, node: fx.Node | None) -> tuple[str | None, fx.Node | None]:
        """The path of the linear or convolution layer that a node is, and the node before it."""
        if node is None or not isinstance(_module(self.site, node), nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            return None, node
        return self.site.inside(node), node.all_input_nodes[0]

    def _norm(self, node: fx.Node) -> str | None:
        module = _module(self.site, node)
        width = next((len(p) for p in module.parameters()), 0) if module is not None else 0
        return self.site.inside(node) if module is not None and width and is_norm(module, width) else None

    def _is_activation(self, node: fx.Node) -> bool:
        module = _module(self.site, node)
        return _folds(module) if module is not None else _is_elementwise(node)


def is_scale(module: nn.Module) -> bool:
    """LayerScale: one value a channel and nothing else."""
    parameters = list(module.parameters())
    return len(parameters) == 1 and parameters[0].dim() <= 3 and not hasattr(module, "eps") and _scales(module)


def _scales(module: nn.Module) -> bool:
    (factor,) = module.parameters()
    x = torch.ones(2, *[1] * max(1, factor.dim() - 1), factor.numel(), dtype=factor.dtype)
    return _gives(lambda: module(x).double().expand(x.shape), (x * factor.flatten()).double())


# ---- applying it


def silence(block: nn.Module, fold: Fold) -> None:
    """Let the branches that carry nothing begin at zero, and the scale of the one that does at one."""
    for path in fold.silenced:
        for parameter in block.get_submodule(path)._parameters.values():
            if parameter is not None:
                parameter.zero_()
    for name in fold.scales:
        block.get_parameter(name).fill_(1.0)


def set_linear(block: nn.Module, fold: Fold, inward: Tensor, outward: Tensor, bias: Tensor | None) -> None:
    """Let the two layers of a fold and the activation between them compute U V h + c.

    Args:
        block: it is changed in place.
        fold: with `first` and `last`.
        inward: V (r, d).
        outward: U (d, r).
        bias: c (d,), or None for zero.

    Raises:
        FusionError: the layers have fewer than 2r hidden channels, or no bias for c.
    """
    assert fold.first is not None
    assert fold.last is not None
    first, last = block.get_submodule(fold.first), block.get_submodule(fold.last)
    rank, w1, w2 = len(inward), first._parameters["weight"], last._parameters["weight"]
    assert w1 is not None
    assert w2 is not None
    if 2 * rank > len(w1):
        raise FusionError(f"`{fold.first}` has {len(w1)} channels, {2 * rank} are needed to carry the light map")
    w1[: 2 * rank] = torch.cat([inward, -inward]).view(2 * rank, *w1.shape[1:])
    w2.zero_()
    w2[:, : 2 * rank] = torch.cat([outward, -outward], 1).view(len(w2), 2 * rank, *w2.shape[2:])
    for layer, value in ((first, None), (last, bias)):
        own = layer._parameters.get("bias")
        if own is not None:
            own[: 2 * rank if layer is first else None] = 0.0 if value is None else value
        elif value is not None:
            raise FusionError(f"`{fold.last}` has no bias to carry the light operator's")
