"""The demo's model: a small causal language model."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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
        self.drop = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Attend to what came before, then pass through the MLP."""
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.drop(self.proj(mixed.transpose(1, 2).reshape(batch, length, width)))
        y: Tensor = x + self.drop(self.mlp(self.norm2(x)))
        return y


class GPT(nn.Module):
    """A small causal language model: (batch, length) token ids to (batch, length, vocabulary) logits.

    Args:
        vocabulary: how many tokens there are.
        context: how many of them the model sees at most.
        width: length of an activation.
        depth: number of blocks.
        heads: heads of an attention; they divide the width.
        dropout: share of an embedding or of a branch that training sets to zero.
        tied: the embedding of the tokens is the head too.
        scaled: initial weights as GPT-2's: of deviation 0.02, or 0.03 below a width of 64, and at the end of each
            branch divided by the root of the number of branches (Radford et al. 2019, section 2.3).
    """

    def __init__(
        self,
        vocabulary: int,
        context: int,
        width: int,
        depth: int,
        heads: int,
        *,
        dropout: float = 0.0,
        tied: bool = False,
        scaled: bool = False,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(0.02 * torch.randn(context, width))
        self.blocks = nn.Sequential(*(CausalBlock(width, heads, dropout) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.drop = nn.Dropout(dropout) if dropout else nn.Identity()
        if tied:
            # At the default deviation of 1 the first logits would be far too large.
            nn.init.normal_(self.tokens.weight, std=0.02)
            self.head.weight = self.tokens.weight
        if scaled:
            self._scale(0.02 if width >= 64 else 0.03)

    def _scale(self, deviation: float) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=deviation)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.tokens.weight, std=0.02)
        with torch.no_grad():
            for name, parameter in self.blocks.named_parameters():
                if name.endswith(("proj.weight", "mlp.2.weight")):
                    parameter.div_((2 * len(self.blocks)) ** 0.5)

    def forward(self, ids: Tensor) -> Tensor:
        """Predict the token after each."""
        x = self.drop(self.tokens(ids) + self.positions[: ids.shape[1]])
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits
