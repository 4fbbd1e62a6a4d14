"""Shapes and costs of nodes: FLOPs, and the bytes that autograd keeps for backward."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn

from replfx.torch_internals import DisableTorchFunction, TorchDispatchMode, memory_id, pytree
from replfx.tracing.info import Cost

__all__ = ["Meter", "annotate", "innermost_path", "parameter_count", "parameters_read", "set_shapes"]


Runner: TypeAlias = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]


class Below(TorchDispatchMode):
    """Sees every operator below autograd: counts FLOPs, and lets `run(func, args, kwargs)` make the call.

    A `FlopCounterMode` would count too, but it also follows modules, with hooks on all their arguments.
    """

    def __init__(self, run: Runner | None = None) -> None:
        from torch.utils.flop_counter import flop_registry  # which imports triton

        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0
        self._registry = flop_registry
        self.run = run or (lambda func, args, kwargs: func(*args, **kwargs))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        packet = getattr(func, "overloadpacket", None)
        count = self._registry.get(packet)
        if count is None and torch.is_inference_mode_enabled() and hasattr(func, "decompose"):
            with self:  # inference mode skips autograd's kernels, which take composite operators apart
                result = func.decompose(*args, **kwargs)
                if result is not NotImplemented:
                    return result
        if packet in _PRODUCTS:
            _check_dtypes(packet, args)
        result = self.run(func, args, kwargs)
        if count is not None:
            self.flops += count(*args, **kwargs, out_val=result)
        return result


_PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.baddbmm)


def _check_dtypes(packet: Any, args: tuple[Any, ...]) -> None:
    """Refuse what a real matrix product refuses and a fake one does not."""
    dtypes = {arg.dtype for arg in args[:3] if isinstance(arg, Tensor)}
    if len(dtypes) > 1:
        names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise RuntimeError(f"a matrix product ({packet.__name__}) of {names}: give inputs of the model's own dtype")


class Meter:
    """Counts FLOPs and newly saved bytes between two calls of `take`.

    Args:
        model: its parameters and buffers never count as saved.
        run: makes the call of every operator.
    """

    def __init__(self, model: nn.Module, run: Runner | None = None) -> None:
        owned = map(_storage, (*model.parameters(), *model.buffers()))
        # The storages themselves are kept: a freed one's address could be given out again.
        self._storages = {memory_id(storage): storage for storage in owned if storage is not None}
        self._saved = 0
        self._below = Below(run)
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = _storage(tensor)
        if storage is not None and memory_id(storage) not in self._storages:
            self._storages[memory_id(storage)] = storage
            self._saved += storage.nbytes()
        # An output that its own graph node keeps would never be freed: Python's collector sees no such circle.
        return tensor if tensor.grad_fn is None else tensor.detach()

    def take(self) -> tuple[int, int]:
        """FLOPs and saved bytes since the last call."""
        taken = self._below.flops, self._saved
        self._below.flops = self._saved = 0
        return taken

    @contextmanager
    def without_hooks(self) -> Iterator[None]:
        """Where PyTorch allows no hooks on saved tensors, as in `torch.func.grad`: nothing is counted as saved."""
        self._hooks.__exit__()
        try:
            yield
        finally:
            self._hooks.__enter__()

    def __enter__(self) -> "Meter":
        self._below.__enter__()  # type: ignore[no-untyped-call]
        self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.__exit__(kind, error, trace)
        self._below.__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        # Autograd's nodes hold the hooks, and so this object; what it held would be in a circle that C++ hides.
        self._below, self._storages = Below(), {}


def _storage(tensor: Tensor) -> torch.UntypedStorage | None:
    """The tensor's storage; None if it has none of its own, as a sparse one."""
    try:
        with DisableTorchFunction():
            return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return None


def innermost_path(node: fx.Node) -> str:
    """Path of the innermost module that the node was recorded in; the root is the empty string."""
    stack = node.meta.get("nn_module_stack")
    return str(next(reversed(stack.values()))[0]) if stack else ""


def parameters_read(root: nn.Module, node: fx.Node) -> list[nn.Parameter]:
    """Parameters that the node reads directly: those of the module it calls, or the one it gets."""
    if node.op == "call_module":
        return list(root.get_submodule(str(node.target)).parameters())
    owner, _, name = str(node.target).rpartition(".")
    parameter = root.get_submodule(owner)._parameters.get(name) if node.op == "get_attr" else None
    return [] if parameter is None else [parameter]


def parameter_count(root: nn.Module, node: fx.Node) -> int:
    """How many scalars those are."""
    return sum(parameter.numel() for parameter in parameters_read(root, node))


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
    with Meter(ghost) as meter:
        return _Annotator(ghost, graph_module.graph, meter).run(*values)
