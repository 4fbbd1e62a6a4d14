"""Tokens: what a node does, free of where it stands; the same step of two like layers has the same token.

A token leaves out what two layers of one kind may differ in: what `replfx.modules.structure` leaves out of a module's
signature (floats, such as drop rates and epsilons, and whether a dropout is there at all), and the sizes (shapes of
parameters, integers that functions take as sizes).
"""

import re
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from replfx.tracing import name_of

__all__ = ["Tokens", "is_stateless"]

# Functions and methods whose integers are sizes or follow from them; those of all others say which computation it is.
_TAKES_SIZES = re.compile(
    "arange|broadcast_to|empty|expand|full|layer_norm|multi_head_attention_forward|narrow|new_empty|new_full|new_ones|"
    "new_zeros|ones|rand|randn|repeat|reshape|rms_norm|split|split_with_sizes|tile|unflatten|view|zeros"
)
_SIZES = re.compile("(in|out|in1|in2|num)_features|(in|out|num)_channels|normalized_shape|embedding_dim|num_embeddings")


def is_stateless(module: nn.Module) -> bool:
    """Whether the module has neither parameters nor buffers: then it may be called from anywhere, often."""
    return next(module.parameters(), None) is None and next(module.buffers(), None) is None


class Tokens:
    """Gives the token of each node of a graph.

    Args:
        root: what the graph's targets refer to.
        values: what each `get_attr` node reads.
    """

    def __init__(self, root: nn.Module, values: Mapping[fx.Node, object]) -> None:
        self.root, self.values = root, values

    def of(self, node: fx.Node) -> Hashable:
        """The token of a node that is no `get_attr`."""
        if node.op in ("placeholder", "output"):
            return node.op, node.name  # like no other: no layer holds one
        what: Hashable = node.target
        if node.op == "call_module":
            what = self._module(self.root.get_submodule(str(node.target)))
        sizes = _TAKES_SIZES.fullmatch(name_of(node)) is not None
        args = node.args[:1] if what is torch._assert else node.args  # a traced message may name nodes
        return node.op, what, self._argument(args, sizes), self._argument(node.kwargs, sizes)

    def _argument(self, value: Any, sizes: bool) -> Hashable:
        """What an argument is; `sizes`: the integers in it are sizes."""
        if isinstance(value, fx.Node):
            read = self.values.get(value)
            if isinstance(read, nn.Module):  # the body of a checkpoint or of a branch: like no other
                return "body", id(read)
            return self._parameter(read) if isinstance(read, nn.Parameter) else "value"
        if isinstance(value, dict):
            return tuple((key, self._argument(item, sizes)) for key, item in sorted(value.items(), key=str))
        if isinstance(value, tuple | list):
            return type(value).__name__, *(self._argument(item, sizes) for item in value)
        if isinstance(value, slice):
            bounds = (value.start, value.stop, value.step)
            return "slice", *(self._argument(bound, sizes=True) for bound in bounds)
        if isinstance(value, float) or (sizes and type(value) is int):
            return type(value).__name__
        # The type too, because 1, 1.0 and True are equal.
        return type(value).__name__, value if isinstance(value, Hashable) else None

    def _parameter(self, tensor: Tensor) -> Hashable:
        return "parameter", tensor.dim(), tensor.dtype

    def _module(self, module: nn.Module) -> Hashable:
        """What a called leaf module is."""
        if is_stateless(module) and (isinstance(module, nn.Identity) or "Drop" in type(module).__name__):
            return "drop"  # an nn.Identity often stands where a drop rate is zero
        facts: list[Hashable] = []
        for path, sub in module.named_modules():
            if path and is_stateless(sub):
                continue
            facts.append((path, type(sub), *self._settings(sub)))
            facts += [(name, p if p is None else self._parameter(p)) for name, p in sub._parameters.items()]
            facts += [(name, b is None) for name, b in sub._buffers.items()]
        return tuple(facts)

    def _settings(self, module: nn.Module) -> list[Hashable]:
        """The settings that the class itself declares; a depthwise convolution is one at any width."""
        settings: list[Hashable] = []
        for name in getattr(module, "__constants__", ()):
            value = getattr(module, name, None)
            if name == "groups" and value == getattr(module, "in_channels", None) != 1:
                value = "depthwise"
            if not _SIZES.fullmatch(name):
                settings.append((name, self._argument(value, sizes=False)))
        return settings
