"""carry_out: the way of a model from its capture to the transformed model, one value after the other."""

import gc
from dataclasses import dataclass, replace

from torch import fx, nn

from replfx.chains.chain import Chains
from replfx.chains.find import find_chains
from replfx.chains.policy import Policy
from replfx.chains.select import Nothing, select
from replfx.errors import FusionError, NoChainError, PlanError, WrittenWeightsError
from replfx.modules.copying import structural_copy
from replfx.modules.paths import head_of
from replfx.passes import run_passes
from replfx.plans import Plan, has_regions, keeping
from replfx.regions.graph_module import limit
from replfx.reports.describe import describe_chains, with_costs, with_layers
from replfx.reports.report import Report
from replfx.rewrite.build import build, insertion, install
from replfx.rewrite.state import mark
from replfx.rewrite.verify import Verified, reads_of_freed, verify
from replfx.tracing import CaptureInfo, ExampleInputs, Inputs, capture_lazily, limits_of

__all__ = ["Prepared", "carry_out", "prepare", "prepare_plan"]

_MANY = 2_000  # nodes


@dataclass(frozen=True, eq=False)
class Prepared:
    """A plan for a captured model, with all that is needed to carry it out."""

    model: nn.Module  # the user's
    target: nn.Module  # what is changed: a copy of it, or `model` itself
    inputs: Inputs | None
    plan: Plan
    draft: Report  # the report of what was found, before anything is replaced
    seen: CaptureInfo  # what the capture knows
    nothing: Nothing | None = None  # why nothing is replaced, if nothing is
    unsound: str | None = None  # why the plan cannot be carried out, if it cannot
    # The captured graph with its chains, if blocks are regions of it; else it is not kept, as the graph of a deep model
    # takes more memory than verifying the model does.
    graph: tuple[fx.GraphModule, Chains] | None = None

    def with_note(self, note: str) -> Report:
        """What was found of the model where nothing is replaced."""
        return replace(self.draft, notes=[*self.draft.notes, note])


def prepare(model: nn.Module, target: nn.Module, example_inputs: ExampleInputs | None, policy: Policy) -> Prepared:
    """Capture a model, find its chains, and choose the blocks; raises as `replfx.transform` does."""
    graph = capture_lazily(target, example_inputs, model)
    found = find_chains(graph)
    selection = select(found, policy)
    regions = has_regions(selection.plan)
    prepared = Prepared(
        model,
        target,
        Inputs.of(example_inputs, model),
        selection.plan,
        describe_chains(found, target, selection),
        found.capture.without_graph(),
        nothing=selection.nothing,
        unsound=None if regions else reads_of_freed(graph, found, selection.plan),
        graph=(graph, found) if regions else None,
    )
    let_go = 0 if regions else len(found.capture.nodes)
    del graph, found, selection
    if let_go > _MANY:
        gc.collect()  # they refer to each other, so that only the collector frees them; of few it is not worth its time
    return prepared


def prepare_plan(model: nn.Module, target: nn.Module, example_inputs: ExampleInputs | None, plan: Plan) -> Prepared:
    """Capture a model for a plan whose blocks are regions of its graph."""
    graph = capture_lazily(target, example_inputs, model)
    found = find_chains(graph)
    inputs = Inputs.of(example_inputs, model)
    return Prepared(model, target, inputs, plan, describe_chains(found, target), found.capture, graph=(graph, found))


def carry_out(prepared: Prepared) -> nn.Module:
    """Carry a plan out on the target, or where its blocks are no modules on the graph; then verify the result.

    Raises:
        NoChainError: there is nothing to replace.
        PlanError, FusionError, VerifyError: what was planned cannot be carried out, or is not sound.
        The target is as it was, then.
    """
    if prepared.nothing is not None:
        raise NoChainError(*prepared.nothing)
    target, inputs = prepared.target, prepared.inputs
    original = structural_copy(prepared.model) if target is prepared.model else prepared.model
    if prepared.graph is not None:
        made, plan, verified = _on_graph(prepared, original)
    else:
        made, plan, verified = _on_modules(prepared, original)
    draft = replace(prepared.draft, notes=[*prepared.draft.notes, *verified.notes])
    mark(made, plan, with_costs(with_layers(draft, plan, made), original, made, inputs, verified.costs))
    return made


def _on_modules(prepared: Prepared, original: nn.Module) -> tuple[nn.Module, Plan, Verified]:
    """Replace blocks that are modules; the plan comes back with the weights that turn out to have to stay."""
    if prepared.unsound is not None:
        raise FusionError(prepared.unsound)
    target, plan = prepared.target, prepared.plan
    while True:
        snapshot = install(target, build(target, plan))
        try:
            return target, plan, verify(target, original, prepared.inputs, prepared.seen, plan)
        except WrittenWeightsError as error:
            snapshot.restore()
            plan = keeping(plan, {r.path: error.names.get(head_of(target, r.path), ()) for r in plan.replacements})
        except BaseException:
            snapshot.restore()  # with inplace=True the model is the user's
            raise


def _on_graph(prepared: Prepared, original: nn.Module) -> tuple[nn.Module, Plan, Verified]:
    """Replace blocks that are regions of the graph, which takes the model's place."""
    assert prepared.graph is not None
    (graph, found), model, plan = prepared.graph, prepared.target, prepared.plan
    kind = type(model).__name__
    if model is prepared.model:
        raise PlanError(
            f"the blocks of this {kind} are no modules (`{plan.replacements[0].path}`): only its graph can be "
            "rewritten, not the model itself; leave inplace=True out"
        )
    if prepared.seen.frozen:
        what = " and ".join(sorted(prepared.seen.frozen))
        raise PlanError(
            f"the blocks of this {kind} are no modules, so that only its graph can be rewritten; but its Python code "
            f"decides by {what}, and a graph would go on as it was decided once"
        )
    limits = limits_of(graph, model, prepared.inputs)
    made = run_passes(graph, [insertion(model, found, plan)]).graph_module
    recorded = "; it was recorded, and holds for inputs of these shapes" if prepared.seen.tracer == "recorded" else ""
    note = f"the blocks are no modules: {kind} has become a torch.fx.GraphModule{recorded}"
    assert isinstance(made, fx.GraphModule)
    verified = verify(made, original, prepared.inputs, prepared.seen, plan)
    limit(made, limits)
    return made, plan, replace(verified, notes=(note, *verified.notes))
