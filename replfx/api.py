"""The public face: transform, inspect, report, plan, apply."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Unpack

from torch import nn

from replfx.calibration import calibrate as fit
from replfx.chains.find import find_chains
from replfx.chains.policy import RULES, ChoiceLike, Options, Policy, policy_of
from replfx.chains.select import select as select_blocks
from replfx.errors import CalibrationError, FusionError, NoChainError, PlanError, VerifyError
from replfx.fusion.registry import AUTO
from replfx.modules.copying import faithful_copy, structural_copy
from replfx.plans import Plan, has_regions
from replfx.reports.describe import describe_chains, describe_plan, with_costs, with_layers
from replfx.reports.expectation import Expectation
from replfx.reports.report import Report
from replfx.rewrite.build import build, install, refuse_transformed
from replfx.rewrite.carry_out import carry_out, prepare, prepare_plan
from replfx.rewrite.state import mark, state_of
from replfx.tracing import ExampleInputs, HeldElsewhereError, Inputs, capture_lazily, check_is_whole

__all__ = ["apply", "inspect", "plan", "report", "transform"]


def transform(
    model: nn.Module,
    example_inputs: ExampleInputs | None = None,
    *,
    every: int | None = None,
    fraction: float | None = None,
    keep: int | float | None = None,
    select: str | Sequence[str] | None = None,
    split_at: str | Sequence[str] | None = None,
    fusion: ChoiceLike = AUTO,
    operator: ChoiceLike = AUTO,
    neighbour_gradient: float = 1.0,
    budget: Mapping[str, object] | None = None,
    plan: Plan | None = None,
    calibrate: Iterable[object] | None = None,
    inplace: bool = False,
) -> nn.Module:
    """Replace some of a model's blocks: they own almost no parameters, and synthesise them from the blocks beside them.

    After any error the model is as it was, also with `inplace=True`.

    Args:
        model: any module with a chain of at least three blocks of one kind.
        example_inputs: a tensor, a tuple of positional inputs, or a dict of keyword inputs. Needed only where
            symbolic tracing fails; with them shapes are checked, and the report knows costs.
        every: k ≥ 2 replaces blocks k, 2k, … of each chain, never its last. The default policy, with k = 2.
        fraction: replaces this part of each chain instead, spread evenly; at most ½.
        keep: replaces all blocks of each chain but this number (an int) or share (a float) of them instead. The first
            and the last always stay, and so do those that change the shape of their activation. Replaced blocks that
            follow each other are made from the nearest kept ones.
        select: replaces the blocks with these paths or globs instead ("blocks.1", "layer3.*").
        split_at: for pipeline parallelism, the modules with which a stage begins (["blocks.4", "blocks.8"], the keys of
            torch's `split_spec`): each stage's blocks are chosen as if it were a model of its own, so that no
            replaced block has a neighbour in another stage.
        fusion: how parameters are made from the neighbours': "scalar", "scalar_layer", "channel", a
            registered name, or a dict with its options, `{"name": "channel", "initial": 0.7}`. "auto" takes what
            our measurements speak for (docs/auto.md), which so far is "scalar".
        operator: what runs with them: "block" (the block's own computation: any block, saves parameters, no
            time), "mixer" (the block without its MLP: pre-norm transformer blocks, saves time and memory too),
            "light" (one residual map: residual blocks, saves most of both), "identity" (the block is gone), a
            registered name, or a dict with its options. "auto" takes what our measurements speak for, which so far
            is "block".
        neighbour_gradient: factor λ, 0 to 1, on the gradient through replaced blocks into their neighbours; 0 lets none
            through.
        budget: what training may cost, and blocks and operator are chosen for it: {"memory": "12GiB"} (peak of a step),
            {"time": 0.75} (of the full model's step), {"parameters": 0.6} (of its trainable ones), or several. Steps
            and blocks are measured on `example_inputs`, the batch that you train with, where the model is; the report
            says what to expect (docs/budget.md). Instead of every=, fraction=, keep= and select=.
        plan: a plan made before, instead of all options above that say what is replaced and how.
        calibrate: batches for a pretrained model: each replaced block starts where it best imitates the block that it
            was, as `replfx.calibrate` has it.
        inplace: change `model` itself rather than a copy.

    Returns:
        A model of the same class; where its blocks are no modules (a loop over weights in one forward), a
        `torch.fx.GraphModule` with the same parameter names, and a note in the report. `replfx.report(model)`
        says what was done.

    Raises:
        NoChainError: there is nothing to replace; the message says why.
        CaptureError: the model cannot be captured, or needs `example_inputs`.
        PlanError: an impossible selection or split, a plan for another model, a model that is transformed already, a
            budget that no plan is within.
        FusionError: an unknown fusion or operator, one that does not fit, or weights that are not finite.
        CalibrationError: as `replfx.calibrate` raises it; or `calibrate=` with `inplace=True`.

    Example:
        >>> model = replfx.transform(timm.create_model("vit_tiny_patch16_224"))
        >>> replfx.report(model).replaced
        ['blocks.1', 'blocks.3', 'blocks.5', 'blocks.7', 'blocks.9']
        >>> optimizer = torch.optim.AdamW(model.parameters())
    """
    if calibrate is not None and inplace:
        raise CalibrationError(
            "calibrate= needs the original model's blocks beside the new ones: leave inplace=True out"
        )
    asked, expected = _asked(
        model,
        example_inputs,
        plan,
        budget,
        every=every,
        fraction=fraction,
        keep=keep,
        select=select,
        split_at=split_at,
        fusion=fusion,
        operator=operator,
        neighbour_gradient=neighbour_gradient,
    )
    if isinstance(asked, Policy):
        made = carry_out(prepare(model, model if inplace else faithful_copy(model), example_inputs, asked))
    else:
        made = apply(model, asked, example_inputs, inplace=inplace)
    if expected is not None:
        state_of(made).report = replace(state_of(made).report, expected=expected)
    if calibrate is not None:
        fit(made, model, calibrate)
    return made


def inspect(
    model: nn.Module,
    example_inputs: ExampleInputs | None = None,
    *,
    every: int | None = None,
    fraction: float | None = None,
    keep: int | float | None = None,
    select: str | Sequence[str] | None = None,
    split_at: str | Sequence[str] | None = None,
    fusion: ChoiceLike = AUTO,
    operator: ChoiceLike = AUTO,
) -> Report:
    """Say what `transform` with the same options would do, and why not where not. Changes nothing.

    Returns:
        A Report; where nothing can be replaced it has no `replaced`, and `refused` and `notes` say why. With
        example inputs it also has FLOPs and saved bytes of each block, and of the model before and after.

    Raises:
        CaptureError: the model cannot be captured, or needs `example_inputs`.

    Example:
        >>> print(replfx.inspect(torchvision.models.resnet50(), torch.rand(2, 3, 224, 224)))
    """
    policy = policy_of(
        every=every, fraction=fraction, keep=keep, select=select, split_at=split_at, fusion=fusion, operator=operator
    )
    _refuse_transformed(model)
    try:
        prepared = prepare(model, structural_copy(model), example_inputs, policy)
        try:
            return state_of(carry_out(prepared)).report
        except NoChainError as error:
            return prepared.with_note(error.note)
        except (VerifyError, FusionError, PlanError) as error:
            refused = prepared.with_note(f"nothing can be replaced: {error}")
    except HeldElsewhereError as error:
        return _not_copied(model, example_inputs, error)
    why = "the transformed model would not be sound"
    return replace(refused, blocks=[replace(block, kept=block.kept or why) for block in refused.blocks])


def report(model: nn.Module) -> Report:
    """What a transformed model has had done to it.

    With the example inputs that `transform` or `apply` got, it also has FLOPs and saved bytes before and after.

    Raises:
        PlanError: the model is not transformed.

    Example:
        >>> report = replfx.report(replfx.transform(model, images, operator="mixer"))
        >>> report.after.saved_bytes < report.before.saved_bytes
        True
    """
    return state_of(model).report


def plan(
    model: nn.Module,
    example_inputs: ExampleInputs | None = None,
    *,
    every: int | None = None,
    fraction: float | None = None,
    keep: int | float | None = None,
    select: str | Sequence[str] | None = None,
    split_at: str | Sequence[str] | None = None,
    fusion: ChoiceLike = AUTO,
    operator: ChoiceLike = AUTO,
    neighbour_gradient: float = 1.0,
    budget: Mapping[str, object] | None = None,
) -> Plan:
    """The plan that `transform` with the same options would carry out. Changes nothing.

    Raises:
        ReplfxError: as `transform` raises it.

    Example:
        >>> plan = replfx.plan(model, every=3)
        >>> replfx.apply(model, plan)
    """
    asked, _ = _asked(
        model,
        example_inputs,
        None,
        budget,
        every=every,
        fraction=fraction,
        keep=keep,
        select=select,
        split_at=split_at,
        fusion=fusion,
        operator=operator,
        neighbour_gradient=neighbour_gradient,
    )
    if not isinstance(asked, Policy):
        return asked
    selection = select_blocks(find_chains(capture_lazily(model, example_inputs)), asked)
    if selection.nothing is not None:
        raise NoChainError(*selection.nothing)
    return selection.plan


def apply(
    model: nn.Module, plan: Plan, example_inputs: ExampleInputs | None = None, *, inplace: bool = False
) -> nn.Module:
    """Carry out a plan. Captures nothing; the same plan always gives the same model.

    Args:
        model: a fresh model of the kind that the plan was made for.
        plan: from `replfx.plan`, `Plan.from_json`, or empty: that changes nothing.
        example_inputs: as for `transform`. Needed only for a plan whose blocks are regions of the graph ("@…"):
            that alone captures the model, as `transform` did, and gives a GraphModule too. With them the report knows
            costs.
        inplace: change `model` itself rather than a copy.

    Raises:
        PlanError: the plan was made for another model, or the model is transformed already.
        FusionError: an unknown fusion or operator, or weights that are not finite.
        CaptureError: the model has no weights yet.

    Example:
        >>> model = replfx.apply(build_model(), Plan.from_json(text))
        >>> model.load_state_dict(torch.load("weights.pt"))
    """
    if not isinstance(plan, Plan):
        raise PlanError(f"plan must be a replfx.Plan, not {type(plan).__name__}; JSON text goes through Plan.from_json")
    check_is_whole(model)
    target = model if inplace else faithful_copy(model)
    if has_regions(plan):
        return carry_out(prepare_plan(model, target, example_inputs, plan))
    inputs = Inputs.of(example_inputs, model)
    original = structural_copy(model) if inplace and inputs is not None else model
    built, draft = build(target, plan), describe_plan(target, plan)
    install(target, built)
    mark(target, plan, with_costs(with_layers(draft, plan, target), original, target, inputs))
    return target


def _refuse_both(one: str, others: Mapping[str, object]) -> None:
    """What is said already is not to be said by other options too."""
    defaults = {"fusion": AUTO, "operator": AUTO, "neighbour_gradient": 1.0}
    if named := [name for name, value in others.items() if value != defaults.get(name)]:
        raise PlanError(f"give {one}= or {named[0]}=, not both")


def _asked(
    model: nn.Module,
    example_inputs: ExampleInputs | None,
    plan: Plan | None,
    budget: Mapping[str, object] | None,
    **options: Unpack[Options],
) -> tuple[Plan | Policy, Expectation | None]:
    """What a user's options ask for, and what that costs: a plan is given, or empty for a model within its budget."""
    if plan is not None:
        _refuse_both("plan", {**options, "budget": budget})
        return plan, None
    if budget is None:
        policy = policy_of(**options)
        _refuse_transformed(model)
        return policy, None
    _refuse_both("budget", {name: value for name, value in options.items() if name in RULES})
    from replfx.budget import choose  # which transforms models itself, and is slow to import

    _refuse_transformed(model)
    split_at, fusion, operator = options["split_at"], options["fusion"], options["operator"]
    chosen = choose(model, example_inputs, budget, fusion=fusion, operator=operator, split_at=split_at)
    if not chosen.paths:
        return Plan(type(model).__name__), chosen.expected
    options = {**options, "select": chosen.paths, "operator": chosen.operator}
    return replace(policy_of(**options), budgeted=True), chosen.expected


def _not_copied(model: nn.Module, example_inputs: ExampleInputs | None, error: Exception) -> Report:
    """What `inspect` says of a model that cannot be copied: what there is, and that nothing will be replaced."""
    draft = describe_chains(find_chains(capture_lazily(model, example_inputs)), model)
    blocks = [replace(block, kept=block.kept or "the transformed model would not run") for block in draft.blocks]
    return replace(draft, blocks=blocks, notes=[*draft.notes, f"nothing can be replaced without inplace=True: {error}"])


def _refuse_transformed(model: nn.Module) -> None:
    check_is_whole(model)
    refuse_transformed(model)
