"""Models for tensor parallelism: small, of operations that DTensors have."""

import math
from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from tests.reference import Options
from tests.reference.blocks import TransformerBlock
from tests.support.models import Row

WIDTH, HEADS = 8, 4
OPTIONS = Options(WIDTH, hidden=12, heads=HEADS)


class Attention(nn.Module):
    """With as many heads as its projections give it, so that they can be shared out."""

    def __init__(self, o: Options) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        # DTensors have no fused kernel here.
        weights = (q @ k.transpose(-1, -2) / math.sqrt(WIDTH // HEADS)).softmax(-1)
        return self.o((weights @ v).transpose(1, 2).flatten(2))


class FusedAttention(nn.Module):
    """With queries, keys and values from one matrix, of which the light operator reads a third."""

    def __init__(self, o: Options) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        weights = (q @ k.transpose(-1, -2) / math.sqrt(WIDTH // HEADS)).softmax(-1)
        return self.o((weights @ v).transpose(1, 2).flatten(2))


class ConvBlock(nn.Module):
    """Without a normalisation: of those of images, DTensors have none that works backward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(WIDTH, WIDTH, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.conv2(F.relu(self.conv1(x))))


def stack(block: Callable[[], nn.Module]) -> Row:
    return Row(*(block() for _ in range(5)))


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "transformer": lambda: TransformerBlock(OPTIONS, Attention),
    "fused": lambda: TransformerBlock(OPTIONS, FusedAttention),
    "cnn": ConvBlock,
}
