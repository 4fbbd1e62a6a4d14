"""Train one model of the demo, and say how accurate it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from replfx import ReplfxError
from replfx.demo.data import Images, augmented
from replfx.measure import Training


@dataclass(frozen=True)
class Recipe:
    """How the demo trains: AdamW with a one-cycle schedule."""

    epochs: int
    batch: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 0.05


def optimizer_of(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Make the recipe's optimizer for the trainable parameters."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True)


def training_of(model: nn.Module, data: Images, recipe: Recipe) -> Training:
    """Set a model up for its cost to be measured, on the first batch."""
    images, labels = data.train_images[: recipe.batch], data.train_labels[: recipe.batch]
    model.train()
    return Training(model, optimizer_of(model, recipe), lambda: F.cross_entropy(model(images), labels), images.device)


def train(model: nn.Module, data: Images, recipe: Recipe, seed: int, on_epoch: Callable[[], object]) -> float:
    """Train the model; the seed fixes the order of the images and how they are augmented.

    Returns:
        the share of the test images it then gets right.

    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = optimizer_of(model, recipe)
    batches = len(data.train_images) // recipe.batch
    if not batches:
        raise ReplfxError(f"{len(data.train_images)} training images do not fill one batch of {recipe.batch}")
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, total_steps=recipe.epochs * batches)
    for _ in range(recipe.epochs):
        model.train()
        order = torch.randperm(len(data.train_images), generator=generator)
        for chosen in order[: batches * recipe.batch].split(recipe.batch):
            images = data.train_images[chosen]
            if data.augment:
                images = augmented(images, generator)
            optimizer.zero_grad()
            F.cross_entropy(model(images), data.train_labels[chosen]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        on_epoch()
    return accuracy(model, data.test_images, data.test_labels)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of the images that the model classifies as labelled."""
    model.eval()
    batches = zip(images.split(500), labels.split(500), strict=True)
    right = sum(int((model(x).argmax(1) == y).sum().item()) for x, y in batches)
    return right / len(labels)
