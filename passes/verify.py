"""verify: is the transformed model sound?"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from replfx.errors import ReadFromOutsideError, VerifyError
from replfx.state import fusion_layers
from replfx.tracing import Draws, Held, Inputs, Look, ghost_of, info_of, restart, steered, undisturbed
from replfx.tree import shapes_in, tensors_in

__all__ = ["Verify", "does_not_run"]


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
            look = info_of(graph_module).look or Look(Draws.HIGH, model.training)
            with undisturbed(model), steered(look.draws, model):
                rehearsal = _Rehearsal(model, self.inputs, list(self.original.parameters()))
                self._check_run(graph_module, model, rehearsal.run(look.training, trained=True), look.training)
                training = not look.training
                self._check_other_mode(rehearsal.run(training, trained=training), training)
        return PassResult(graph_module, False)

    def _check_run(
        self, graph_module: fx.GraphModule, model: nn.Module, after: "_Run | Exception", training: bool
    ) -> None:
        if after == _Run(info_of(graph_module).outputs, frozenset()):
            return
        before = self._before(training, trained=True)
        if isinstance(before, Exception):  # the capture ran the model for real for the same reason
            info_of(graph_module).notes.append(f"shapes not verified: {type(before).__name__} under fake tensors")
            return
        if isinstance(after, Exception):
            raise _broken(after)
        if before.outputs != after.outputs:
            raise VerifyError(
                f"the output's shapes were {before.outputs} and would become {after.outputs}; please report this"
            )
        lost = sorted((after.without - before.without).intersection(dict(model.named_parameters())))
        if lost:
            raise VerifyError(f"`{lost[0]}` would get no gradient any more ({len(lost)} parameters in all)")

    def _check_other_mode(self, after: "_Run | Exception", training: bool) -> None:
        if isinstance(after, Exception) and isinstance(self._before(training, trained=training), _Run):
            raise _broken(after, f" in {'training' if training else 'evaluation'} mode")

    def _before(self, training: bool, *, trained: bool) -> "_Run | Exception":
        assert self.inputs is not None
        return _Rehearsal(self.original, self.inputs, list(self.original.parameters())).run(training, trained=trained)


def _broken(error: Exception, when: str = "") -> VerifyError:
    """What to raise for a transformed model that fails although the original ran."""
    if isinstance(error, ReadFromOutsideError):
        return error
    raised = VerifyError(does_not_run(error, when))
    raised.__cause__ = error
    return raised


@dataclass(frozen=True)
class _Run:
    """What came of a dry run: shapes of the output's tensors, and the trainable parameters without a gradient."""

    outputs: list[tuple[int, ...]] | None
    without: frozenset[str]


def does_not_run(error: BaseException, when: str = "") -> str:
    """What to say of a transformed model that fails although the original ran."""
    return (
        f"the transformed model does not run{when}: {type(error).__name__}: {error}. A fusion layer takes what its "
        "block took and has its attributes, but is not of its class: if the model asks isinstance(block, …), let it "
        "ask for an attribute"
    )


def _check_synthesis(model: nn.Module) -> None:
    with torch.no_grad():
        for path, layer in fusion_layers(model).items():
            name = layer.not_finite()
            if name is not None:
                raise VerifyError(f"`{path}`: the synthesised `{name}` is not finite; check the fusion's options")


class _Rehearsal:
    """Runs of a model under fake tensors, all on one copy: a copy takes memory for each of its modules.

    Args:
        model: any module.
        inputs: the example inputs.
        reachable: parameters that the model's code may reach although they are none of its own any more.
    """

    def __init__(self, model: nn.Module, inputs: Inputs, reachable: Sequence[nn.Parameter]) -> None:
        self.model, self.inputs = model, inputs
        self.reachable = [*reachable, *model.parameters()]
        self.copy: tuple[FakeTensorMode, nn.Module, Inputs] | None = None
        self.modes: list[tuple[nn.Module, bool]] = []

    def run(self, training: bool, *, trained: bool) -> _Run | Exception:
        """Run forward and, if `trained`, backward; where that fails, the error."""
        found: dict[str, list[str]] = {}
        try:
            mode, ghost, fakes = self.copy = self.copy or ghost_of(self.model, self.inputs)
            self._put_in_mode(ghost, training)
            restart()
            ghost.zero_grad()
            with mode, torch.set_grad_enabled(trained), _reads_of_vacant(ghost, found), self._untouched(ghost):
                tensors = tensors_in(ghost(*fakes.args, **fakes.kwargs))
                losses = [tensor.sum() for tensor in tensors if tensor.requires_grad and tensor.dtype.is_floating_point]
                if losses:
                    torch.stack([loss.double() for loss in losses]).sum().backward()
        except Exception as error:
            if not found:
                return error
            path, names = next(iter(found.items()))
            said = (
                f"the model reads `{names[0]}` of `{path}` itself, which is replaced: {type(error).__name__}: {error}"
            )
            return ReadFromOutsideError(said, found)
        without = frozenset(name for name, p in ghost.named_parameters() if p.requires_grad and p.grad is None)
        return _Run(shapes_in(tensors), without)

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
        """In a mode; in the model's own, what is inside may have another one, as a frozen norm has."""
        self.modes = self.modes or [(module, module.training) for module in ghost.modules()]
        for module, mode in self.modes:
            module.training = mode
        if training is not self.model.training:
            ghost.train(training)


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
