"""Pairing: which parameter of a neighbour a block's parameter is fused from. Ours.

Neighbours of one class need not be alike: one has a shortcut convolution, another no expansion, and then names
shift. A parameter's *role* is what owns it (class of the module, and of the one inside the block that holds it:
a layer alone is like the same layer in a window), its name there, its number of dimensions, whether its numbers are
real or complex, and for kernels whether they are pointwise, depthwise or dense. Parameters pair by name where the
roles agree, and of what is left as many as can be by role, in the order of registration. Their shapes may differ:
`replfx.fusion.alignment` makes up for that.
"""

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Tensor, nn

from replfx.modules.structure import class_of

__all__ = [
    "LEAST_SHARE",
    "Counterpart",
    "Counterparts",
    "counterparts",
    "first_unpaired",
    "pair",
    "share_paired",
    "synthesizable",
]

LEAST_SHARE = 0.5
"""Of a block's weights, how many need a counterpart in both neighbours."""

Side: TypeAlias = Literal["previous", "next"]
Counterpart: TypeAlias = tuple[Side, str]  # a neighbour, and the name of its parameter
Counterparts: TypeAlias = dict[str, Counterpart]


@dataclass(frozen=True)
class _Role:
    owner: type[nn.Module]
    holder: type[nn.Module] | None
    leaf: str
    dims: int
    kernel: str
    numbers: str


def synthesizable(block: nn.Module) -> dict[str, Tensor]:
    """The parameters that a fusion may make: those of two dimensions and up, by name."""
    return {name: p for name, p in block.named_parameters() if p.dim() >= 2}


def pair(block: nn.Module, neighbour: nn.Module) -> dict[str, str]:
    """For the block's parameters their counterparts' names in `neighbour`, where there are any."""
    wanted, offered = _roles(block), _roles(neighbour)
    found = {name: name for name, role in wanted.items() if offered.get(name) == role}
    rest = [name for name in wanted if name not in found]
    free = [name for name in offered if name not in found]
    for i, j in _in_order([wanted[name] for name in rest], [offered[name] for name in free]):
        found[rest[i]] = free[j]
    return found


def counterparts(
    previous: Mapping[str, str], next: Mapping[str, str], names: Iterable[str]
) -> tuple[Counterparts, Counterparts]:
    """What θ_prev and θ_next of each parameter are; one that only one neighbour has is taken from it for both.

    Args:
        previous: what `pair` gave for the neighbour before.
        next: what it gave for the one after.
        names: the parameters to synthesise; those without a counterpart on either side are left out.
    """
    before, after = Counterparts(), Counterparts()
    sides: tuple[tuple[Side, Mapping[str, str]], ...] = ("previous", previous), ("next", next)
    for name in names:
        if found := [(side, theirs[name]) for side, theirs in sides if name in theirs]:
            before[name], after[name] = found[0], found[-1]
    return before, after


def share_paired(block: nn.Module, *pairs: Mapping[str, str]) -> float:
    """The share of the block's synthesizable weights that have a counterpart in every one of `pairs`."""
    sizes = {name: p.numel() for name, p in synthesizable(block).items()}
    total = sum(sizes.values())
    return sum(n for name, n in sizes.items() if all(name in each for each in pairs)) / total if total else 0.0


def first_unpaired(block: nn.Module, neighbour: nn.Module) -> str | None:
    """Why the first weight of the block without a counterpart has none, as "`conv.groups`: 4 ≠ 1"; None if all have."""
    paired = pair(block, neighbour)
    name = next((name for name in synthesizable(block) if name not in paired), None)
    if name is None:
        return None
    mine, theirs = _roles(block)[name], _roles(neighbour).get(name)
    path, _, _ = name.rpartition(".")
    if theirs is None:
        return f"`{name}`: {tuple(block.get_parameter(name).shape)} ≠ absent"
    if mine.owner is not theirs.owner:
        return f"`{path or 'class'}`: {mine.owner.__qualname__} ≠ {theirs.owner.__qualname__}"
    if mine.kernel != theirs.kernel:
        differs = f"{mine.kernel} ≠ {theirs.kernel}"
        one, other = block.get_submodule(path), neighbour.get_submodule(path)
        for setting in ("kernel_size", "groups"):
            values = getattr(one, setting, None), getattr(other, setting, None)
            if values[0] != values[1]:
                return f"`{path}.{setting}`: {values[0]} ≠ {values[1]} (`{name}`: {differs})".replace("`.", "`")
        return f"`{name}`: {differs}"
    if mine.dims != theirs.dims:
        return f"`{name}`: {mine.dims} dimensions ≠ {theirs.dims}"
    if mine.numbers != theirs.numbers:
        return f"`{name}`: {mine.numbers} ≠ {theirs.numbers}"
    return f"`{name}`: held by {_held(mine)} ≠ by {_held(theirs)}"


def _held(role: _Role) -> str:
    return "the block" if role.holder is None else role.holder.__qualname__


def _in_order(one: Sequence[Hashable], other: Sequence[Hashable]) -> Iterator[tuple[int, int]]:
    """As many pairs of equal items as there can be without any two crossing: a longest common subsequence."""
    longest = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]  # of what begins at i and at j
    for i in reversed(range(len(one))):
        for j in reversed(range(len(other))):
            same = one[i] == other[j]
            longest[i][j] = longest[i + 1][j + 1] + 1 if same else max(longest[i + 1][j], longest[i][j + 1])
    i = j = 0
    while i < len(one) and j < len(other):
        if one[i] == other[j]:
            yield i, j
            i, j = i + 1, j + 1
        elif longest[i + 1][j] >= longest[i][j + 1]:
            i += 1
        else:
            j += 1


def _roles(block: nn.Module) -> dict[str, _Role]:
    return {name: _role(block, name, p) for name, p in block.named_parameters()}


def _role(block: nn.Module, name: str, parameter: Tensor) -> _Role:
    path, _, leaf = name.rpartition(".")
    owner = block.get_submodule(path)
    holder = class_of(block.get_submodule(path.rpartition(".")[0])) if "." in path else None
    numbers = "complex" if parameter.is_complex() else "real"
    return _Role(class_of(owner), holder, leaf, parameter.dim(), _kernel(owner, parameter), numbers)


def _kernel(owner: nn.Module, parameter: Tensor) -> str:
    """What a convolution's kernel mixes: channels alone, places alone, or both."""
    if parameter.dim() < 3:
        return "none"
    if parameter[0, 0].numel() == 1:
        return "pointwise"
    groups = getattr(owner, "groups", None)  # of one channel alone a dense kernel has one column too
    many = groups if isinstance(groups, int) else parameter.shape[0]
    return "depthwise" if parameter.shape[1] == 1 < many else "dense"
