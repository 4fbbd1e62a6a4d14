"""The ways out of a transformed model: materialize and unroll."""

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, fx, nn

from replfx.errors import FusionError, PlanError
from replfx.live import SUBMODULE, Synthesis
from replfx.live.blocks import make_block_plain
from replfx.live.classes import make_plain
from replfx.modules.copying import faithful_copy
from replfx.modules.paths import head_of, is_region, named
from replfx.modules.structure import move_hooks, redirect, set_submodule
from replfx.operators.mixer import MixerOperator
from replfx.regions.graph_module import Rewritten, restore_region
from replfx.reports.describe import WAS_NO_MODULE
from replfx.rewrite.optimizers import Optimizers, checked, given_names, hand_over, in_order, name_anew
from replfx.rewrite.state import Placement, forget, placed_blocks
from replfx.rewrite.wrappers import gather_nothing, tell_of_change
from replfx.torch_internals import PRESERVED_ATTRIBUTES
from replfx.tracing import ExampleInputs, Inputs, calls_of

__all__ = ["Start", "check_unrolls", "materialize", "unroll"]

Start: TypeAlias = Literal["outputs", "copies"]
"""What blocks start as when they are unrolled; `unroll` says what each is."""


def materialize(model: nn.Module) -> nn.Module:
    """Give each replaced block the weights that are synthesised for it now, as its own.

    Args:
        model: a transformed model; it is left as it is.

    Returns:
        A copy that gives the same outputs and holds nothing of replfx: neither modules nor hooks. A replaced
        block is of its original class again under `block` and `mixer` (one that was no module is a part of the
        graph again, with the names that its parameters had), a `torch.fx.GraphModule` of torch's own operations
        under operators that run in its place. Kept blocks no longer share anything with it. Blocks that were wrapped
        since (by `checkpoint_wrapper`, `torch.compile`) stay wrapped.

    Raises:
        PlanError: the model is not transformed.
        FusionError: processes share a sequence (`SequenceParallel`), which plain modules in the place of light
            operators do not know of.

    Example:
        >>> plain = replfx.materialize(model.eval())
        >>> torch.equal(plain(x), model(x))
        True
    """
    placed_blocks(model)  # whether there is anything to copy
    twin = faithful_copy(model)
    root, placed = placed_blocks(twin)
    with torch.no_grad():
        theta = {path: _theta(path, placement.synthesis) for path, placement in placed.items()}
        for path, placement in placed.items():
            if placement.synthesis.operator.keeps_block:
                _give_weights(root, path, placement, theta[path])
            else:
                _exchange(twin, placement, placement.synthesis.operator.plain(theta[path]))
    _finish(root, placed)
    return twin


def unroll(
    model: nn.Module,
    optimizer: Optimizers = None,
    example_inputs: ExampleInputs | None = None,
    *,
    blocks: str | Sequence[str] | None = None,
    start: Start = "outputs",
) -> nn.Module:
    """Give the replaced blocks back at full depth.

    Under operator `block` the blocks have the weights that were synthesised last, and under `mixer` what it runs has
    them. What an operator had freed, `mixer` an MLP, `light` and `identity` the whole block, starts as `start` says:

    - "outputs": the model computes what it computed. What was freed is the mean of the neighbours', changed so that
      the block gives what its operator gave (`replfx.operators.folding` says how; random dropping of branches and
      channels sets in).
    - "copies": each parameter that was freed is a copy of the one in the nearest kept block before it (stacking: Gong
      et al., ICML 2019), or, if that has not its shape, in the one after. The outputs change. Models that began without
      some blocks ended at a lower loss than with "outputs" (docs/findings.md).

    It may be called in the middle of training, between two steps. Whatever wraps the model goes on with it: DDP
    reduces the gradients of the new parameters, FSDP2 shards them as their block's others, `torch.compile` compiles
    once more. A copy of the model with averaged weights has to be unrolled too.

    Args:
        model: a transformed model, or what wraps it. It is changed in place, so that an optimizer goes on holding the
            parameters of the kept blocks.
        optimizer: gets the new parameters, each in the group of a neighbour's parameter of its name, and forgets the
            coefficients. Where both neighbours' are in no group, or are frozen, the new ones are so too. Their moments
            start as the means of their neighbours', or as copies too; the state of all other parameters stays, and so
            does what a learning-rate scheduler knows. Its state_dict then fits an optimizer that was made for the full
            model. Several train one model, as Muon does its matrices and AdamW the rest: give them in a list.
        example_inputs: a training batch, as for `transform`. Needed for `light` residual convolution blocks alone,
            whose outputs stay: their inner batch normalisation is set to the statistics of what it gets.
        blocks: paths or globs of replaced blocks, for some of them alone; the others stay replaced.
        start: what the blocks start as.

    Returns:
        `model` itself, with the parameter names of the original.

    Raises:
        PlanError: the model is not transformed, has no such replaced block, or `start` is neither.
        FusionError: an operator that does not go back into a full block (with tensor parallelism that is any but
            `block`), an optimizer whose parameters cannot be exchanged (LBFGS, ZeroRedundancyOptimizer), or example
            inputs that are needed; the model is left as it was.

    Example:
        >>> model = replfx.transform(model)
        >>> ...                                # until the learning rate begins to fall
        >>> replfx.unroll(model, optimizer)
        >>> ...                                # the rest at full depth
    """
    root, placed = placed_blocks(model)
    optimizers = checked(optimizer)
    if blocks is not None:
        placed = {path: placed[path] for path in named(blocks, placed, "blocks")}
    copies = _is_copies(start)
    gather_nothing(root)
    seen = {} if example_inputs is None else _main_inputs(model, example_inputs)
    # Of a window, `block` is the first member alone; it has the coefficients.
    before = {path: {*at.block.parameters(), *_parameters(root, at).values()} for path, at in placed.items()}
    like = {path: at.synthesis.counterparts() for path, at in placed.items()}
    known, names = set(root.parameters()), given_names(optimizers)
    with torch.no_grad():
        _unroll(root, placed, seen, next(model.parameters()), copies=copies)
        new = _new_parameters(root, placed, like, known)
        for parameter, sides in new.items():
            if sides and not any(side.requires_grad for side in sides):
                parameter.requires_grad_(False)
        tell_of_change(root, {parameter: next(iter(sides), None) for parameter, sides in new.items()})
        if optimizers:
            for path, placement in placed.items():
                hand_over(optimizers, before[path], _parameters(root, placement), like[path], copies=copies)
            in_order(optimizers, model, set(root.parameters()) - known)
            name_anew(optimizers, model, names)
    _finish(root, placed)
    return model


def check_unrolls(model: nn.Module, example_inputs: ExampleInputs | None, start: Start) -> None:
    """Make sure that `unroll` would give all blocks back; changes nothing, and raises as `unroll` does."""
    _, placed = placed_blocks(model)
    copies = _is_copies(start)
    seen = {} if example_inputs is None else _main_inputs(model, example_inputs)
    with torch.no_grad():
        for path, placement in placed.items():
            synthesis = placement.synthesis
            if synthesis.operator.unrolls:
                synthesis.check_lays_out()
            else:
                theta, like = _theta(path, synthesis), next(model.parameters())
                _full_block(path, synthesis, theta, like, seen.get(path), copies=copies)


def _is_copies(start: Start) -> bool:
    if start not in get_args(Start):
        raise PlanError(f'start={start!r}: blocks start with the model\'s "outputs", or as "copies" of neighbours')
    return start == "copies"


def _unroll(
    root: nn.Module, placed: Mapping[str, Placement], seen: Mapping[str, Tensor], like: Tensor, *, copies: bool
) -> None:
    theta = {path: _theta(path, placement.synthesis) for path, placement in placed.items()}
    full = {  # these may fail, and nothing is changed yet
        path: _full_block(path, placement.synthesis, theta[path], like, seen.get(path), copies=copies)
        for path, placement in placed.items()
        if not placement.synthesis.operator.unrolls
    }
    for path, placement in placed.items():
        if placement.synthesis.operator.keeps_block:
            _give_weights(root, path, placement, theta[path])
        if path in full:
            _complete(placement, full[path])


def _theta(path: str, synthesis: Synthesis) -> dict[str, Tensor]:
    try:
        return synthesis.materialized()
    except FusionError as error:
        raise FusionError(f"`{path}` cannot be made plain: {error}") from error


def _full_block(
    path: str, synthesis: Synthesis, theta: dict[str, Tensor], like: Tensor, inputs: Tensor | None, *, copies: bool
) -> nn.Module:
    try:
        if is_region(path) or synthesis.skeleton is None:
            raise FusionError(WAS_NO_MODULE)
        if synthesis.tensor_parallel is not None:
            raise FusionError("it is tensor parallel, and only operator='block' gives such a block back")
        block = synthesis.skeleton.full_block(synthesis.neighbours, like, copies=copies)
        if not copies:
            synthesis.operator.restore(theta, block, inputs)
    except FusionError as error:
        raise FusionError(f"`{path}` cannot be unrolled: {error}") from error
    return block


def _main_inputs(model: nn.Module, example_inputs: ExampleInputs) -> dict[str, Tensor]:
    """What each replaced block gets as its main activation, in a run of a copy of the model."""
    inputs = Inputs.of(example_inputs, model)
    assert inputs is not None
    twin = faithful_copy(model)
    placed = placed_blocks(twin)[1]
    with torch.no_grad():
        calls = calls_of(twin, inputs, {path: placement.block for path, placement in placed.items()})
    activations = {path: placed[path].synthesis.operator.interface.activation for path in calls}
    return {path: activations[path](call.args, call.kwargs).detach() for path, call in calls.items()}


def _give_weights(root: nn.Module, path: str, placement: Placement, theta: Mapping[str, Tensor]) -> None:
    """Give a block that runs its own computation the weights; a region becomes a part of the graph again."""
    make_block_plain(placement.block, placement.synthesis, root, theta)
    if is_region(path):
        assert isinstance(root, fx.GraphModule)
        assert isinstance(placement.block, fx.GraphModule)
        restore_region(root, head_of(root, path), placement.block, placement.synthesis.names)


def _exchange(model: nn.Module, placement: Placement, plain: nn.Module) -> None:
    """Put what computes the same in a block's place, wherever that is held, with its hooks and its mode."""
    block = placement.block
    known = set(placement.synthesis.modules())
    move_hooks(block, plain)
    for module in plain.modules():
        if module not in known:  # the others have modes of their own: a norm may be frozen in a block that trains
            module.training = block.training
    lacking = {
        k: v for k, v in vars(block).items() if not k.startswith("_") and _is_simple(v) and not hasattr(plain, k)
    }
    vars(plain).update(lacking)  # a model may ask a block for its `shift_size`
    if isinstance(plain, fx.GraphModule):  # whose copies have what its graph names, and this
        plain.meta[PRESERVED_ATTRIBUTES] = lacking
    redirect(model, {block: plain})


def _is_simple(value: object) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_simple(item) for item in value)
    if isinstance(value, Mapping):
        return all(isinstance(k, str) and _is_simple(v) for k, v in value.items())
    return value is None or isinstance(value, bool | int | float | str)


def _complete(placement: Placement, full: nn.Module) -> None:
    """Give a block what it had lost: it remains the object that it was."""
    block, operator = placement.block, placement.synthesis.operator
    sides = reversed(placement.synthesis.neighbours)
    modes = {path: module.training for side in sides for path, module in side.named_modules()}
    for path, module in full.named_modules():  # batch norms may be frozen in the block before
        module.training = modes.get(path, block.training)
    if isinstance(operator, MixerOperator):
        for path in operator.dropped:
            set_submodule(block, path, full.get_submodule(path))
        for name in operator.scales:
            owner, _, leaf = name.rpartition(".")
            block.get_submodule(owner)._parameters[leaf] = full.get_parameter(name)
        return
    del block._modules[SUBMODULE]
    make_plain(block, {})
    for name in ("_modules", "_parameters", "_buffers"):
        getattr(block, name).update(getattr(full, name))


def _parameters(root: nn.Module, placement: Placement) -> dict[str, nn.Parameter]:
    """The parameters that a block and its members have now, by their names in it."""
    if not placement.synthesis.names:
        return dict(placement.block.named_parameters())
    found = {}
    for name, home in placement.synthesis.names.items():
        with suppress(AttributeError):  # it is synthesised, or a part that the operator has freed
            found[name] = root.get_parameter(home)
    return found


def _new_parameters(
    root: nn.Module,
    placed: Mapping[str, Placement],
    like: Mapping[str, Sequence[Mapping[str, Tensor]]],
    known: set[nn.Parameter],
) -> dict[nn.Parameter, list[Tensor]]:
    """The parameters that plain blocks have and had not before, each with the neighbours' of its name."""
    return {
        parameter: [side[name] for side in like[path] if name in side]
        for path, placement in placed.items()
        for name, parameter in _parameters(root, placement).items()
        if parameter not in known
    }


def _finish(root: nn.Module, gone: Collection[str]) -> None:
    """Let the model forget replaced blocks that it has no more."""
    if not forget(root, gone) and isinstance(root, Rewritten):
        root.become_plain()
