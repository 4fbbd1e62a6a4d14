"""fold_affines: let a synthesised matrix do what the weight and bias of the normalisation before it do."""

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.nn import functional as F

from replfx.dynamo.nodes import are_plain_and_unwritten, epochs, made_beside, made_of_parameters, value_of
from replfx.passes import Rewrite

__all__ = ["FoldAffines"]

_NORMS: dict[Any, tuple[str, ...]] = {
    F.layer_norm: ("input", "normalized_shape", "weight", "bias", "eps"),
    torch.rms_norm: ("input", "normalized_shape", "weight", "eps"),
}


class _Fold(NamedTuple):
    """A normalisation whose only reader is a linear map."""

    norm: fx.Node
    linear: fx.Node
    given: dict[str, Any]  # the normalisation's arguments, by their names
    matrix: fx.Node
    bias: fx.Node | None


@dataclass(frozen=True)
class FoldAffines(Rewrite[_Fold]):
    """Rewrite M (γ ⊙ x̂ + β) + c to (M ⊙ γ) x̂ + (M β + c) for a synthesised M where that takes fewer FLOPs.

    x̂ is what the normalisation makes of T tokens of d channels before its own γ and β, and M has o rows. With
    gradients γ and β cost some 6·T·d operations a step, forward and backward, and in the matrix 10·o·d; without, the
    matrix is made once for many calls.
    """

    def find(self, graph: fx.Graph) -> Iterator[_Fold]:
        """Normalisations that nothing but a linear map with a synthesised matrix reads."""
        stretch, made = epochs(graph), made_of_parameters(graph)
        for norm in list(graph.nodes):
            if norm.op != "call_function" or norm.target not in _NORMS or len(norm.users) != 1:
                continue
            (linear,) = norm.users
            if linear.target is not F.linear or linear.kwargs or stretch[linear] != stretch[norm]:
                continue
            given = dict(zip(_NORMS[norm.target], norm.args, strict=False)) | norm.kwargs
            operands: Any = (*linear.args, None)[:3]
            x, matrix, bias = operands
            if x is norm and norm not in (matrix, bias) and made.get(matrix) and given.get("weight") is not None:
                nodes = [
                    node
                    for node in (norm, linear, matrix, given["weight"], given.get("bias"), bias)
                    if node is not None
                ]
                if all(isinstance(node, fx.Node) for node in nodes) and are_plain_and_unwritten(nodes):
                    yield _Fold(norm, linear, given, matrix, bias)

    def is_worth_it(self, candidate: _Fold) -> bool:
        """Whether γ and β take longer at the tokens than in the matrix, by the counts above."""
        x, matrix, weight = map(value_of, (candidate.norm, candidate.matrix, candidate.given["weight"]))
        if (matrix.dim(), weight.dim()) != (2, 1):
            return False  # a norm over several dimensions has other weights for each token
        tokens = x.numel() // x.shape[-1]
        return bool(not matrix.requires_grad or 3 * tokens > 5 * matrix.shape[0])

    def rewrite(self, graph: fx.Graph, candidate: _Fold) -> None:
        """Move γ and β into the matrix and the bias."""
        norm, linear, given, matrix, bias = candidate
        weight, shift = given["weight"], given.get("bias")
        scaled = made_beside(linear, operator.mul, matrix, weight)
        moved = bias if shift is None else made_beside(linear, F.linear, shift, matrix, bias)
        norm.args = (given["input"], given["normalized_shape"])
        norm.kwargs = {"eps": given["eps"]} if "eps" in given else {}
        linear.args, linear.kwargs = (norm, scaled, moved), {}
