"""Handwritten digits, which come with scikit-learn, and small networks that learn them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.models import vision_transformer
from tests.support.models import ConvNet


@dataclass(frozen=True)
class Digits:
    """Normalised images (N, 1, 8, 8) and labels (N,)."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def digits() -> Digits:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    images = torch.from_numpy(bunch.images[:, None].astype(np.float32))
    split = train_test_split(images, bunch.target, test_size=0.3, random_state=0, stratify=bunch.target)
    train, test, labels, test_labels = split
    mean, deviation = train.mean(), train.std()
    as_tensor = torch.from_numpy
    return Digits((train - mean) / deviation, as_tensor(labels), (test - mean) / deviation, as_tensor(test_labels))


def cnn() -> nn.Module:
    return ConvNet(6, (16, 32), channels=1, classes=10)


def vit() -> nn.Module:
    """Sixteen patches an image."""
    return vision_transformer(8, 2, 1, 10, width=64, depth=8)


def train(model: nn.Module, data: Digits, epochs: int, seed: int) -> float:
    """Train with AdamW and one cycle; the seed fixes the order of the images.

    Returns:
        the share of the test images that it then gets right.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05, fused=True)
    batches = len(data.train_images) // 64
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=epochs * batches)
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(data.train_images), generator=generator)
        for chosen in order[: batches * 64].split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(data.train_images[chosen]), data.train_labels[chosen]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return accuracy(model, data.test_images, data.test_labels)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of the images that the model classifies as labelled."""
    model.eval()
    batches = zip(images.split(500), labels.split(500), strict=True)
    right = sum(int((model(x).argmax(1) == y).sum().item()) for x, y in batches)
    return right / len(labels)
