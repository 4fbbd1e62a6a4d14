"""The batched synthesis: θ_i = a_i·θ_prev,i + b_i·θ_next,i for all i as one operation, with its gradients.

In plain torch. `triton_op` makes an operation that runs by itself in eager mode, and that AOTAutograd opens up
into what it is made of, forward and backward; Inductor then makes one horizontally fused kernel of each list.
No Triton is needed for that.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from replfx.fusion.fusions import along_first
from replfx.torch_internals.dynamo import foreach_add, foreach_mul

__all__ = ["SYNTHESIZE", "kernel_operation"]


@torch.library.triton_op("replfx::synthesize_many", mutates_args=())
def synthesize_many(previous: list[Tensor], next: list[Tensor], a: list[Tensor], b: list[Tensor]) -> list[Tensor]:
    """All θ_i = a_i·previous_i + b_i·next_i.

    Args:
        previous: tensors of any shapes.
        next: tensors of the same shapes.
        a: for each a vector of length 1, or of the length of its first dimension.
        b: for each a vector of length 1, or of the length of its first dimension.

    Example:
        >>> w = torch.ones(2, 3)
        >>> torch.ops.replfx.synthesize_many([w], [w], [torch.tensor([0.5])], [torch.tensor([1.0, 2.0])])[0][:, 0]
        tensor([1.5000, 2.5000])
    """
    # Coefficients first, as in a fusion's forward: the first factor decides on the layout of the product.
    return list(foreach_add(foreach_mul(_along_first(a, previous), previous), foreach_mul(_along_first(b, next), next)))


@torch.library.triton_op("replfx::scale_many", mutates_args=())
def scale_many(gradients: list[Tensor], coefficients: list[Tensor]) -> list[Tensor]:
    """All c_i·g_i: the gradients of one side's neighbours."""
    return list(foreach_mul(_along_first(coefficients, gradients), gradients))


def _along_first(coefficients: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    return [along_first(c, t) for c, t in zip(coefficients, tensors, strict=True)]


def _save(ctx: Any, inputs: tuple[list[Tensor], ...], output: list[Tensor]) -> None:
    ctx.count = len(output)
    ctx.save_for_backward(*(tensor for side in inputs for tensor in side))


def _backward(ctx: Any, gradients: list[Tensor | None]) -> tuple[list[Tensor | None], ...]:
    saved = [ctx.saved_tensors[start : start + ctx.count] for start in range(0, 4 * ctx.count, ctx.count)]
    previous, next, a, b = saved
    wanted: tuple[list[bool], ...] = ctx.needs_input_grad
    return (
        _scaled(gradients, a, wanted[0]),
        _scaled(gradients, b, wanted[1]),
        _products(gradients, previous, a, wanted[2]),
        _products(gradients, next, b, wanted[3]),
    )


def _scaled(
    gradients: Sequence[Tensor | None], coefficients: Sequence[Tensor], wanted: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of the neighbours, all by one operation; None where none is wanted."""
    chosen = [(i, g) for i, g in enumerate(gradients) if g is not None and wanted[i]]
    found: list[Tensor | None] = [None] * len(gradients)
    if chosen:
        made = torch.ops.replfx.scale_many([g for _, g in chosen], [coefficients[i] for i, _ in chosen])
        for (i, _), value in zip(chosen, made, strict=True):
            found[i] = value
    return found


def _products(
    gradients: Sequence[Tensor | None], thetas: Sequence[Tensor], coefficients: Sequence[Tensor], wanted: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of the coefficients: Σ g·θ, over each channel or over all.

    Not as lists: Inductor would write the products out, where it fuses a product into the sum over it.
    """
    return [
        _product(g, theta, c) if g is not None and wants else None
        for g, theta, c, wants in zip(gradients, thetas, coefficients, wanted, strict=True)
    ]


def _product(gradient: Tensor, theta: Tensor, coefficients: Tensor) -> Tensor:
    product = gradient * theta
    if coefficients.shape[0] == 1:
        return product.sum().view(1)
    return product.flatten(1).sum(1) if product.dim() > 1 else product


synthesize_many.register_autograd(_backward, setup_context=_save)

SYNTHESIZE: Any = torch.ops.replfx.synthesize_many.default


def kernel_operation() -> Any:
    """`replfx::synthesize`, of the same meaning: the Triton kernels where they run, plain operations elsewhere.

    Its backward reads each dW once for all four gradients.
    """
    import replfx.kernels  # noqa: F401 (registers it)

    return torch.ops.replfx.synthesize.default
