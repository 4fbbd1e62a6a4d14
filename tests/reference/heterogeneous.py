"""Stacks whose blocks differ in shape, and what they compute once some blocks are replaced.

The reference of a transformed stack is the untransformed one, run with parameters that are made here: fused
from what the neighbours have under the same name, which `tests.reference.alignment` brings into shape.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from tests.reference.alignment import align, split_gains
from tests.reference.blocks import (
    ALL,
    FAMILIES,
    FusedAttention,
    Mlp,
    Options,
    SeparateAttention,
    Tensors,
    TransformerBlock,
    _batch_norm,
)
from tests.reference.model import _fuse, _scaled, _under

SIDE = 7  # of the image that windows of attention are cut from


@dataclass(frozen=True)
class Step:
    """A block and what comes before or after it; each kind of stack reads those that mean something to it.

    Attributes:
        before: channels that come in.
        width: channels that go out.
        hidden, heads, groups, kernel, stride, dilation: as in `Options`.
        window: side of an attention's window.
        pool: whether a max-pooling follows.
        between: a stack of blocks that keep their width maps `before` to `width` ahead of the block; else the
            two are equal.
    """

    before: int
    width: int
    hidden: int = 8
    heads: int = 1
    groups: int = 1
    kernel: int = 3
    stride: int = 1
    dilation: int = 1
    window: int = 3
    pool: bool = False


@dataclass(frozen=True)
class Spot:
    """A block of a stack.

    Attributes:
        path: as the library names it.
        members: the modules that make it up.
        turn: it changes the shape of its activation.
        between: something lies between it and the block before.
        like: equal for blocks of one make.
        window: it is layers in a row, and its parameters' names begin with a position.
    """

    path: str
    members: tuple[str, ...]
    turn: bool
    between: bool
    like: tuple[object, ...]
    window: bool = False

    def name(self, inside: str) -> str:
        """The name in the model of a parameter with this name in the block."""
        if not self.window:
            return f"{self.members[0]}.{inside}"
        index, _, rest = inside.partition(".")
        return f"{self.members[int(index)]}.{rest}"


# ---- convolution blocks with a shortcut where the shape changes


class Unit(nn.Module):
    def __init__(self, s: Step) -> None:
        super().__init__()
        d = s.width
        settings = {"groups": s.groups, "bias": False, "dilation": s.dilation, "padding": s.dilation * (s.kernel // 2)}
        self.conv1, self.bn1 = nn.Conv2d(s.before, d, s.kernel, s.stride, **settings), nn.BatchNorm2d(d)
        self.conv2, self.bn2 = nn.Conv2d(d, d, s.kernel, **settings), nn.BatchNorm2d(d)
        if s.before != d or s.stride != 1:
            self.shortcut = nn.Conv2d(s.before, d, 1, s.stride)
        else:
            self.shortcut = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (self.shortcut(x) + h).relu()


class Blocks(nn.Module):
    """Blocks in a row, with a linear map ahead of those that are wider or narrower than the one before."""

    def __init__(self, steps: Sequence[Step], make: Callable[[Step], nn.Module], *, mapped: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(make(step) for step in steps)
        merges = {str(i): nn.Linear(s.before, s.width) for i, s in enumerate(steps) if mapped and s.before != s.width}
        self.merges = nn.ModuleDict(merges)

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            if str(i) in self.merges:
                x = self.merges[str(i)](x)
            x = block(x)
        return x


# ---- attention in windows, with a table of relative positions


class WindowAttention(nn.Module):
    def __init__(self, s: Step) -> None:
        super().__init__()
        self.heads, self.side = s.heads, s.window
        self.qkv, self.proj = nn.Linear(s.width, 3 * s.width), nn.Linear(s.width, s.width)
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * s.window - 1) ** 2, s.heads))
        place = torch.stack(torch.meshgrid(*[torch.arange(s.window)] * 2, indexing="ij")).flatten(1)
        offset = place[:, :, None] - place[:, None, :] + s.window - 1
        self.register_buffer("index", offset[0] * (2 * s.window - 1) + offset[1], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        bias = self.relative_position_bias_table[self.index].permute(2, 0, 1)
        weights = (q @ k.transpose(-1, -2) / math.sqrt(d // self.heads) + bias).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, t, d))


class WindowBlock(nn.Module):
    def __init__(self, s: Step) -> None:
        super().__init__()
        self.side, self.more = s.window, -SIDE % s.window
        self.norm1, self.attn = nn.LayerNorm(s.width), WindowAttention(s)
        self.norm2, self.mlp = nn.LayerNorm(s.width), Mlp(options_of(s))

    def forward(self, x: Tensor) -> Tensor:
        w, count = self.side, (SIDE + self.more) // self.side
        b, _, _, d = x.shape
        h = F.pad(self.norm1(x), (0, 0, 0, self.more, 0, self.more))
        h = h.view(b, count, w, count, w, d).transpose(2, 3).reshape(b * count * count, w * w, d)
        h = self.attn(h).view(b, count, count, w, w, d).transpose(2, 3).reshape(b, count * w, count * w, d)
        x = x + h[:, :SIDE, :SIDE]
        return x + self.mlp(self.norm2(x))


# ---- layers in a row, in no blocks


class FlatConvolutions(nn.Module):
    """VGG: [Conv(, BN), ReLU(, MaxPool)] × n."""

    def __init__(self, steps: Sequence[Step], norm: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for s in steps:
            layers.append(nn.Conv2d(s.before, s.width, s.kernel, padding=s.kernel // 2, groups=s.groups))
            layers += [nn.BatchNorm2d(s.width)] * norm + [nn.ReLU()] + [nn.MaxPool2d(2)] * s.pool
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(steps[-1].width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


class FlatMaps(nn.Sequential):
    """[Linear, Tanh] × n and a last Linear, the model itself."""

    def __init__(self, steps: Sequence[Step]) -> None:
        layers = [layer for s in steps for layer in (nn.Linear(s.before, s.width), nn.Tanh())]
        super().__init__(*layers[:-1])


# ---- all of them


def options_of(s: Step) -> Options:
    return Options(width=s.width, hidden=s.hidden, heads=s.heads, groups=s.groups, kernel=s.kernel)


KINDS = ("units", "tokens", "tokens_separate", "windows", "flat_conv", "flat_conv_norm", "flat_maps")


def build_stack(kind: str, steps: Sequence[Step]) -> nn.Module:
    """An untransformed model."""
    if kind == "units":
        return Blocks(steps, Unit, mapped=False)
    if kind.startswith("tokens"):
        attention = FusedAttention if kind == "tokens" else SeparateAttention
        return Blocks(steps, lambda s: TransformerBlock(options_of(s), attention), mapped=True)
    if kind == "windows":
        return Blocks(steps, WindowBlock, mapped=True)
    return FlatMaps(steps) if kind == "flat_maps" else FlatConvolutions(steps, kind == "flat_conv_norm")


def input_shape(kind: str, steps: Sequence[Step], batch: int) -> tuple[int, ...]:
    """Channels come where the stack wants them."""
    d = steps[0].before
    image = (batch, SIDE, SIDE, d) if kind == "windows" else (batch, d, 8, 6)
    return (batch, 5, d) if kind.startswith("tokens") else (batch, d) if kind == "flat_maps" else image


def spots_of(kind: str, steps: Sequence[Step]) -> list[Spot]:
    """The blocks, in the order in which they run."""
    found, position = [], 0
    for i, s in enumerate(steps):
        mapped, last = s.before != s.width, i == len(steps) - 1
        if kind == "units":
            like: tuple[object, ...] = (s.before, s.width, s.groups, s.kernel, s.stride, s.dilation)
            found.append(Spot(f"blocks.{i}", (f"blocks.{i}",), mapped or s.stride > 1, False, like))
        elif kind.startswith("tokens") or kind == "windows":
            like = (s.width, s.hidden, (s.heads, s.window) if kind == "windows" else None)
            found.append(Spot(f"blocks.{i}", (f"blocks.{i}",), False, mapped, like))
        else:
            parent, dot = ("", "") if kind == "flat_maps" else ("features", ".")
            length = 3 if kind == "flat_conv_norm" else 1 if kind == "flat_maps" and last else 2
            members = tuple(f"{parent}{dot}{position + j}" for j in range(length))
            path = members[0] if length == 1 else f"{parent}[{position}:{position + length}]"
            between = bool(i) and kind != "flat_maps" and steps[i - 1].pool
            found.append(Spot(path, members, mapped, between, (s.before, s.width, s.groups, s.kernel), window=True))
            position += length + (kind != "flat_maps" and s.pool)
    return found


def replaced_every(spots: Sequence[Spot], k: int) -> list[int]:
    """Blocks k, 2k, … of those counted from 1, anew at a change of shape and at a new stage; or through all.

    The first and the last stay, and those that change the shape stay if there are others. Where all that are counted
    have to stay, the next block that may be replaced is taken, and counting begins after it.
    """
    inner = range(1, len(spots) - 1)
    may = {i for i in inner if not spots[i].turn} or set(inner)
    numbers = []
    for i, spot in enumerate(spots):
        anew = i == 0 or spot.turn or (spot.between and spot.like != spots[i - 1].like)
        numbers.append(1 if anew else numbers[-1] + 1)
    chosen = [i for i in may if numbers[i] % k == 0]
    if through := sorted(chosen or [i for i in may if (i + 1) % k == 0]):
        return through
    late, last = [], -1
    for i in sorted(may):
        if i - last >= k:
            late.append(i)
            last = i
    return late


# ---- what a transformed one computes

_ADDED = (
    (r"fusion\.(rule\.)?previous$", "a"),
    (r"fusion\.(rule\.)?next$", "b"),
    (r"fusion\.align_previous\.gains$", "gains_before"),
    (r"fusion\.align_next\.gains$", "gains_after"),
    (r"operator\.bias$", "shift"),
    (r"operator\.", ""),
)


def renamed(added: str) -> str:
    """By its name within `replfx`, what a reference calls a tensor."""
    return next(re.sub(f"^{pattern}", by, added) for pattern, by in _ADDED if re.match(pattern, added))


def parts_of(tensors: Tensors, spot: Spot) -> Tensors:
    """What a replaced block has in the transformed model: `a`, `b`, gains, a light operator's; and `own.NAME`."""
    found = {}
    for name, tensor in _under(tensors, f"{spot.members[0]}.").items():
        added = name.removeprefix("replfx.")
        found[f"own.{name}" if added == name else renamed(added)] = tensor
    return found


def reference_run(
    kind: str,
    steps: Sequence[Step],
    replaced: Sequence[int],
    tensors: Tensors,
    x: Tensor,
    *,
    fusion: str,
    operator: str,
    neighbour_gradient: float,
    training: bool,
) -> Tensor:
    """The output of a stack whose blocks `replaced` are replaced; updates running statistics in `tensors`."""
    plain, spots = build_stack(kind, steps).to(x.dtype).train(training), spots_of(kind, steps)
    state = {name: t for name, t in tensors.items() if name in dict(plain.state_dict())}
    for i in replaced:
        parts = parts_of(tensors, spots[i])
        block = {n: t.shape for n, t in _inside(plain, spots[i]).items() if t.dim() >= 2}
        sides = [_inside(plain, spots[j]) for j in (i - 1, i + 1)]
        if operator == "light":
            maps = FAMILIES[_family(kind)].light_maps
            rows = maps(options_of(steps[i]))
        else:
            rows = {n: ALL for n, shape in block.items() if any(_fits(s.get(n), shape) for s in sides)}
        aligned = []
        for j, gains in ((i - 1, "gains_before"), (i + 1, "gains_after")):
            twin = 2 * i - j
            theirs, groups = {}, {}
            for name, part in rows.items():
                at = j if _fits(_inside(plain, spots[j]).get(name), block[name]) else twin  # the other has none
                theta = _scaled(tensors[spots[at].name(name)], neighbour_gradient)
                theirs[name] = theta if part == ALL else theta[len(theta) * 2 // 3 :]
                groups[name] = (_groups(plain, spots[at].name(name)), _groups(plain, spots[i].name(name)))
            aligned.append(_aligned(theirs, block, rows, groups, parts.get(gains)))
        theta = _fuse(parts["a"], parts["b"], *aligned, dict.fromkeys(rows, ALL), fusion, 1.0)
        if operator == "light":
            _put_light(plain, i, kind, steps[i], theta, parts, training)
        else:
            for name, tensor in theta.items():
                state[spots[i].name(name)] = tensor
    needed = [name for name, _ in (*plain.named_parameters(), *plain.named_buffers())]
    fixed = {name: b for name, b in plain.named_buffers() if name not in plain.state_dict()}
    return functional_call(plain, {name: {**fixed, **state}[name] for name in needed}, (x,), strict=True)


def _inside(model: nn.Module, spot: Spot) -> Tensors:
    """The block's own parameters by their names in it."""
    if not spot.window:
        return dict(model.get_submodule(spot.members[0]).named_parameters())
    modules = enumerate(spot.members)
    return {f"{i}.{n}": p for i, path in modules for n, p in model.get_submodule(path).named_parameters()}


def _fits(theirs: Tensor | None, shape: Sequence[int]) -> bool:
    """Whether a neighbour's parameter of the same name is of one role with the block's: kernels of 1×1 are apart."""
    return theirs is not None and theirs.dim() == len(shape) and (theirs.shape[2:] == (1, 1)) == (shape[2:] == (1, 1))


def _groups(model: nn.Module, name: str) -> int:
    return getattr(model.get_submodule(name.rpartition(".")[0]), "groups", 1)


def _aligned(
    theirs: Tensors,
    block: dict[str, torch.Size],
    rows: dict[str, slice],
    groups: dict[str, tuple[int, int]],
    gains: Tensor | None,
) -> Tensors:
    targets = {n: s if rows[n] == ALL else (s[0] // 3, *s[1:]) for n, s in block.items() if n in rows}
    split = split_gains(gains, {n: tuple(theirs[n].shape) for n in targets}, targets)
    found = {}
    for name, theta in theirs.items():
        layout = "table" if name.endswith("table") else "kernel" if theta.dim() == 4 else "matrix"
        columns = {theta.shape[1], targets[name][1]} if theta.dim() > 1 else {1}
        mixed = (1, 1) if columns == {1} else groups[name]  # depthwise kernels have nothing to mix
        found[name] = align(theta, split[name], targets[name], layout, mixed)
    return {name: found[name] for name in rows}


def _family(kind: str) -> str:
    return {"units": "basic", "tokens": "transformer", "tokens_separate": "transformer_separate"}[kind]


class _Light(nn.Module):
    def __init__(self, run: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


def _put_light(plain: nn.Module, i: int, kind: str, step: Step, theta: Tensors, own: Tensors, training: bool) -> None:
    blocks = plain.blocks
    assert isinstance(blocks, nn.ModuleList)

    def run(x: Tensor) -> Tensor:
        if kind == "units":  # φ(x + N(K ∗ x)) with the block's own dilation
            padding = step.dilation * (step.kernel // 2)
            h = F.conv2d(x, theta["conv2.weight"], padding=padding, dilation=step.dilation)
            return (x + _batch_norm(own, "norm", h, training)).relu()
        formula = FAMILIES[_family(kind)].light
        return formula(theta, own, x, options_of(step), training)

    blocks[i] = _Light(run)
