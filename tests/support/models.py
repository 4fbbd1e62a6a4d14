"""Small models that the tests share, written by hand and without the library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.reference import Stack


class Mlp(nn.Module):
    """A pre-norm residual block: x + fc2(gelu(fc1(norm(x))))."""

    def __init__(self, width: int = 8, hidden: int = 16, *, bias: bool = True, norm: Any = None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width) if norm is None else norm
        self.fc1 = nn.Linear(width, hidden, bias=bias)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(self.act(self.fc1(self.norm(x))))


class Plain(nn.Module):
    """A block that is not residual: relu(linear(x))."""

    def __init__(self, width: int = 8, out: int | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(width, out or width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).relu()


class Row(Stack):
    """Blocks in a list, called one after the other."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__(blocks)


class Tower(nn.Module):
    """A stem, a chain of blocks, a head."""

    def __init__(self, *blocks: nn.Module, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Linear(4, width)
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)))


def tower(length: int = 5) -> Tower:
    """A tower of residual blocks that takes `(batch, 4)`."""
    return Tower(*(Mlp() for _ in range(length)))


class Residual(nn.Module):
    """The smallest residual block: x + relu(fc(x)), of width 4."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc(x).relu()


class ConvBlock(nn.Module):
    """A basic residual block: relu(x + bn(conv(relu(bn(conv(x))))))."""

    def __init__(self, width: int = 6, width_in: int | None = None, stride: int = 1) -> None:
        super().__init__()
        width_in = width_in or width
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module | None = None
        if stride != 1 or width_in != width:
            self.shortcut = nn.Conv2d(width_in, width, 1, stride)

    def branch(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.branch(x) + (x if self.shortcut is None else self.shortcut(x)))


class ConvNet(nn.Module):
    """Stages of basic blocks; takes `(batch, channels, s, s)`."""

    def __init__(
        self, depth: int = 4, widths: tuple[int, ...] = (6, 8), *, channels: int = 3, classes: int = 3
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, widths[0], 3, padding=1)
        stages = []
        width_in = widths[0]
        for index, width in enumerate(widths):
            first = ConvBlock(width, width_in, 1 if index == 0 else 2)
            stages.append(nn.Sequential(first, *(ConvBlock(width) for _ in range(depth - 1))))
            width_in = width
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(width_in, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(x)).mean((2, 3)))


class CausalBlock(nn.Module):
    """A pre-norm transformer block with causal attention."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.drop(self.proj(mixed.transpose(1, 2).reshape(batch, length, width)))
        return x + self.drop(self.mlp(self.norm2(x)))


class GPT(nn.Module):
    """A causal language model: (batch, length) token ids to (batch, length, vocabulary) logits."""

    def __init__(
        self,
        vocabulary: int = 31,
        context: int = 16,
        width: int = 16,
        depth: int = 6,
        heads: int = 2,
        dropout: float = 0.0,
        *,
        tied: bool = False,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(0.02 * torch.randn(context, width))
        self.blocks = nn.ModuleList(CausalBlock(width, heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Stop(nn.Module):
    """Runs a model, and stops symbolic tracing."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] < 0:
            raise AssertionError
        return self.model(x)


class WithExtras(nn.Module):
    """Blocks that share a mask and a keyword, and give a tuple."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor, mask: Tensor, *, scale: Tensor, flag: bool = False) -> tuple[Tensor, Tensor]:
            return x + self.linear(x) * mask * scale, mask

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(self.Block() for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        mask = x.sigmoid()
        scale = torch.full((1,), 0.5)
        for block in self.blocks:
            x, mask = block(x, mask, scale=scale, flag=True)
        return x * mask


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.linear(self.norm(x)))


class Net(Row):
    def __init__(self, block: Callable[[], nn.Module] = Layer) -> None:
        super().__init__(*(block() for _ in range(5)))
        self.head = nn.Linear(8, 3)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(super().forward(x)) * self.scale


class Products(nn.Module):
    """`x = relu(x @ w)` for each of some weights: its blocks are no modules."""

    def __init__(self, depth: int = 5, width: int = 4) -> None:
        super().__init__()
        self.w = nn.ParameterList(torch.randn(width, width) / width**0.5 for _ in range(depth))

    def forward(self, x: Tensor) -> Any:
        for w in self.w:
            x = torch.relu(x @ w)
        return x


class Checkpointed(nn.Module):
    """Runs a part of a model again in the backward pass."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *args: Tensor) -> object:
        return checkpoint(self.block, *args, use_reentrant=False)
