"""reassociate_products: of a few tokens, apply the factors of a synthesised map in turn, without their product."""

import operator
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx
from torch.nn import functional as F

from replfx.dynamo.nodes import (
    are_plain_and_unwritten,
    epochs,
    has_known_sizes,
    made_beside,
    made_of_parameters,
    value_of,
)
from replfx.passes import Rewrite

__all__ = ["ReassociateProducts"]

_PRODUCTS = (operator.matmul, torch.matmul)


@dataclass(frozen=True)
class ReassociateProducts(Rewrite[fx.Node]):
    """Rewrite x (A B)ᵀ to (x Bᵀ) Aᵀ for synthesised A and B where that takes fewer FLOPs, over Dynamo's graph.

    With A (o, m), B (m, i) and T tokens it is o·m·i + T·i·o against T·m·(i + o) multiplications, forward and, twice
    over, backward. Only where gradients flow, for without them the product is formed once for many calls.
    """

    def find(self, graph: fx.Graph) -> Iterator[fx.Node]:
        """Products that are matrices of linear maps and nothing else."""
        made, stretch = made_of_parameters(graph), epochs(graph)
        # Of factors that are parameters themselves the order is the model's own.
        for node in (n for n in made if n.target in _PRODUCTS and any(made[factor] for factor in n.all_input_nodes)):
            if all(_is_matrix_of(node, user) and stretch[user] == stretch[node] for user in node.users):
                yield node

    def is_worth_it(self, product: fx.Node) -> bool:
        """Whether two thin products are cheaper, of matrices whose order of operations does not show."""
        nodes = (product, *product.all_input_nodes)
        if len(nodes) != 3 or product.kwargs or not are_plain_and_unwritten(nodes):
            return False
        made, outward, inward = map(value_of, nodes)
        given = [value_of(user.all_input_nodes[0]) for user in product.users]
        if not made.requires_grad or any(value.dim() != 2 for value in (outward, inward)) or not has_known_sizes(given):
            return False
        (outputs, between), inputs = outward.shape, inward.shape[1]
        tokens = sum(value.numel() // inputs for value in given)
        return bool(tokens * between * (inputs + outputs) < outputs * between * inputs + tokens * inputs * outputs)

    def rewrite(self, graph: fx.Graph, product: fx.Node) -> None:
        """linear(x, outward @ inward, bias) as linear(linear(x, inward), outward, bias)."""
        outward, inward = product.all_input_nodes
        for user in list(product.users):
            x, _, *bias = user.args
            assert isinstance(x, fx.Node)
            user.args = (made_beside(user, F.linear, x, inward), outward, *bias)
        graph.erase_node(product)


def _is_matrix_of(product: fx.Node, user: fx.Node) -> bool:
    """Whether the product is the matrix of linear(x, product, …) and nothing else in it."""
    places = [place for place, arg in enumerate(user.args) if arg is product]
    return user.target is F.linear and places == [1] and product not in user.kwargs.values()
