"""The synthesis: what a replaced block has more than before, and where its weights come from."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from replfx.dtensors import is_distributed
from replfx.errors import FusionError
from replfx.fusion.fusions import Fusion
from replfx.fusion.magnitude import is_finite, largest
from replfx.fusion.sharded import (
    any_sharded,
    as_sharded,
    gathered,
    lower_precision,
    reshard_stale,
    synthesize_sharded,
)
from replfx.live.classes import SUBMODULE
from replfx.live.made_by_hooks import made_by_hook
from replfx.live.tensor_parallel import TensorParallel, laid_out, mesh_of_activation, refuse_unprepared
from replfx.modules.structure import is_wrapped
from replfx.torch_internals import functorch_is_active, saved_tensors_are_packed

if TYPE_CHECKING:
    from replfx.live.skeletons import Skeleton
    from replfx.operators.base import Operator

__all__ = [
    "Reading",
    "Readings",
    "SharedWeights",
    "Synthesis",
    "syntheses_of",
    "synthesis_of",
    "written_weights",
]


class Reading(NamedTuple):
    """A parameter that a synthesis reads. Its path is looked up at each call, so that it is never stale."""

    base: nn.Module  # a module that stays in its place: the neighbour, or what holds it
    path: tuple[str, ...]  # of the parameter's owner in `base`
    leaf: str  # the parameter's name there
    known: nn.Module  # what owned the parameter at first
    rows: tuple[int, int] | None = None  # which of its rows are read; None for all

    def owner(self) -> nn.Module:
        """The module that owns the parameter now: what is at its path, or what that wraps.

        Raises:
            FusionError: nothing is at its path any more.
        """
        found: Any = self.base
        for name in self.path:
            inner = getattr(found, name, None)
            if not isinstance(inner, nn.Module):
                break
            found = inner
        else:
            return self.known if found is self.known or _wraps(found, self.known) else found
        if _wraps(found, self.known):
            return self.known
        raise FusionError(
            f"a replaced block reads `{'.'.join((*self.path, self.leaf))}` of its neighbour, a "
            f"{type(self.base).__name__}, and that is gone: call replfx.materialize before a model is rebuilt"
        )

    def tensor(self) -> Tensor:
        """The whole parameter as its owner gives it, unchecked."""
        found: Tensor = getattr(self.owner(), self.leaf)
        return found


def _wraps(module: nn.Module, owner: nn.Module) -> bool:
    return any(inner is owner for inner in module.modules())


Readings: TypeAlias = Mapping[str, Reading]
"""By the block's name for a parameter: where its counterpart is."""


class SharedWeights(dict[str, Tensor]):
    """Synthesised weights that several forward passes share; a copy has none, and synthesises its own."""

    def __reduce_ex__(self, protocol: object) -> tuple[type[None], tuple[()]]:
        return type(None), ()


class Synthesis(nn.Module):
    """Synthesises the weights of a replaced block from its two neighbours. The block has it as its submodule `replfx`.

    The neighbours are held as plain references, not as submodules, and their parameters are read at each call: so
    they appear once in `state_dict`, follow `.to()` and `deepcopy`, and take part in `torch.func.functional_call` and
    FSDP.

    Args:
        operator: what runs with the synthesised parameters.
        fusion: how they are made, or None if the operator has none.
        readings: what is read of the kept block before and of the one after.
        neighbour_gradient: factor λ on the gradient that flows through this into the neighbours; 1 is the
            paper's, 0 detaches them.
        neighbours: the kept block before and the one after; if the operator needs none, those of them that there are,
            of which a full block can be made.
        places: where these were in the model, for messages.
        skeleton: the structure of the block, if the operator does not keep it.

    Attributes:
        marks: the Python attributes that each synthesised parameter had.
        names: where the parts of a block that was no module were in the model, by their names in the block.
        shared: the weights that it runs with instead of synthesising them, within `replfx.synthesize_once`.
        tensor_parallel: how it runs on several processes, if `replfx.parallelize_module` was told.
    """

    def __init__(
        self,
        operator: Operator,
        fusion: Fusion | None,
        readings: tuple[Readings, Readings],
        *,
        neighbour_gradient: float = 1.0,
        neighbours: tuple[nn.Module, ...] = (),
        places: tuple[str, ...] = (),
        skeleton: Skeleton | None = None,
    ) -> None:
        super().__init__()
        self.operator = operator
        self.fusion = fusion
        self._readings = readings
        self.neighbours = neighbours  # in a tuple, so that they are no submodules
        self.places = places
        self.skeleton = skeleton
        self.marks: dict[str, dict[str, Any]] = {}
        self.names: Mapping[str, str] = {}
        self.shared: SharedWeights | None = None
        self.neighbour_gradient = neighbour_gradient
        self.tensor_parallel: TensorParallel | None = None

    # ---- weights

    def forward(self, name: str) -> Tensor:
        """The synthesised weight of that name in the block.

        Raises:
            FusionError: it was called as if it were one of the block's own layers.
        """
        if not isinstance(name, str):
            raise FusionError(
                f"the block calls all of its children in turn, and its `{SUBMODULE}`, which synthesises its weights, "
                "is no layer: let it name its layers, or hold them in an nn.Sequential or nn.ModuleList"
            )
        return self.weight(name)

    def weight(self, name: str) -> Tensor:
        """The same, once for all who ask within one call of the block."""
        if self.shared is not None:
            return self.shared[name]
        if torch.compiler.is_compiling():
            return self._laid_out(self._synthesize((name,), alone=True), None)[name]
        call = _local.calls.get(self)
        if call is None or functorch_is_active():
            theta = self._laid_out(self._synthesize((name,), alone=True), None)[name]
        else:
            theta = call.weights()[name]
        for note in _local.watchers:
            note(self, name, theta)
        return theta

    def call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> AbstractContextManager[object]:
        """A call of the block with these arguments: within it each weight is synthesised once."""
        if self.runs():
            return nullcontext()
        mesh = mesh_of_activation(args, kwargs) if is_distributed() else None
        return _Call(self, mesh)

    def runs(self) -> bool:
        """Whether the block is being called, in this thread."""
        return self in _local.calls

    def operate(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the operator gives for a call of the block."""
        parallel, inside = self.tensor_parallel, (args, kwargs)
        if parallel is not None:
            inside = parallel.enter(self.operator.interface, args, kwargs)
        mesh = mesh_of_activation(*inside)
        theta: Mapping[str, Tensor] | None = self.shared
        if theta is None:
            made = self._synthesize(None, alone=parallel is not None or mesh is not None)
            theta = self._laid_out(made, mesh)
        result = self.operator(dict(theta), *inside)
        return result if parallel is None else parallel.leave(self.operator.interface, result, args, kwargs)

    def synthesized(self) -> dict[str, Tensor]:
        """The operator's weights as they stand: parameter name in the block → tensor.

        The light operator takes the value rows alone of a fused query-key-value projection. Empty for an operator
        without weights. Gradients flow from these tensors into coefficients and neighbours. They are whole tensors on
        each process, also if the neighbours are sharded.
        """
        return gathered(self._synthesize(None, alone=True))

    def materialized(self) -> dict[str, Tensor]:
        """The same without gradients, laid out as the block wants them; raises as `check_lays_out` does."""
        self.check_lays_out()
        theta = laid_out(self._synthesize(None, alone=True), None, self.tensor_parallel)
        return {name: tensor.detach().clone() for name, tensor in theta.items()}

    def check_lays_out(self) -> None:
        """Make sure that the weights can become the block's own.

        Raises:
            FusionError: its processes share a sequence.
        """
        if self.tensor_parallel is not None and self.tensor_parallel.sequence is not None:
            raise FusionError(
                "its processes share the sequence: load a full state_dict into a model on one process, and use that"
            )

    def _laid_out(self, theta: Mapping[str, Tensor], mesh: Any) -> dict[str, Tensor]:
        dtype = lower_precision(self.fusion, theta) if self.fusion is not None and any_sharded(theta) else None
        return laid_out(theta, mesh, self.tensor_parallel, dtype)

    def _synthesize(self, names: tuple[str, ...] | None, *, alone: bool) -> dict[str, Tensor]:
        """Weights; if the neighbours are sharded, they lie as the fusion's operations leave them.

        Args:
            names: which; None for all. More may come.
            alone: whether nobody minds how the activation lies.
        """
        if self.fusion is None:
            return {}
        sides = self._readings
        if names is not None and self.fusion.separate:
            sides = ({name: sides[0][name] for name in names}, {name: sides[1][name] for name in names})
        if is_distributed():
            before, after = ([(reading.owner(), reading.leaf) for reading in side.values()] for side in sides)
            reshard_stale(before, after, None if self.tensor_parallel is None else self.tensor_parallel.mesh)
        with _out_of_sight():
            previous, next = (self._read(readings) for readings in sides)
            if any_sharded(previous) or any_sharded(next):
                if not alone and self.tensor_parallel is None:
                    refuse_unprepared([reading.owner() for side in sides for reading in side.values()])
                return synthesize_sharded(self.fusion, previous, next)
            # Not as modules where the call is exported: their place is not within the module that reads the weight.
            made = self.fusion.forward if torch.compiler.is_compiling() else self.fusion
            result: dict[str, Tensor] = made(previous, next)
        return result

    def _read(self, readings: Readings) -> dict[str, Tensor]:
        return {
            name: _scale_gradient(_read_parameter(reading), self.neighbour_gradient)
            for name, reading in readings.items()
        }

    # ---- what is read

    def rebind(self, home: Callable[[nn.Module, str], tuple[nn.Module, str]]) -> None:
        """Read from where the neighbours' parameters are now: `home` gives owner and name for what they were."""
        before, after = ({name: _moved(reading, home) for name, reading in side.items()} for side in self._readings)
        self._readings = (before, after)

    def readings(self) -> Iterator[Reading]:
        """All that a synthesis reads of both neighbours."""
        return (reading for side in self._readings for reading in side.values())

    def counterparts(self) -> list[dict[str, Tensor]]:
        """Each neighbour's parameters by the names of their like in the block: what is read, and all others."""
        return [
            {**dict(block.named_parameters()), **{name: r.tensor() for name, r in side.items()}}
            for side, block in zip(self._readings, self.neighbours, strict=False)
        ]

    def read_parameters(self) -> list[nn.Parameter]:
        """The neighbours' parameters and the coefficients; each once."""
        read = [reading.tensor() for reading in self.readings()]
        fusion = () if self.fusion is None else self.fusion.parameters()
        return list(dict.fromkeys(p for p in (*read, *fusion) if isinstance(p, nn.Parameter)))

    def not_finite(self) -> str | None:
        """The name of a synthesised weight with an element that is not finite; None if there is none.

        Nothing is synthesised if the fusion knows a bound: that would take memory as large as the block.
        """
        if self.fusion is None:
            return None
        before, after = ({name: _read_parameter(r) for name, r in side.items()} for side in self._readings)
        limit = min(torch.finfo(theta.dtype).max for theta in (*before.values(), *after.values()))
        sizes = [{name: largest(theta) for name, theta in side.items()} for side in (before, after)]
        if self.fusion.bound(*sizes) < limit / 2:  # room for rounding
            return None
        return next((name for name, theta in self.synthesized().items() if not is_finite(theta)), None)

    # ---- where it runs

    @staticmethod
    def neighbour_missing(path: str, neighbour: str, why: str) -> str:
        """What to say of a replaced block at `path` that is parted from its neighbour."""
        return (
            f"`{path}` is a replaced block, and it reads the weights of its neighbour `{neighbour}`: {why}, so it "
            "would read a copy that nothing trains along. Transform with split_at= the modules with which your "
            "pipeline stages begin, and a block and its neighbours stay in one; where you only cut blocks off, call "
            "replfx.materialize first"
        )

    def extra_repr(self) -> str:
        return "" if self.neighbour_gradient == 1.0 else f"neighbour_gradient={self.neighbour_gradient}"


# ---- one call of a block


class _Local(threading.local):
    """The blocks that are being called in a thread, and who is told of what is read there."""

    def __init__(self) -> None:
        self.calls: dict[Synthesis, _Call] = {}
        self.watchers: tuple[Callable[[Synthesis, str, Tensor], None], ...] = ()


_local = _Local()


@contextmanager
def written_weights() -> Iterator[Callable[[], dict[Synthesis, list[str]]]]:
    """Within it, watch what is read in this thread; gives a function that says what has been written to since.

    Such a write is lost: the weight is computed anew when it is read again.
    """
    seen: list[tuple[Synthesis, str, Tensor]] = []

    def written() -> dict[Synthesis, list[str]]:
        found: dict[Synthesis, list[str]] = {}
        for synthesis, name, theta in seen:
            if theta._version and name not in found.setdefault(synthesis, []):
                found[synthesis].append(name)
        return {synthesis: names for synthesis, names in found.items() if names}

    def note(*read: Any) -> None:
        seen.append(read)

    before, _local.watchers = _local.watchers, (*_local.watchers, note)
    try:
        yield written
    finally:
        _local.watchers = before


@dataclass(slots=True)
class _Call:
    """Keeps the weights of one call of a block."""

    synthesis: Synthesis
    mesh: Any  # that of its activation, if that is a DTensor
    # The weights, by whether gradients are recorded: a part of a block may run without.
    made: dict[bool, dict[str, Tensor]] = field(default_factory=dict)

    def __enter__(self) -> None:
        _local.calls[self.synthesis] = self

    def __exit__(self, *error: object) -> None:
        del _local.calls[self.synthesis]

    def weights(self) -> dict[str, Tensor]:
        """All weights of the block, synthesised when the first is asked for."""
        recorded = torch.is_grad_enabled()
        if recorded not in self.made:
            alone = self.synthesis.tensor_parallel is not None or self.mesh is not None
            theta = self.synthesis._synthesize(None, alone=alone)
            self.made[recorded] = self.synthesis._laid_out(theta, self.mesh)
        return self.made[recorded]


def _out_of_sight() -> AbstractContextManager[object]:
    """Hide what a synthesis saves for its backward pass from activation checkpointing.

    `torch.utils.checkpoint` counts what is saved in the forward pass and in the repeated one. How often a weight is
    synthesised may differ there, since the block's call as a whole is not repeated. A synthesis saves parameters alone,
    which take no memory.
    """
    if torch.compiler.is_compiling() or not saved_tensors_are_packed():
        return nullcontext()
    return saved_tensors_hooks(_same, _same)


def _same(tensor: Tensor) -> Tensor:
    return tensor


# ---- reading


def _read_parameter(reading: Reading) -> Tensor:
    owner, leaf = reading.owner(), reading.leaf
    theta = getattr(owner, leaf, None)
    if not torch.compiler.is_compiling():
        theta = _checked(owner, leaf, theta)
    theta = as_sharded(theta)  # type: ignore[arg-type]
    return theta if reading.rows is None else theta[reading.rows[0] : reading.rows[1]]


def _checked(owner: nn.Module, leaf: str, theta: object) -> Tensor:
    if leaf in vars(owner):
        theta = made_by_hook(owner, leaf)
    if not isinstance(theta, Tensor):
        raise FusionError(
            f"the `{leaf}` of a neighbour's {type(owner).__name__} is gone (it is {theta!r}): call replfx.materialize "
            "before a model is rebuilt"
        )
    # The numbers of a tensor without subclass are what they seem.
    if is_wrapped(theta) or not (theta.dtype.is_floating_point or theta.dtype.is_complex):
        kind = type(theta).__name__ if is_wrapped(theta) else theta.dtype
        raise FusionError(
            f"the `{leaf}` of a neighbour's {type(owner).__name__} is quantised ({kind}), and weights are synthesised "
            "from floats alone: transform the float model, and quantise what replfx.materialize(model) gives"
        )
    return theta


def _moved(reading: Reading, home: Callable[[nn.Module, str], tuple[nn.Module, str]]) -> Reading:
    owner, leaf = home(reading.owner(), reading.leaf)
    return Reading(owner, (), leaf, owner, reading.rows)


def _scale_gradient(theta: Tensor, factor: float) -> Tensor:
    """`theta` itself in the forward pass (lerp(t, t, λ) = t exactly), λ times its gradient in the backward."""
    if factor == 1.0:
        return theta
    return theta.detach() if factor == 0.0 else torch.lerp(theta.detach(), theta, factor)


# ---- in a model


def synthesis_of(module: nn.Module) -> Synthesis | None:
    """The synthesis of a replaced block; None for any other module."""
    if SUBMODULE not in module._modules:
        return None
    found = module._modules[SUBMODULE]
    return found if isinstance(found, Synthesis) else None


def syntheses_of(model: nn.Module) -> dict[str, Synthesis]:
    """The syntheses of a model, by the paths of the replaced blocks."""
    return {path: found for path, module in model.named_modules() if (found := synthesis_of(module)) is not None}
