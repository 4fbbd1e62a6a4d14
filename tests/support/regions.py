"""Models to be whose blocks are no modules, and what replaces their layers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

import replfx
from tests.reference.functional import spots_of
from tests.reference.heterogeneous import replaced_every
from tests.support.functional import ACTIVATIONS, Functional, Spec
from tests.support.strategies import randomize


@dataclass(frozen=True)
class Regions:
    """A model to be, and what replaces its layers; everything that is random comes from `seed`."""

    spec: Spec
    fusion: str = "channel"
    neighbour_gradient: float = 1.0
    training: bool = True
    measured: bool = True
    seed: int = 3

    def model(self) -> Functional:
        torch.manual_seed(self.seed)
        model = Functional(self.spec).double()
        randomize(model, self.seed)
        return model.train(self.training)

    def inputs(self, batch: int = 2) -> tuple[Tensor, ...]:
        torch.manual_seed(self.seed + 1)
        _, *extra = (t.double() for t in Functional(self.spec).inputs())
        return (torch.randn(batch, 3, self.spec.widths[0], dtype=torch.float64).requires_grad_(), *extra)

    def given(self) -> tuple[Tensor, ...] | None:
        return self.inputs() if self.measured else None

    def policy(self) -> dict[str, Any]:
        return {"fusion": self.fusion, "neighbour_gradient": self.neighbour_gradient}

    def transformed(self) -> fx.GraphModule:
        made = replfx.transform(self.model(), self.given(), **self.policy())
        assert isinstance(made, fx.GraphModule)
        randomize(made, self.seed + 2)
        return made

    def replaced(self) -> list[int]:
        """By the rule, not by the library."""
        return replaced_every(spots_of(self.spec, measured=self.measured), 2)

    def paths(self, positions: Sequence[int]) -> list[str]:
        return [spots_of(self.spec, measured=self.measured)[i].path for i in positions]


def spec_of(kind: str, number: int = 0, **facts: Any) -> Spec:
    """One of a kind, with other things going round by a number."""
    extra, storage = (None, "input", "computed", "buffer")[number % 4], ("lists", "one list", "dict", "attributes")
    activation = sorted(ACTIVATIONS)[number % len(ACTIVATIONS)]
    plain = Spec(kind, (3, 3, 5, 5, 4, 4), activation, False, extra, False, storage[-1 - number % 4], True, True, True)
    return replace(plain, **facts)
