"""Caches of keys and values: what a block leaves in one that it is given, and what takes its place has to.

Transformers' models hand one object to all of their decoder layers. Each appends its keys and values under its own
number, and the model asks some of them how many tokens they have: positions and masks come from that. Where no
attention runs, zeros of the same shape are appended, which nobody attends to: every layer counts the same tokens.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import reduce
from typing import Annotated, Any, TypeAlias

from torch import Tensor, fx

from replfx.fusion.templates import is_slot
from replfx.modules.tree import is_cache
from replfx.plain_data import Rule

__all__ = ["Filled"]

_Number: TypeAlias = Annotated[int, Rule("at least 0", lambda number: number >= 0)]


@dataclass(frozen=True)
class Filled:
    """A part of a cache that a block fills, of one number.

    Attributes:
        slot: the block's argument: its position or name.
        at: the attributes that lead from the argument to the cache.
        layer: the block's number in it.
        keys, values: heads and width of what is appended, between which is the number of tokens.
    """

    slot: Annotated[str, Rule("a position or a name", lambda slot: is_slot(slot) and "." not in slot)]
    at: tuple[Annotated[str, Rule("an attribute", lambda name: name.isidentifier() and name[0] != "_")], ...]
    layer: _Number
    keys: tuple[_Number, _Number]
    values: tuple[_Number, _Number]

    def to_dict(self) -> dict[str, object]:
        """As plain JSON values."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    def pass_over(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], activation: Tensor) -> None:
        """Let the cache, if the call has one, count the tokens of an activation."""
        given = dict(enumerate(args)).get(int(self.slot)) if self.slot.isdigit() else kwargs.get(self.slot)
        cache: Any = reduce(lambda held, name: getattr(held, name, None), self.at, given)
        if is_cache(cache):
            batch, tokens, _ = activation.shape
            one = activation.new_zeros((1, 1, 1, 1))
            parts = (one.expand(batch, heads, tokens, width) for heads, width in (self.keys, self.values))
            cache.update(*parts, self.layer)

    def emit(self, graph: fx.Graph, cache: fx.Node, activation: fx.Node) -> None:
        """The same as nodes that need no replfx to run; the graph's module has a `nothing` to call without a cache."""
        for name in self.at:
            cache = graph.call_function(getattr, (cache, name, None))
        update = graph.call_function(getattr, (cache, "update", graph.get_attr("nothing")))
        batch, tokens = (graph.call_method("size", (activation, dim)) for dim in (0, 1))
        one = graph.call_method("new_zeros", (activation, (1, 1, 1, 1)))
        parts = [
            graph.call_method("expand", (one, batch, heads, tokens, width)) for heads, width in (self.keys, self.values)
        ]
        graph.call_method("__call__", (update, *parts, self.layer))
