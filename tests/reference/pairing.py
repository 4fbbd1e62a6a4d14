"""Which parameter of a neighbour each of a block's goes with, by trying everything."""

from collections.abc import Hashable, Mapping, Sequence
from functools import cache

from torch import Tensor, nn


def role(block: nn.Module, name: str) -> Hashable:
    """What has to agree: owner, holder, name there, dimensions, and what a kernel mixes."""
    *path, leaf = name.split(".")
    owner, tensor = block.get_submodule(".".join(path)), block.get_parameter(name)
    holder = type(block.get_submodule(".".join(path[:-1]))) if len(path) > 1 else None
    return type(owner), holder, leaf, tensor.dim(), kernel(owner, tensor)


def kernel(owner: nn.Module, tensor: Tensor) -> str:
    """Channels alone, places alone, or both."""
    if tensor.dim() < 3:
        return "none"
    if all(size == 1 for size in tensor.shape[2:]):
        return "pointwise"
    groups = getattr(owner, "groups", tensor.shape[0])
    return "depthwise" if tensor.shape[1] == 1 and groups > 1 else "dense"


def by_name(block: nn.Module, neighbour: nn.Module) -> set[str]:
    """The names that both have in one role."""
    names = {name for name, _ in neighbour.named_parameters()} & {name for name, _ in block.named_parameters()}
    return {name for name in names if role(block, name) == role(neighbour, name)}


def most_in_order(one: Sequence[Hashable], other: Sequence[Hashable]) -> int:
    """How many of `one` can go with equals of `other` without any two crossing."""

    @cache
    def best(i: int, j: int) -> int:
        if i == len(one) or j == len(other):
            return 0
        with_j = [1 + best(i + 1, k + 1) for k in range(j, len(other)) if other[k] == one[i]]
        return max([best(i + 1, j), *with_j])

    return best(0, 0)


def is_pairing(found: Mapping[str, str], block: nn.Module, neighbour: nn.Module) -> None:
    """Assert that `found` is one: by name first, and of the rest as many as possible in the order of registration."""
    names, theirs = ([name for name, _ in m.named_parameters()] for m in (block, neighbour))
    same = by_name(block, neighbour)
    assert {name for name in same if found.get(name) == name} == same
    assert set(found) <= set(names)
    assert len(set(found.values())) == len(found)
    for name, counterpart in found.items():
        assert role(block, name) == role(neighbour, counterpart), (name, counterpart)
    rest, free = ([name for name in side if name not in same] for side in (names, theirs))
    places = [free.index(found[name]) for name in rest if name in found]
    assert places == sorted(places)
    assert len(places) == most_in_order([role(block, n) for n in rest], [role(neighbour, n) for n in free])
