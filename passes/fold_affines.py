"""fold_affines: let a synthesised matrix do what the weight and bias of the normalisation before it do."""

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult
from torch.nn import functional as F

from replfx.dynamo.nodes import are_settled, epochs, made_beside, made_of_parameters, value_of

__all__ = ["FoldAffines"]

_NORMS: dict[Any, tuple[str, ...]] = {
    F.layer_norm: ("input", "normalized_shape", "weight", "bias", "eps"),
    torch.rms_norm: ("input", "normalized_shape", "weight", "eps"),
}


@dataclass(frozen=True)
class FoldAffines(PassBase):
    """Rewrite M (γ ⊙ x̂ + β) + c to (M ⊙ γ) x̂ + (M β + c) for a synthesised M where that takes fewer FLOPs.

    x̂ is what the normalisation makes of T tokens of d channels before its own γ and β, and M has o rows. With
    gradients γ and β cost some 6·T·d operations a step, forward and backward, and in the matrix 10·o·d; without, the
    matrix is made once for many calls.
    """

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrite all of them."""
        changed, stretch, made = False, epochs(graph_module.graph), made_of_parameters(graph_module.graph)
        for node in list(graph_module.graph.nodes):
            if node.target in _NORMS and node.op == "call_function":
                users = list(node.users)  # none, if its result is not needed in this mode
                if len(users) == 1 and stretch[node] == stretch[users[0]]:
                    changed |= _fold(node, users[0], made)
        if changed:
            graph_module.recompile()
        return PassResult(graph_module, changed)


def _fold(norm: fx.Node, linear: fx.Node, made: Mapping[fx.Node, bool]) -> bool:
    given: dict[str, Any] = dict(zip(_NORMS[norm.target], norm.args, strict=False)) | norm.kwargs
    weight, shift = given.get("weight"), given.get("bias")
    if linear.target is not F.linear or linear.kwargs:
        return False
    operands: Any = (*linear.args, None)[:3]
    x, matrix, bias = operands
    if x is not norm or norm in (matrix, bias) or not made.get(matrix):
        return False
    nodes = [node for node in (norm, matrix, weight, shift, bias) if node is not None]
    if not isinstance(weight, fx.Node) or not _is_worth_it(norm, linear, nodes):
        return False
    scaled = made_beside(linear, operator.mul, matrix, weight)
    moved = bias if shift is None else made_beside(linear, F.linear, shift, matrix, bias)
    norm.args, norm.kwargs = (
        (given["input"], given["normalized_shape"]),
        {"eps": given["eps"]} if "eps" in given else {},
    )
    linear.args, linear.kwargs = (norm, scaled, moved), {}
    return True


def _is_worth_it(norm: fx.Node, linear: fx.Node, nodes: list[Any]) -> bool:
    if not all(isinstance(node, fx.Node) for node in nodes) or not are_settled((linear, *nodes)):
        return False
    x, matrix, weight = map(value_of, nodes[:3])
    if (matrix.dim(), weight.dim()) != (2, 1):
        return False  # a norm over several dimensions has other weights for each token
    tokens = x.numel() // x.shape[-1]
    return bool(not matrix.requires_grad or 3 * tokens > 5 * matrix.shape[0])
