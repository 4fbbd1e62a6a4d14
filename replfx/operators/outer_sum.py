"""A block that is a residual branch itself: the sum with its input is in the code around it, `x + block(norm(x))`."""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, fx, nn

from replfx.modules.structure import attribute_at
from replfx.operators.base import Site
from replfx.operators.probe import activations_of, is_vector, rounding_of
from replfx.operators.residual import is_residual, is_sum

__all__ = ["is_branch"]

_MOST = 16
"""Nodes that are looked through for what a weight is made of; an activation has the whole model before it."""


def is_branch(site: Site) -> bool:
    """Whether all that is done with what a block gives is to add it to what it was given.

    Normalisations, activations, scales, dropout and layouts may lie between, on both ways, and other terms of the sum.
    A block that is a sum with its input itself is no branch.
    """
    if is_residual(site):
        return False
    stream, inside = set(_back(site.input)), set(site.nodes)
    pending, seen, found = [site.output], {site.output}, False
    while pending:
        node = pending.pop()
        for user in node.users:
            if user in seen or user in inside:
                continue
            seen.add(user)
            others = [term for term in user.all_input_nodes if any(behind in stream for behind in _back(term))]
            if others and (is_sum(user) or any(_adds(user, node, other) for other in others)):
                found = True
            elif is_sum(user) or _is_vectors_only(user):
                pending.append(user)
            else:
                return False
    return found


def _back(node: fx.Node) -> Iterator[fx.Node]:
    """A node, and those that it was made from without a matrix and without another activation, the last first."""
    yield node
    while _is_vectors_only(node):
        node = next(term for term in activations_of(node) if _weights(term) is None)
        yield node


def _is_vectors_only(node: fx.Node) -> bool:
    """Whether a node has one activation, and no parameter that is more than a vector (a norm's, a scale)."""
    if node.op not in ("call_module", "call_function", "call_method"):
        return False
    weights = [_weights(term) for term in activations_of(node)]
    read = [weight for found in weights for weight in found or ()]
    if node.op == "call_module":
        read += _module(node).parameters()
    return weights.count(None) == 1 and all(is_vector(weight) for weight in read)


def _weights(node: fx.Node) -> list[Tensor] | None:
    """The tensors that a node is made of, where these are the model's own alone, as in `1 + gamma`; None if not."""
    root, found, pending = node.graph.owning_module, list[Tensor](), [node]
    assert root is not None
    for _ in range(_MOST):
        if not pending:
            return found
        term = pending.pop()
        if term.op == "get_attr":
            value = attribute_at(root, str(term.target))
            found += [value] if isinstance(value, Tensor) else []
        elif term.op in ("call_function", "call_method") and term.all_input_nodes:
            pending += term.all_input_nodes
        else:
            return None
    return None


def _adds(node: fx.Node, one: fx.Node, other: fx.Node) -> bool:
    """Whether a module gives the sum of two of its inputs, perhaps scaled: measured, with numbers drawn at random."""
    if node.op != "call_module" or one is other or not all(is_vector(p) for p in _module(node).parameters()):
        return False
    draw = torch.Generator().manual_seed(0)

    def given(*present: fx.Node) -> Tensor:
        def value(term: fx.Node) -> Tensor:
            made = drawn[term]
            return made if term in present or term not in (one, other) else torch.zeros_like(made)

        made: Tensor = module(*fx.map_arg(node.args, value), **fx.map_arg(node.kwargs, value))
        return made

    try:
        module = copy.deepcopy(_module(node)).double().eval()
        drawn = {n: torch.randn(n.meta["shape"], generator=draw, dtype=torch.float64) for n in node.all_input_nodes}
        with torch.no_grad():
            none, first, second, both = given(), given(one), given(other), given(one, other)
    except Exception:  # it cannot be copied, or wants something else than numbers
        return False
    moved = all(bool((part != none).any()) for part in (first, second))
    return moved and torch.allclose(both - second, first - none, atol=rounding_of(torch.float64))


def _module(node: fx.Node) -> nn.Module:
    assert node.graph.owning_module is not None
    return node.graph.owning_module.get_submodule(str(node.target))
