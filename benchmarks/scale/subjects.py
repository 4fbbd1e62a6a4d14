"""What is transformed: models whose step is the yardstick, and towers of one small block that grow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.models import CLASSES, CONTEXT, VOCABULARY
from replfx.demo.model import GPT

__all__ = ["MODELS", "TOWERS", "Model", "Tower"]

DEEP = 1024  # blocks
BATCH = 2  # the cheapest step there is: a larger batch makes the pass cost fewer steps
PIXELS = 224
TINY = 8  # channels of a tower: the cost of the pass alone, next to none of arithmetic


class Residual(nn.Module):
    """A pre-norm residual block: x + fc2(gelu(fc1(norm(x))))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Add what the two layers make of the normalised activation."""
        y: Tensor = x + self.fc2(self.act(self.fc1(self.norm(x))))
        return y


class Untraceable(Residual):
    """The same, with control flow on a size, which symbolic tracing cannot follow: it has to be recorded."""

    def forward(self, x: Tensor) -> Tensor:
        """Refuse an empty batch."""
        if len(x) == 0:
            raise ValueError("an empty batch")
        return super().forward(x)


class Weights(nn.Module):
    """`x = relu(x @ w)` for each of some weights: blocks that are no modules."""

    def __init__(self, blocks: int, width: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(width, width) / width**0.5 for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        """Go through all weights."""
        for w in self.weights:
            x = torch.relu(x @ w)
        return x


def _modules(blocks: int, width: int) -> nn.Module:
    return nn.Sequential(*(Residual(width) for _ in range(blocks)))


def _recorded(blocks: int, width: int) -> nn.Module:
    return nn.Sequential(*(Untraceable(width) for _ in range(blocks)))


def _windows(blocks: int, width: int) -> nn.Module:
    return nn.Sequential(*(layer for _ in range(blocks) for layer in (nn.Linear(width, width), nn.ReLU())))


@dataclass(frozen=True)
class Tower:
    """A model of any number of like blocks, by the way in which blocks are found in it.

    Attributes:
        build: (blocks, width) → model, from (rows, width) to the same.
        symbolic: it can be captured without example inputs.
        about: what it is, in a few words.
    """

    build: Callable[[int, int], nn.Module]
    symbolic: bool
    about: str


TOWERS = {
    "modules": Tower(_modules, True, "residual MLP blocks"),
    "recorded": Tower(_recorded, False, "the same, with control flow on a size"),
    "windows": Tower(_windows, True, "[Linear, ReLU] × n in one Sequential"),
    "regions": Tower(Weights, True, "for w in weights: x = relu(x @ w)"),
}


@dataclass(frozen=True)
class Model:
    """A model to transform and to train.

    Attributes:
        build: (small: whether a few blocks will do) → model.
        batch: inputs and targets (class indices) of a training step; the inputs are the example inputs too.
        symbolic: it can be captured without example inputs.
        about: what it is and the batch, in a few words.
    """

    build: Callable[[bool], nn.Module]
    batch: Callable[[], tuple[Tensor, Tensor]]
    symbolic: bool
    about: str


def _vit_l(small: bool) -> nn.Module:
    import timm

    model: nn.Module = timm.create_model("vit_large_patch16_224", depth=4 if small else 24)
    return model


def _resnet152(small: bool) -> nn.Module:
    import torchvision

    model: nn.Module = torchvision.models.resnet50() if small else torchvision.models.resnet152()
    return model


def _gpt(small: bool) -> nn.Module:
    return GPT(VOCABULARY, CONTEXT["cpu"], width=192, depth=4 if small else DEEP, heads=3)


def _images() -> tuple[Tensor, Tensor]:
    return torch.randn(BATCH, 3, PIXELS, PIXELS), torch.randint(CLASSES, (BATCH,))


def _text() -> tuple[Tensor, Tensor]:
    ids = torch.randint(VOCABULARY, (BATCH, CONTEXT["cpu"] + 1))
    return ids[:, :-1], ids[:, 1:]


def _deep(name: str, width: int) -> Model:
    """A tower as a model, with blocks of a size at which the step is arithmetic."""
    tower = TOWERS[name]
    rows = BATCH * CONTEXT["cpu"]
    return Model(
        lambda small: tower.build(4 if small else DEEP, width),
        lambda: (torch.randn(rows, width), torch.randint(width, (rows,))),
        tower.symbolic,
        f"{DEEP} × {tower.about}, width {width}, {rows} rows",
    )


MODELS = {
    "vit_l": Model(_vit_l, _images, True, f"timm's vit_large_patch16_224, {BATCH} images of {PIXELS} px"),
    "resnet152": Model(_resnet152, _images, True, f"torchvision's resnet152, {BATCH} images of {PIXELS} px"),
    "gpt_1024": Model(_gpt, _text, True, f"{DEEP} × causal block, width 192, {BATCH} × {CONTEXT['cpu']} bytes"),
    "recorded_1024": _deep("recorded", 192),
    "windows_1024": _deep("windows", 512),
    "regions_1024": _deep("regions", 512),
}
