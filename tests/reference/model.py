"""Stacks of blocks, and what they compute once some blocks are replaced, by hand.

Parameters of the reference are named so:
    blocks.I.NAME          of a kept block
    blocks.I.a, blocks.I.b the coefficients of a replaced block, one vector each
    blocks.I.NAME          what operators `block` and `mixer` leave a replaced block of its own
    blocks.I.gain, .shift, .norm.NAME, .map.bias   what operator `light` owns: g, c, N and a kernel's bias
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tests.reference.blocks import ALL, FAMILIES, Options, Tensors


class Stack(nn.Module):
    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class MaskedStack(Stack):
    """Hands a mask to every block, and adds up what they give besides their activation."""

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        total = x.new_zeros(())
        for block in self.blocks:
            x, seen = block(x, mask)
            total = total + seen.mean()
        return x, total


def build(family: str, options: Options, depth: int) -> Stack:
    """A model of `depth` blocks."""
    blocks = [FAMILIES[family].make(options) for _ in range(depth)]
    return (MaskedStack if family == "masked" else Stack)(blocks)


def reference_forward(
    family: str,
    options: Options,
    depth: int,
    replaced: Sequence[int],
    tensors: Tensors,
    inputs: tuple[Tensor, ...],
    *,
    fusion: str,
    operator: str,
    neighbour_gradient: float,
    training: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """The output of a stack in which the blocks `replaced` are replaced; updates running statistics."""
    kind, (x, *extra) = FAMILIES[family], inputs
    total = x.new_zeros(())
    for i in range(depth):
        own = _under(tensors, f"blocks.{i}.")
        if i not in replaced:
            y = kind.run(own, x, options, training, *extra)
        elif operator == "identity":
            y = x
        else:
            before, after = (_under(tensors, f"blocks.{j}.") for j in (i - 1, i + 1))
            parts = _parts(family, options, operator, before)
            theta = _fuse(own["a"], own["b"], before, after, parts, fusion, neighbour_gradient)
            if operator == "block":
                y = kind.run({**theta, **own}, x, options, training, *extra)
            elif operator == "mixer":
                y = kind.mixer({**theta, **own}, x, options, training)
            else:
                y = kind.light(theta, own, x, options, training)
        if family == "masked":
            x, seen = y
            total = total + seen.mean()
        else:
            x = y
    return (x, total) if family == "masked" else x


def _under(tensors: Tensors, prefix: str) -> Tensors:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _parts(family: str, options: Options, operator: str, block: Tensors) -> dict[str, slice]:
    """What is synthesised: name → rows."""
    if operator == "block":
        return {name: ALL for name, t in block.items() if t.dim() >= 2}
    if operator == "mixer":
        return {name: ALL for name, t in block.items() if t.dim() >= 2 and name.startswith("attn.")}
    chosen = FAMILIES[family].light_maps
    return chosen(options)


def _fuse(
    a: Tensor,
    b: Tensor,
    before: Tensors,
    after: Tensors,
    parts: dict[str, slice],
    fusion: str,
    neighbour_gradient: float,
) -> Tensors:
    """θ = a·θ_before + b·θ_after, parameter by parameter in the block's order."""
    theta: Tensors = {}
    position = 0
    for name, rows in parts.items():
        one, other = (_scaled(side[name][rows], neighbour_gradient) for side in (before, after))
        if fusion == "scalar_layer":
            theta[name] = a[0] * one + b[0] * other
        elif fusion == "scalar":
            theta[name] = a[position] * one + b[position] * other
            position += 1
        else:
            channels = range(one.shape[0])
            theta[name] = torch.stack([a[position + c] * one[c] + b[position + c] * other[c] for c in channels])
            position += one.shape[0]
    assert position in (0, len(a))  # no coefficient is left over
    return theta


def _scaled(theta: Tensor, factor: float) -> Tensor:
    """The same value, with `factor` times the gradient."""
    if factor == 0:
        return theta.detach()
    return theta if factor == 1 else factor * theta + ((1 - factor) * theta).detach()
