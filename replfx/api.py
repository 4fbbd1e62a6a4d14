"""The public face: transform, inspect, report, plan, apply."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassBase

from replfx.calibration import calibrate as fit
from replfx.chains.find import FindChains
from replfx.chains.policy import Choosable, policy_of
from replfx.chains.select import SelectBlocks, plan_of
from replfx.errors import (
    CalibrationError,
    FusionError,
    NoChainError,
    PlanError,
    ReplfxError,
    VerifyError,
    WrittenWeightsError,
)
from replfx.fusion.registry import AUTO
from replfx.modules.copying import faithful_copy, structural_copy
from replfx.modules.paths import head_of
from replfx.passes.insert_fusion import InsertFusion
from replfx.passes.pipeline import run_passes
from replfx.plans import Plan, has_regions, keeping
from replfx.regions.graph_module import limit
from replfx.reports.describe import describe_chains, describe_plan, with_costs, with_layers
from replfx.reports.report import Report
from replfx.rewrite.build import build, install, refuse_transformed
from replfx.rewrite.release import Release
from replfx.rewrite.state import mark, state_of
from replfx.rewrite.verify import Verify, refuse_reads_of_freed
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
    keep: int | float | None = None,
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
    """Replace some of a model's blocks: they own almost no parameters, and synthesise them from the blocks beside them.

    Args:
        model: any module with a chain of at least three blocks of one kind.
        example_inputs: a tensor, a tuple of positional inputs, or a dict of keyword inputs. Needed only where
            symbolic tracing fails; with them shapes are checked, and the report knows costs.
        every: k ≥ 2 replaces blocks k, 2k, … of each chain, never its last. The default policy, with k = 2.
        fraction: replaces this part of each chain instead, spread evenly; at most ½.
        keep: replaces all blocks of each chain but this number (an int) or share (a float) of them instead. The first
            and the last always stay, and so do those that change the shape of their activation. Of several replaced
            blocks in a row each is made from the nearest kept ones.
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
        neighbour_gradient: factor λ, 0 to 1, on the gradient through replaced blocks into their neighbours.
        detach_neighbours: the same as `neighbour_gradient=0`.
        plan: a plan made before, instead of a policy.
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
    given = {"every": every, "fraction": fraction, "keep": keep, "select": select, "split_at": split_at}
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
        policy = policy_of(every, fraction, select, fusion, operator, factor, split_at, keep)
        _refuse_transformed(model)
        made = _Transformation(model, model if inplace else faithful_copy(model), example_inputs, policy).carry_out()
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
    policy = policy_of(every, fraction, select, fusion, operator, 1.0, split_at, keep)
    _refuse_transformed(model)
    attempt = _Transformation(model, structural_copy(model), example_inputs, policy)
    try:
        made = attempt.carry_out()
    except NoChainError as error:
        return attempt.found(str(error).partition(":")[0])
    except HeldElsewhereError as error:
        return _not_copied(model, example_inputs, error)
    except (VerifyError, FusionError, PlanError) as error:
        if not attempt.planned:
            raise
        refused = attempt.found(f"nothing can be replaced: {error}")
        why = "the transformed model would not be sound"
        return replace(refused, blocks=[replace(block, kept=block.kept or why) for block in refused.blocks])
    return state_of(made).report


def report(model: nn.Module) -> Report:
    """What a transformed model has had done to it.

    With the example inputs that `transform` or `apply` got, it also has FLOPs and saved bytes before and after.

    Raises:
        PlanError: the model is not transformed.

    Example:
        >>> model = replfx.transform(model, images)
        >>> replfx.report(model).after.saved_bytes
        205733376
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
    policy = policy_of(every, fraction, select, fusion, operator, factor, split_at, keep)
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
        graph = capture_lazily(target, example_inputs, model)
        run_passes(graph, [FindChains()])
        graph.meta["replfx_plan"] = plan
        return _carry_out(graph, model, target, Inputs.of(example_inputs, model))
    inputs = Inputs.of(example_inputs, model)
    original = structural_copy(model) if inplace and inputs is not None else model
    built, draft = build(target, plan), describe_plan(target, plan)
    install(target, built)
    mark(target, plan, with_costs(with_layers(draft, plan, target), original, target, inputs))
    return target


# ---- the pieces


class _Transformation:
    """One policy carried out on one model.

    Args:
        model: the user's.
        target: what is changed: a copy of it, or `model` itself.
        example_inputs: the user's.
        policy: which blocks are replaced, and how.
    """

    def __init__(
        self, model: nn.Module, target: nn.Module, example_inputs: ExampleInputs | None, policy: SelectBlocks
    ) -> None:
        self.model, self.target, self.example_inputs, self.policy = model, target, example_inputs, policy
        self.inputs = Inputs.of(example_inputs, model)
        self.planned = False  # whether the policy could be met
        self._draft: Report | None = None

    def carry_out(self) -> nn.Module:
        """Give the transformed model.

        Raises:
            NoChainError: there is nothing to replace; `found` then says why.
            FusionError, VerifyError: what was planned cannot be carried out, or is not sound; the same.
        """
        return _carry_out(self._planned(), self.model, self.target, self.inputs)

    def found(self, note: str) -> Report:
        """What was found of the model where nothing is replaced."""
        assert self._draft is not None
        return replace(self._draft, notes=[*self._draft.notes, note])

    def _planned(self) -> fx.GraphModule:
        graph = capture_lazily(self.target, self.example_inputs, self.model)
        run_passes(graph, [FindChains()])
        try:
            run_passes(graph, [self.policy])
            self.planned = True
        finally:
            self._draft = describe_chains(graph, self.target)
        return graph


def _planned(
    model: nn.Module, example_inputs: ExampleInputs | None, policy: SelectBlocks, original: nn.Module | None = None
) -> fx.GraphModule:
    """A captured graph with the plan of the policy in its meta; `original` is what the model was copied from."""
    graph = capture_lazily(model, example_inputs, original)
    run_passes(graph, [FindChains(), policy])
    return graph


def _carry_out(graph: fx.GraphModule, model: nn.Module, target: nn.Module, inputs: Inputs | None) -> nn.Module:
    """Carry the graph's plan out on `target`, or where its blocks are no modules on the graph.

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
    if rewritten:
        if why := _frozen(graph, model):
            raise PlanError(why)
        limits = limits_of(graph, target, inputs)
        passes: list[PassBase] = [InsertFusion(target), Verify(None, original, inputs)]
        result = run_passes(graph, passes).graph_module
        assert isinstance(result, fx.GraphModule)
        limit(result, limits)
        target, draft = result, replace(draft, notes=list(info_of(graph).notes))
        for key in [key for key in target.meta if key.startswith("replfx")]:
            del target.meta[key]  # it speaks of nodes of the captured graph
    else:
        refuse_reads_of_freed(graph, planned)
        planned = _carry_out_on_modules(graph, target, planned, Verify(target, original, inputs))
        draft = replace(draft, notes=list(info_of(graph).notes))
    mark(target, planned, with_costs(with_layers(draft, planned, target), original, target, inputs))
    return target


def _not_copied(model: nn.Module, example_inputs: ExampleInputs | None, error: Exception) -> Report:
    """What `inspect` says of a model that cannot be copied: what there is, and that nothing will be replaced."""
    graph = capture_lazily(model, example_inputs)
    run_passes(graph, [FindChains()])
    draft = describe_chains(graph, model)
    blocks = [replace(block, kept=block.kept or "the transformed model would not run") for block in draft.blocks]
    return replace(draft, blocks=blocks, notes=[*draft.notes, f"nothing can be replaced without inplace=True: {error}"])


def _carry_out_on_modules(graph: fx.GraphModule, target: nn.Module, planned: Plan, verify: Verify) -> Plan:
    """Replace blocks that are modules; gives the plan, with the weights that turn out to have to stay."""
    passes: list[PassBase] = [Release(), verify]
    while True:
        snapshot = install(target, build(target, planned))
        try:
            run_passes(graph, passes)
        except ReplfxError as error:
            snapshot.restore()  # with inplace=True the model is the user's
            if not isinstance(error, WrittenWeightsError):
                raise
            written = {r.path: error.names.get(head_of(target, r.path), ()) for r in planned.replacements}
            planned, passes = keeping(planned, written), [verify]
        else:
            return planned


def _frozen(graph: fx.GraphModule, model: nn.Module) -> str:
    """Why a graph may not take the model's place: it has taken up what would be another thing in the next call."""
    what = " and ".join(sorted(info_of(graph).frozen))
    return what and (
        f"the blocks of this {type(model).__name__} are no modules, so that only its graph can be rewritten; but its "
        f"Python code decides by {what}, and a graph would go on as it was decided once"
    )


def _refuse_transformed(model: nn.Module) -> None:
    check_is_whole(model)
    refuse_transformed(model)
