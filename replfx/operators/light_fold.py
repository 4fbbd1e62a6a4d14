"""How a light operator goes back into the full block; `replfx.operators.folding` has the formulas."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from replfx.errors import FusionError
from replfx.operators.folding import Fold, fold_of, set_linear, silence
from replfx.operators.light_recipe import LightRecipe
from replfx.operators.residual import Residual
from replfx.torch_internals import BatchNorm

if TYPE_CHECKING:
    from replfx.operators.light import LightOperator

__all__ = ["light_fold", "restore_light"]


def light_fold(residual: Residual, recipe: LightRecipe) -> Fold | str:
    """Where the light map of a recipe goes in a residual block, or why it has no place there."""
    block = residual.site.block
    if recipe.kind == "conv":
        fold = fold_of(residual, "convolutions")
        return fold if isinstance(fold, str) else _as_convolutions(block, recipe, fold)
    if recipe.activation is not None or not (recipe.norm_first or recipe.kind == "depthwise"):
        return (
            "its normalisation follows the light map, which leaves no layers that carry one through their activations"
        )
    fold = fold_of(residual, "mlp")
    return fold if isinstance(fold, str) else _as_mlp(block, recipe, fold)


def _as_mlp(block: nn.Module, recipe: LightRecipe, fold: Fold) -> Fold | str:
    assert fold.first is not None
    assert fold.last is not None
    if not _alike(block, recipe.norm, fold.norm):
        return f"its normalisations `{recipe.norm}` and `{fold.norm}` are not alike"
    entry = None if recipe.kind == "product" else recipe.maps[0].removesuffix(".weight")
    if fold.entry != entry:
        return f"what is before `{fold.norm}` is no part of the light map"
    width, inner = _channels(block, recipe.maps[-1], recipe.columns)
    hidden, _ = _channels(block, f"{fold.first}.weight", [f"{path}.weight" for path in fold.columns])
    _, read = _channels(block, f"{fold.last}.weight", [f"{path}.weight" for path in fold.columns])
    rank = width if recipe.kind == "depthwise" else min(width, inner)
    if hidden < 2 * rank or read != hidden:
        return f"`{fold.first}` has {hidden} channels, and {2 * rank} would be needed"
    if recipe.kind == "product" and block.get_submodule(fold.last)._parameters.get("bias") is None:
        return f"`{fold.last}` has no bias"
    return fold


def _channels(block: nn.Module, name: str, columns: Sequence[str]) -> tuple[int, int]:
    """How many outputs and inputs a map has."""
    weight = block.get_parameter(name)
    one, other = weight.shape[0], weight[0].numel()
    return (other, one) if name in columns else (one, other)


def _as_convolutions(block: nn.Module, recipe: LightRecipe, fold: Fold) -> Fold | str:
    assert fold.inner is not None
    assert fold.first is not None
    ends = (recipe.norm, *recipe.maps) == (fold.norm, f"{fold.last}.weight")
    if not ends or recipe.norm_first or recipe.activation is None:
        return "its light map is not its last convolution, or no activation follows the sum"
    if not isinstance(block.get_submodule(fold.inner), BatchNorm):
        return f"`{fold.inner}` is no batch normalisation"
    first: Any = block.get_submodule(fold.first)
    weight = first.weight
    sides = zip(first.padding, first.kernel_size, first.dilation, strict=True)
    centred = all(k % 2 == 1 and 2 * padding == (k - 1) * dilation for padding, k, dilation in sides)
    if weight.shape[0] != weight.shape[1] or set(first.stride) != {1} or not centred:
        return f"`{fold.first}` cannot be the identity"
    return fold


def _alike(block: nn.Module, one: str | None, other: str | None) -> bool:
    """Whether two normalisations differ in nothing but their values."""
    if one is None or other is None:
        return one is other
    modules = block.get_submodule(one), block.get_submodule(other)
    texts, shapes = ({repr(m) for m in modules}, {tuple(p.shape for p in m.parameters()) for m in modules})
    return len(texts) == len(shapes) == 1


def restore_light(
    operator: "LightOperator", fold: Fold, theta: dict[str, Tensor], block: nn.Module, inputs: Tensor | None
) -> None:
    """Let a full block compute what the operator computes.

    Args:
        operator: as it stands.
        fold: where it goes.
        theta: its synthesised weights.
        block: changed in place.
        inputs: a batch of the block's inputs, which a batch normalisation between convolutions needs.

    Raises:
        FusionError: it needs inputs and has none.
    """
    silence(block, fold)
    weight = theta[operator.recipe.maps[0]]
    eye = partial(torch.eye, dtype=weight.dtype, device=weight.device)
    if fold.norm is not None and operator.norm is not None:
        block.get_submodule(fold.norm).load_state_dict(operator.norm.state_dict())
    if operator.recipe.kind == "product":
        inward, outward = operator.factors(theta)
        if len(inward) > len(outward):  # more hidden channels than the product has rows: it is of their rank
            inward, outward = outward @ inward, eye(len(outward))
        set_linear(block, fold, inward, outward, operator.bias)
        return
    assert operator.map is not None
    target = fold.entry if operator.recipe.kind == "depthwise" else fold.last
    assert target is not None
    layer, bias = block.get_submodule(target), operator.map._parameters.get("bias")
    layer.get_parameter("weight").copy_(weight)
    if bias is not None:
        layer.get_parameter("bias").copy_(bias)  # the map is a copy of this layer
    if operator.recipe.kind == "depthwise":
        set_linear(block, fold, eye(len(weight)), eye(len(weight)), None)
    else:
        _pass_on(block, fold, inputs)


def _pass_on(block: nn.Module, fold: Fold, inputs: Tensor | None) -> None:
    """Let the first convolution and the batch normalisation behind it give on what they get."""
    if inputs is None:
        raise FusionError(
            "its batch normalisation has to be set to the statistics of its inputs: call "
            "replfx.unroll(model, optimizer, example_inputs) with a training batch"
        )
    assert fold.first is not None
    assert fold.inner is not None
    first, norm = block.get_submodule(fold.first), block.get_submodule(fold.inner)
    assert isinstance(norm, BatchNorm)
    nn.init.dirac_(first.get_parameter("weight"))
    if first._parameters.get("bias") is not None:
        first.get_parameter("bias").zero_()
    rest = [dim for dim in range(inputs.dim()) if dim != 1]
    variance, mean = torch.var_mean(inputs, rest, correction=0)
    if norm.running_mean is not None and norm.running_var is not None:
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
    norm.weight.copy_((variance + norm.eps).sqrt())
    norm.bias.copy_(mean)
