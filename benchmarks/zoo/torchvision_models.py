"""Every model of torchvision's registry; the quantizable ones in float, as they come."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torchvision
from torch import nn

from benchmarks.zoo.subject import Inputs, Subject, Variant

SOURCE = "torchvision"
SIDES = (64, 96, 128, 224, 299)
CLIPS = ((8, 64), (16, 64), (16, 112), (16, 224))

# What it takes to have smaller inputs than usual, by the module that a builder is in: options by side.
Options = Callable[[int], dict[str, object]]
RESIZED: dict[str, Options] = {
    "vision_transformer": lambda side: {"image_size": side},
    "maxvit": lambda side: {"input_size": (side, side)},
}

# The detectors resize to at least 800 pixels unless told otherwise; SSD has a size that it cannot be told. An
# R-CNN runs its heads on hundreds of regions an image, which are no other for the library than a few.
FEW_REGIONS: dict[str, object] = {
    "rpn_post_nms_top_n_train": 64,
    "rpn_post_nms_top_n_test": 64,
    "box_batch_size_per_image": 16,
    "box_detections_per_img": 8,
}


def names(store: Path, on_count: Callable[[int, int], object] = lambda done, total: None) -> list[str]:
    """Names of the subjects."""
    return [f"{SOURCE}:{model}" for model in torchvision.models.list_models()]


def subject(name: str) -> Subject:
    """A model by its name."""
    model = name.partition(":")[2]
    builder = torchvision.models.get_model_builder(model)
    family = builder.__module__.removeprefix("torchvision.models.")
    return Subject(name, family, _variants(model, family))


def _variants(model: str, family: str) -> tuple[Variant, ...]:
    if family.startswith("detection."):
        options: dict[str, object] = {} if ".ssd" in family else {"min_size": 128, "max_size": 128}
        options |= FEW_REGIONS if "rcnn" in family else {}
        build = partial(_build, model, {**options, "weights": None, "weights_backbone": None})
        return (Variant("128 px", build, partial(_scenes, 128, "keypoint" in family)),)
    if family.startswith("optical_flow."):
        return (Variant("2 × 128 px", partial(_build, model, {}), partial(_frame_pairs, 128)),)
    if family.startswith("segmentation."):
        build = partial(_build, model, {"weights": None, "weights_backbone": None})
        return tuple(Variant(f"{side} px", build, partial(_images, side)) for side in (64, 224))
    if family == "video.mvit":
        return (Variant("16 × 224 px", partial(_build, model, {}), partial(_clips, 1, 16, 224)),)
    if family.startswith("video."):
        build = partial(_build, model, {})
        return tuple(Variant(f"{n} × {side} px", build, partial(_clips, 2, n, side)) for n, side in CLIPS)
    resized = RESIZED.get(family, _unresized)
    sides = (56, *SIDES) if model == "vit_h_14" else SIDES  # 64 is no multiple of its patches' 14
    return tuple(Variant(f"{side} px", partial(_build, model, resized(side)), partial(_images, side)) for side in sides)


def _unresized(side: int) -> dict[str, object]:
    return {}


def _build(model: str, options: dict[str, object]) -> nn.Module:
    get: Callable[..., nn.Module] = torchvision.models.get_model
    return get(model, **options)


def _images(side: int) -> Inputs:
    return torch.randn(2, 3, side, side)


def _clips(count: int, frames: int, side: int) -> Inputs:
    return torch.randn(count, 3, frames, side, side)


def _frame_pairs(side: int) -> Inputs:
    return torch.rand(2, 3, side, side), torch.rand(2, 3, side, side)


def _scenes(side: int, keypoints: bool) -> Inputs:
    """Two images with two things in each: boxes, labels, masks, and keypoints where the model knows them."""
    images, targets = [], []
    for _ in range(2):
        images.append(torch.rand(3, side, side))
        corners = torch.rand(2, 2) * side / 2
        boxes = torch.cat([corners, corners + side / 4 + torch.rand(2, 2) * side / 4], dim=1)
        target = {"boxes": boxes, "labels": torch.ones(2, dtype=torch.int64)}
        target["masks"] = (torch.rand(2, side, side) > 0.5).to(torch.uint8)
        if keypoints:
            places = boxes[:, None, :2] + torch.rand(2, 17, 2) * (boxes[:, None, 2:] - boxes[:, None, :2])
            target["keypoints"] = torch.cat([places, torch.ones(2, 17, 1)], dim=2)
        targets.append(target)
    return images, targets
