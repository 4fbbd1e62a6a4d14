"""Kinds of block that people write, each a chain of five, and the same by hand with a mean of both neighbours."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

import replfx
from tests.support.models import Mlp

WIDTH = 8


class Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Named(nn.ModuleDict):
    """Goes through what it holds by name."""

    def __init__(self) -> None:
        super().__init__({"up": nn.Linear(WIDTH, 12), "act": nn.ReLU(), "down": nn.Linear(12, WIDTH)})

    def forward(self, x: Tensor) -> Tensor:
        for name, module in self.items():
            x = module(x) if name in self else x
        return x * len(self)


class Listed(nn.ModuleList):
    """Goes through what it holds, and takes the last and a part of it."""

    def __init__(self) -> None:
        super().__init__([nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH)])

    def forward(self, x: Tensor) -> Tensor:
        for module in self:
            x = module(x)
        for module in list(self)[:2]:
            x = module(x)
        return x + self[-1](x) / len(self)


class Children(nn.Module):
    """Goes through its children, whatever these are."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(WIDTH, 12), nn.Tanh(), nn.Linear(12, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for child in self.children():
            x = child(x)
        return x


class Owner(nn.Module):
    """Owns its matrices itself, and reads one of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix, self.shift = nn.Parameter(torch.randn(WIDTH, WIDTH) / 3), nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(x @ self.matrix + self.shift) @ self.matrix


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(WIDTH), nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)[:, None]
        return x + self.attention(h, h, h, need_weights=False)[0][:, 0]


class Recurrent(nn.Module):
    """Its layer keeps a list of its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(WIDTH, WIDTH, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(x[:, None])[0][:, 0]


class Checkpointed(Mlp):
    """Checkpoints a part of itself, whose weight it also looks at outside of that."""

    def forward(self, x: Tensor) -> Tensor:
        def part(h: Tensor) -> Tensor:
            return self.fc2(self.act(self.fc1(h))) * self.fc1.weight.abs().mean()

        h = self.norm(x).to(self.fc1.weight.dtype)
        return x + torch.utils.checkpoint.checkpoint(part, h, use_reentrant=False)


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: Mlp(WIDTH),
    "sequential": lambda: nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)),
    "residual sequential": lambda: Residual(nn.Linear(WIDTH, WIDTH), nn.ReLU()),
    "layer": lambda: nn.Linear(WIDTH, WIDTH),
    "named": Named,
    "listed": Listed,
    "children": Children,
    "owner": Owner,
    "attention": Attention,
    "recurrent": Recurrent,
    "checkpointed": lambda: Checkpointed(WIDTH),
}


def inputs() -> Tensor:
    return torch.randn(4, WIDTH, dtype=torch.float64)


def chain(name: str, length: int = 5) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(BLOCKS[name]() for _ in range(length))).double()


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def by_hand(model: nn.Module, made: nn.Module) -> nn.Module:
    """The untransformed model, with the means of both neighbours' matrices in its replaced blocks."""
    twin = copy.deepcopy(model)
    for r in replfx.plan_of(made).replacements:
        here, before, after = (twin.get_submodule(path) for path in (r.path, r.previous, r.next))
        with torch.no_grad():
            for name, weight in here.named_parameters():
                if weight.dim() > 1:
                    weight.copy_((before.get_parameter(name) + after.get_parameter(name)) / 2)
    return twin
