"""The fusion layer: the module that stands in a replaced block's place."""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from replfx.errors import FusionError
from replfx.fusion.fusions import Fusion
from replfx.fusion.magnitude import is_finite, largest
from replfx.fusion.operators import Operator
from replfx.fusion.sharded import all_sharded, any_sharded, as_sharded, gathered, replicated
from replfx.structure import move_hooks

__all__ = ["FusionLayer", "Readings"]

# By the block's name for a parameter: the module that owns its counterpart, its name there, and which of its rows.
Readings: TypeAlias = Mapping[str, tuple[nn.Module, str, tuple[int, int] | None]]


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
            its `shift_size`); the block itself is not kept.

    Attributes:
        names: where the parts of a block that was no module were in the model, by their names in the block.
    """

    def __init__(
        self,
        operator: Operator,
        fusion: Fusion | None,
        readings: tuple[Readings, Readings] | None,
        *,
        neighbour_gradient: float = 1.0,
        replaced: nn.Module,
    ) -> None:
        super().__init__()
        self.operator = operator
        self.fusion = fusion
        self._readings = readings
        self.names: Mapping[str, str] = {}
        self.neighbour_gradient = neighbour_gradient
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

    def synthesized(self) -> dict[str, Tensor]:
        """The operator's weights as they stand: parameter name in the block → tensor.

        Of a fused query-key-value projection the light operator takes the value rows alone. Empty for an
        operator without weights. Gradients flow from these tensors into coefficients and neighbours.
        """
        if self.fusion is None or self._readings is None:
            return {}
        previous, next = (self._read(readings) for readings in self._readings)
        if any_sharded(previous) or any_sharded(next):
            return self._synthesize_sharded(self.fusion, previous, next)
        result: dict[str, Tensor] = self.fusion(previous, next)
        return result

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

    @staticmethod
    def _synthesize_sharded(fusion: Fusion, previous: dict[str, Tensor], next: dict[str, Tensor]) -> dict[str, Tensor]:
        on_shards = fusion.elementwise and all_sharded(previous) and all_sharded(next)
        if on_shards:
            coefficients = replicated(fusion, previous)
        else:
            coefficients = gathered(dict(fusion.named_parameters()))
            previous, next = gathered(previous), gathered(next)
        made: dict[str, Tensor] = torch.func.functional_call(fusion, coefficients, (previous, next), tie_weights=False)
        return gathered(made) if on_shards else made

    def _read(self, readings: Readings) -> dict[str, Tensor]:
        return {
            name: _scale_gradient(_read_parameter(*reading), self.neighbour_gradient)
            for name, reading in readings.items()
        }

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the replaced block would have been called with, and what it would have given."""
        return self.operator(self.synthesized(), args, kwargs)

    def extra_repr(self) -> str:
        return "" if self.neighbour_gradient == 1.0 else f"neighbour_gradient={self.neighbour_gradient}"


def _read_parameter(owner: nn.Module, leaf: str, rows: tuple[int, int] | None) -> Tensor:
    theta = getattr(owner, leaf)
    if not isinstance(theta, Tensor):
        raise FusionError(f"the neighbour's parameter `{leaf}` is gone: it is no tensor but {theta!r}")
    theta = as_sharded(theta)
    return theta if rows is None else theta[rows[0] : rows[1]]


def _scale_gradient(theta: Tensor, factor: float) -> Tensor:
    """`theta` itself in the forward pass (lerp(t, t, λ) = t exactly), λ times its gradient in the backward."""
    if factor == 1.0:
        return theta
    return theta.detach() if factor == 0.0 else torch.lerp(theta.detach(), theta, factor)


def _is_simple(value: object) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_simple(item) for item in value)
    if isinstance(value, Mapping):
        return all(isinstance(k, str) and _is_simple(v) for k, v in value.items())
    return value is None or isinstance(value, bool | int | float | str)
