"""Small models, one for each way in which blocks are put together; written by hand and without the library."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.models import CausalBlock, Mlp, Row

__all__ = ["CONTAINERS", "Container"]

D = 8  # width of what has only one


@dataclass(frozen=True)
class Container:
    """A model, how to feed it, and what is to become of it.

    Attributes:
        build: makes the model.
        inputs: makes example inputs, as `replfx.transform` takes them.
        replaced: the blocks that every=2 replaces; none where it refuses.
        refusal: what the refusal must say.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    replaced: tuple[str, ...] = ()
    refusal: str = ""


CONTAINERS: dict[str, Container] = {}


def container(
    inputs: Callable[[], Any], *replaced: str, refusal: str = ""
) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Put a model into the table, under the name of its class."""

    def put(kind: type[nn.Module]) -> type[nn.Module]:
        CONTAINERS[kind.__name__] = Container(kind, inputs, replaced, refusal)
        return kind

    return put


def image() -> Tensor:
    return torch.randn(2, 3, 8, 8)


def sequence() -> Tensor:
    return torch.randn(2, 5, D)


# ---- densely connected


class DenseLayer(nn.Module):
    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(width), nn.Conv2d(width, growth, 3, padding=1, bias=False)

    def forward(self, seen: list[Tensor]) -> Tensor:
        return self.conv(self.norm(torch.cat(seen, 1)).relu())


@container(image, "dense.1", "dense.3")
class DenseNet(nn.Module):
    """Each layer reads what all before it gave."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.dense = nn.ModuleList(DenseLayer(4 + 3 * i, 3) for i in range(5))
        self.head = nn.Linear(4 + 3 * 5, 5)

    def forward(self, x: Tensor) -> Tensor:
        seen = [self.stem(x)]
        for layer in self.dense:
            seen.append(layer(seen))
        return self.head(torch.cat(seen, 1).mean((2, 3)))


class GrowingLayer(DenseLayer):
    """A dense layer that hands on what it was given."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(self.norm(x).relu())], 1)


@container(image, "dense.1", "dense.3")
class GrowingNet(nn.Module):
    """The concatenation is inside of the layers, so all of them change the shape."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.dense = nn.Sequential(*(GrowingLayer(4 + 3 * i, 3) for i in range(5)))
        self.head = nn.Linear(4 + 3 * 5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dense(self.stem(x)).mean((2, 3)))


# ---- parallel branches


class Conv(nn.Module):
    def __init__(self, width_in: int, width: int, kernel: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width_in, width, kernel, padding=kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).relu()


class InceptionBlock(nn.Module):
    def __init__(self, width_in: int, widths: tuple[int, int, int]) -> None:
        super().__init__()
        a, b, c = widths
        self.point = Conv(width_in, a, 1)
        self.wide = nn.Sequential(Conv(width_in, b, 1), Conv(b, b, 3))
        self.pooled = nn.Sequential(nn.MaxPool2d(3, 1, 1), Conv(width_in, c, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.point(x), self.wide(x), self.pooled(x)], 1)


@container(image, "blocks.1", "blocks.3")
class Inception(nn.Module):
    """Blocks of three branches, of different widths; the first one changes the shape."""

    def __init__(self) -> None:
        super().__init__()
        widths = [(2, 4, 2), (2, 4, 2), (3, 3, 2), (2, 4, 2), (4, 2, 2), (2, 4, 2)]
        before = [3, *map(sum, widths)]
        self.blocks = nn.Sequential(*(InceptionBlock(i, w) for i, w in zip(before, widths, strict=False)))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x).mean((2, 3)))


@container(lambda: (image(), torch.randint(0, 11, (2, 6))), "image.1", "image.3", "text.1", "text.3")
class TwoTowers(nn.Module):
    """CLIP: two chains that never meet but in the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.tokens = nn.Conv2d(3, D, 4, 4), nn.Embedding(11, D)
        self.image = nn.ModuleList(CausalBlock(D, 2) for _ in range(5))
        self.text = nn.ModuleList(CausalBlock(D, 2) for _ in range(5))

    def forward(self, image: Tensor, ids: Tensor) -> Tensor:
        x, y = self.patches(image).flatten(2).mT, self.tokens(ids)
        for one, other in zip(self.image, self.text, strict=True):
            x, y = one(x), other(y)
        return x.mean(1) @ y.mean(1).mT


# ---- two inputs


class Cell(nn.Module):
    """NASNet: works on what the two cells before gave."""

    def __init__(self, before: int, width_in: int, width: int) -> None:
        super().__init__()
        self.left, self.right = Conv(before, width, 1), Conv(width_in, width, 1)
        self.mix, self.other = Conv(width, width, 3), Conv(width, width, 5)

    def forward(self, before: Tensor, x: Tensor) -> Tensor:
        h, y = self.left(before), self.right(x)
        return torch.cat([self.mix(y) + h, self.other(h) + y], 1)


@container(image, "cells.1", "cells.3")
class NasNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = Conv(3, 8)
        self.cells = nn.ModuleList(Cell(8, 8, 4) for _ in range(5))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        before = x = self.stem(x)
        for cell in self.cells:
            before, x = x, cell(before, x)
        return self.head(x.mean((2, 3)))


# ---- stages


class Merging(nn.Module):
    """Swin: four neighbouring patches become one of twice the width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.reduction = nn.LayerNorm(4 * width), nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        parts = [x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)]
        return self.reduction(self.norm(torch.cat(parts, -1)))


class Windowed(nn.Module):
    """Attention in windows of a side, shifted by half of one or not, and an MLP."""

    def __init__(self, width: int, side: int, shift: int) -> None:
        super().__init__()
        self.side, self.shift = side, shift
        self.norm, self.qkv, self.proj = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.table = nn.Parameter(0.1 * torch.randn((2 * side - 1) ** 2, 1))
        place = torch.stack(torch.meshgrid(*[torch.arange(side)] * 2, indexing="ij")).flatten(1)
        offset = place[:, :, None] - place[:, None, :] + side - 1
        self.register_buffer("index", offset[0] * (2 * side - 1) + offset[1])
        self.mlp = Mlp(width, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        (b, h, w, d), s = x.shape, self.side
        y = torch.roll(self.norm(x), (-self.shift, -self.shift), (1, 2)) if self.shift else self.norm(x)
        y = y.view(b, h // s, s, w // s, s, d).transpose(2, 3).reshape(-1, s * s, d)
        q, k, v = self.qkv(y).chunk(3, -1)
        weights = (q @ k.mT * d**-0.5 + self.table[self.index].squeeze(-1)).softmax(-1)
        y = (weights @ v).view(b, h // s, w // s, s, s, d).transpose(2, 3).reshape(b, h, w, d)
        y = torch.roll(self.proj(y), (self.shift, self.shift), (1, 2)) if self.shift else self.proj(y)
        return self.mlp(x + y)


@container(image, "stages.0.1", "stages.1.1", "stages.1.3")
class Swin(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 6, 1)
        self.stages = nn.ModuleList(
            nn.ModuleList(Windowed(6 * 2**i, side, side // 2 * (j % 2)) for j in range(depth))
            for i, (depth, side) in enumerate([(2, 4), (5, 2)])
        )
        self.merge = Merging(6)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).permute(0, 2, 3, 1)
        for block in self.stages[0]:
            x = block(x)
        x = self.merge(x)
        for block in self.stages[1]:
            x = block(x)
        return self.head(x.mean((1, 2)))


class Residual(nn.Module):
    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.one, self.two = Conv(width_in, width), Conv(width, width)
        self.skip = nn.Identity() if width_in == width else nn.Conv2d(width_in, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x) + self.two(self.one(x))


def three(width_in: int, width: int) -> nn.Sequential:
    return nn.Sequential(Residual(width_in, width), Residual(width, width), Residual(width, width))


@container(image, "down.0.1", "down.1.1", "middle.0", "middle.2", "up.1.1", "up.0.1")
class UNet(nn.Module):
    """What the way down gives at each size is read on the way up; one chain, counted anew where widths change."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [(3, 4), (4, 8)]
        self.down = nn.ModuleList(three(i, o) for i, o in sizes)
        self.middle = three(8, 8)
        self.up = nn.ModuleList(three(i, o) for i, o in [(8, 4), (16, 4)])
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for stage in self.down:
            x = stage(x)
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = self.middle(x)
        for stage, skip in zip(reversed(self.up), reversed(skips), strict=True):
            x = F.interpolate(x, scale_factor=2)
            x = stage(torch.cat([x, skip], 1))
        return self.head(x)


# ---- mixture of experts


class Experts(nn.Module):
    """Each token goes through the k experts that its router likes best: which rows, is known when it runs."""

    def __init__(self, width: int, count: int, k: int) -> None:
        super().__init__()
        self.k, self.norm, self.router = k, nn.LayerNorm(width), nn.Linear(width, count)
        self.experts = nn.ModuleList(Mlp(width, 2 * width) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        flat = self.norm(x).flatten(0, -2)
        weights, chosen = self.router(flat).softmax(-1).topk(self.k)
        mixed = torch.zeros_like(flat)
        for index, expert in enumerate(self.experts):
            rows, slots = torch.where(chosen == index)
            if len(rows):
                mixed = mixed.index_add(0, rows, expert(flat[rows]) * weights[rows, slots, None])
        return x + mixed.view_as(x)


@container(lambda: torch.randn(4, 40, D), "blocks.1", "blocks.3")
class MixtureOfExperts(Row):
    def __init__(self) -> None:
        super().__init__(*(Experts(D, 3, 2) for _ in range(5)))


# ---- recurrent


@container(sequence, refusal="`rnn`: its 4 layers run in one call of LSTM: none can be taken out")
class LayeredLstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(D, D, num_layers=4, batch_first=True), nn.Linear(D, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


@container(sequence, refusal="`rnn`: its 2 layers run in one call of GRU: none can be taken out")
class LayeredGru(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(D, D, num_layers=2, batch_first=True, bidirectional=True), nn.Linear(2 * D, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


@container(sequence, "layers.1", "layers.3")
class StackedLstm(nn.Module):
    """Layers of their own, one after the other, as a user writes them who wants something between."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.LSTM(D, D, batch_first=True) for _ in range(5))
        self.head = nn.Linear(D, 5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.dropout(layer(x)[0], 0.1, self.training)
        return self.head(x)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.norm, self.rnn = nn.LayerNorm(D), kind(D, D, batch_first=True)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        y, state = self.rnn(self.norm(x), state)
        return x + y, state


@container(sequence, "layers.1", "layers.3")
class ResidualGru(nn.Module):
    """Blocks around one layer each; each begins with the state that the one before ended with."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Recurrent(nn.GRU) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for layer in self.layers:
            x, state = layer(x, state)
        return x


class Skipping(nn.Module):
    """Gives what goes on and what is added up aside; the last one gives nothing on."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        self.mlp, self.skip = Mlp(D), nn.Linear(D, D)
        self.last = last

    def forward(self, x: Tensor) -> tuple[Tensor | None, Tensor]:
        y = self.mlp(x)
        return None if self.last else x + y, self.skip(y)


@container(sequence, "layers.1", "layers.3")
class SumOfSkips(nn.Module):
    """As in WaveNet and Conv-TasNet: the output is what all layers give aside."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Skipping(i == 4) for i in range(5))

    def forward(self, x: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        for layer in self.layers:
            x, skip = layer(x)
            total = total + skip
        return total


# ---- how blocks are called


class Steered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.gate = Mlp(D), nn.Linear(D, D)

    def forward(
        self, x: Tensor, *, scale: float = 1.0, mask: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        y = self.gate(self.mlp(x)) * scale
        y = y if mask is None else y * mask
        return x + (y if bias is None else y + bias)


@container(sequence, "blocks.1", "blocks.3")
class Keywords(nn.Module):
    """The same blocks, each called in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Steered() for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        mask = x.sigmoid()
        x = self.blocks[0](x)
        x = self.blocks[1](x, mask=mask)
        x = self.blocks[2](x, scale=0.5)
        x = self.blocks[3](x=x, bias=mask, scale=2.0)
        return self.blocks[4](x, mask=mask, bias=x.mean())


class Masked(Mlp):
    def forward(self, x: Tensor, *, mask: Tensor) -> Tensor:
        return super().forward(x) * mask


class Biased(Mlp):
    def forward(self, x: Tensor, *, bias: Tensor) -> Tensor:
        return super().forward(x) + bias


@container(sequence, "blocks.2", "blocks.3")
class Signatures(nn.Module):
    """Two kinds of blocks in turn, which ask for other keywords: each kind is a chain of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(kind(D) for _ in range(3) for kind in (Masked, Biased))

    def forward(self, x: Tensor) -> Tensor:
        mask = x.sigmoid()
        for masked, biased in zip(self.blocks[::2], self.blocks[1::2], strict=True):
            x = biased(masked(x, mask=mask), bias=mask)
        return x


@container(sequence, "blocks.2", "blocks.3")
class AsksForTheClass(Signatures):
    """A replaced block is of its class."""

    def forward(self, x: Tensor) -> Tensor:
        mask = x.sigmoid()
        for block in self.blocks:
            x = block(x, mask=mask) if isinstance(block, Masked) else block(x, bias=mask)
        return x


class DecoderBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(D), nn.MultiheadAttention(D, 2, batch_first=True)
        self.norm2, self.cross = nn.LayerNorm(D), nn.MultiheadAttention(D, 2, batch_first=True)
        self.mlp = Mlp(D)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.attn(h, h, h, need_weights=False)[0]
        x = x + self.cross(self.norm2(x), memory, memory, need_weights=False)[0]
        return self.mlp(x)


@container(lambda: (sequence(), torch.randn(2, 3, D)), "encoder.1", "encoder.3", "decoder.1", "decoder.3")
class EncoderDecoder(nn.Module):
    """All blocks of the decoder read what the encoder gave."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(CausalBlock(D, 2) for _ in range(5))
        self.decoder = nn.ModuleList(DecoderBlock() for _ in range(5))

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        for block in self.encoder:
            source = block(source)
        for block in self.decoder:
            target = block(target, memory=source)
        return target


# ---- tied


@container(sequence, refusal="`layer`: it is called 5 times in one forward pass")
class Albert(nn.Module):
    """One layer, five times."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = CausalBlock(D, 2)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(5):
            x = self.layer(x)
        return x


@container(sequence, refusal="is shared with")
class TiedLayers(Row):
    """Five layers with one set of weights."""

    def __init__(self) -> None:
        super().__init__(*(Mlp(D) for _ in range(5)))
        for layer in self.blocks:
            layer.fc1.weight, layer.fc2.weight = self.blocks[0].fc1.weight, self.blocks[0].fc2.weight
