"""Language modelling in memory: WikiText-2 as words or as bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.accuracy.seeds import generator
from replfx import ReplfxError

Batch = tuple[Tensor, Tensor]
END = "<eos>"
EVALUATED = 2048
"""Tokens a batch when the loss is taken."""
CURVE_WINDOWS = 128
"""How many windows the metric is taken on while training."""


@dataclass(frozen=True)
class Text:
    """Token ids (N,) of three splits, and how a model is fed with them.

    Attributes:
        train, valid, test: token ids, as small an integer type as holds them.
        vocabulary: how many tokens there are.
        context: tokens that a model sees at a time.
        perplexity: whether the metric is exp(loss) on the test split; else it is the loss, in nats a token, on the
            validation split.
        final_windows: how many windows the metric is taken on at the end; None for all of them.
    """

    train: Tensor
    valid: Tensor
    test: Tensor
    vocabulary: int
    context: int = 128
    perplexity: bool = True
    final_windows: int | None = None
    channels_last: ClassVar[bool] = False

    @property
    def examples(self) -> int:
        """How many windows the training split holds."""
        return len(self.train) // self.context

    def part(self, count: int) -> Text:
        """The same text with the first `count` windows of its training split."""
        return replace(self, train=self.train[: count * self.context + 1])

    def to(self, device: torch.device) -> Text:
        """Move everything to a device."""
        train, valid, test = self.train.to(device), self.valid.to(device), self.test.to(device)
        return replace(self, train=train, valid=valid, test=test)

    def batch(self, seed: int, step: int, size: int) -> Batch:
        """The batch of a step, a function of its arguments alone: windows from anywhere in the text.

        Returns:
            tokens (size, context) int64 and for each the one that follows.

        Raises:
            ReplfxError: the text is shorter than one window.

        """
        if len(self.train) <= self.context:
            raise ReplfxError(f"{len(self.train)} training tokens are no window of {self.context} and what follows")
        starts = torch.randint(len(self.train) - self.context, (size, 1), generator=generator(seed, "windows", step))
        return self._windows(self.train, starts)

    def _windows(self, split: Tensor, starts: Tensor) -> Batch:
        ids = split[(starts + torch.arange(self.context + 1)).to(split.device)].long()
        return ids[:, :-1], ids[:, 1:]

    @staticmethod
    def inputs(batch: Batch) -> Tensor:
        """The tokens."""
        return batch[0]

    @staticmethod
    def loss(model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy a token of a batch."""
        inputs, targets = batch
        return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def metric(self, model: nn.Module, final: bool) -> float:
        """Perplexity on the test split or loss on the validation split; `model` is in evaluation mode.

        The split is cut into windows that do not overlap. While training, evenly spread ones are taken.
        """
        split = self.test if self.perplexity else self.valid
        count = (len(split) - 1) // self.context
        wanted = self.final_windows if final else CURVE_WINDOWS
        kept = torch.arange(count) if wanted is None or wanted >= count else torch.arange(wanted) * count // wanted
        total = torch.zeros((), dtype=torch.float64)
        for starts in (kept[:, None] * self.context).split(max(1, EVALUATED // self.context)):
            total += len(starts) * self.loss(model, self._windows(split, starts)).double().cpu()
        mean = float(total) / len(kept)
        return math.exp(mean) if self.perplexity else mean


def _read(root: Path) -> list[bytes]:
    """The three splits of WikiText-2, from ``wikitext2/train.txt`` … or ``wikitext-2/wiki.train.tokens`` …."""
    splits = ("train", "valid", "test")
    for paths in (
        [root / "wikitext2" / f"{split}.txt" for split in splits],
        [root / "wikitext-2" / f"wiki.{split}.tokens" for split in splits],
    ):
        if all(path.is_file() for path in paths):
            return [path.read_bytes() for path in paths]
    raise ReplfxError(f"no WikiText-2 in {root}: it has neither wikitext2/train.txt nor wikitext-2/wiki.train.tokens")


def wikitext2_bytes(root: Path, context: int = 128) -> Text:
    """WikiText-2 byte by byte; the metric is the validation loss."""
    train, valid, test = (torch.from_numpy(np.frombuffer(text, dtype=np.uint8).copy()) for text in _read(root))
    return Text(train, valid, test, vocabulary=256, context=context, perplexity=False, final_windows=1024)


def wikitext2_bytes_narrow(root: Path) -> Text:
    """The same with half of the context."""
    return wikitext2_bytes(root, context=64)


def python_bytes(root: Path) -> Text:
    """The sources of Python's standard library, byte by byte, split as the demo splits them; `root` is not read."""
    from replfx.demo.text import load

    text = load(None)
    return Text(text.train, text.held_out, text.held_out, 256, context=64, perplexity=False, final_windows=1024)


def wikitext2(root: Path) -> Text:
    """WikiText-2 word by word over its whole vocabulary, each line ended by ``<eos>``; the metric is test perplexity.

    The vocabulary is that of the three splits together, as published: words that the training split lacks were made
    ``<unk>`` in it already.
    """
    splits = [[word for line in text.decode().splitlines() for word in (*line.split(), END)] for text in _read(root)]
    ids: dict[str, int] = {}
    for split in splits:
        for word in split:
            ids.setdefault(word, len(ids))
    train, valid, test = (torch.tensor([ids[word] for word in split], dtype=torch.int32) for split in splits)
    return Text(train, valid, test, vocabulary=len(ids))
