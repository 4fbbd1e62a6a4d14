"""Operators, for the blocks of this benchmark alone, and fusions that were tried; docs/findings.md says how they did.

A variant names them as any other operator, ``narrow+scalar``, and replfx knows those alone that were named. Those whose
names end in ``own`` have weights of their own instead of synthesised ones, as a control for what synthesising earns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import replfx
from benchmarks.accuracy.resnet import BasicBlock
from replfx import Interface, Match, Operator, Site, Source
from replfx.demo.model import CausalBlock
from replfx.fusion.interface import read_slot
from replfx.live import syntheses_of

__all__ = ["FUSION_TRIALS", "TRIALS", "connect_trials", "register_trial"]


class _Tried(Operator):
    """y = `replace(x, θ)`, from the block's activation to the next.

    Attributes:
        fits: the class of block that it is written for.
        own: whether θ are parameters of the operator itself.
    """

    fits: ClassVar[type[nn.Module]]
    own: ClassVar[bool] = False

    def __init__(self, block: nn.Module, interface: Interface, **sources: Source) -> None:
        super().__init__(block, interface)
        self.sources = {source.path: source for source in sources.values()}
        if self.own:
            kept = {path: _part(block.get_parameter(path), source) for path, source in self.sources.items()}
            self.weights = nn.ParameterList(nn.Parameter(weight.detach().clone()) for weight in kept.values())

    @classmethod
    def match(cls, site: Site) -> Match:
        if isinstance(site.block, cls.fits):
            return Match()
        return Match(reason=f"it is no {cls.fits.__name__}, and this operator is a trial")

    def forward(self, theta: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.own:
            # Zero times what is synthesised, so that the coefficients have a gradient, as the library asks.
            theta = {name: w + 0 * theta[name] for name, w in zip(theta, self.weights, strict=True)}
        y = self.replace(read_slot(self.interface.main, args, kwargs), *theta.values())
        return self.interface.result(args, kwargs, y)

    def replace(self, x: Tensor, *theta: Tensor) -> Tensor:
        raise NotImplementedError

    def plain(self, theta: dict[str, Tensor]) -> nn.Module:
        raise replfx.FusionError("a trial cannot be materialized")


def _part(weight: Tensor, source: Source) -> Tensor:
    return weight if source.rows is None else weight[source.rows[0] : source.rows[1]]


class _Branch(_Tried):
    """φ(x + U bn₂(conv₂(relu(bn₁(conv₁(D x)))))), with a share of the inner channels; D pools, U repeats pixels."""

    fits = BasicBlock
    share: ClassVar[float] = 1.0
    pool: ClassVar[int] = 1

    def __init__(self, block: nn.Module, interface: Interface) -> None:
        assert isinstance(block, BasicBlock)
        width = len(block.conv1.weight)
        self.inner = int(width * self.share)
        super().__init__(block, interface, first=Source("conv1.weight", (0, self.inner)), last=Source("conv2.weight"))
        self.bn1, self.bn2 = nn.BatchNorm2d(self.inner), nn.BatchNorm2d(width)

    def replace(self, x: Tensor, *theta: Tensor) -> Tensor:
        first, last = theta
        h = F.avg_pool2d(x, self.pool) if self.pool > 1 else x
        h = torch.relu(self.bn1(F.conv2d(h, first, padding=1)))
        h = self.bn2(F.conv2d(h, last[:, : self.inner], padding=1))
        return torch.relu(x + (F.interpolate(h, scale_factor=self.pool) if self.pool > 1 else h))


class _OneMap(_Tried):
    """φ(x + bn(K ∗ x)), K the last convolution's kernel or the sum of its taps; bn's weight starts at 0.1."""

    fits = BasicBlock
    taps: ClassVar[bool] = True

    def __init__(self, block: nn.Module, interface: Interface) -> None:
        super().__init__(block, interface, last=Source("conv2.weight"))
        self.bn = nn.BatchNorm2d(len(block.get_parameter("conv2.weight")))
        nn.init.constant_(self.bn.weight, 0.1)

    def replace(self, x: Tensor, *theta: Tensor) -> Tensor:
        (kernel,) = theta
        h = F.conv2d(x, kernel, padding=1) if self.taps else F.conv2d(x, kernel.sum((2, 3), keepdim=True))
        return torch.relu(x + self.bn(h))


class _NarrowMlp(_Tried):
    """x + g ⊙ W₂ gelu(W₁ N(x) + b) + c: the MLP of a causal block with half of its hidden channels; g starts at 0.1."""

    fits = CausalBlock

    def __init__(self, block: nn.Module, interface: Interface) -> None:
        bias, last = block.get_parameter("mlp.0.bias"), block.get_parameter("mlp.2.weight")
        self.hidden = len(bias) // 2
        super().__init__(block, interface, first=Source("mlp.0.weight", (0, self.hidden)), last=Source("mlp.2.weight"))
        width = len(last)
        self.norm = nn.LayerNorm(width)
        self.inner = nn.Parameter(bias[: self.hidden].detach().clone())
        self.gain, self.bias = nn.Parameter(torch.full((width,), 0.1)), nn.Parameter(torch.zeros(width))

    def replace(self, x: Tensor, *theta: Tensor) -> Tensor:
        first, last = theta
        h = F.gelu(F.linear(self.norm(x), first, self.inner))
        return x + F.linear(h, self.gain.unsqueeze(1) * last[:, : self.hidden], self.bias)


class _Reused(_Tried):
    """x + W_O (A · W_V N(x)) + c: attention without an MLP, and A the attention map of the block before."""

    fits = CausalBlock

    def __init__(self, block: nn.Module, interface: Interface) -> None:
        assert isinstance(block, CausalBlock)
        self.heads, width = block.heads, len(block.proj.bias)
        rows = (2 * width, 3 * width)
        super().__init__(block, interface, first=Source("qkv.weight", rows), last=Source("proj.weight"))
        self.norm = nn.LayerNorm(width)
        self.inner = nn.Parameter(block.qkv.bias[rows[0] :].detach().clone())
        self.bias = nn.Parameter(block.proj.bias.detach().clone())
        self.heard: list[Tensor] | None = None

    def listen(self, previous: nn.Module) -> None:
        """Keep what the block before projects, (batch, length, 3 width), until it is used."""
        self.heard = heard = list[Tensor]()
        previous.get_submodule("qkv").register_forward_hook(lambda _module, _args, out: heard.append(out))

    def replace(self, x: Tensor, *theta: Tensor) -> Tensor:
        first, last = theta
        batch, length, width = x.shape
        h = F.linear(self.norm(x), first, self.inner)
        # Before it listens it is only rehearsed, for its shapes.
        others = h.repeat(1, 1, 2) if self.heard is None else self.heard.pop()[..., : 2 * width]
        q, k, v = torch.cat([others, h], dim=-1).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + F.linear(mixed.transpose(1, 2).reshape(batch, length, width), last, self.bias)


class _LowRank(replfx.Fusion):
    """θ = a·θ_prev + b·θ_next + U Vᵀ: two scalars and a matrix of rank r of its own a parameter; U starts at zero.

    V's elements start with a variance of one over their number in a column, as in LoRA (arXiv 2106.09685).
    """

    elementwise: ClassVar[bool] = False
    rank: ClassVar[int] = 8

    def __init__(self, shapes: Mapping[str, torch.Size], *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(shapes, dtype=dtype, device=device)

        def parameter(*sizes: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(sizes, dtype=dtype, device=device))

        self.places = {name: index for index, name in enumerate(shapes)}
        self.previous, self.next = parameter(len(shapes)), parameter(len(shapes))
        self.u = nn.ParameterList(parameter(shape[0], self.rank) for shape in shapes.values())
        self.v = nn.ParameterList(parameter(shape[1:].numel(), self.rank) for shape in shapes.values())
        for start in (self.previous, self.next):
            nn.init.constant_(start, 0.5)
        for v in self.v:
            nn.init.normal_(v, std=len(v) ** -0.5)

    def combine(self, name: str, previous: Tensor, next: Tensor) -> Tensor:
        index = self.places[name]
        a, b = (side[index : index + 1] for side in (self.previous, self.next))
        product: Tensor = self.u[index] @ self.v[index].mT
        return a * previous + b * next + product.view(previous.shape)


class _Own(_LowRank):
    """θ is a parameter of its own, which starts as torch's layers do: a control for what synthesising earns."""

    def __init__(self, shapes: Mapping[str, torch.Size], *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(shapes, dtype=dtype, device=device)
        self.own = nn.ParameterList(
            nn.Parameter(torch.empty(shape, dtype=dtype, device=device)) for shape in shapes.values()
        )
        for own in self.own:
            nn.init.kaiming_uniform_(own, a=5**0.5)

    def combine(self, name: str, previous: Tensor, next: Tensor) -> Tensor:
        # Zero times the rest, so that all of it has a gradient, as the library asks.
        theta: Tensor = self.own[self.places[name]] + 0 * super().combine(name, previous, next)
        return theta


class _Copy(replfx.Fusion):
    """θ = θ_prev: plain sharing of the matrices alone, as a control for what mixing earns."""

    def combine(self, name: str, previous: Tensor, next: Tensor) -> Tensor:
        return previous


def _trial(name: str, base: type[_Tried], **attributes: object) -> type[_Tried]:
    return type(f"Tried_{name.replace('-', '_')}", (base,), attributes)


TRIALS = {
    "narrow": _trial("narrow", _Branch, share=0.5),
    "narrow-own": _trial("narrow-own", _Branch, share=0.5, own=True),
    "coarse": _trial("coarse", _Branch, pool=2),
    "point": _trial("point", _OneMap, taps=False),
    "one-map-own": _trial("one-map-own", _OneMap, own=True),
    "narrow-mlp": _trial("narrow-mlp", _NarrowMlp),
    "attention-reused": _trial("attention-reused", _Reused),
}


FUSION_TRIALS: dict[str, type[replfx.Fusion]] = {
    "low-rank": _LowRank,
    "own": _Own,
    "copy": _Copy,
}


def register_trial(name: str) -> None:
    """Let replfx know the operator or fusion of this name, if it is a trial."""
    if name in TRIALS:
        replfx.register_operator(name)(TRIALS[name])
    if name in FUSION_TRIALS:
        replfx.register_fusion(name)(FUSION_TRIALS[name])


def connect_trials(model: nn.Module) -> nn.Module:
    """Let trials hear what the blocks before them compute, where they use that; the model is given on."""
    for layer in syntheses_of(model).values():
        if isinstance(layer.operator, _Reused):
            layer.operator.listen(layer.neighbours[0])
    return model
