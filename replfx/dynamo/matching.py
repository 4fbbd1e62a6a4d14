"""Syntheses in Dynamo's graph: where θ = a·θ_prev + b·θ_next is made of parameters."""

import operator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from replfx.dynamo.nodes import are_plain_and_unwritten, made_of_parameters, value_of

__all__ = ["SynthesisNode", "syntheses_in", "synthesis_at"]


@dataclass(frozen=True)
class SynthesisNode:
    """One synthesised parameter.

    Attributes:
        node: gives θ.
        previous, next: give what is fused, both of θ's shape: a neighbour's parameter, or what alignment and
            `neighbour_gradient` made of it.
        a, b: give the coefficients as vectors of length 1, or of length θ.shape[0].
    """

    node: fx.Node
    previous: fx.Node
    next: fx.Node
    a: fx.Node
    b: fx.Node

    @property
    def inputs(self) -> tuple[fx.Node, fx.Node, fx.Node, fx.Node]:
        """θ_prev, θ_next, a, b."""
        return self.previous, self.next, self.a, self.b

    @property
    def kind(self) -> tuple[torch.Size, torch.dtype, torch.device]:
        """Syntheses of one kind can run as one."""
        theta: Tensor = value_of(self.node)
        return theta.shape, theta.dtype, theta.device

    @property
    def size(self) -> int:
        """Bytes of θ."""
        return int(value_of(self.node).nbytes)


def syntheses_in(graph: fx.Graph) -> list[SynthesisNode]:
    """All syntheses, in the order in which they run."""
    return [found for node in made_of_parameters(graph) if (found := synthesis_at(node)) is not None]


def synthesis_at(node: fx.Node) -> SynthesisNode | None:
    """The synthesis whose θ this node, made of parameters, gives; None if it is none, or one that has to stay.

    It is known by its computation, add(mul(view(a), θ_prev), mul(view(b), θ_next)), and not by a name. It has to stay
    if something writes into one of its tensors, or if they are not plain tensors of one shape, dtype and device
    (DTensors, mixed precision).
    """
    if node.op != "call_function" or node.target is not operator.add or len(node.args) != 2:
        return None
    left, right = (_term(arg) for arg in node.args)
    if left is None or right is None:
        return None
    found = SynthesisNode(node, left[1], right[1], left[0], right[0])
    return found if _is_sound(found) else None


def _term(node: object) -> tuple[fx.Node, fx.Node] | None:
    """(coefficients, θ) of mul(view(coefficients, -1, 1, …), θ)."""
    match node:
        case fx.Node(
            op="call_function",
            target=operator.mul,
            args=(fx.Node(op="call_method", target="view", args=(fx.Node() as vector, *sizes)), fx.Node() as theta),
        ):
            value = value_of(theta)
            if isinstance(value, Tensor) and sizes == [-1, *[1] * (value.dim() - 1)]:
                return vector, theta
    return None


def _is_sound(found: SynthesisNode) -> bool:
    nodes = (found.node, *found.inputs)
    if not are_plain_and_unwritten(nodes):
        return False
    theta, previous, next, a, b = map(value_of, nodes)
    vectors = all(vector.dim() == 1 and vector.shape[0] in (1, theta.shape[0]) for vector in (a, b))
    return bool(theta.dtype.is_floating_point and vectors and theta.shape == previous.shape == next.shape)
