"""Small models on their way out: transformed with weights as training might leave them, and materialized."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import replfx
from tests.support.models import GPT, ConvNet, Tower, tower
from tests.support.strategies import randomize

STAGES = ("transformed", "materialized")
OPERATORS = ("block", "light")


def _vit() -> nn.Module:
    timm = pytest.importorskip("timm")
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 5, "num_heads": 2, "num_classes": 5}
    return timm.create_model("vit_tiny_patch16_224", **sizes)


def _images(count: int) -> Tensor:
    return torch.rand(count, 3, 16, 16)


def _tokens(count: int) -> Tensor:
    return torch.randint(0, 31, (count, 12))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "conv": (ConvNet, _images),
    "gpt": (GPT, _tokens),
    "vit": (_vit, _images),
}


@dataclass(frozen=True)
class Shipped:
    """A model that is to be shipped.

    Attributes:
        build: makes the untransformed model, with other weights each time.
        model: transformed or materialized, in evaluation mode.
        x: a batch to trace it with.
        y: another batch of the same shape, so that nothing that was recorded of `x` passes for the model.
    """

    build: Callable[[], nn.Module]
    model: nn.Module
    x: Tensor
    y: Tensor

    def on_y(self) -> Tensor:
        with torch.no_grad():
            result: Tensor = self.model(self.y)
        return result


def shipped(name: str, operator: str, stage: str, dtype: torch.dtype = torch.float32) -> Shipped:
    torch.manual_seed(0)
    build, batch = MODELS[name]
    x, y = batch(2), batch(2)
    model = scattered(replfx.transform(build(), x, operator=operator)).eval().to(dtype)
    if stage == "materialized":
        model = replfx.materialize(model)
    x, y = (t.to(dtype) if t.is_floating_point() else t for t in (x, y))
    return Shipped(build, model, x, y)


def transformed_tower(operator: str = "block", seed: int = 6) -> Tower:
    torch.manual_seed(seed)
    model = replfx.transform(tower(5), operator=operator)
    randomize(model, seed)
    return model


def scattered(model: nn.Module) -> nn.Module:
    """The model with every parameter and running statistic moved: what starts at zero or ½ would hide mistakes."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if buffer.is_floating_point():
                buffer.add_(0.1 * torch.rand_like(buffer) if "var" in name else 0.05 * torch.randn_like(buffer))
    return model


def emptied(model: nn.Module) -> nn.Module:
    """A copy whose every tensor is zero: what it computes after loading comes from the file alone."""
    twin = copy.deepcopy(model)
    for tensor in twin.state_dict().values():
        tensor.zero_()
    return twin
