"""Small block families: each as a module, and once more by hand, as torch.nn.functional calls on weights.

`run(p, x, o, training, *extra)` is the block itself with the parameters and buffers `p`; running statistics
in `p` are updated in place as the module updates its own. `light` is what stands in its place under the
operator `light`, written from the formulas of that operator's documentation, with what is its own in `p` and
what is synthesised in `w`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Tensors = dict[str, Tensor]
EPS = 1e-5  # of every normalisation; PyTorch's default


@dataclass(frozen=True)
class Options:
    """What a block is drawn with; a family reads those that mean something to it.

    Attributes:
        width: channels of the activation.
        hidden: channels inside of an MLP or a bottleneck.
        heads: of an attention; divides `width`.
        groups: of a convolution; divides `width`.
        kernel: taps of a convolution along each axis, odd.
        stride: of a convolution whose result is scaled up again.
        dims: spatial axes.
        bias: whether maps have one.
        norm: whether an MLP block normalises.
    """

    width: int
    hidden: int = 8
    heads: int = 1
    groups: int = 1
    kernel: int = 3
    stride: int = 1
    dims: int = 2
    bias: bool = True
    norm: bool = True


@dataclass(frozen=True)
class Family:
    """A kind of block.

    Attributes:
        make: the module.
        run: the same by hand.
        shape: an input's shape for a batch of this size.
        light: the light operator by hand; None if there is none for these blocks.
        light_maps: the parameters that it synthesises, in the order of the block's, with the rows it takes.
        mixer: the mixer operator by hand, the block without its MLP; None if there is none. It synthesises what is
            under `attn`.
        residual: whether the block is a sum with its own input, which tells that it keeps a shape.
        spatial: axes after the channels, or 0 where channels are last.
    """

    make: Callable[[Options], nn.Module]
    run: Callable[..., Any]
    shape: Callable[[Options, int], tuple[int, ...]]
    light: Callable[[Tensors, Tensors, Tensor, Options, bool], Tensor] | None = None
    light_maps: Callable[[Options], dict[str, slice]] | None = None
    mixer: Callable[[Tensors, Tensor, Options, bool], Tensor] | None = None
    residual: bool = True
    spatial: int = 0


ALL = slice(None)


def _linear(p: Tensors, name: str, x: Tensor) -> Tensor:
    y = x @ p[f"{name}.weight"].T
    return y + p[f"{name}.bias"] if f"{name}.bias" in p else y


def _layer_norm(p: Tensors, name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt() * p[f"{name}.weight"] + p[f"{name}.bias"]


def _batch_norm(p: Tensors, name: str, x: Tensor, training: bool) -> Tensor:
    weight, bias = p[f"{name}.weight"], p[f"{name}.bias"]
    if training:
        p[f"{name}.num_batches_tracked"].add_(1)
    return F.batch_norm(
        x, p[f"{name}.running_mean"], p[f"{name}.running_var"], weight, bias, training, momentum=0.1, eps=EPS
    )


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None, **settings: Any) -> Tensor:
    return {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[x.dim()](x, weight, bias, **settings)


def _attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Softmax attention written out; also the weights."""
    b, t, d = q.shape
    q, k, v = (z.view(b, t, heads, d // heads).transpose(1, 2) for z in (q, k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(d // heads)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    weights = scores.softmax(-1)
    return (weights @ v).transpose(1, 2).reshape(b, t, d), weights


# ---- transformer blocks


class FusedAttention(nn.Module):
    def __init__(self, o: Options) -> None:
        super().__init__()
        self.heads = o.heads
        self.qkv = nn.Linear(o.width, 3 * o.width, bias=o.bias)
        self.proj = nn.Linear(o.width, o.width, bias=o.bias)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, d))


class SeparateAttention(nn.Module):
    def __init__(self, o: Options) -> None:
        super().__init__()
        self.heads = o.heads
        self.q, self.k, self.v, self.o = (nn.Linear(o.width, o.width, bias=o.bias) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = (m(x).view(b, t, self.heads, -1).transpose(1, 2) for m in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, d))


class Mlp(nn.Module):
    def __init__(self, o: Options) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(o.width, o.hidden, bias=o.bias), nn.Linear(o.hidden, o.width, bias=o.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class TransformerBlock(nn.Module):
    """Pre-norm; attention with one map for queries, keys and values, or with one each (then causal)."""

    def __init__(self, o: Options, attention: type[nn.Module]) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(o.width), attention(o)
        self.norm2, self.mlp = nn.LayerNorm(o.width), Mlp(o)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def _mix_fused(p: Tensors, x: Tensor, o: Options, training: bool) -> Tensor:
    q, k, v = _linear(p, "attn.qkv", _layer_norm(p, "norm1", x)).chunk(3, -1)
    return x + _linear(p, "attn.proj", _attend(q, k, v, o.heads)[0])


def _mix_separate(p: Tensors, x: Tensor, o: Options, training: bool) -> Tensor:
    q, k, v = (_linear(p, f"attn.{name}", _layer_norm(p, "norm1", x)) for name in "qkv")
    causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    return x + _linear(p, "attn.o", _attend(q, k, v, o.heads, causal)[0])


def _run_fused(p: Tensors, x: Tensor, o: Options, training: bool) -> Tensor:
    return _run_mlp_half(p, _mix_fused(p, x, o, training))


def _run_separate(p: Tensors, x: Tensor, o: Options, training: bool) -> Tensor:
    return _run_mlp_half(p, _mix_separate(p, x, o, training))


def _run_mlp_half(p: Tensors, x: Tensor) -> Tensor:
    return x + _linear(p, "mlp.fc2", F.gelu(_linear(p, "mlp.fc1", _layer_norm(p, "norm2", x))))


def _light_normed_first(w: Tensors, p: Tensors, x: Tensor, o: Options, training: bool) -> Tensor:
    """y = x + g ⊙ (W_out W_in N(x)) + c."""
    inward, outward = w.values()
    h = _layer_norm(p, "norm", x) if "norm.weight" in p else x
    return x + p["gain"] * (h @ inward.T @ outward.T) + p["shift"]


# ---- a block with an argument besides its activation, and a tuple for a result


class MaskedBlock(nn.Module):
    def __init__(self, o: Options) -> None:
        super().__init__()
        self.heads, self.norm = o.heads, nn.LayerNorm(o.width)
        self.q, self.k, self.v, self.o = (nn.Linear(o.width, o.width, bias=o.bias) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        b, t, d = x.shape
        h = self.norm(x)
        q, k, v = (m(h).view(b, t, self.heads, -1).transpose(1, 2) for m in (self.q, self.k, self.v))
        weights = (q @ k.transpose(-1, -2) / math.sqrt(d // self.heads)).masked_fill(~mask, -math.inf).softmax(-1)
        x = x + self.o((weights @ v).transpose(1, 2).reshape(b, t, d))
        return x, weights.square().sum((-1, -2))


def _run_masked(p: Tensors, x: Tensor, o: Options, training: bool, mask: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = (_linear(p, name, _layer_norm(p, "norm", x)) for name in "qkv")
    attended, weights = _attend(q, k, v, o.heads, mask)
    return x + _linear(p, "o", attended), weights.square().sum((-1, -2))


# ---- a residual MLP


class MlpBlock(nn.Module):
    def __init__(self, o: Options) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(o.width) if o.norm else nn.Identity()
        self.fc1, self.fc2 = nn.Linear(o.width, o.hidden, bias=o.bias), nn.Linear(o.hidden, o.width, bias=o.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(torch.tanh(self.fc1(self.norm(x))))


def _run_mlp_block(p: Tensors, x: Tensor, o: Options, training: bool) -> Tensor:
    h = _layer_norm(p, "norm", x) if o.norm else x
    return x + _linear(p, "fc2", torch.tanh(_linear(p, "fc1", h)))


# ---- convolution blocks


def _conv_of(o: Options) -> type[nn.Module]:
    return (nn.Conv1d, nn.Conv2d, nn.Conv3d)[o.dims - 1]


def _bn_of(o: Options) -> type[nn.Module]:
    return (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[o.dims - 1]


class BasicBlock(nn.Module):
    """Two convolutions of two or three spatial axes."""

    def __init__(self, o: Options) -> None:
        super().__init__()
        conv, d = _conv_of(o), o.width
        settings = {"padding": o.kernel // 2, "groups": o.groups, "bias": o.bias}
        self.conv1, self.bn1 = conv(d, d, o.kernel, **settings), _bn_of(o)(d)
        self.conv2, self.bn2 = conv(d, d, o.kernel, **settings), _bn_of(o)(d)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x + self.bn2(self.conv2(self.act(self.bn1(self.conv1(x))))))


def _run_basic(p: Tensors, x: Tensor, o: Options, training: bool) -> Tensor:
    settings = {"padding": o.kernel // 2, "groups": o.groups}
    h = F.relu(_batch_norm(p, "bn1", _conv(x, p["conv1.weight"], p.get("conv1.bias"), **settings), training))
    h = _batch_norm(p, "bn2", _conv(h, p["conv2.weight"], p.get("conv2.bias"), **settings), training)
    return F.relu(x + h)


def _light_basic(w: Tensors, p: Tensors, x: Tensor, o: Options, training: bool) -> Tensor:
    """y = φ(x + N(K ∗ x)), the last convolution; its bias is its own."""
    (kernel,) = w.values()
    return F.relu(x + _batch_norm(p, "norm", _conv(x, kernel, p.get("map.bias"), padding=o.kernel // 2), training))


class Bottleneck(nn.Module):
    def __init__(self, o: Options) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(o.width, o.hidden, 1, bias=False), nn.BatchNorm2d(o.hidden)
        self.conv2 = nn.Conv2d(o.hidden, o.hidden, o.kernel, padding=o.kernel // 2, groups=o.groups, bias=False)
        self.bn2 = nn.BatchNorm2d(o.hidden)
        self.conv3, self.bn3 = nn.Conv2d(o.hidden, o.width, 1, bias=False), nn.BatchNorm2d(o.width)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.conv1(x)))
        h = F.relu(self.bn2(self.conv2(h)))
        return F.relu(self.bn3(self.conv3(h)) + x)


def _run_bottleneck(p: Tensors, x: Tensor, o: Options, training: bool) -> Tensor:
    h = F.relu(_batch_norm(p, "bn1", F.conv2d(x, p["conv1.weight"]), training))
    h = F.conv2d(h, p["conv2.weight"], padding=o.kernel // 2, groups=o.groups)
    h = F.relu(_batch_norm(p, "bn2", h, training))
    return F.relu(x + _batch_norm(p, "bn3", F.conv2d(h, p["conv3.weight"]), training))


def _light_bottleneck(w: Tensors, p: Tensors, x: Tensor, o: Options, training: bool) -> Tensor:
    """y = φ(x + N(W_out W_in x)), N the last normalisation."""
    inward, outward = w.values()
    return F.relu(x + _batch_norm(p, "norm", F.conv2d(F.conv2d(x, inward), outward), training))


class ConvNeXtBlock(nn.Module):
    def __init__(self, o: Options) -> None:
        super().__init__()
        d = o.width
        self.dw = nn.Conv2d(d, d, o.kernel, padding=o.kernel // 2, groups=d, bias=o.bias)
        self.norm = nn.LayerNorm(d)
        self.fc1, self.fc2 = nn.Linear(d, o.hidden), nn.Linear(o.hidden, d)
        self.gamma = nn.Parameter(torch.full((d,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.dw(x).permute(0, 2, 3, 1))
        h = self.gamma * self.fc2(F.gelu(self.fc1(h)))
        return x + h.permute(0, 3, 1, 2)


def _run_convnext(p: Tensors, x: Tensor, o: Options, training: bool) -> Tensor:
    h = F.conv2d(x, p["dw.weight"], p.get("dw.bias"), padding=o.kernel // 2, groups=o.width).movedim(1, -1)
    h = _linear(p, "fc2", F.gelu(_linear(p, "fc1", _layer_norm(p, "norm", h))))
    return x + (p["gamma"] * h).movedim(-1, 1)


def _light_convnext(w: Tensors, p: Tensors, x: Tensor, o: Options, training: bool) -> Tensor:
    """y = x + N(D ∗ x); the kernel's bias is its own."""
    (kernel,) = w.values()
    h = F.conv2d(x, kernel, p.get("map.bias"), padding=o.kernel // 2, groups=o.width)
    return x + _layer_norm(p, "norm", h.movedim(1, -1)).movedim(-1, 1)


class GroupedBlock(nn.Module):
    """No residual: a grouped convolution with a stride, and up again to the size that came in."""

    def __init__(self, o: Options) -> None:
        super().__init__()
        self.stride = o.stride
        self.conv = nn.Conv2d(
            o.width, o.width, o.kernel, stride=o.stride, padding=o.kernel // 2, groups=o.groups, bias=o.bias
        )
        self.norm = nn.GroupNorm(o.groups, o.width)

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(torch.tanh(self.norm(self.conv(x))), scale_factor=float(self.stride), mode="nearest")


def _run_grouped(p: Tensors, x: Tensor, o: Options, training: bool) -> Tensor:
    settings = {"stride": o.stride, "padding": o.kernel // 2, "groups": o.groups}
    h = _conv(x, p["conv.weight"], p.get("conv.bias"), **settings)
    h = torch.tanh(F.group_norm(h, o.groups, p["norm.weight"], p["norm.bias"], EPS))
    return h.repeat_interleave(o.stride, 2).repeat_interleave(o.stride, 3)


# ---- all of them


def _tokens(o: Options, batch: int) -> tuple[int, ...]:
    return batch, 5, o.width


def _image(o: Options, batch: int) -> tuple[int, ...]:
    return (batch, o.width, *(4, 6, 3)[: o.dims])


FAMILIES: dict[str, Family] = {
    "transformer": Family(
        lambda o: TransformerBlock(o, FusedAttention),
        _run_fused,
        _tokens,
        _light_normed_first,
        lambda o: {"attn.qkv.weight": slice(2 * o.width, 3 * o.width), "attn.proj.weight": ALL},
        _mix_fused,
    ),
    "transformer_separate": Family(
        lambda o: TransformerBlock(o, SeparateAttention),
        _run_separate,
        _tokens,
        _light_normed_first,
        lambda o: {"attn.v.weight": ALL, "attn.o.weight": ALL},
        _mix_separate,
    ),
    "mlp": Family(
        MlpBlock, _run_mlp_block, _tokens, _light_normed_first, lambda o: {"fc1.weight": ALL, "fc2.weight": ALL}
    ),
    "masked": Family(MaskedBlock, _run_masked, _tokens),
    "basic": Family(BasicBlock, _run_basic, _image, _light_basic, lambda o: {"conv2.weight": ALL}, spatial=2),
    "basic3d": Family(BasicBlock, _run_basic, _image, _light_basic, lambda o: {"conv2.weight": ALL}, spatial=3),
    "bottleneck": Family(
        Bottleneck,
        _run_bottleneck,
        _image,
        _light_bottleneck,
        lambda o: {"conv1.weight": ALL, "conv3.weight": ALL},
        spatial=2,
    ),
    "convnext": Family(ConvNeXtBlock, _run_convnext, _image, _light_convnext, lambda o: {"dw.weight": ALL}, spatial=2),
    "grouped": Family(GroupedBlock, _run_grouped, _image, residual=False, spatial=2),
}
