"""The fusion layer: the module that stands in a replaced block's place."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.fx.graph_module import _USER_PRESERVED_ATTRIBUTES_KEY

from replfx.errors import FusionError
from replfx.fusion.fusions import Fusion
from replfx.fusion.magnitude import is_finite, largest
from replfx.fusion.operators import Operator
from replfx.fusion.running import running_stage
from replfx.fusion.sharded import (
    any_sharded,
    as_sharded,
    gathered,
    is_distributed,
    lower_precision,
    settle,
    synthesize_sharded,
)
from replfx.fusion.tensor_parallel import TensorParallel, laid_out, mesh_of_activation, refuse_unprepared
from replfx.structure import is_wrapped, move_hooks, structural_copy

__all__ = ["FusionLayer", "Held", "Readings", "check_neighbours", "fusion_layers"]

# By the block's name for a parameter: the module that owns its counterpart, its name there, and which of its rows.
Readings: TypeAlias = Mapping[str, tuple[nn.Module, str, tuple[int, int] | None]]


class Held(dict[str, Tensor]):
    """Synthesised weights that several forwards share; a copy of the layer has none, and synthesises its own."""

    def __deepcopy__(self, memo: object) -> None:
        return None

    def __reduce_ex__(self, protocol: object) -> tuple[type[None], tuple[()]]:
        return type(None), ()


class FusionLayer(nn.Module):
    """Synthesises an operator from two neighbouring blocks and applies it.

    The modules that own the neighbours' parameters are held as plain references, not as submodules, and
    the parameters are read at each call: so they appear once in `state_dict`, follow `.to()` and `deepcopy`,
    and take part in `torch.func.functional_call` and FSDP.

    Args:
        operator: what runs with the synthesised parameters.
        fusion: how they are made, or None if the operator has none.
        readings: what is read of the kept block before and of the one after; None if the operator has no
            parameters.
        neighbour_gradient: factor λ on the gradient that flows through this layer into the neighbours;
            1 is the paper's, 0 detaches them.
        replaced: the block that this layer replaces, for its simple attributes (a model may ask a block for
            its `shift_size`) and for its structure, if the operator has not kept that; its weights are not kept.
        neighbours: the kept block before and the one after.
        places: where these were in the model, for messages.

    Attributes:
        neighbours: the kept block before and the one after; empty if the operator needs none.
        names: where the parts of a block that was no module were in the model, by their names in the block.
        held: the weights that it runs with instead of synthesising them, within `replfx.synthesize_once`.
        tensor_parallel: how it runs on several processes, if `replfx.parallelize_module` was told.
    """

    def __init__(
        self,
        operator: Operator,
        fusion: Fusion | None,
        readings: tuple[Readings, Readings] | None,
        *,
        neighbour_gradient: float = 1.0,
        replaced: nn.Module,
        neighbours: tuple[nn.Module, ...] = (),
        places: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        self.operator = operator
        self.fusion = fusion
        self._readings = readings
        self.neighbours = neighbours  # in a tuple, so that they are no submodules
        self.places = places
        self._checked = 0  # the id of the layer that was seen with its neighbours: a copy is another one
        skeleton = None if operator.unrolls else structural_copy(replaced, _without_values)
        self._skeleton = (skeleton,)  # in a tuple, so that it is no submodule
        self.names: Mapping[str, str] = {}
        self.held: Held | None = None
        self.neighbour_gradient = neighbour_gradient
        self.tensor_parallel: TensorParallel | None = None
        self._attributes = {k: v for k, v in vars(replaced).items() if not k.startswith("_") and _is_simple(v)}
        move_hooks(replaced, self)
        if fusion is not None:
            fusion.train(replaced.training)
        self.training = operator.training = replaced.training  # what is inside keeps its own: a frozen norm

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            attributes = self.__dict__.get("_attributes", {})
            if name in attributes:
                return attributes[name]
            block = self.__dict__.get("_modules", {}).get("operator")
            block = None if block is None else block._modules.get("block")
            if block is None or name.startswith("_"):
                raise
            return getattr(block, name)

    def rebind(self, home: Callable[[nn.Module, str], tuple[nn.Module, str]]) -> None:
        """Read from where the neighbours' parameters are now: `home` gives owner and name for what they were."""
        if self._readings is not None:
            before, after = (
                {name: (*home(owner, leaf), rows) for name, (owner, leaf, rows) in side.items()}
                for side in self._readings
            )
            self._readings = (before, after)

    def full_block(self, like: Tensor) -> nn.Module:
        """A block of the replaced one's structure; each parameter is the mean of the neighbours' of its name and shape.

        Without neighbours its layers initialise themselves.

        Args:
            like: tells device and dtype.

        Raises:
            FusionError: a parameter that no neighbour has the like of, or that no layer initialises.
        """
        (skeleton,) = self._skeleton
        assert skeleton is not None
        block = copy.deepcopy(skeleton)
        sides = [dict(neighbour.named_parameters()) for neighbour in self.neighbours]
        for name, shape in [(name, p.shape) for name, p in skeleton.named_parameters()]:
            path, _, leaf = name.rpartition(".")
            owner = block.get_submodule(path)
            found = [side[name].detach() for side in sides if name in side and side[name].shape == shape]
            if not found and (sides or not hasattr(owner, "reset_parameters")):
                raise FusionError(f"nothing tells where its `{name}` would start: neither neighbour has the like")
            value = torch.stack(found).mean(0) if found else like.new_empty(shape)
            owner._parameters[leaf] = nn.Parameter(value, requires_grad=skeleton.get_parameter(name).requires_grad)
        _like_theirs(block, self.neighbours)
        for module in block.modules():
            if not sides and callable(reset := getattr(module, "reset_parameters", None)):
                reset()
        return block.to(like.device)

    def synthesized(self) -> dict[str, Tensor]:
        """The operator's weights as they stand: parameter name in the block → tensor.

        Of a fused query-key-value projection the light operator takes the value rows alone. Empty for an
        operator without weights. Gradients flow from these tensors into coefficients and neighbours. Where the
        neighbours are sharded, these are whole tensors on each process.
        """
        return gathered(self._synthesize(alone=True))

    def read_parameters(self) -> list[nn.Parameter]:
        """All that a synthesis reads: the neighbours' parameters and the coefficients; each once."""
        read = [getattr(owner, leaf) for side in self._readings or () for owner, leaf, _ in side.values()]
        fusion = () if self.fusion is None else self.fusion.parameters()
        return list(dict.fromkeys(p for p in (*read, *fusion) if isinstance(p, nn.Parameter)))

    def _synthesize(self, *, alone: bool) -> dict[str, Tensor]:
        """The same, but where the neighbours are sharded as the fusion's operations leave it.

        Args:
            alone: whether nobody minds how the activation lies.
        """
        if self.fusion is None or self._readings is None:
            return {}
        if is_distributed():
            before, after = ([(owner, leaf) for owner, leaf, _ in side.values()] for side in self._readings)
            settle(before, after, None if self.tensor_parallel is None else self.tensor_parallel.mesh)
        previous, next = (self._read(readings) for readings in self._readings)
        if any_sharded(previous) or any_sharded(next):
            if not alone:
                refuse_unprepared([owner for side in self._readings for owner, _, _ in side.values()])
            return synthesize_sharded(self.fusion, previous, next)
        result: dict[str, Tensor] = self.fusion(previous, next)
        return result

    def plain(self) -> nn.Module:
        """A module without replfx that computes the same with weights of its own, and has the block's attributes.

        Raises:
            FusionError: its processes share a sequence.
        """
        if self.tensor_parallel is not None and self.tensor_parallel.sequence is not None:
            raise FusionError(
                "its processes share the sequence: load a full state_dict into a model on one process, and use that"
            )
        theta = laid_out(self._synthesize(alone=True), None, self.tensor_parallel)
        made = self.operator.plain({name: tensor.detach().clone() for name, tensor in theta.items()})
        lacking = {name: value for name, value in self._attributes.items() if not hasattr(made, name)}
        for name, value in lacking.items():
            setattr(made, name, value)
        if isinstance(made, fx.GraphModule):  # whose copies have what its graph names, and this
            made.meta[_USER_PRESERVED_ATTRIBUTES_KEY] = lacking
        return made

    def not_finite(self) -> str | None:
        """The name of a synthesised weight with an element that is not finite; None if there is none.

        Where the fusion knows a bound, nothing is synthesised: that takes memory as large as the block.
        """
        if self.fusion is None or self._readings is None:
            return None
        before, after = ({name: _read_parameter(*r) for name, r in side.items()} for side in self._readings)
        limit = min(torch.finfo(theta.dtype).max for theta in (*before.values(), *after.values()))
        sizes = [{name: largest(theta) for name, theta in side.items()} for side in (before, after)]
        if self.fusion.bound(*sizes) < limit / 2:  # room for rounding
            return None
        return next((name for name, theta in self.synthesized().items() if not is_finite(theta)), None)

    def _read(self, readings: Readings) -> dict[str, Tensor]:
        return {
            name: _scale_gradient(_read_parameter(*reading), self.neighbour_gradient)
            for name, reading in readings.items()
        }

    @staticmethod
    def parted(path: str, neighbour: str, why: str) -> str:
        """What to say of a fusion layer at `path` that is parted from its neighbour."""
        return (
            f"`{path}` is a fusion layer, and it reads the weights of its neighbour `{neighbour}`: {why}, so it would "
            "read a copy that nothing trains along. Transform with split_at= the modules with which your pipeline "
            "stages begin, and a block and its neighbours stay in one; where you only cut blocks off, call "
            "replfx.materialize first"
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the replaced block would have been called with, and what it would have given."""
        if not torch.compiler.is_compiling() and self._checked != id(self) and (stage := running_stage()) is not None:
            check_neighbours(stage)
            for layer in fusion_layers(stage).values():
                layer._checked = id(layer)
        parallel, inside = self.tensor_parallel, (args, kwargs)
        if parallel is not None:
            inside = parallel.enter(self.operator.interface, args, kwargs)
        mesh = mesh_of_activation(*inside)
        held = self.held
        theta = self._synthesize(alone=parallel is not None or mesh is not None) if held is None else held
        dtype = lower_precision(self.fusion, theta) if self.fusion is not None and any_sharded(theta) else None
        result = self.operator(laid_out(theta, mesh, parallel, dtype), *inside)
        return result if parallel is None else parallel.leave(self.operator.interface, result, args, kwargs)

    def extra_repr(self) -> str:
        return "" if self.neighbour_gradient == 1.0 else f"neighbour_gradient={self.neighbour_gradient}"


def fusion_layers(model: nn.Module) -> dict[str, FusionLayer]:
    """The fusion layers of a model, by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, FusionLayer)}


def check_neighbours(model: nn.Module) -> None:
    """Make sure that what the fusion layers of a model, or of a part of one, read is in it.

    Raises:
        FusionError: a neighbour is not there.
    """
    # Parameters too: a batch norm that was converted is another module with the parameters of the one before.
    present = {id(part) for part in (*model.modules(), *model.parameters())}
    for path, layer in fusion_layers(model).items():
        for owner, leaf, _ in (reading for side in layer._readings or () for reading in side.values()):
            if id(owner) not in present and id(getattr(owner, leaf)) not in present:
                sides = zip(layer.places, layer.neighbours, strict=False)
                found = (place for place, side in sides if owner in side.modules())
                raise FusionError(layer.parted(path, next(found, leaf), "that is not in the model or stage that runs"))


def _read_parameter(owner: nn.Module, leaf: str, rows: tuple[int, int] | None) -> Tensor:
    theta = getattr(owner, leaf)
    if not isinstance(theta, Tensor):
        raise FusionError(f"the neighbour's parameter `{leaf}` is gone: it is no tensor but {theta!r}")
    if is_wrapped(theta) or not (
        theta.dtype.is_floating_point or theta.dtype.is_complex
    ):  # its numbers are codes, or nothing at all
        kind = type(theta).__name__ if is_wrapped(theta) else theta.dtype
        raise FusionError(
            f"the `{leaf}` of a neighbour's {type(owner).__name__} is quantised ({kind}), and weights are synthesised "
            "from floats alone: transform the float model, and quantise what replfx.materialize(model) gives"
        )
    theta = as_sharded(theta)
    return theta if rows is None else theta[rows[0] : rows[1]]


def _scale_gradient(theta: Tensor, factor: float) -> Tensor:
    """`theta` itself in the forward pass (lerp(t, t, λ) = t exactly), λ times its gradient in the backward."""
    if factor == 1.0:
        return theta
    return theta.detach() if factor == 0.0 else torch.lerp(theta.detach(), theta, factor)


def _like_theirs(block: nn.Module, neighbours: Sequence[nn.Module]) -> None:
    """Give buffers the dtype of a neighbour's of their name, and statistics its values; masks and tables stay."""
    theirs = {name: buffer for side in reversed(neighbours) for name, buffer in side.named_buffers()}
    for name, mine in list(block.named_buffers()):
        path, _, leaf = name.rpartition(".")
        if name in theirs:
            statistics = leaf.startswith("running_") and theirs[name].shape == mine.shape
            block.get_submodule(path)._buffers[leaf] = (
                theirs[name].detach().clone() if statistics else mine.to(theirs[name].dtype)
            )


def _without_values(tensor: Tensor) -> Tensor:
    """Of a parameter its shape and dtype alone; a buffer (a table of relative positions) as it is."""
    return nn.Parameter(tensor.to("meta"), tensor.requires_grad) if isinstance(tensor, nn.Parameter) else tensor


def _is_simple(value: object) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_simple(item) for item in value)
    if isinstance(value, Mapping):
        return all(isinstance(k, str) and _is_simple(v) for k, v in value.items())
    return value is None or isinstance(value, bool | int | float | str)
