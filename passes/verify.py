"""verify: is the transformed model sound?"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from replfx.blocks import head_of, parameters_of
from replfx.errors import ReadFromOutsideError, VerifyError
from replfx.passes.select_blocks import plan_of
from replfx.plans import Plan
from replfx.state import fusion_layers
from replfx.tracing import Inputs, ghost_of, info_of, real_twin
from replfx.tree import shapes_in, tensors_in

__all__ = ["Verify"]


@dataclass(frozen=True, eq=False)
class Verify(PassBase):
    """Check a transformed model; changes nothing.

    Always: synthesised weights are finite. With inputs, under fake tensors, so at no compute: the output has
    the shapes that it had, every trainable parameter gets a gradient that had one before, and the model runs in
    training as in evaluation mode if it did so before.

    Attributes:
        model: the transformed model; None if it is the graph itself.
        original: the model before, or any twin of it in structure. It is run only where the transformed model does
            not give what the capture saw, or leaves parameters without a gradient: then perhaps it did so before.
        inputs: example inputs, or None.
    """

    model: nn.Module | None
    original: nn.Module
    inputs: Inputs | None = None

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Raise VerifyError if the model is not sound."""
        model = graph_module if self.model is None else self.model
        _check_synthesis(model)
        if self.inputs is not None:
            rehearsal = _Rehearsal(model, self.inputs)
            self._check_run(graph_module, model, rehearsal.run(model.training))
            self._check_other_mode(rehearsal.run(not model.training), not model.training)
        return PassResult(graph_module, False)

    def _check_run(self, graph_module: fx.GraphModule, model: nn.Module, after: "_Run | Exception") -> None:
        if after == _Run(info_of(graph_module).outputs, frozenset()):
            return
        before = self._before(self.original.training)
        if isinstance(before, Exception):  # the capture ran the model for real for the same reason
            unknown = f"shapes and gradients not verified: {type(before).__name__} under fake tensors"
            info_of(graph_module).notes.append(unknown)
            self._check_runs_for_real(model)
            return
        if isinstance(after, Exception):
            raise _broken(after)
        if before.outputs != after.outputs:
            raise VerifyError(
                f"the output's shapes were {before.outputs} and would become {after.outputs}; please report this"
            )
        lost = sorted(n for n in after.without - before.without if self._had_gradient(n, before, plan_of(graph_module)))
        if lost:
            raise VerifyError(f"`{lost[0]}` would get no gradient any more ({len(lost)} parameters in all)")

    def _had_gradient(self, name: str, before: "_Run", plan: Plan) -> bool:
        """Whether a parameter of the transformed model had a gradient; of what is new in a block, whether any there."""
        had = dict(self.original.named_parameters()).keys() - before.without
        old = name.replace(".operator.block.", ".")
        if old in before.without or old in had:
            return old in had
        for replacement in plan.replacements if self.model is not None else ():
            if name.startswith(f"{head_of(self.original, replacement.path)}."):
                return not had.isdisjoint(parameters_of(self.original, replacement.path))
        return True

    def _check_runs_for_real(self, model: nn.Module) -> None:
        """Check no more than that it runs: shapes may hang on values, which are others now, as those of found boxes."""
        assert self.inputs is not None
        twin, inputs = real_twin(model, self.inputs)
        try:
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                twin(*inputs.args, **inputs.kwargs)
        except Exception as error:
            raise _broken(error) from error

    def _check_other_mode(self, after: "_Run | Exception", training: bool) -> None:
        if isinstance(after, Exception) and isinstance(self._before(training), _Run):
            raise _broken(after, f" in {'training' if training else 'evaluation'} mode")

    def _before(self, training: bool) -> "_Run | Exception":
        assert self.inputs is not None
        return _Rehearsal(self.original, self.inputs).run(training)


def _broken(error: Exception, when: str = "") -> VerifyError:
    """What to raise for a transformed model that fails although the original ran."""
    if isinstance(error, ReadFromOutsideError):
        return error
    raised = VerifyError(_does_not_run(error, when))
    raised.__cause__ = error
    return raised


@dataclass(frozen=True)
class _Run:
    """What came of a dry run: shapes of the output's tensors, and the trainable parameters without a gradient."""

    outputs: list[tuple[int, ...]] | None
    without: frozenset[str]


def _does_not_run(error: BaseException, when: str = "") -> str:
    """What to say of a transformed model that fails although the original ran."""
    return (
        f"the transformed model does not run{when}: {type(error).__name__}: {error}. The model, or a block, asks for "
        "what is not there any more: take operator='block', or leave out with select= the blocks that it asks"
    )


def _check_synthesis(model: nn.Module) -> None:
    with torch.no_grad():
        for path, layer in fusion_layers(model).items():
            name = layer.not_finite()
            if name is not None:
                raise VerifyError(f"`{path}`: the synthesised `{name}` is not finite; check the fusion's options")


class _Rehearsal:
    """Runs of a model under fake tensors, all on one copy: a copy takes memory for each of its modules."""

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        self.model, self.inputs = model, inputs
        self.copy: tuple[FakeTensorMode, nn.Module, Inputs] | None = None

    def run(self, training: bool) -> _Run | Exception:
        """Run forward, and backward but where a model in training is evaluated; where that fails, the error."""
        trained = training or not self.model.training
        found: dict[str, list[str]] = {}
        try:
            mode, ghost, fakes = self.copy = self.copy or ghost_of(self.model, self.inputs)
            if training is not self.model.training:  # what is inside may have a mode of its own, as a frozen norm has
                ghost.train(training)
            ghost.zero_grad()
            with mode, torch.set_grad_enabled(trained), _reads_of_vacant(ghost, found):
                result = ghost(*fakes.args, **fakes.kwargs)
                losses = [torch.view_as_real(t) if t.is_complex() else t for t in tensors_in(result) if t.requires_grad]
                if losses:
                    torch.stack([loss.sum().double() for loss in losses]).sum().backward()
        except Exception as error:
            if not found:
                return error
            path, names = next(iter(found.items()))
            said = (
                f"the model reads `{names[0]}` of `{path}` itself, which is replaced: {type(error).__name__}: {error}"
            )
            return ReadFromOutsideError(said, found)
        without = frozenset(name for name, p in ghost.named_parameters() if p.requires_grad and p.grad is None)
        return _Run(shapes_in(result), without)


@contextmanager
def _reads_of_vacant(model: nn.Module, found: dict[str, list[str]]) -> Iterator[None]:
    """While open, note which weights of replaced blocks are read while they are not there."""
    vacant = {
        (id(owner), leaf): (path, name)
        for path, layer in fusion_layers(model).items()
        for name, (owner, leaf) in layer.operator.vacant().items()
    }
    original = nn.Module.__getattr__

    def read(self: nn.Module, name: str) -> Any:
        value: Any = original(self, name)
        if value is None and (id(self), name) in vacant:
            path, parameter = vacant[id(self), name]
            if parameter not in found.setdefault(path, []):
                found[path].append(parameter)
        return value

    nn.Module.__getattr__ = read  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__getattr__ = original  # type: ignore[method-assign]
