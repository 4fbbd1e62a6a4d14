"""A block that is a residual branch itself: the sum with its input is in the code around it, `x + block(norm(x))`."""

from collections.abc import Iterator

from torch import Tensor, fx

from replfx.modules.structure import attribute_at
from replfx.operators.base import Site
from replfx.operators.probe import activations_of, is_vector
from replfx.operators.residual import is_residual, is_sum

__all__ = ["is_branch"]


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
        for user in pending.pop().users:
            if user in seen or user in inside:
                continue
            seen.add(user)
            if is_sum(user) and any(term in stream for other in user.all_input_nodes for term in _back(other)):
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
        node = next(term for term in activations_of(node) if term.op != "get_attr")
        yield node


def _is_vectors_only(node: fx.Node) -> bool:
    """Whether a node has one activation, and no parameter that is more than a vector (a norm's, a scale)."""
    if node.op not in ("call_module", "call_function", "call_method"):
        return False
    activations = [term for term in activations_of(node) if term.op != "get_attr"]
    root = node.graph.owning_module
    if len(activations) != 1 or root is None:
        return False
    read = [attribute_at(root, str(term.target)) for term in node.all_input_nodes if term.op == "get_attr"]
    if node.op == "call_module":
        read += root.get_submodule(str(node.target)).parameters()
    return all(is_vector(value) for value in read if isinstance(value, Tensor))
