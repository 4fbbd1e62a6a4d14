"""Making reports: from a captured graph, a plan, and the blocks that were replaced."""

from collections.abc import Iterable
from dataclasses import replace

from torch import fx, nn

from replfx.chains.chain import Chains
from replfx.chains.select import Selection, reads
from replfx.errors import CaptureError
from replfx.live import syntheses_of
from replfx.modules.paths import head_of, is_region, parameters_of
from replfx.modules.tree import tensors_in
from replfx.operators import Operator
from replfx.operators.base import operators
from replfx.plans import Plan, Replacement
from replfx.reports.report import BlockReport, Report, Totals
from replfx.tracing import Cost, Inputs, costs_of

__all__ = ["WAS_NO_MODULE", "describe_chains", "describe_plan", "with_costs", "with_layers"]

WAS_NO_MODULE = "it was no module, and only operator='block' gives such a block back"
"""Why a block that was a region cannot be unrolled."""


def describe_chains(found: Chains, model: nn.Module, selection: Selection | None = None) -> Report:
    """What was found in `model`: its chains, each block's cost, and what is in none and why."""
    info = found.capture
    kept_for = {} if selection is None else selection.kept
    refused = found.refused if selection is None else selection.refused
    blocks = []
    for index, chain in enumerate(found.chains):
        for block in chain.blocks:
            costs, size = _totals(block.site.nodes), _trainable(block.site.block.parameters())
            flops, saved = (None, None) if costs is None else (costs.flops, costs.saved_bytes)
            blocks.append(BlockReport(block.path, index, size, flops, saved, kept=kept_for.get(block.path)))
    count = _trainable(model.parameters())
    return Report(
        model=type(model).__name__,
        capture=info.tracer,
        chains=[chain.paths for chain in found.chains],
        blocks=blocks,
        refused={**{path: b.obstacle for path, b in found.blocks.items() if b.obstacle}, **refused},
        parameters_before=count,
        parameters_after=count,
        notes=list(info.notes),
        before=_totals(info.nodes),
    )


def describe_plan(model: nn.Module, plan: Plan) -> Report:
    """What a plan alone says of `model`, where nothing was captured: the replaced blocks and their neighbours."""
    chains = _chains_of_plan(plan)
    replaced = {replacement.path for replacement in plan.replacements}
    read = reads(plan.replacements)
    blocks = [
        BlockReport(
            path,
            index,
            _trainable(parameters_of(model, path).values()),
            kept=None if path in replaced else read.get(path, "it stays"),
        )
        for index, paths in enumerate(chains)
        for path in paths
    ]
    count = _trainable(model.parameters())
    return Report(
        model=type(model).__name__, chains=chains, blocks=blocks, parameters_before=count, parameters_after=count
    )


def _chains_of_plan(plan: Plan) -> list[list[str]]:
    """The replaced blocks with their neighbours; where a neighbour is of two replaced blocks, the chain goes on."""
    chains: list[list[str]] = []
    for replacement in plan.replacements:
        if chains and replacement.previous is not None and chains[-1][-1] == replacement.previous:
            chain = chains[-1]
        else:
            chain = [replacement.previous] if replacement.previous is not None else []
            chains.append(chain)
        chain.append(replacement.path)
        if replacement.next is not None:
            chain.append(replacement.next)
    return chains


def with_costs(
    report: Report, before: nn.Module, after: nn.Module, inputs: Inputs | None, measured: tuple[int, int] | None = None
) -> Report:
    """The report with what the model cost before and costs after, if there are example inputs to run it on.

    The report may know the costs before; `measured` are those after, if they are known.
    """
    if inputs is None:
        return report
    try:
        first = report.before or Totals(*costs_of(before, inputs))
        last = Totals(*(measured or costs_of(after, inputs)))
    except CaptureError as error:
        return replace(report, notes=[*report.notes, f"the costs of the whole model are not known: {error}"])
    return replace(report, before=first, after=last, example=_described(inputs))


def _described(inputs: Inputs) -> str:
    """The shapes of the tensors among the example inputs."""
    named = [("", value) for value in inputs.args] + [(f"{name} ", value) for name, value in inputs.kwargs.items()]
    shapes = [name + "×".join(map(str, t.shape)) for name, value in named for t in tensors_in(value) if t.dim()]
    return ", ".join([*shapes[:4], "…"] if len(shapes) > 4 else shapes) or "the example inputs"


def with_layers(report: Report, plan: Plan, model: nn.Module) -> Report:
    """The report with what takes the replaced blocks' places, and the parameters that are left."""
    planned, syntheses = {replacement.path: replacement for replacement in plan.replacements}, syntheses_of(model)
    blocks = []
    for block in report.blocks:
        if block.path in planned:
            replacement = planned[block.path]
            made = syntheses[head_of(model, block.path)].fusion is not None
            block = replace(
                block,
                previous=replacement.previous if made else None,
                next=replacement.next if made else None,
                fusion=replacement.fusion.name if made else None,
                operator=replacement.operator.name,
                parameters_after=_trainable(parameters_of(model, block.path).values()),
                not_unrolled=_why_not_unrolled(replacement),
            )
        blocks.append(block)
    notes = [*report.notes, *_unrolling_notes(blocks)]
    return replace(report, blocks=blocks, parameters_after=_trainable(model.parameters()), notes=notes)


def _trainable(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in dict.fromkeys(parameters) if p.requires_grad)


def _why_not_unrolled(replacement: Replacement) -> str | None:
    """Why `replfx.unroll` could not give a replaced block back; None if it could."""
    name = replacement.operator.name
    kind, fold = operators[name], replacement.operator.options.get("fold")
    if kind.unrolls:
        return None
    if is_region(replacement.path):
        return WAS_NO_MODULE
    if kind.restore is Operator.restore:
        return f"operator {name!r} does not say how it goes back into a full block"
    return fold if isinstance(fold, str) else None


def _unrolling_notes(blocks: Iterable[BlockReport]) -> list[str]:
    """One note for each reason."""
    found: dict[str, list[str]] = {}
    for block in blocks:
        if block.not_unrolled is not None:
            found.setdefault(block.not_unrolled, []).append(f"`{block.path}`")
    return [f"replfx.unroll cannot give {', '.join(paths)} back at full depth: {why}" for why, paths in found.items()]


def _totals(nodes: Iterable[fx.Node]) -> Totals | None:
    """What nodes cost together; None if that is not known of all."""
    costs = [node.meta["replfx"] for node in nodes if isinstance(node.meta.get("replfx"), Cost)]
    if not costs or any(cost.flops is None for cost in costs):
        return None
    return Totals(sum(cost.flops for cost in costs), sum(cost.saved_bytes for cost in costs))
