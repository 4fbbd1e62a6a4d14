"""The models that are compiled, and one training of each for every way of compiling it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import replfx
from benchmarks.accuracy.resnet import ResNet
from benchmarks.common import in_training
from benchmarks.models import CLASSES, CONTEXT, PIXELS, VOCABULARY
from replfx.demo.model import GPT
from replfx.measure import Training

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Subject:
    """A model to compile, with random weights.

    Attributes:
        build: kind of device ("cpu" or "cuda") → the model.
        quick: a model of the same kind that a CPU compiles in seconds.
        batch: (kind of device, batch size, quick) → inputs and targets.
        sizes: kind of device → batch size.
    """

    build: Callable[[str], nn.Module]
    quick: Callable[[], nn.Module]
    batch: Callable[[str, int, bool], Batch]
    sizes: Mapping[str, int]


def _images(kind: str, count: int, quick: bool) -> Batch:
    side = 32 if quick else PIXELS[kind]
    return torch.randn(count, 3, side, side), torch.randint(CLASSES, (count,))


def _small_images(kind: str, count: int, quick: bool) -> Batch:
    return torch.randn(count, 3, 32, 32), torch.randint(10, (count,))


def _text(kind: str, count: int, quick: bool) -> Batch:
    ids = torch.randint(VOCABULARY, (count, (32 if quick else CONTEXT[kind]) + 1))
    return ids[:, :-1], ids[:, 1:]


def _vit(image: int, patch: int, width: int, depth: int, heads: int) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    sizes: dict[str, Any] = {"embed_dim": width, "depth": depth, "num_heads": heads}
    model: nn.Module = VisionTransformer(img_size=image, patch_size=patch, num_classes=CLASSES, **sizes)
    return model


def _resnet(layers: list[int], width: int = 64) -> nn.Module:
    from torchvision.models.resnet import Bottleneck
    from torchvision.models.resnet import ResNet as Bottlenecks

    model: nn.Module = Bottlenecks(Bottleneck, layers, num_classes=CLASSES, width_per_group=width)
    return model


def _convnext(depths: tuple[int, ...], widths: tuple[int, ...]) -> nn.Module:
    from timm.models.convnext import ConvNeXt

    model: nn.Module = ConvNeXt(depths=depths, dims=widths, num_classes=CLASSES)
    return model


SUBJECTS = {
    "vit_b": Subject(
        lambda kind: _vit(PIXELS[kind], 16, 768, 12, 12),
        lambda: _vit(32, 8, 32, 5, 2),
        _images,
        {"cpu": 4, "cuda": 64},
    ),
    "resnet50": Subject(
        lambda kind: _resnet([3, 4, 6, 3]), lambda: _resnet([1, 3, 1, 1], 8), _images, {"cpu": 4, "cuda": 128}
    ),
    "resnet110": Subject(lambda kind: ResNet(110), lambda: ResNet(20, 4), _small_images, {"cpu": 32, "cuda": 128}),
    "convnext_t": Subject(
        lambda kind: _convnext((3, 3, 9, 3), (96, 192, 384, 768)),
        lambda: _convnext((1, 1, 5, 1), (8, 16, 16, 16)),
        _images,
        {"cpu": 4, "cuda": 64},
    ),
    "gpt2": Subject(
        lambda kind: GPT(VOCABULARY, CONTEXT[kind], width=768, depth=12, heads=12),
        lambda: GPT(VOCABULARY, CONTEXT["cpu"], width=32, depth=5, heads=2),
        _text,
        {"cpu": 2, "cuda": 16},
    ),
}


@dataclass(frozen=True)
class Way:
    """How a model is replaced and compiled.

    Attributes:
        name: of the row.
        operator: of the replaced blocks; None leaves the model whole, "identity" deletes them.
        compiler: a backend of torch.compile, or None for eager.
        kernels: whether replfx's backend is to run its Triton kernels, which takes a GPU.
    """

    name: str
    operator: str | None
    compiler: str | None
    kernels: bool = False


WAYS = (
    Way("eager full", None, None),
    Way("eager replfx", "auto", None),
    Way("Inductor full", None, "inductor"),
    Way("Inductor removed", "identity", "inductor"),
    Way("Inductor replfx", "auto", "inductor"),
    Way("backend replfx", "auto", "replfx"),
    Way("backend replfx, kernels", "auto", "replfx", kernels=True),
)


def ways_on(device: torch.device) -> list[Way]:
    """Those that there are on a device: on a CPU the kernels are the plain operations."""
    return [way for way in WAYS if device.type == "cuda" or not way.kernels]


def training_of(
    subject: Subject, way: Way, operator: str, device: torch.device, *, batch: int, quick: bool, bf16: bool
) -> Training:
    """A model from seed 0 in training with AdamW, replaced and compiled; nothing is compiled before its first step.

    Args:
        subject: the model.
        way: what is done to it.
        operator: instead of "auto".
        device: where.
        batch: examples a step.
        quick: take the small model.
        bf16: run forward under bfloat16 autocast.

    Raises:
        ReplfxError: the model's blocks do not have the operator.

    """
    torch.manual_seed(0)
    model = (subject.quick() if quick else subject.build(device.type)).train().to(device)
    inputs, targets = (t.to(device) for t in subject.batch(device.type, batch, quick))
    if way.operator is not None:
        model = replfx.transform(model, inputs[:2], operator=operator if way.operator == "auto" else way.operator)
    called = model if way.compiler is None else _compiled(model, way.compiler, way.kernels)
    return in_training(model, called, inputs, targets, bf16=bf16)


def _compiled(model: nn.Module, compiler: str, kernels: bool) -> Callable[..., Tensor]:
    backend: Any = replfx.backend(kernels=kernels) if compiler == "replfx" else compiler
    compiled: Callable[..., Tensor] = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)
    return compiled
