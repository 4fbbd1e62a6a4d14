"""reassociate_products: of a few tokens, apply the factors of a synthesised map in turn, without their product."""

import operator
from dataclasses import dataclass

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult
from torch.nn import functional as F

from replfx.dynamo.nodes import epochs, is_plain, is_untouched, made_beside, made_of_parameters, value_of

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
    values = [value_of(node) for node in (product, *product.all_input_nodes)]
    if len(values) != 3 or product.kwargs or not all(is_plain(value) and value.dim() == 2 for value in values):
        return False
    if not values[0].requires_grad or not all(map(is_untouched, product.all_input_nodes)):
        return False
    if len({value.dtype for value in values}) != 1:
        return False  # under autocast each result is rounded, and another order would show
    given = [value_of(user.all_input_nodes[0]) for user in product.users]
    outputs, between, inputs = values[1].shape[0], values[1].shape[1], values[2].shape[1]
    if any(type(size) is not int for value in (*given, *values) for size in value.shape):
        return False  # who knows how many tokens there will be
    tokens = sum(value.numel() // inputs for value in given)
    return bool(tokens * between * (inputs + outputs) < outputs * between * inputs + tokens * inputs * outputs)


def _rewrite(user: fx.Node, outward: fx.Node, inward: fx.Node) -> None:
    """linear(x, outward @ inward, bias) as linear(linear(x, inward), outward, bias)."""
    x, _, *bias = user.args
    assert isinstance(x, fx.Node)
    user.args = (made_beside(user, F.linear, x, inward), outward, *bias)
