"""reassociate_products: of a few tokens, apply the factors of a synthesised map in turn, without their product."""

import operator
from dataclasses import dataclass

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult
from torch.nn import functional as F

from replfx.dynamo.nodes import are_settled, epochs, has_known_sizes, made_beside, made_of_parameters, value_of

__all__ = ["ReassociateProducts"]

_PRODUCTS = (operator.matmul, torch.matmul)


@dataclass(frozen=True)
class ReassociateProducts(PassBase):
    """Rewrite x (A B)ᵀ to (x Bᵀ) Aᵀ for synthesised A and B where that takes fewer FLOPs, over Dynamo's graph.

    With A (o, m), B (m, i) and T tokens it is o·m·i + T·i·o against T·m·(i + o) multiplications, forward and, twice
    over, backward. Only where gradients flow, for without them the product is formed once for many calls.
    """

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrite all of them."""
        changed, stretch = False, epochs(graph_module.graph)
        made = made_of_parameters(graph_module.graph)
        for node in made:
            # Of factors that are parameters themselves the order is the model's own.
            if node.target not in _PRODUCTS or not any(made[factor] for factor in node.all_input_nodes):
                continue
            fits = all(_is_matrix_of(node, user) and stretch[user] == stretch[node] for user in node.users)
            if fits and _is_worth_it(node):
                outward, inward = node.all_input_nodes
                for user in list(node.users):
                    _rewrite(user, outward, inward)
                graph_module.graph.erase_node(node)
                changed = True
        if changed:
            graph_module.recompile()
        return PassResult(graph_module, changed)


def _is_matrix_of(product: fx.Node, user: fx.Node) -> bool:
    """Whether the product is the matrix of linear(x, product, …) and nothing else in it."""
    places = [place for place, arg in enumerate(user.args) if arg is product]
    return user.target is F.linear and places == [1] and product not in user.kwargs.values()


def _is_worth_it(product: fx.Node) -> bool:
    nodes = (product, *product.all_input_nodes)
    if len(nodes) != 3 or product.kwargs or not are_settled(nodes):
        return False
    made, outward, inward = map(value_of, nodes)
    given = [value_of(user.all_input_nodes[0]) for user in product.users]
    if not made.requires_grad or any(value.dim() != 2 for value in (outward, inward)) or not has_known_sizes(given):
        return False
    (outputs, between), inputs = outward.shape, inward.shape[1]
    tokens = sum(value.numel() // inputs for value in given)
    return bool(tokens * between * (inputs + outputs) < outputs * between * inputs + tokens * inputs * outputs)


def _rewrite(user: fx.Node, outward: fx.Node, inward: fx.Node) -> None:
    """linear(x, outward @ inward, bias) as linear(linear(x, inward), outward, bias)."""
    x, _, *bias = user.args
    assert isinstance(x, fx.Node)
    user.args = (made_beside(user, F.linear, x, inward), outward, *bias)
