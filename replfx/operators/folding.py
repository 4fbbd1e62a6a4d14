"""Folding a light operator back into the full block that it stood for, with the outputs unchanged. Ours.

A residual block is its input and branches, summed. Given back, it is to compute what its light operator computed,
with all of its own parameters there to be trained:

- A branch is *silenced*: weight and bias of its last layer start at zero, as those of residual branches often do.
  Which layer that is, is measured: with it at zero the branch gives zero, in training and in evaluation, whatever the
  other weights are, and a gradient reaches it.
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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor, fx, nn

from replfx.errors import FusionError
from replfx.operators.base import Site
from replfx.operators.norms import is_entry, is_norm
from replfx.operators.probe import Probe, Unmeasured, is_vector, module_at, number_of, rounding_of
from replfx.operators.residual import Branch, Residual, gives, is_passing, is_residual, not_residual

__all__ = ["Fold", "branch_silencers", "fold_of", "identity_fold", "set_linear", "silence"]

_NEAR = 1e-10  # a branch that gives anything gives something of the size of its weights

_Run: TypeAlias = Callable[..., Mapping[fx.Node, Tensor]]
"""Gives values of nodes, for keyword arguments `weights` and `training`."""


@dataclass(frozen=True)
class Fold:
    """Where in a block its operator goes; plain data that travels in a plan.

    Attributes:
        silenced: modules whose own parameters start at zero: the last layer of each branch that carries nothing, and
            of the one that carries the map what passes all on then (global response normalisation).
        norm: the normalisation of the branch that carries the light map: before its layers, or after them.
        first, last: the layers of that branch; None if all branches are silenced.
        inner: the normalisation between them.
        entry: the depthwise layer before `norm`.
        scales: parameters that scale that branch.
        columns: which of `first` and `last` keep an output's weights in a column, as GPT-2's layers do.
    """

    silenced: tuple[str, ...]
    norm: str | None = None
    first: str | None = None
    inner: str | None = None
    last: str | None = None
    entry: str | None = None
    scales: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()


# ---- what can be silenced


def _silencers(
    probe: Probe, nodes: Sequence[fx.Node], run: _Run, wanted: Mapping[fx.Node, Tensor | float]
) -> tuple[str, ...]:
    """The last modules of a block that have to start at zero for something to be silent; none if there are no such.

    Scales alone (LayerScale) are taken where nothing else will do, and only modules that a gradient then reaches.

    Args:
        probe: runs the block.
        nodes: those whose modules may be taken.
        run: runs what is to be silent.
        wanted: the values that nodes have then.
    """

    def silent(owners: Sequence[str]) -> bool:
        return _in_both_modes(partial(run, weights=_zeros(probe, owners)), wanted)

    owners = _owners(probe, nodes)
    layers = [owner for owner in owners if not _is_scale(probe.block.get_submodule(owner))]
    for tried in (layers, owners):
        while found := _fewest(tried, silent):
            dead = _dead(probe, found)
            if not dead:
                return found
            tried = [owner for owner in tried if owner not in dead]
    return ()


def _fewest(owners: Sequence[str], silent: Callable[[Sequence[str]], bool]) -> tuple[str, ...]:
    """The last of some modules that will do, none of which can be left out."""
    if not silent(owners):
        return ()
    chosen: list[str] = []
    for owner in reversed(owners):
        chosen.append(owner)
        if silent(chosen):
            break
    for owner in reversed(chosen.copy()):  # the first that runs is the first to be spared
        rest = [other for other in chosen if other != owner]
        if silent(rest):
            chosen = rest
    return tuple(chosen)


def _zeros(probe: Probe, owners: Iterable[str]) -> dict[str, Tensor]:
    """Zero for the parameters that some modules own themselves."""
    return {
        f"{owner}.{name}".lstrip("."): torch.zeros_like(parameter, requires_grad=True)
        for owner in owners
        for name, parameter in probe.block.get_submodule(owner).named_parameters(recurse=False)
    }


def _owners(probe: Probe, nodes: Sequence[fx.Node]) -> list[str]:
    """The modules whose own parameters some nodes read and no others do, in the order in which they are read."""
    order = {name: place for place, (name, _) in enumerate(probe.block.named_parameters())}
    last: dict[str, tuple[int, int]] = {}
    for position, node in enumerate(nodes):
        for name, _ in probe.parameters_at(node):
            owner = name.rpartition(".")[0]
            last[owner] = max(last.get(owner, (0, 0)), (position, order[name]))
    inside = set(nodes)
    elsewhere = {
        n.rpartition(".")[0] for node in probe.site.nodes if node not in inside for n, _ in probe.parameters_at(node)
    }
    return sorted((owner for owner in last if owner not in elsewhere), key=last.__getitem__)


def _dead(probe: Probe, owners: Sequence[str]) -> set[str]:
    """Those of some modules, all at zero, that no gradient would reach: they would stay at zero."""
    weights = _zeros(probe, owners)
    with torch.enable_grad():
        made = probe.run(watch=[end for _, end in probe.site.others], weights=weights).values()
        # |·| has no gradient at zero.
        terms = [(out + probe.draw(out.shape, out.dtype)) * probe.draw(out.shape, out.dtype) for out in made]
        loss = torch.stack([term.abs().sum() for term in terms]).sum()
        grads = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    reached = {n.rpartition(".")[0] for n, grad in zip(weights, grads, strict=True) if grad is not None and grad.any()}
    return set(owners) - reached


def _is_scale(module: nn.Module) -> bool:
    """Whether what it owns is a value a channel, and it is no normalisation."""
    own = list(module.parameters(recurse=False))
    return not hasattr(module, "eps") and all(map(is_vector, own))


def _in_both_modes(run: _Run, wanted: Mapping[fx.Node, Tensor | float]) -> bool:
    """Whether nodes have the values that are wanted, in evaluation and in training."""
    with torch.no_grad():
        for training in (False, True):
            try:
                made = run(training=training)
            except ValueError:  # a batch normalisation that is trained asks for more than one value a channel
                if not training:
                    raise
                continue
            for node, value in wanted.items():
                near = max(_NEAR, rounding_of(made[node].dtype))
                expected = torch.as_tensor(value, dtype=made[node].dtype)
                if not torch.allclose(made[node], expected, rtol=near, atol=near):
                    return False
    return True


# ---- finding it


def identity_fold(site: Site, *, branch: bool = False) -> Fold | str:
    """How the block at `site` is made to give on its input, or if it is a branch nothing; or why it cannot be."""
    try:
        probe = Probe(site)
        ends = {site.output: 0.0 if branch else probe.x, **{end: probe.outside(at) for at, end in site.others}}
        found = _silencers(probe, site.nodes, partial(probe.run, watch=ends), ends)
    except Unmeasured as error:
        return f"it could not be run alone to see which of its layers have to start at zero: {error}"
    if found:
        return Fold(found)
    if branch or is_residual(site):
        wanted = "something" if branch else "something else than its input"
        return f"whichever of its layers start at zero, it gives {wanted}"
    return not_residual(site)


def branch_silencers(branch: Branch) -> tuple[str, ...]:
    """The modules that have to start at zero for a branch to give nothing; none if there are no such."""
    return _silencers(branch.residual.probe, branch.nodes, branch.gives, {branch.end: 0.0})


def fold_of(residual: Residual, carrier: str) -> Fold | str:
    """How a light operator for a residual block folds back into it, or why it cannot.

    Args:
        residual: the block.
        carrier: what is to carry the operator's map: "mlp" (layers behind a normalisation) or "convolutions" (each
            with its normalisation behind it).
    """
    if others := residual.site.others:
        return f"it changes another activation too, at `{others[0][1].name}`, which its light operator hands on"
    silenced, carrying = list[str](), None
    for branch in residual.branches:
        if carrying is None:
            reader = _Reader(branch)
            carrying = reader.as_mlp() if carrier == "mlp" else reader.as_convolutions()
            if carrying is not None:
                continue
        found = branch_silencers(branch)
        if not found:
            return f"whichever of its layers start at zero, its branch at `{branch.end.name}` gives something"
        silenced += found
    if carrying is None:
        return f"none of its branches is {_WANTED[carrier]}"
    return replace(carrying, silenced=(*silenced, *carrying.silenced))


_WANTED = {
    "mlp": "a normalisation and two linear layers with ReLU, GELU, SiLU or hard swish between them",
    "convolutions": "two convolutions with normalisations behind them, and between them an activation that gives on "
    "what the block gets (a ReLU whose inputs come out of another)",
}


class _Reader:
    """Reads a branch backwards from its end, as layers with a normalisation and an activation."""

    def __init__(self, branch: Branch) -> None:
        self.branch, self.site = branch, branch.residual.site
        self.scales: list[str] = []
        self.silenced: list[str] = []
        self.columns: list[str] = []

    def as_mlp(self) -> Fold | None:
        """Read it as norm → layer → activation → layer → scale; None if it is anything else."""
        last, node = self._layer(self._behind(self.branch.end, scales=True))
        node = self._behind(node)
        if last is None or node is None or not self._is_activation(node):
            return None
        first, node = self._layer(self._behind(node.all_input_nodes[0]))
        norm, node = self._norm(self._behind(node), is_entry)
        entry, before = None, self._behind(node)
        if before not in self.branch.residual.main:
            entry, before = self._layer(before)
        if first is None or norm is None or before not in self.branch.residual.main:
            return None
        return self._fold(norm=norm, first=first, last=last, entry=entry)

    def as_convolutions(self) -> Fold | None:
        """Read it as layer → norm → activation → layer → norm; None if it is anything else."""
        norm, node = self._norm(self._behind(self.branch.end))
        last, node = self._layer(self._behind(node))
        node = self._behind(node)
        if norm is None or last is None or node is None or not self._gives_on_inputs(node):
            return None
        inner, node = self._norm(self._behind(node.all_input_nodes[0]))
        first, node = self._layer(self._behind(node))
        if inner is None or first is None or node not in self.branch.residual.main:
            return None
        return self._fold(norm=norm, first=first, inner=inner, last=last)

    def _fold(self, **paths: str | None) -> Fold:
        return Fold(tuple(self.silenced), scales=tuple(self.scales), columns=tuple(self.columns), **paths)

    def _behind(self, node: fx.Node | None, *, scales: bool = False) -> fx.Node | None:
        """Go back over dropout, layout, what passes all on, and if wanted scales; gives the node that is there."""
        residual = self.branch.residual
        while node is not None and node not in residual.main:
            module = module_at(self.site, node)
            inner = [term for term in node.all_input_nodes if residual.probe.parameter_behind(term) is None]
            if not is_passing(self.site, node):
                names = [name for name, _ in residual.probe.parameters_at(node)]
                if len(inner) != 1 or not names:
                    break
                if scales and self._gives(node, inner[0], names, torch.ones_like):
                    self.scales += names
                elif module is not None and self._gives(node, inner[0], names, torch.zeros_like):
                    self.silenced.append(self.site.inside(node))
                else:
                    break
            node = inner[0] if inner else None
        return node

    def _gives(self, node: fx.Node, inner: fx.Node, names: Sequence[str], value: Callable[[Tensor], Tensor]) -> bool:
        """Whether a node gives on what it gets if its parameters have a value."""
        probe = self.branch.residual.probe
        weights = {name: value(probe.block.get_parameter(name)) for name in names}
        if not all(map(is_vector, weights.values())):
            return False
        nodes = [each for term in node.all_input_nodes if term is not inner for each in probe.handles(term)] + [node]
        start = self.branch.gives(watch=[inner])[inner]
        return gives(lambda: probe.replay(nodes, {inner: start}, [node], weights=weights)[node], start)

    def _layer(self, node: fx.Node | None) -> tuple[str | None, fx.Node | None]:
        """The path of the linear or convolution layer that a node is, and the node before it."""
        module = None if node is None else module_at(self.site, node)
        if node is None or module is None:
            return None, node
        path = self.site.inside(node)
        if not isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            if not _is_in_columns(self.branch.residual.probe.block.get_submodule(path)):
                return None, node
            self.columns.append(path)
        return path, node.all_input_nodes[0]

    def _norm(
        self, node: fx.Node | None, fits: Callable[[Residual, str], bool] = is_norm
    ) -> tuple[str | None, fx.Node | None]:
        """The path of the normalisation that a node is, and the node before it."""
        if node is None or node.op != "call_module" or not fits(self.branch.residual, self.site.inside(node)):
            return None, node
        return self.site.inside(node), node.all_input_nodes[0]

    def _is_activation(self, node: fx.Node) -> bool:
        """Whether it is an a with a(z) − a(−z) = z."""
        activation = self._activation(node)
        z = torch.linspace(-9, 9, 181, dtype=torch.float64)
        return activation is not None and gives(lambda: activation(z.clone()) - activation(-z), z)

    def _gives_on_inputs(self, node: fx.Node) -> bool:
        """Whether it is an activation that has nothing to do on what the block gets: ReLU behind another."""
        activation, x = self._activation(node), self.branch.residual.probe.x
        return activation is not None and gives(lambda: activation(x.clone()), x)

    def _activation(self, node: fx.Node) -> Callable[[Tensor], Tensor] | None:
        module = module_at(self.site, node)
        if module is not None:
            return copy.deepcopy(module).double().eval() if number_of(module) == 0 else None
        return _applied(node) if node.op == "call_function" else None


def _is_in_columns(module: nn.Module) -> bool:
    """Whether it is x W + b, with a bias or without."""
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if weight is None or weight.dim() != 2 or number_of(module) > 1 + (bias is not None):
        return False
    x = torch.linspace(-1, 1, 2 * len(weight), dtype=weight.dtype).view(1, 2, -1)
    return gives(lambda: module(x), x @ weight.detach() + (0.0 if bias is None else bias.detach()))


def _applied(node: fx.Node) -> Callable[[Tensor], Tensor]:
    """The function of one tensor that a node applies; it raises where the node has other inputs."""
    assert callable(node.target)
    target, kwargs = node.target, {k: v for k, v in node.kwargs.items() if not isinstance(v, fx.Node)}
    rest = [argument for argument in node.args[1:] if not isinstance(argument, fx.Node)]
    return lambda z: target(z, *rest, **kwargs)


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
    rank, w1, w2 = len(inward), _weight(first, fold.first in fold.columns), _weight(last, fold.last in fold.columns)
    if 2 * rank > len(w1):
        raise FusionError(f"`{fold.first}` has {len(w1)} channels, {2 * rank} are needed to carry the light map")
    w1[: 2 * rank] = torch.cat([inward, -inward]).view(2 * rank, *w1.shape[1:])
    w2.zero_()
    w2[:, : 2 * rank] = torch.cat([outward, -outward], 1).view(len(w2), 2 * rank, *w2.shape[2:])
    b1, b2 = (layer._parameters.get("bias") for layer in (first, last))
    if b1 is not None:
        b1[: 2 * rank] = 0.0
    if b2 is not None:
        b2[:] = 0.0 if bias is None else bias
    elif bias is not None:
        raise FusionError(f"`{fold.last}` has no bias to carry the light operator's")


def _weight(layer: nn.Module, columns: bool) -> Tensor:
    """The weight of a layer with a row for each output."""
    weight = layer.get_parameter("weight")
    return weight.T if columns else weight
