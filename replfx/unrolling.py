"""The ways out of a transformed model: materialize and unroll."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.optim import Optimizer

from replfx.blocks import head_of, is_region, put_blocks
from replfx.errors import FusionError
from replfx.fusion import FusionLayer
from replfx.fusion.interface import read_slot
from replfx.passes.rewritten import Rewritten, restore_region
from replfx.state import placed_layers, state_of, unmark
from replfx.structure import move_hooks
from replfx.tracing import ExampleInputs, Inputs

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
        FusionError: processes share a sequence (`SequenceParallel`), which plain modules in the place of light
            operators do not know of.

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
            made[path] = _plain(path, layer)
    _put(twin, layers, made)
    return twin


def unroll(
    model: nn.Module, optimizer: Optimizer | None = None, example_inputs: ExampleInputs | None = None
) -> nn.Module:
    """Give the replaced blocks back at full depth, starting from what their fusion layers learned.

    Under operator `block` the blocks have the weights that were synthesised last, and under `mixer` what it runs has
    them, beside an MLP that begins as the mean of its neighbours' with a last layer of zero. Under `light` and
    `identity` they start as the means of their neighbours, save that each computes exactly what its operator computed
    (`replfx.fusion.folding` says how; random dropping of branches and channels sets in).

    Args:
        model: a transformed model. It is changed in place, so that an optimizer goes on holding the parameters of
            the kept blocks.
        optimizer: gets the new parameters, each in the group of a neighbour's parameter of its name, and forgets the
            coefficients; the state of all other parameters stays.
        example_inputs: a training batch, as for `transform`. Needed for `light` residual convolution blocks alone:
            their inner batch normalisation is set to the statistics of what it gets.

    Returns:
        `model` itself, with the outputs that it had and the parameter names of the original.

    Raises:
        PlanError: the model is not transformed.
        FusionError: an operator that does not go back into a full block (with tensor parallelism that is any but
            `block`), or example inputs that are needed; the model is left as it was.

    Example:
        >>> model = replfx.transform(model, operator="light")
        >>> ...                                # most of the training
        >>> replfx.unroll(model, optimizer)
        >>> ...                                # the rest at full depth
    """
    layers = placed_layers(model, state_of(model).plan)
    seen = {} if example_inputs is None else _main_inputs(model, example_inputs)
    with torch.no_grad():
        like = next(model.parameters())
        coefficients = {path: set(layer.parameters()) for path, layer in layers.items()}
        in_turn = sorted(layers.items(), key=lambda item: item[1].operator.unrolls)  # those that may fail first
        blocks = {path: _full_block(path, layer, like, seen.get(path)) for path, layer in in_turn}
        if optimizer is not None:
            for path, layer in layers.items():
                _hand_over(optimizer, coefficients[path], blocks[path], layer.neighbours)
    _put(model, layers, blocks)
    return model


def _plain(path: str, layer: FusionLayer) -> nn.Module:
    try:
        return layer.plain()
    except FusionError as error:
        raise FusionError(f"`{path}` cannot be made plain: {error}") from error


def _full_block(path: str, layer: FusionLayer, like: Tensor, inputs: Tensor | None) -> nn.Module:
    if layer.operator.unrolls:
        return _plain(path, layer)
    theta = {name: tensor.detach().clone() for name, tensor in layer.synthesized().items()}
    try:
        if is_region(path):
            raise FusionError("it was no module, and only operator='block' gives such a block back")
        if layer.tensor_parallel is not None:
            raise FusionError("it is tensor parallel, and only operator='block' gives such a block back")
        block = layer.full_block(like)
        layer.operator.restore(theta, block, inputs)
    except FusionError as error:
        raise FusionError(f"`{path}` cannot be unrolled: {error}") from error
    return block


def _main_inputs(model: nn.Module, example_inputs: ExampleInputs) -> dict[str, Tensor]:
    """What each fusion layer gets as its main activation, in a run of a copy of the model."""
    inputs = Inputs.of(example_inputs, model)
    assert inputs is not None
    twin, seen = copy.deepcopy(model), {}
    for path, layer in placed_layers(twin, state_of(twin).plan).items():

        def note(module: nn.Module, args: Any, kwargs: Any, path: str = path, layer: FusionLayer = layer) -> None:
            seen[path] = read_slot(layer.operator.interface.main, args, kwargs).detach()

        layer.register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad():
        twin(*inputs.args, **inputs.kwargs)
    return seen


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


def _hand_over(optimizer: Optimizer, old: set[nn.Parameter], full: nn.Module, like: Sequence[nn.Module]) -> None:
    """Let the parameters of `full` take the place of those of `old` that are gone.

    Each goes to the group of a neighbour's parameter of its name (some groups have no weight decay), or else to that
    of what is gone, or else to the first.
    """
    gone = old.difference(full.parameters())
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    rest = next((group for p, group in groups.items() if p in gone), optimizer.param_groups[0])
    names = [dict(block.named_parameters()) for block in like]
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if p not in gone]
    for name, parameter in full.named_parameters():
        if parameter not in old:
            homes = [groups[side[name]] for side in names if side.get(name) in groups]
            (homes[0] if homes else rest)["params"].append(parameter)
    for parameter in gone:
        optimizer.state.pop(parameter, None)
