"""The models that are benchmarked, with random weights, and random batches that fit them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from replfx.demo.model import GPT

CLASSES = 1000
VOCABULARY = 256
CONTEXT = {"cpu": 128, "cuda": 1024}
PIXELS = {"cpu": 96, "cuda": 224}


def convnext(classes: int, *, width: int, depth: int) -> nn.Module:
    """Build torchvision's ConvNeXt with one stage, as deep as the model: an isotropic network on patches of 4 x 4.

    Args:
        classes: number of labels.
        width: channels of an activation.
        depth: number of blocks.

    """
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    # The published scale of 1e-6 in front of each branch is for hundreds of thousands of steps.
    model: nn.Module = ConvNeXt([CNBlockConfig(width, None, depth)], layer_scale=1.0, num_classes=classes)
    return model


def vision_transformer(size: int, patch: int, channels: int, classes: int, *, width: int, depth: int) -> nn.Module:
    """Build timm's VisionTransformer, narrow for its depth: heads of 16 to 32 channels, an MLP of twice the width.

    Args:
        size: height and width of an image.
        patch: height and width of a patch.
        channels: channels of an image.
        classes: number of labels.
        width: length of an activation.
        depth: number of blocks.

    """
    from timm.models.vision_transformer import VisionTransformer

    model: nn.Module = VisionTransformer(
        img_size=size,
        patch_size=patch,
        in_chans=channels,
        num_classes=classes,
        embed_dim=width,
        depth=depth,
        num_heads=max(4, width // 32),
        mlp_ratio=2.0,
        class_token=False,
        global_pool="avg",
        weight_init="reset",
    )
    # timm draws positions at 0.02, from which so narrow a model learns to tell them apart too slowly.
    nn.init.normal_(model.get_parameter("pos_embed"), std=0.5)
    return model


@dataclass(frozen=True)
class Subject:
    """A model to measure, and how to feed it on a kind of device ("cpu" or "cuda")."""

    build: Callable[[str], nn.Module]
    batch: Callable[[str, int], tuple[Tensor, Tensor]]
    """(kind of device, batch size) → inputs and targets, on the CPU."""
    sizes: dict[str, int]
    """Kind of device → default batch size."""


def _images(kind: str, count: int) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 3, PIXELS[kind], PIXELS[kind]), torch.randint(CLASSES, (count,))


def _text(kind: str, count: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(VOCABULARY, (count, CONTEXT[kind] + 1))
    return ids[:, :-1], ids[:, 1:]


def _vit_s(kind: str) -> nn.Module:
    import timm

    model: nn.Module = timm.create_model("vit_small_patch16_224", img_size=PIXELS[kind], num_classes=CLASSES)
    return model


def _resnet50(kind: str) -> nn.Module:
    import torchvision

    model: nn.Module = torchvision.models.resnet50()
    return model


def _convnext_t(kind: str) -> nn.Module:
    import torchvision

    model: nn.Module = torchvision.models.convnext_tiny()
    return model


def _gpt(kind: str) -> nn.Module:
    return GPT(VOCABULARY, CONTEXT[kind], width=384, depth=12, heads=6)


SUBJECTS = {
    "vit_s": Subject(_vit_s, _images, {"cpu": 16, "cuda": 128}),
    "resnet50": Subject(_resnet50, _images, {"cpu": 16, "cuda": 128}),
    "convnext_t": Subject(_convnext_t, _images, {"cpu": 8, "cuda": 128}),
    "gpt": Subject(_gpt, _text, {"cpu": 8, "cuda": 32}),
}
