"""Shapes and costs of nodes: FLOPs, and the bytes that autograd keeps for backward."""

from collections.abc import Iterable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from replfx.tracing.info import Cost

__all__ = ["Meter", "annotate", "innermost_path", "set_shapes"]


class Meter:
    """Counts FLOPs and newly saved bytes between two calls of `take`.

    Args:
        owned: tensors whose storage never counts as saved (parameters and buffers).
    """

    def __init__(self, owned: Iterable[Tensor]) -> None:
        self._seen = {t.untyped_storage()._cdata for t in owned}
        self._keep: list[Tensor] = []  # a freed storage's address could be given out again
        self._saved = 0
        self._flops = 0
        self._counter = FlopCounterMode(display=False)
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self._keep.append(tensor.detach())
            self._saved += storage.nbytes()
        return tensor

    def take(self) -> tuple[int, int]:
        """FLOPs and saved bytes since the last call."""
        total = self._counter.get_total_flops()
        taken = total - self._flops, self._saved
        self._flops, self._saved = total, 0
        return taken

    def __enter__(self) -> "Meter":
        self._counter.__enter__()
        self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.__exit__(kind, error, trace)
        self._counter.__exit__(kind, error, trace)


def innermost_path(node: fx.Node) -> str:
    """Path of the innermost module that the node was recorded in; the root is the empty string."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    return str(next(reversed(stack.values()))[0])


def parameter_count(root: nn.Module, node: fx.Node) -> int:
    """Parameters that the node reads directly: those of the module it calls, or the one it gets."""
    if node.op == "call_module":
        return sum(p.numel() for p in root.get_submodule(str(node.target)).parameters())
    if node.op == "get_attr":
        owner, _, name = str(node.target).rpartition(".")
        holder = root.get_submodule(owner)
        value = holder._parameters.get(name)
        return 0 if value is None else value.numel()
    return 0


def set_shapes(node: fx.Node, value: object) -> None:
    """Put shape and dtype of the node's result into its meta, in the structure that the result has."""
    tensors = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
    if isinstance(value, Tensor):
        node.meta["shape"], node.meta["dtype"] = tuple(value.shape), value.dtype
    elif tensors:
        node.meta["shape"] = tuple(tuple(t.shape) for t in tensors)
        node.meta["dtype"] = tuple(t.dtype for t in tensors)


class _Annotator(fx.Interpreter):
    """Runs a graph on a ghost of its model and notes what each node gave and cost."""

    def __init__(self, ghost: nn.Module, graph: fx.Graph, meter: Meter) -> None:
        super().__init__(ghost, graph=graph)  # any module that holds the targets will do
        self.ghost = ghost
        self.meter = meter

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        flops, saved = self.meter.take()
        set_shapes(n, result)
        n.meta["replfx"] = Cost(innermost_path(n), parameter_count(self.ghost, n), flops, saved)
        return result


def annotate(graph_module: fx.GraphModule, ghost: nn.Module, values: tuple[object, ...]) -> object:
    """Fill shape, dtype and `Cost` of every node by running the graph on `ghost`; gives the output.

    Args:
        graph_module: the captured graph.
        ghost: the model's structure with fake tensors, run under their fake mode.
        values: one value a placeholder.
    """
    with Meter((*ghost.parameters(), *ghost.buffers())) as meter:
        return _Annotator(ghost, graph_module.graph, meter).run(*values)
