"""The public face: transform, inspect, report, plan, apply."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassBase

from replfx.blocks import block_at, put_blocks
from replfx.building import build_layers
from replfx.calibration import calibrate as fit
from replfx.copying import faithful_copy, structural_copy
from replfx.describe import describe_chains, describe_plan, totals_of, with_layers
from replfx.errors import CalibrationError, CaptureError, NoChainError, PlanError, ReadFromOutsideError, ReplfxError
from replfx.fusion.registry import AUTO
from replfx.measure import trainable_parameters
from replfx.passes import (
    FindChains,
    InsertFusion,
    Release,
    SelectBlocks,
    Verify,
    does_not_run,
    limit,
    plan_of,
    run_passes,
)
from replfx.plans import Plan, has_regions, keeping
from replfx.policies import Choosable, policy_of
from replfx.reports import Report
from replfx.state import mark, placed_layers, state_of
from replfx.tracing import (
    ExampleInputs,
    HeldElsewhereError,
    Inputs,
    capture_lazily,
    check_is_whole,
    info_of,
    limits_of,
)

__all__ = ["apply", "inspect", "plan", "report", "transform"]


def transform(
    model: nn.Module,
    example_inputs: ExampleInputs | None = None,
    *,
    every: int | None = None,
    fraction: float | None = None,
    select: str | Sequence[str] | None = None,
    split_at: str | Sequence[str] | None = None,
    fusion: Choosable = AUTO,
    operator: Choosable = AUTO,
    neighbour_gradient: float = 1.0,
    detach_neighbours: bool = False,
    plan: Plan | None = None,
    calibrate: Iterable[object] | None = None,
    inplace: bool = False,
) -> nn.Module:
    """Replace some of a model's blocks by fusion layers, which own almost no parameters.

    Args:
        model: any module with a chain of at least three blocks of one kind.
        example_inputs: a tensor, a tuple of positional inputs, or a dict of keyword inputs. Needed only where
            symbolic tracing fails; with them shapes are checked, and the report knows costs.
        every: k ≥ 2 replaces blocks k, 2k, … of each chain, never its last. The default policy, with k = 2.
        fraction: replaces this part of each chain instead, spread evenly; at most ½.
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
        neighbour_gradient: factor λ, 0 to 1, on the gradient through fusion layers into their neighbours.
        detach_neighbours: the same as `neighbour_gradient=0`.
        plan: a plan made before, instead of a policy.
        calibrate: batches for a pretrained model: each fusion layer starts where it best imitates the block that it
            replaces, as `replfx.calibrate` has it.
        inplace: change `model` itself rather than a copy.

    Returns:
        A model of the same class; where its blocks are no modules (a loop over weights in one forward), a
        `torch.fx.GraphModule` with the same parameter names, and a note in the report. `replfx.report(model)`
        says what was done.

    Raises:
        NoChainError: there is nothing to replace; the message says why.
        CaptureError: the model cannot be captured, or needs `example_inputs`.
        PlanError: an impossible selection or split, a plan for another model, a model that is transformed already.
        FusionError: an unknown fusion or operator, one that does not fit, or weights that are not finite.
        CalibrationError: as `replfx.calibrate` raises it; or `calibrate=` with `inplace=True`.
        The model is left as it was, also with `inplace=True`.

    Example:
        >>> model = replfx.transform(timm.create_model("vit_tiny_patch16_224"))
        >>> replfx.report(model).replaced
        ['blocks.1', 'blocks.3', 'blocks.5', 'blocks.7', 'blocks.9']
        >>> optimizer = torch.optim.AdamW(model.parameters())
    """
    given = {"every": every, "fraction": fraction, "select": select, "split_at": split_at}
    if calibrate is not None and inplace:
        raise CalibrationError(
            "calibrate= needs the original model's blocks beside the new ones: leave inplace=True out"
        )
    if plan is not None:
        named = [name for name, value in given.items() if value is not None]
        if named:
            raise PlanError(f"give plan= or {named[0]}=, not both")
        made = apply(model, plan, example_inputs, inplace=inplace)
    else:
        factor = 0.0 if detach_neighbours else neighbour_gradient
        policy = policy_of(every, fraction, select, fusion, operator, factor, split_at)
        made = _transformed(model, example_inputs, policy, inplace)
    if calibrate is not None:
        fit(made, model, calibrate)
    return made


def inspect(
    model: nn.Module,
    example_inputs: ExampleInputs | None = None,
    *,
    every: int | None = None,
    fraction: float | None = None,
    select: str | Sequence[str] | None = None,
    split_at: str | Sequence[str] | None = None,
    fusion: Choosable = AUTO,
    operator: Choosable = AUTO,
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
    policy = policy_of(every, fraction, select, fusion, operator, 1.0, split_at)
    _refuse_transformed(model)
    graph = capture_lazily(model, example_inputs)
    run_passes(graph, [FindChains()])
    try:
        run_passes(graph, [policy])
    except NoChainError as error:
        draft = describe_chains(graph, model)
        return replace(draft, notes=[*draft.notes, str(error).partition(":")[0]])
    if has_regions(plan_of(graph)) and (why := _frozen(graph, model)):
        draft = describe_chains(graph, model)
        return replace(draft, notes=[*draft.notes, why])
    draft, before = describe_chains(graph, model), totals_of(graph)  # InsertFusion takes the replaced nodes out
    twin, result = _inserted(graph, model)
    if has_regions(plan_of(graph)):
        draft, twin = replace(draft, notes=list(info_of(graph).notes)), result
    layers = placed_layers(twin, plan_of(graph))
    found = with_layers(draft, plan_of(graph), layers, trainable_parameters(twin))
    if example_inputs is None:
        return found
    try:
        return replace(found, before=before, after=totals_of(capture_lazily(twin, example_inputs, model)))
    except HeldElsewhereError as error:
        why = f"nothing can be replaced without inplace=True: {error}"
    except CaptureError as error:  # the original ran
        why = f"nothing can be replaced: {does_not_run(error.__cause__ or error)}"
    blocks = [replace(block, kept=block.kept or "the transformed model would not run") for block in draft.blocks]
    return replace(draft, blocks=blocks, notes=[*draft.notes, why])


def report(model: nn.Module) -> Report:
    """What a transformed model has had done to it.

    Raises:
        PlanError: the model is not transformed.
    """
    return state_of(model).report


def plan(
    model: nn.Module,
    example_inputs: ExampleInputs | None = None,
    *,
    every: int | None = None,
    fraction: float | None = None,
    select: str | Sequence[str] | None = None,
    split_at: str | Sequence[str] | None = None,
    fusion: Choosable = AUTO,
    operator: Choosable = AUTO,
    neighbour_gradient: float = 1.0,
    detach_neighbours: bool = False,
) -> Plan:
    """The plan that `transform` with the same options would carry out. Changes nothing.

    Raises:
        As `transform` does.

    Example:
        >>> plan = replfx.plan(model, every=3)
        >>> replfx.apply(model, plan)
    """
    factor = 0.0 if detach_neighbours else neighbour_gradient
    policy = policy_of(every, fraction, select, fusion, operator, factor, split_at)
    _refuse_transformed(model)
    return plan_of(_planned(model, example_inputs, policy))


def apply(
    model: nn.Module, plan: Plan, example_inputs: ExampleInputs | None = None, *, inplace: bool = False
) -> nn.Module:
    """Carry out a plan. Captures nothing; the same plan always gives the same model.

    Args:
        model: a fresh model of the kind that the plan was made for.
        plan: from `replfx.plan`, `Plan.from_json`, or empty: that changes nothing.
        example_inputs: as for `transform`. Needed only for a plan whose blocks are regions of the graph ("@…"):
            that alone captures the model, as `transform` did, and gives a GraphModule too.
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
        graph = capture_lazily(target, example_inputs, model)
        run_passes(graph, [FindChains()])
        graph.meta["replfx_plan"] = plan
        return _carry_out(graph, model, target, Inputs.of(example_inputs, model))
    layers = build_layers(target, plan)
    draft = describe_plan(target, plan)
    put_blocks(target, layers)
    mark(target, plan, with_layers(draft, plan, layers, trainable_parameters(target)))
    return target


# ---- the pieces


def _transformed(
    model: nn.Module, example_inputs: ExampleInputs | None, policy: SelectBlocks, inplace: bool
) -> nn.Module:
    _refuse_transformed(model)
    target, inputs = model if inplace else faithful_copy(model), Inputs.of(example_inputs, model)
    read: dict[str, list[str]] = {}
    while True:  # with one weight more each time that has to stay
        graph = _planned(target, example_inputs, policy, model)
        graph.meta["replfx_plan"] = keeping(plan_of(graph), read)
        try:
            return _carry_out(graph, model, target, inputs)
        except ReadFromOutsideError as error:
            for path, names in error.names.items():
                read.setdefault(path, []).extend(names)


def _inserted(graph: fx.GraphModule, model: nn.Module) -> tuple[nn.Module, fx.GraphModule]:
    """Carry the graph's plan out on a copy without weights; gives the copy and the graph."""
    twin = structural_copy(model)
    try:
        return twin, run_passes(graph, [InsertFusion(twin)]).graph_module
    except ReadFromOutsideError as error:  # before anything was changed
        graph.meta["replfx_plan"] = keeping(plan_of(graph), error.names)
    twin = structural_copy(model)
    return twin, run_passes(graph, [InsertFusion(twin)]).graph_module


def _planned(
    model: nn.Module, example_inputs: ExampleInputs | None, policy: SelectBlocks, original: nn.Module | None = None
) -> fx.GraphModule:
    """A captured graph with the plan of the policy in its meta; `original` is what the model was copied from."""
    graph = capture_lazily(model, example_inputs, original)
    run_passes(graph, [FindChains(), policy])
    return graph


def _carry_out(graph: fx.GraphModule, model: nn.Module, target: nn.Module, inputs: Inputs | None) -> nn.Module:
    """Put the fusion layers of the graph's plan into `target`, or where that is impossible into the graph.

    `target` is a copy of `model`, or `model` itself.
    """
    planned, draft = plan_of(graph), describe_chains(graph, target)
    original = structural_copy(model) if target is model else model
    rewritten = has_regions(planned)
    if rewritten and target is model:
        raise PlanError(
            f"the blocks of this {type(target).__name__} are no modules (`{planned.replacements[0].path}`): only its "
            "graph can be rewritten, not the model itself; leave inplace=True out"
        )
    if rewritten and (why := _frozen(graph, model)):
        raise PlanError(why)
    limits = limits_of(graph, target, inputs) if rewritten else None
    blocks = {r.path: block_at(target, r.path) for r in planned.replacements if not rewritten}
    try:
        spent: list[PassBase] = [] if rewritten else [Release()]
        passes = [InsertFusion(target), *spent, Verify(None if rewritten else target, original, inputs)]
        result = run_passes(graph, passes).graph_module
    except ReplfxError:
        put_blocks(target, blocks)  # with inplace=True the model is the user's
        raise
    if limits is not None:
        assert isinstance(result, fx.GraphModule)
        limit(result, limits)
        target, draft = result, replace(draft, notes=list(info_of(graph).notes))
        for key in [key for key in target.meta if key.startswith("replfx")]:
            del target.meta[key]  # it speaks of nodes of the captured graph
    layers = placed_layers(target, planned)
    mark(target, planned, with_layers(draft, planned, layers, trainable_parameters(target)))
    return target


def _frozen(graph: fx.GraphModule, model: nn.Module) -> str:
    """Why a graph may not take the model's place: it has taken up what would be another thing in the next call."""
    what = " and ".join(sorted(info_of(graph).frozen))
    return what and (
        f"the blocks of this {type(model).__name__} are no modules, so that only its graph can be rewritten; but its "
        f"Python code decides by {what}, and a graph would go on as it was decided once"
    )


def _refuse_transformed(model: nn.Module) -> None:
    check_is_whole(model)
    build_layers(model, Plan(type(model).__name__))
