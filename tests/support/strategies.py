"""What the property tests draw: a stack of blocks, how it is run, and what of it is replaced."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import replfx
from tests.reference import FAMILIES, Options, Stack, build

__all__ = ["FUSIONS", "Case", "Policy", "cases", "policies", "randomize"]

FUSIONS = ("scalar", "scalar_layer", "channel")


@dataclass(frozen=True)
class Policy:
    """How blocks are chosen and what replaces them: the arguments of `replfx.transform`."""

    choice: dict[str, Any]
    fusion: str
    operator: str
    neighbour_gradient: float

    def arguments(self) -> dict[str, Any]:
        return {
            **self.choice,
            "fusion": self.fusion,
            "operator": self.operator,
            "neighbour_gradient": self.neighbour_gradient,
        }


@dataclass(frozen=True)
class Case:
    """A model to be, with its inputs; everything that is random in it comes from `seed`."""

    family: str
    options: Options
    depth: int
    policy: Policy
    dtype: torch.dtype
    channels_last: bool
    training: bool
    traced_on_inputs: bool
    seed: int

    def model(self) -> Stack:
        """A fresh untransformed model; the same every time."""
        torch.manual_seed(self.seed)
        model = self.lay_out(build(self.family, self.options, self.depth).to(self.dtype))
        randomize(model, self.seed)
        return model.train(self.training)

    def lay_out(self, model: nn.Module) -> Any:
        """Put 4- or 5-dimensional weights into the drawn memory format."""
        return model.to(memory_format=self._format()) if self.channels_last else model

    def inputs(self, batch: int = 3) -> tuple[Tensor, ...]:
        """Fresh inputs; the first, the activation, asks for a gradient."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        shape = FAMILIES[self.family].shape(self.options, batch)
        x = torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype)
        if self.channels_last:
            x = x.contiguous(memory_format=self._format())
        mask = torch.rand(shape[1], shape[1], generator=generator) < 0.6
        mask |= torch.eye(shape[1], dtype=torch.bool)
        return (x.requires_grad_(), mask) if self.family == "masked" else (x.requires_grad_(),)

    def transformed(self, model: Stack | None = None) -> Stack:
        """`model`, or a fresh one, transformed by the policy, with all parameters random again."""
        made = replfx.transform(
            model or self.model(), self.inputs() if self.traced_on_inputs else None, **self.policy.arguments()
        )
        randomize(made, self.seed + 2)
        assert isinstance(made, Stack)
        return made

    def _format(self) -> torch.memory_format:
        return torch.channels_last if FAMILIES[self.family].spatial == 2 else torch.channels_last_3d


def randomize(model: nn.Module, seed: int) -> None:
    """All parameters and running statistics at random, coefficients and gains too: nothing stays 0, ½ or 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            # Spread by the number of terms that are summed, so that activations neither die nor explode.
            terms = max(parameter[0].numel(), 1) if parameter.dim() > 1 else 4
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / terms**0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator, dtype=torch.float64) / 4)
            elif name.endswith("running_var"):
                buffer.copy_(torch.rand(buffer.shape, generator=generator, dtype=torch.float64) + 0.5)


@st.composite
def policies(
    draw: st.DrawFn, depth: int, operators: tuple[str, ...], gradients: tuple[float, ...] = (1.0, 0.5, 0.0)
) -> Policy:
    """Any choice of blocks that replaces at least one of `depth`."""
    kind = draw(st.sampled_from(("every", "fraction", "select")))
    choice: dict[str, Any]
    if kind == "every":
        choice = {"every": draw(st.integers(2, depth - 1))}
    elif kind == "fraction":
        choice = {"fraction": draw(st.floats(0.34, 0.5))}
    else:
        chosen: list[int] = []
        for index in draw(st.sets(st.integers(1, depth - 2), min_size=1).map(sorted)):
            if not chosen or index - chosen[-1] > 1:
                chosen.append(index)
        choice = {"select": [f"blocks.{index}" for index in chosen]}
    return Policy(
        choice, draw(st.sampled_from(FUSIONS)), draw(st.sampled_from(operators)), draw(st.sampled_from(gradients))
    )


@st.composite
def cases(
    draw: st.DrawFn,
    *,
    operators: tuple[str, ...] = ("block", "light", "identity", "mixer"),
    families: tuple[str, ...] = tuple(FAMILIES),
    dtypes: tuple[torch.dtype, ...] = (torch.float64,),
    gradients: tuple[float, ...] = (1.0, 0.5, 0.0),
) -> Case:
    """A case whose family has one of the operators."""
    family = draw(st.sampled_from(families))
    kind = FAMILIES[family]
    dims = 3 if family == "basic3d" else 2
    options = Options(
        width=(width := draw(st.sampled_from((4, 6, 8)))),
        hidden=draw(st.sampled_from((2, 4, 6, 8, 12))),
        heads=draw(st.sampled_from((1, 2))),
        groups=draw(st.sampled_from((1, 2))),
        kernel=draw(st.sampled_from((3,) if dims == 3 else (3, 5))),
        stride=draw(st.sampled_from((1, 2))),
        dims=dims,
        bias=draw(st.booleans()),
        norm=draw(st.booleans()),
    )
    assert width % options.groups == 0
    depth = draw(st.integers(3, 6))
    fitting = tuple(o for o in operators if fits(family, options, o))
    policy = draw(policies(depth, fitting or ("block",), gradients))
    return Case(
        family=family,
        options=options,
        depth=depth,
        policy=policy,
        dtype=draw(st.sampled_from(dtypes)),
        channels_last=kind.spatial > 0 and draw(st.booleans()),
        training=draw(st.booleans()),
        # Where nothing is known of shapes, only a residual block is known to keep them.
        traced_on_inputs=not kind.residual or draw(st.booleans()),
        seed=draw(st.integers(0, 2**20)),
    )


def fits(family: str, options: Options, operator: str) -> bool:
    """Whether blocks of this family have such an operator, by the operators' documentation."""
    if operator == "light":
        grouped = family in ("basic", "basic3d") and options.groups > 1
        return FAMILIES[family].light is not None and not grouped
    if operator == "mixer":
        return FAMILIES[family].mixer is not None
    return operator == "block" or family != "masked"


def case_of(
    family: str,
    operator: str,
    fusion: str,
    *,
    gradient: float = 1.0,
    training: bool = True,
    width: int = 4,
    hidden: int = 8,
    **facts: Any,
) -> Case:
    """A small case, every second block of it replaced; `facts` are fields of `Case`."""
    options = Options(width, hidden, heads=2, dims=3 if family == "basic3d" else 2)
    policy = Policy({"every": 2}, fusion, operator, gradient)
    return replace(Case(family, options, 3, policy, torch.float64, False, training, True, seed=5), **facts)
