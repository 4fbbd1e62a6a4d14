"""Stacks to be whose blocks differ in shape, or are windows of layers, and what of them is replaced by what."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor, nn

import replfx
from tests.reference.heterogeneous import KINDS, Step, build_stack, input_shape, replaced_every, spots_of
from tests.support.strategies import FUSIONS, randomize

LIGHT = ("units", "tokens", "tokens_separate")  # of these the formula is in tests/reference


@dataclass(frozen=True)
class Drawn:
    """A stack to be, and what of it is replaced by what; everything that is random comes from `seed`."""

    kind: str
    steps: tuple[Step, ...]
    fusion: str = "channel"
    operator: str = "block"
    neighbour_gradient: float = 1.0
    training: bool = True
    measured: bool = True
    seed: int = 3

    def model(self) -> nn.Module:
        torch.manual_seed(self.seed)
        model = build_stack(self.kind, self.steps).double()
        randomize(model, self.seed)
        return model.train(self.training)

    def inputs(self, batch: int = 3) -> tuple[Tensor]:
        shape, generator = input_shape(self.kind, self.steps, batch), torch.Generator().manual_seed(self.seed + 1)
        return (torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_(),)

    def given(self) -> tuple[Tensor] | None:
        return self.inputs() if self.measured else None

    def policy(self) -> dict[str, object]:
        return {"fusion": self.fusion, "operator": self.operator, "neighbour_gradient": self.neighbour_gradient}

    def transformed(self) -> nn.Module:
        made = replfx.transform(self.model(), self.given(), **self.policy())
        randomize(made, self.seed + 2)
        return made

    def replaced(self) -> list[int]:
        """By the rule, not by the library."""
        return replaced_every(spots_of(self.kind, self.steps), 2)

    def paths(self, positions: Sequence[int]) -> list[str]:
        spots = spots_of(self.kind, self.steps)
        return [spots[i].path for i in positions]


def various(kind: str) -> tuple[Step, ...]:
    """Blocks that are wider, narrower, dilated and grouped, each unlike the one before."""
    wide, narrow = Step(4, 8, hidden=3, heads=2, kernel=5, window=5), Step(8, 6, hidden=12, window=3)
    same = replace(wide, before=8, dilation=2 if kind == "units" else 1)
    return Step(4, 4), wide, same, narrow, replace(narrow, before=6, kernel=5, groups=2, window=7)


@st.composite
def steps_of(draw: st.DrawFn, kind: str, *, groups: bool = True) -> tuple[Step, ...]:
    """Three to five blocks, each like the one before or not."""
    one_width = st.sampled_from((4, 6, 8))
    width, downs = draw(st.sampled_from((1, 2, 4)) if kind.startswith("flat") else one_width), 2
    even = kind != "flat_maps"
    found: list[Step] = []
    for _ in range(draw(st.integers(3, 5))):
        if found and draw(st.integers(0, 2)):  # as the one before, but that nothing changes the shape here
            step = replace(found[-1], before=width, stride=1, pool=False)
        else:
            before, width = width, draw(one_width if even else st.integers(2, 7))
            many = 2 if groups and before % 2 == 0 and before > 2 and draw(st.booleans()) else 1
            step = Step(
                before,
                width,
                hidden=draw(st.sampled_from((3, 8, 12))),
                heads=draw(st.sampled_from((1, 2))),
                groups=many,
                kernel=draw(st.sampled_from((3, 5))),
                dilation=draw(st.sampled_from((1, 2))) if kind == "units" else 1,
                window=draw(st.sampled_from((3, 5, 7))),
            )
        if downs and kind.startswith(("units", "flat_conv")) and draw(st.integers(0, 4)) == 0:
            downs -= 1
            step = replace(step, stride=2) if kind == "units" else replace(step, pool=True)
        found.append(step)
    return tuple(found)


@st.composite
def drawn_stacks(draw: st.DrawFn, *, operators: tuple[str, ...] = ("block",)) -> Drawn:
    """A stack of which every=2 replaces something."""
    kind = draw(st.sampled_from(KINDS))
    operator = draw(st.sampled_from(operators if kind in LIGHT else ("block",)))
    drawn = Drawn(
        kind=kind,
        steps=draw(steps_of(kind, groups=operator == "block")),
        fusion=draw(st.sampled_from(FUSIONS)),
        operator=operator,
        neighbour_gradient=draw(st.sampled_from((1.0, 0.5, 0.0))),
        training=draw(st.booleans()),
        measured=draw(st.booleans()),
        seed=draw(st.integers(0, 2**20)),
    )
    assume(drawn.replaced())
    spots = spots_of(kind, drawn.steps)
    # Only shapes tell that a block changes the shape if all blocks around it do the same; and a light operator
    # needs a block that does not.
    drawn = replace(drawn, measured=drawn.measured or needs_shapes(drawn))
    assume(operator == "block" or not any(spots[i].turn for i in drawn.replaced()))
    return drawn


def needs_shapes(drawn: Drawn) -> bool:
    return drawn.kind == "units" and any(s.stride > 1 and s.before == s.width for s in drawn.steps)
