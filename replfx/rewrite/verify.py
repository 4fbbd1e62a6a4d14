"""verify: is the transformed model sound?"""

import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import fx, nn

from replfx.chains.chain import Chains
from replfx.errors import VerifyError, WrittenWeightsError
from replfx.live import syntheses_of
from replfx.live.synthesis import written_weights
from replfx.modules.paths import ancestors, head_of, is_region, parameters_of
from replfx.modules.tree import shapes_in, tensors_in
from replfx.operators.base import operators
from replfx.plans import Plan
from replfx.torch_internals import FakeTensorMode
from replfx.tracing import (
    CaptureInfo,
    Draws,
    Held,
    Inputs,
    Look,
    Meter,
    Traces,
    ghost_of,
    real_twin,
    restart,
    steered,
    undisturbed,
)

__all__ = ["Verified", "reads_of_freed", "verify"]


def reads_of_freed(graph_module: fx.GraphModule, found: Chains, plan: Plan) -> str | None:
    """Why a plan cannot be carried out that frees weights which the model reads itself, outside of their block."""
    freed = {r.path: r.operator.name for r in plan.replacements if not operators[r.operator.name].keeps_block}
    inside = {node for path, block in found.blocks.items() if path in freed for node in block.site.nodes}
    for node in graph_module.graph.find_nodes(op="get_attr"):
        path = next((above for above in ancestors(str(node.target)) if above in freed), None)
        if path is not None and node not in inside:
            return (
                f"`{path}`: the model reads its `{str(node.target).removeprefix(f'{path}.')}` itself, and operator "
                f"{freed[path]!r} has none of it; take operator='block', or leave this block out of select="
            )
    return None


@dataclass(frozen=True)
class Verified:
    """What came of verifying a model."""

    notes: tuple[str, ...] = ()  # what could not be verified
    # FLOPs of a forward pass and the bytes that autograd keeps for backward, if it ran without compute.
    costs: tuple[int, int] | None = None


def verify(model: nn.Module, original: nn.Module, inputs: Inputs | None, seen: CaptureInfo, plan: Plan) -> Verified:
    """Check a transformed model.

    Synthesised weights must be finite. If there are inputs, a run on fake tensors, which takes no compute, must show
    that the output has the shapes that it had, that every trainable parameter that had a gradient gets one, and that
    the model runs in training and in evaluation mode if it did so before.

    Args:
        model: the transformed model.
        original: the model before, or any twin of it in structure. It is run only if the transformed model does not
            give what the capture saw, or leaves parameters without a gradient: perhaps the original did so too.
        inputs: the example inputs.
        seen: what the capture of the original knows, with or without its graph.
        plan: what was carried out.

    Raises:
        VerifyError: the model is not sound.
    """
    _check_synthesis(model)
    if inputs is None:
        return Verified()
    look = seen.look or Look(Draws.HIGH, model.training)
    with undisturbed(model), Traces(model) as traces, steered(look.draws, model):
        return _Check(model, _Rehearsal(original, inputs, traces), plan).all(  # by no name: nothing of it is to stay
            _Rehearsal(model, inputs, traces, list(original.parameters())), look.training, seen.outputs
        )


@dataclass(frozen=True, eq=False)
class _Check:
    """What runs of a transformed model are held against: those of the original."""

    model: nn.Module
    original: "_Rehearsal"
    plan: Plan

    def all(self, model: "_Rehearsal", training: bool, outputs: Sequence[tuple[int, ...]] | None) -> Verified:
        """Raise VerifyError if the model is not sound."""
        after = model.run(training, trained=True)
        notes = self.run(after, training, outputs)
        self.other_mode(model.run(not training, trained=not training), not training)
        return Verified(tuple(notes), after.costs if isinstance(after, _Run) else None)

    def run(self, after: "_Run | _Failure", training: bool, outputs: Sequence[tuple[int, ...]] | None) -> list[str]:
        """Raise VerifyError if the run is not as it was; notes say what is not known."""
        if after == _Run(outputs, frozenset()):
            return []
        before = self.original.run(training, trained=True)
        if isinstance(before, _Failure):  # the capture ran the model for real for the same reason
            self._check_runs_for_real()
            return [f"shapes and gradients not verified: {type(before.error).__name__} under fake tensors"]
        if isinstance(after, _Failure):
            raise _broken(after)
        if before.outputs != after.outputs:
            raise VerifyError(
                f"the output's shapes were {before.outputs} and would become {after.outputs}; please report this"
            )
        lost = sorted(name for name in after.without - before.without if self._had_gradient(name, before))
        if lost:
            raise VerifyError(f"`{lost[0]}` would get no gradient any more ({len(lost)} parameters in all)")
        return []

    def other_mode(self, after: "_Run | _Failure", training: bool) -> None:
        """Raise VerifyError if the model does not run in the other mode, but did."""
        if isinstance(after, _Failure) and isinstance(self.original.run(training, trained=training), _Run):
            raise _broken(after, f" in {'training' if training else 'evaluation'} mode")

    def _had_gradient(self, name: str, before: "_Run") -> bool:
        """Whether a parameter of the transformed model had a gradient; for a new one, whether any of its block had."""
        original = self.original.model
        had = dict(original.named_parameters()).keys() - before.without
        if name in before.without or name in had:
            return name in had
        for replacement in self.plan.replacements:
            if not is_region(replacement.path) and name.startswith(f"{head_of(original, replacement.path)}."):
                return not had.isdisjoint(parameters_of(original, replacement.path))
        return True

    def _check_runs_for_real(self) -> None:
        """Check only that it runs: shapes may depend on values, as on boxes that are found, and these differ now."""
        twin, inputs = real_twin(self.model, self.original.inputs)
        try:
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                twin(*inputs.args, **inputs.kwargs)
        except Exception as error:
            raise _broken(_Failure.of(error, twin)) from error


@dataclass(frozen=True)
class _Failure:
    """What came of a dry run that failed.

    Attributes:
        error: which.
        path: the module whose code was running, the model itself as "".
    """

    error: Exception
    path: str

    @classmethod
    def of(cls, error: Exception, model: nn.Module) -> "_Failure":
        """Find the innermost module of `model` that the error passed through."""
        paths = {id(module): path for path, module in model.named_modules()}
        frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
        passed = [paths[id(own)] for frame in frames if id(own := frame.f_locals.get("self")) in paths]
        return cls(error, passed[-1] if passed else "")


def _broken(failure: _Failure, when: str = "") -> VerifyError:
    """What to raise for a transformed model that fails although the original ran."""
    error = failure.error
    if isinstance(error, WrittenWeightsError):
        return error
    where = f", in `{failure.path}`" if failure.path else ""
    raised = VerifyError(
        f"the transformed model does not run{when}{where}: {type(error).__name__}: {error}. The model, or a block, "
        "asks for what is not there any more: take operator='block', or leave out with select= the blocks that it asks"
    )
    raised.__cause__ = error
    return raised


@dataclass(frozen=True)
class _Run:
    """What came of a dry run: shapes of the output's tensors, trainable parameters without a gradient, and costs."""

    outputs: Sequence[tuple[int, ...]] | None
    without: frozenset[str]
    costs: tuple[int, int] | None = field(default=None, compare=False)


def _check_synthesis(model: nn.Module) -> None:
    with torch.no_grad():
        for path, layer in syntheses_of(model).items():
            if name := layer.not_finite():
                raise VerifyError(f"`{path}`: the synthesised `{name}` is not finite; check the fusion's options")


class _Rehearsal:
    """Runs of a model under fake tensors, all on one copy: a copy takes memory for each of its modules.

    The model's code may reach the parameters in `reachable` although they are none of its own any more.
    """

    def __init__(
        self, model: nn.Module, inputs: Inputs, traces: Traces, reachable: Sequence[nn.Parameter] = ()
    ) -> None:
        self.model, self.inputs, self.traces = model, inputs, traces
        self.reachable = [*reachable, *model.parameters()]
        self.copy: tuple[FakeTensorMode, nn.Module, Inputs] | None = None
        self.modes: list[tuple[nn.Module, bool]] = []

    def run(self, training: bool, *, trained: bool) -> _Run | _Failure:
        """Run forward and, if `trained`, backward."""
        ghost = self.model
        try:
            mode, ghost, fakes = self.copy = self.copy or ghost_of(self.model, self.inputs, self.traces)
            self._put_in_mode(ghost, training)
            restart()
            ghost.zero_grad()
            with mode, torch.set_grad_enabled(trained), written_weights() as written, self._untouched(ghost):
                with Meter(ghost) as meter:
                    result = ghost(*fakes.args, **fakes.kwargs)
                    costs = meter.take()
                losses = [torch.view_as_real(t) if t.is_complex() else t for t in tensors_in(result) if t.requires_grad]
                if losses:
                    torch.stack([loss.sum().double() for loss in losses]).sum().backward()
        except Exception as error:
            return _Failure.of(error, ghost)
        if names := written():
            paths = {synthesis: path for path, synthesis in syntheses_of(ghost).items()}
            found = {paths[synthesis]: of_block for synthesis, of_block in names.items()}
            path, (name, *_) = next(iter(found.items()))
            text = f"the model writes to the `{name}` of `{path}`, which is synthesised"
            return _Failure(WrittenWeightsError(text, found), path)
        without = frozenset(name for name, p in ghost.named_parameters() if p.requires_grad and p.grad is None)
        return _Run(shapes_in(result), without, costs)

    @contextmanager
    def _untouched(self, ghost: nn.Module) -> Iterator[None]:
        """The code may reach the model rather than the copy: its modules mean the copy's, its gradients stay."""
        gradients = [(parameter, parameter.grad) for parameter in self.reachable]
        try:
            with Held(self.model, None).redirected(ghost):
                yield
        finally:
            for parameter, gradient in gradients:
                if parameter.grad is not gradient:
                    parameter.grad = gradient

    def _put_in_mode(self, ghost: nn.Module, training: bool) -> None:
        """Put the copy in a mode; in the model's own mode, modules inside keep theirs, as a frozen norm does."""
        self.modes = self.modes or [(module, module.training) for module in ghost.modules()]
        for module, mode in self.modes:
            module.training = mode
        if training is not self.model.training:
            ghost.train(training)
