"""What is done to one model: transform it, train it for a step, save and load it, materialize it."""

from __future__ import annotations

import copy
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, fx, nn

import replfx
from benchmarks.zoo.subject import Inputs, Subject, Variant, built, called, fed, loss_of, tensors_of
from replfx.rewrite.state import state_of

REPLACED, REFUSED, FAILURE = "replaced", "refused", "failure"

# The materialized model has the same numbers as weights and may only sum them in another order. One rounding of
# float32 is 6e-8; hundreds of layers, with norms over batches of two in them, make it at most some thousand times
# larger. A wrong weight changes outputs by about their own size.
TOLERANCE = 1e-3

# Which expert of a mixture gets a token depends on the weights before it, and layer drop leaves layers out by chance:
# where a parameter has no gradient yet, further batches and other chances are drawn.
DRAWS = 6


@dataclass
class Outcome:
    """What became of one model; plain JSON values."""

    status: str = FAILURE
    stage: str | None = None
    """Where it failed, or where it is."""
    error: str | None = None
    reasons: list[str] = field(default_factory=list)
    """Why it was refused."""
    variant: int | None = None
    variant_label: str | None = None
    capture: str | None = None
    chains: int = 0
    blocks: int = 0
    replaced: int = 0
    parameters_before: int | None = None
    parameters_after: int | None = None
    graph_module: bool = False
    notes: list[str] = field(default_factory=list)
    transform_seconds: float | None = None
    seconds: float | None = None
    peak_mib: float | None = None

    def to_dict(self) -> dict[str, object]:
        """As plain JSON values."""
        return asdict(self)


class CheckError(Exception):
    """The library's result is not what it should be."""


def check(
    subject: Subject, operator: str = "block", on_stage: Callable[[Outcome], object] = lambda draft: None
) -> Outcome:
    """Try an operator on a model; whatever it raises becomes part of the outcome. Each stage begins with a draft."""
    outcome = Outcome()
    started = time.perf_counter()

    def enter(stage: str) -> None:
        outcome.stage = stage
        on_stage(outcome)

    try:
        _check(subject, operator, outcome, enter)
        outcome.stage = None
    except Exception as error:
        outcome.status, outcome.error = FAILURE, first_line(error)
        if outcome.stage == "transform" and _while_capturing(error):
            outcome.stage = "capture"
        print(f"\n---- {subject.name}: {outcome.stage}", file=sys.stderr)
        traceback.print_exception(error, file=sys.stderr)
    outcome.seconds = round(time.perf_counter() - started, 2)
    outcome.peak_mib = _peak_mib()
    return outcome


def first_line(error: BaseException) -> str:
    """Type and first line of an exception."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:400]


def _check(subject: Subject, operator: str, outcome: Outcome, enter: Callable[[str], None]) -> None:
    enter("original")
    model, variant, without = _original(subject, outcome)
    inputs = fed(variant)
    outcome.parameters_before = _trainable(model)
    enter("transform")
    before = time.perf_counter()
    try:
        new = replfx.transform(model, inputs, operator=operator)
    except replfx.NoChainError as error:
        enter("inspect")
        _refused(replfx.inspect(model, inputs, operator=operator), error, outcome)
        return
    outcome.transform_seconds = round(time.perf_counter() - before, 2)
    enter("report")
    _describe(new, outcome)
    enter("class")
    outcome.graph_module = isinstance(new, fx.GraphModule) and not isinstance(model, fx.GraphModule)
    if type(new) is not type(model) and not outcome.graph_module:
        raise CheckError(f"transform gave a {type(new).__name__} for a {type(model).__name__}")
    _train_a_step(new, variant, without, enter)
    new.zero_grad()
    enter("eval")
    with torch.no_grad():
        expected = called(new.eval(), inputs)
    enter("state_dict")
    _round_trip(new, None if outcome.graph_module else model, inputs, expected)
    del model
    enter("materialize")
    with torch.no_grad():
        _compare(called(replfx.materialize(new), inputs), expected)
    outcome.status = REPLACED


def _original(subject: Subject, outcome: Outcome) -> tuple[nn.Module, Variant, set[str]]:
    """The untouched model in the first variant that trains, and the parameters that get no finite gradient."""
    for number, variant in enumerate(subject.variants):
        outcome.variant, outcome.variant_label = number, variant.label
        try:
            model = built(variant)
            trained = _copy(model, variant)  # the run leaves running statistics, and perhaps caches, in it
            loss_of(called(trained, fed(variant))).backward()
        except Exception:
            if variant is subject.variants[-1]:
                raise
            continue
        break
    without = _without_gradient(trained)
    if without:
        without = _without_gradient_in_more(trained, variant, set())
    return model, variant, without


def _without_gradient(model: nn.Module) -> set[str]:
    """The parameters without a finite gradient."""
    return {name for name, p in model.named_parameters() if not _has_finite_gradient(p)}


def _without_gradient_in_more(model: nn.Module, variant: Variant, ever: set[str]) -> set[str]:
    """The same after some more batches, or as soon as only those of `ever` are left."""
    for draw in range(2, DRAWS + 1):
        loss_of(called(model, fed(variant, draw), draw)).backward()
        if _without_gradient(model) <= ever:
            break
    return _without_gradient(model)


def _copy(model: nn.Module, variant: Variant) -> nn.Module:
    """Copy a model, which takes a fraction of the time of drawing its weights again; not all can be copied."""
    try:
        return copy.deepcopy(model)
    except Exception:
        return built(variant)


def _refused(report: replfx.Report, error: Exception, outcome: Outcome) -> None:
    """Refused is not failed where the library can say why."""
    outcome.capture, outcome.notes = report.capture, report.notes
    paths: dict[str, list[str]] = {}
    for path, reason in report.refused.items():
        paths.setdefault(reason, []).append(path)
    outcome.reasons = [
        f"{found[0]}{f' and {len(found) - 1} more' * (len(found) > 1)}: {reason}" for reason, found in paths.items()
    ] + report.notes
    if not outcome.reasons:
        raise CheckError(f"inspect has no reason for: {first_line(error)}")
    outcome.error = first_line(error)
    outcome.status = REFUSED


def _describe(model: nn.Module, outcome: Outcome) -> None:
    report = replfx.report(model)
    outcome.capture, outcome.notes = report.capture, report.notes
    outcome.chains, outcome.blocks, outcome.replaced = len(report.chains), len(report.blocks), len(report.replaced)
    outcome.parameters_after = _trainable(model)
    if not outcome.replaced:
        raise CheckError("transform replaced nothing and said nothing")
    said = (report.parameters_before, report.parameters_after)
    if said != (outcome.parameters_before, outcome.parameters_after):
        raise CheckError(
            f"the report says {said[0]} → {said[1]} trainable parameters, there are "
            f"{outcome.parameters_before} → {outcome.parameters_after}"
        )


def _train_a_step(model: nn.Module, variant: Variant, without: set[str], enter: Callable[[str], None]) -> None:
    enter("forward")
    loss = loss_of(called(model, fed(variant)))
    enter("backward")
    loss.backward()
    enter("gradient")
    if _without_gradient(model) - without:
        lost = sorted(_without_gradient_in_more(model, variant, without) - without)
        if lost:
            shown = ", ".join(lost[:3])
            raise CheckError(f"no finite gradient: {shown}{f' and {len(lost) - 3} more' * (len(lost) > 3)}")
    enter("step")
    torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=1e-3).step()


def _round_trip(model: nn.Module, original: nn.Module | None, inputs: Inputs, expected: object) -> None:
    """Load the weights strictly into the untouched model under the same plan; without one, into a copy."""
    state = model.state_dict()
    if original is None:
        twin = copy.deepcopy(model)
        with torch.no_grad():
            for tensor in twin.state_dict().values():
                tensor.zero_()
    else:
        plan = replfx.Plan.from_json(state_of(model).plan.to_json())
        twin = replfx.apply(original, plan, inplace=True)
    twin.load_state_dict(state, strict=True)
    loaded = twin.state_dict()
    if changed := [key for key, tensor in state.items() if not _same(loaded[key], tensor)]:
        raise CheckError(f"`{changed[0]}` is not what was saved ({len(changed)} tensors in all)")
    with torch.no_grad():
        _compare(called(twin.eval(), inputs), expected)


def _same(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=a.is_floating_point())
    return a == b


def _compare(output: object, expected: object) -> None:
    """Hold two outputs against each other, each tensor against its own scale."""
    pairs = list(zip(tensors_of(output), tensors_of(expected), strict=True))
    for number, (a, b) in enumerate(pairs):
        if a.shape != b.shape:
            raise CheckError(f"output {number} has shape {tuple(a.shape)}, not {tuple(b.shape)}")
        if not a.numel():
            continue
        if not (a.is_floating_point() or a.is_complex()):
            if not torch.equal(a, b):
                raise CheckError(f"output {number} (of {a.dtype}) differs")
            continue
        scale = b.abs().nan_to_num(0.0, 0.0, 0.0).max().item()
        if not torch.allclose(a, b, rtol=0, atol=TOLERANCE * scale, equal_nan=True):
            worst = (a - b).abs().nan_to_num(float("inf")).max().item()
            raise CheckError(f"output {number} differs by {worst:.2g} at a scale of {scale:.2g}")


def _has_finite_gradient(parameter: nn.Parameter) -> bool:
    if not parameter.requires_grad:
        return True
    return parameter.grad is not None and bool(torch.isfinite(parameter.grad).all())


def _trainable(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _while_capturing(error: BaseException) -> bool:
    return isinstance(error, replfx.CaptureError) or any(
        frame.name == "capture" for frame in traceback.extract_tb(error.__traceback__)
    )


def _peak_mib() -> float | None:
    try:
        import resource
    except ImportError:
        return None
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)
