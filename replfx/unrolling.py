"""The ways out of a transformed model: materialize and unroll."""

import copy
from collections.abc import Mapping

import torch
from torch import fx, nn
from torch.optim import Optimizer

from replfx.blocks import head_of, is_region, put_blocks
from replfx.errors import FusionError
from replfx.fusion import FusionLayer
from replfx.passes.rewritten import Rewritten, restore_region
from replfx.state import placed_layers, state_of, unmark
from replfx.structure import move_hooks

__all__ = ["materialize", "unroll"]


def materialize(model: nn.Module) -> nn.Module:
    """Turn each fusion layer into a plain module with the weights that it synthesises now.

    Args:
        model: a transformed model; it is left as it is.

    Returns:
        A copy that gives the same outputs and holds nothing of replfx: neither modules nor hooks. A replaced
        block is of its original class again under operator `block` (one that was no module is a part of the
        graph again, with the names that its parameters had), a `torch.fx.GraphModule` of torch's own operations
        under the others. Kept blocks no longer share anything with it.

    Raises:
        PlanError: the model is not transformed.

    Example:
        >>> plain = replfx.materialize(model.eval())
        >>> torch.equal(plain(x), model(x))
        True
    """
    plan = state_of(model).plan
    twin = copy.deepcopy(model)
    layers, made = placed_layers(twin, plan), {}
    with torch.no_grad():
        for path, layer in layers.items():
            made[path] = layer.operator.plain({n: t.detach().clone() for n, t in layer.synthesized().items()})
    _put(twin, layers, made)
    return twin


def unroll(model: nn.Module, optimizer: Optimizer | None = None) -> nn.Module:
    """Give the replaced blocks back at full depth, starting from what their fusion layers learned.

    Args:
        model: a model transformed with operator `block`. It is changed in place, so that an optimizer goes on
            holding the parameters of the kept blocks.
        optimizer: gets the new parameters, in the group of the coefficients that they take the place of, and
            forgets those; the state of all other parameters stays.

    Returns:
        `model` itself, with the outputs that it had and the parameter names of the original.

    Raises:
        PlanError: the model is not transformed.
        FusionError: another operator than `block`; the model is left as it was.

    Example:
        >>> model = replfx.transform(model, every=2)
        >>> ...                                # most of the training
        >>> replfx.unroll(model, optimizer)
        >>> ...                                # the rest at full depth
    """
    layers = placed_layers(model, state_of(model).plan)
    for path, layer in layers.items():
        if not layer.operator.unrolls:
            raise FusionError(
                f"`{path}` has operator {type(layer.operator).__name__}, which keeps no full block to give back; "
                "unroll needs operator='block' (or call replfx.materialize)"
            )
    with torch.no_grad():
        thetas = {
            path: {name: tensor.detach().clone() for name, tensor in layer.synthesized().items()}
            for path, layer in layers.items()
        }
        blocks = {}
        for path, layer in layers.items():
            coefficients = set(layer.parameters())
            blocks[path] = layer.operator.plain(thetas[path])
            if optimizer is not None:
                _hand_over(optimizer, coefficients, blocks[path])
    _put(model, layers, blocks)
    return model


def _put(model: nn.Module, layers: Mapping[str, FusionLayer], plain: Mapping[str, nn.Module]) -> None:
    """Put plain modules, or what they compute, in the fusion layers' places; nothing of replfx is left."""
    modules: dict[str, nn.Module] = {}
    for path, layer in layers.items():
        made = plain[path]
        if is_region(path) and layer.operator.unrolls:
            assert isinstance(model, fx.GraphModule)
            assert isinstance(made, fx.GraphModule)
            restore_region(model, head_of(model, path), made, layer.names)
        else:
            modules[path] = _in_place_of(layer, made)
    put_blocks(model, modules)
    unmark(model)
    if isinstance(model, Rewritten):
        model.become_plain()


def _in_place_of(layer: FusionLayer, plain: nn.Module) -> nn.Module:
    """Give a plain module the hooks and the training mode of the fusion layer whose place it takes."""
    move_hooks(layer, plain)
    known = set(layer.modules())
    for module in plain.modules():
        if module not in known:  # the others have modes of their own: a norm may be frozen in a block that trains
            module.training = layer.training
    return plain


def _hand_over(optimizer: Optimizer, old: set[nn.Parameter], full: nn.Module) -> None:
    """Let the parameters of `full` take the place of those of `old` that are gone, in the same group."""
    kept = set(full.parameters())
    gone = old - kept
    new = [p for p in full.parameters() if p not in old]
    for group in optimizer.param_groups:
        if any(parameter in gone for parameter in group["params"]):
            group["params"] = [p for p in group["params"] if p not in gone] + new
            new = []  # the coefficients may be spread over groups, the new parameters go to the first
    for parameter in gone:
        optimizer.state.pop(parameter, None)
