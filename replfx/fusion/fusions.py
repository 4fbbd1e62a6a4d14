"""Fusions: learnable maps (θ_prev, θ_next) → θ, one for all synthesised parameters of a block."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from replfx.errors import FusionError
from replfx.fusion.magnitude import largest
from replfx.fusion.mixing import mixed
from replfx.fusion.registry import Registry

__all__ = [
    "ChannelFusion",
    "Fusion",
    "LayerScalarFusion",
    "LinearFusion",
    "ScalarFusion",
    "along_first",
    "fusions",
    "register_fusion",
]

fusions: Registry["Fusion"] = Registry("fusion")
register_fusion = fusions.register


class Fusion(nn.Module):
    """Base of all fusions. A subclass defines `combine`, and its parameters if it has any.

    Args:
        shapes: shape of each synthesised parameter, by name; both neighbours' have the same.
        dtype: of the coefficients.
        device: of the coefficients.

    A subclass takes its own options as further keyword arguments, plain JSON values.

    Attributes:
        elementwise: each element of θ comes from the same element of both neighbours alone, so that the fusion can
            run on the shards of sharded parameters.
        separate: each parameter comes from its own counterparts alone, so that `forward` may be called for some of
            them. False for a subclass that has a `forward` of its own, unless it says otherwise.

    Example:
        >>> @replfx.register_fusion("mean")
        ... class Mean(replfx.Fusion):
        ...     def combine(self, name, previous, next):
        ...         return (previous + next) / 2
        >>> model = replfx.transform(model, fusion="mean")
    """

    elementwise: ClassVar[bool] = True
    separate: bool = True

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if "forward" in cls.__dict__ and "separate" not in cls.__dict__:
            cls.separate = False

    def __init__(self, shapes: Mapping[str, torch.Size], *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()

    def combine(self, name: str, previous: Tensor, next: Tensor) -> Tensor:
        """θ for the parameter `name`, of the shape that both neighbours' θ have."""
        raise NotImplementedError

    def forward(self, previous: Mapping[str, Tensor], next: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All synthesised parameters of the block, by name."""
        return {name: self.combine(name, theta, next[name]) for name, theta in previous.items()}

    def bound(self, previous: Mapping[str, float], next: Mapping[str, float]) -> float:
        """What no magnitude among the synthesised parameters exceeds; inf if that is unknown.

        A subclass that changes what is synthesised changes this too.

        Args:
            previous: the largest magnitude in each parameter of the neighbour before, by name.
            next: the same of the neighbour after.
        """
        return math.inf


class LinearFusion(Fusion):
    """θ = a·θ_prev + b·θ_next with coefficients that subclasses lay out.

    All a of a block are one vector and all b another: few parameters for an optimizer to loop over, of one
    dimension, so that neither FSDP (which refuses scalars) nor channels_last (which refuses five
    dimensions) stumbles over them. They are real for complex θ too: beside a complex weight a block has real ones,
    which one vector of complex coefficients would make complex.

    Args:
        initial: start of all a and b, or of all a and of all b. At ½ a block starts as the mean of its neighbours
            (ours; the paper names no start).
    """

    separate: bool = True

    def __init__(
        self,
        shapes: Mapping[str, torch.Size],
        *,
        dtype: torch.dtype,
        device: torch.device,
        initial: float | Sequence[float] = 0.5,
    ) -> None:
        super().__init__(shapes, dtype=dtype, device=device)
        self.initial = _both(initial)
        self.sizes = {name: self.coefficients(shape) for name, shape in shapes.items()}
        total, dtype = self.total(list(self.sizes.values())), dtype.to_real()
        self.previous = nn.Parameter(torch.full((total,), self.initial[0], dtype=dtype, device=device))
        self.next = nn.Parameter(torch.full((total,), self.initial[1], dtype=dtype, device=device))

    def coefficients(self, shape: torch.Size) -> int:
        """How many a (and as many b) a parameter of this shape has: one, or one an output channel."""
        raise NotImplementedError

    def total(self, sizes: list[int]) -> int:
        """Length of the vector of all a."""
        return sum(sizes)

    def parts(self, vector: Tensor) -> dict[str, Tensor]:
        """The coefficients of each parameter."""
        return dict(zip(self.sizes, vector.split(list(self.sizes.values())), strict=True))

    def forward(self, previous: Mapping[str, Tensor], next: Mapping[str, Tensor]) -> dict[str, Tensor]:
        a, b = self.parts(self.previous), self.parts(self.next)
        return {
            name: mixed(theta, next[name], along_first(a[name], theta), along_first(b[name], theta))
            for name, theta in previous.items()
        }

    def bound(self, previous: Mapping[str, float], next: Mapping[str, float]) -> float:
        a, b = ({name: largest(part) for name, part in self.parts(v).items()} for v in (self.previous, self.next))
        # Their sum rather than the largest one: a NaN anywhere makes it NaN, which is under no limit.
        return sum(a[name] * size + b[name] * next[name] for name, size in previous.items())

    def extra_repr(self) -> str:
        a, b = self.initial
        return f"coefficients={2 * self.previous.numel()}, initial={a if a == b else self.initial}"


def _both(initial: object) -> tuple[float, float]:
    """The start of a and that of b."""
    both: list[Any] = list(initial) if isinstance(initial, list | tuple) else [initial, initial]
    numbers = all(isinstance(each, int | float) and not isinstance(each, bool) for each in both)
    if len(both) != 2 or not numbers or not all(map(math.isfinite, both)):
        raise FusionError(f"option `initial` must be a finite number, or two, not {initial!r}")
    return float(both[0]), float(both[1])


def along_first(coefficients: Tensor, theta: Tensor) -> Tensor:
    """Shape coefficients to multiply `theta` along its first dimension."""
    return coefficients.view(-1, *[1] * (theta.dim() - 1))


@fusions.register("scalar")
class ScalarFusion(LinearFusion):
    """θ = a·θ_prev + b·θ_next, two learnable scalars a parameter tensor.

    The 2024 rule (arXiv 2410.01239), there with two a layer; a block has several layers.
    """

    def coefficients(self, shape: torch.Size) -> int:
        return 1


@fusions.register("scalar_layer")
class LayerScalarFusion(ScalarFusion):
    """θ = a·θ_prev + b·θ_next, two learnable scalars for the whole block.

    The 2024 rule (arXiv 2410.01239) to the letter, if the replaced layer is the block.
    """

    def total(self, sizes: list[int]) -> int:
        return 1

    def parts(self, vector: Tensor) -> dict[str, Tensor]:
        return dict.fromkeys(self.sizes, vector)


@fusions.register("channel")
class ChannelFusion(LinearFusion):
    """θ[c] = a[c]·θ_prev[c] + b[c]·θ_next[c], two learnables an output channel c (ours).

    The output channel is the first dimension, as `nn.Linear` and the convolutions store it.
    """

    def coefficients(self, shape: torch.Size) -> int:
        return shape[0]
