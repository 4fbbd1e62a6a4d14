"""The two sides of a synthesis θ = a·θ_prev + b·θ_next, aligned, and its coefficients."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from replfx.fusion.alignment import AlignedFusion
from replfx.fusion.fusions import ChannelFusion, LinearFusion
from replfx.live import Synthesis

__all__ = ["Sides"]


@dataclass(frozen=True)
class Sides:
    """What a layer synthesises from.

    Attributes:
        rule: the fusion, which is linear in its coefficients.
        previous, next: θ if all a are 1 and all b 0, and the other way round; by name.
    """

    rule: LinearFusion
    previous: Mapping[str, Tensor]
    next: Mapping[str, Tensor]

    @classmethod
    def of(cls, layer: Synthesis) -> "Sides | None":
        """Those of a layer; None if its fusion is not of this form."""
        rule = layer.fusion.rule if isinstance(layer.fusion, AlignedFusion) else layer.fusion
        if not isinstance(rule, LinearFusion):
            return None
        start = rule.previous.detach().clone(), rule.next.detach().clone()
        sides = []
        with torch.no_grad():
            for a, b in ((1.0, 0.0), (0.0, 1.0)):
                rule.previous.fill_(a)
                rule.next.fill_(b)
                sides.append(layer.synthesized())
            rule.previous.copy_(start[0])
            rule.next.copy_(start[1])
        return cls(rule, *sides)

    @property
    def by_channel(self) -> bool:
        """Whether each output channel has coefficients of its own."""
        return isinstance(self.rule, ChannelFusion)

    @property
    def common(self) -> bool:
        """Whether all parameters of the block have one a and one b."""
        return self.rule.total([1, 1]) == 1

    def assign(self, name: str, coefficients: Tensor) -> None:
        """Let the parameter's a and b be these: (2,), or (channels, 2) if each channel has its own."""
        with torch.no_grad():
            for part, vector in enumerate((self.rule.previous, self.rule.next)):
                self.rule.parts(vector)[name].copy_(coefficients[..., part])
