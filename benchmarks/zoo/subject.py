"""A model to try: how to build it, how to feed it, how to make one loss of whatever it gives."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Inputs = Tensor | tuple[object, ...] | dict[str, object]


@dataclass(frozen=True)
class Variant:
    """One way to build and feed a model, such as a smaller image than its usual one."""

    label: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]


@dataclass(frozen=True)
class Subject:
    """A model of a registry.

    Attributes:
        name: "source:model", unique.
        family: what the table has a row for.
        variants: the cheapest first; the first in which the untouched model runs forward and backward is taken.
    """

    name: str
    family: str
    variants: tuple[Variant, ...]


def seed(number: int = 0) -> None:
    """Start all of the random generators that a model may draw from."""
    import numpy as np

    random.seed(number)
    np.random.seed(number)  # noqa: NPY002 - wav2vec2 draws its masks from the global generator
    torch.manual_seed(number)


def built(variant: Variant) -> nn.Module:
    """Build the model from seed 0, in training mode."""
    seed()
    return variant.build().train()


def fed(variant: Variant, draw: int = 1) -> Inputs:
    """Draw the inputs, the same each time for one draw."""
    seed(draw)
    return variant.inputs()


def called(model: Callable[..., object], inputs: Inputs, draw: int = 1) -> object:
    """Call a model, or what a peer made of it, from the same state of the random generators each time for one draw."""
    seed(draw + 1)
    if isinstance(inputs, Tensor):
        return model(inputs)
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def tensors_of(output: object) -> Iterator[Tensor]:
    """Go through the tensors in a model's output, however deep they lie."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensors_of(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from tensors_of(value)
    elif dataclasses.is_dataclass(output):
        for field in dataclasses.fields(output):
            yield from tensors_of(getattr(output, field.name))


def differentiable(output: object) -> list[Tensor]:
    """The tensors of an output that a loss can be made of."""
    return [t for t in tensors_of(output) if t.requires_grad and t.is_floating_point()]


def loss_of(output: object) -> Tensor:
    """Sum the means of all that gradients can flow from."""
    means = [t.mean() for t in differentiable(output) if t.numel()]
    if not means:
        raise ValueError("the output has no floating-point tensor that needs a gradient")
    return torch.stack(means).sum()
