"""The second rung: run the model once and record what happens into the same kind of graph.

Every call of a torch function, of a tensor method and of a leaf module becomes a node; which node made a
tensor is known by the tensor's identity. Run under fake tensors it costs no compute and no memory; where
the model's control flow asks for values, it is run for real on a copy of its buffers.
"""

import builtins
import inspect
import operator
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import base_types
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

from replfx.structure import set_submodule
from replfx.tracing.costs import Meter, innermost_path, parameter_count, set_shapes
from replfx.tracing.info import CaptureInfo, Cost, ModuleCall
from replfx.tracing.inputs import Inputs
from replfx.tracing.symbolic import TrainingFlag, is_leaf, is_small

__all__ = ["record"]


class Recorder(TorchFunctionMode):
    """Records one run of `ghost` into `graph`; see the module's docstring."""

    def __init__(self, ghost: nn.Module, meter: Meter) -> None:
        super().__init__()
        self.ghost = ghost
        self.meter = meter
        self.graph = fx.Graph()
        self.nodes: list[fx.Node] = []
        self.calls: list[ModuleCall] = []
        self.notes: list[str] = []
        self.constants: dict[str, Tensor] = {}
        self.flags: dict[str, bool] = {}  # targets of the `TrainingFlag` submodules that the graph needs
        self._node_of: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._names = {id(t): n for n, t in (*ghost.named_parameters(), *ghost.named_buffers())}
        self._paths = {id(m): path for path, m in ghost.named_modules()}
        self._stack: dict[str, tuple[str, type[nn.Module]]] = {}
        self._paused = 0

    # ---- values to nodes

    def node(self, op: str, target: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> fx.Node:
        """Append a node."""
        made = self.graph.create_node(op, target, args, kwargs or {})
        made.meta["nn_module_stack"] = dict(self._stack)
        self.nodes.append(made)
        return made

    def bind(self, node: fx.Node, value: object) -> None:
        """Say that `node` made `value`; parts of a structure get getitem nodes of their own."""
        with self._pause():  # reading a tensor's shape is a torch function too
            set_shapes(node, value)
            flops, saved = self.meter.take()
            node.meta["replfx"] = Cost(innermost_path(node), parameter_count(self.ghost, node), flops, saved)
            self._bind_parts(node, value)

    def _bind_parts(self, node: fx.Node, value: object) -> None:
        if isinstance(value, Tensor):
            self._node_of[value] = node
            return
        items: Iterator[tuple[Any, Any]] = iter(())
        if isinstance(value, dict):
            items = iter(value.items())
        elif isinstance(value, tuple | list):
            items = iter(enumerate(value))
        for key, item in items:
            if isinstance(item, Tensor | tuple | list | dict):
                part = self.node("call_function", operator.getitem, (node, key))
                part.meta["replfx"] = Cost(innermost_path(part), 0, 0, 0)
                set_shapes(part, item)
                self._bind_parts(part, item)

    def to_nodes(self, tree: Any) -> Any:
        """The same structure with a node for every tensor in it."""
        if isinstance(tree, Tensor):
            return self._node_for(tree)
        if isinstance(tree, dict):
            return {key: self.to_nodes(item) for key, item in tree.items()}
        if isinstance(tree, slice):
            return slice(self.to_nodes(tree.start), self.to_nodes(tree.stop), self.to_nodes(tree.step))
        if isinstance(tree, torch.Size):
            return tuple(tree)
        if isinstance(tree, tuple) and hasattr(tree, "_fields"):
            return type(tree)(*(self.to_nodes(item) for item in tree))
        if isinstance(tree, tuple | list):
            return (
                type(tree)(self.to_nodes(item) for item in tree)
                if type(tree) in (tuple, list)
                else [self.to_nodes(item) for item in tree]
            )
        return tree

    def _node_for(self, tensor: Tensor) -> fx.Node:
        node: fx.Node | None = self._node_of.get(tensor)
        if node is None:
            name = self._names.get(id(tensor))
            if name is None:
                name = f"_tensor_constant{len(self.constants)}"
                self.constants[name] = tensor
            node = self.node("get_attr", name)
            with self._pause():
                node.meta["replfx"] = Cost(innermost_path(node), parameter_count(self.ghost, node), 0, 0)
                set_shapes(node, tensor)
            self._node_of[tensor] = node
        return node

    # ---- what happens to nodes

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types_: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if self._paused:
            return func(*args, **kwargs)
        target = _target(func)
        if target is None:  # a property that gives no tensor, or one of the interpreter's own questions
            return func(*args, **kwargs)
        result = func(*args, **kwargs)
        gives_tensor = any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(result))
        if not gives_tensor and target[1] not in (operator.setitem, torch._C._set_grad_enabled):
            return result
        args, kwargs = self._follow_training(func, args, kwargs)
        node_args, node_kwargs = self.to_nodes(args), self.to_nodes(kwargs)
        op, name, extra = target
        self.bind(self.node(op, name, (*node_args, *extra), node_kwargs), result)
        return result

    def _follow_training(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Let an argument `training`, as `F.dropout` has, follow the module that the call is made in."""
        if not isinstance(func, types.FunctionType) or "training" not in inspect.signature(func).parameters:
            return args, kwargs
        path = str(next(reversed(self._stack.values()))[0]) if self._stack else ""
        bound = inspect.signature(func).bind(*args, **kwargs)
        if bound.arguments.get("training") is not self.ghost.get_submodule(path).training:
            return args, kwargs
        target = f"{path}.training_flag" if path else "training_flag"
        self.flags[target] = self.ghost.get_submodule(path).training
        bound.arguments["training"] = self.node("call_module", target)
        return bound.args, bound.kwargs

    def module_call(self, module: nn.Module, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A module is called: one node if it is a leaf, else what happens inside it."""
        path = self._paths.get(id(module))
        if path is None or self._paused:
            return call(module, *args, **kwargs)
        record = ModuleCall(path, self.to_nodes(args), self.to_nodes(kwargs), len(self.nodes))
        key = path if path not in self._stack else f"{path}@{len(self._stack)}"
        self._stack[key] = (path, type(module))
        try:
            whole = is_leaf(module) or (is_small(module) and _reads_training(module))
            # The model itself is never one, even if it has no submodules but only parameters.
            leaf = bool(path) and whole and _representable((record.args, record.kwargs))
            if leaf:
                with self._pause():
                    result = call(module, *args, **kwargs)
                self.bind(self.node("call_module", path, record.args, record.kwargs), result)
            else:
                result = call(module, *args, **kwargs)
        finally:
            self._stack.pop(key)
        record.stop, record.output = len(self.nodes), self.to_nodes(result)
        self.calls.append(record)
        return result

    @contextmanager
    def _pause(self) -> Iterator[None]:
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1


def _target(func: Callable[..., Any]) -> tuple[str, Any, tuple[Any, ...]] | None:
    """The fx op and target of a torch function, with what is to follow its arguments."""
    name = getattr(func, "__name__", "")
    if name == "__get__":  # a property of a tensor, such as x.T: kept only if it gives a tensor
        return "call_function", getattr, (func.__self__.__name__,)  # type: ignore[attr-defined]
    if name in ("__set__", "__delete__", "__repr__", "__len__", "__bool__", "__format__", "__hash__"):
        return None
    if name == "__setitem__":
        return "call_function", operator.setitem, ()
    if name == "__getitem__":
        return "call_function", operator.getitem, ()
    if isinstance(func, types.MethodDescriptorType | types.WrapperDescriptorType) or (
        getattr(Tensor, name, None) is func
    ):
        return "call_method", name, ()
    return "call_function", func, ()


def _reads_training(module: nn.Module) -> bool:
    """Whether the code of its `forward` names `training`: then only calling it whole follows the mode."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "training" in code.co_names


def _representable(tree: Any) -> bool:
    """Whether a graph can hold these arguments: nodes, plain values, and tuples, lists and dicts of them."""
    if isinstance(tree, dict):
        return all(_representable(item) for item in tree.values())
    if isinstance(tree, tuple | list):
        return all(_representable(item) for item in tree)
    if isinstance(tree, slice):
        return all(_representable(item) for item in (tree.start, tree.stop, tree.step))
    return tree is None or tree is builtins.Ellipsis or isinstance(tree, (fx.Node, *base_types))


@contextmanager
def _watching_modules(recorder: Recorder) -> Iterator[None]:
    original = nn.Module.__call__

    def watched(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return recorder.module_call(module, original, args, kwargs)

    nn.Module.__call__ = watched  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__call__ = original  # type: ignore[method-assign]


def record(root: nn.Module, ghost: nn.Module, inputs: Inputs) -> fx.GraphModule:
    """Run `ghost` on `inputs` and give what happened as a graph over `root`.

    Args:
        root: the structural copy that the GraphModule will hold.
        ghost: a copy of the same structure to run, on fake or on real tensors.
        inputs: the example inputs, as fake or as real as `ghost`.
    """
    with Meter((*ghost.parameters(), *ghost.buffers())) as meter:
        recorder = Recorder(ghost, meter)
        for index, tensor in enumerate(inputs.tensors()):
            recorder.bind(recorder.node("placeholder", f"input_{index}"), tensor)
        with torch.enable_grad(), recorder, _watching_modules(recorder):
            result = ghost(*inputs.args, **inputs.kwargs)
        output = recorder.to_nodes(result)
        if not _representable(output):
            output = [recorder._node_for(t) for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]
            recorder.notes.append(f"the output, a {type(result).__name__}, is given as a list of its tensors")
        recorder.graph.output(output)
    for name, tensor in recorder.constants.items():
        root.register_buffer(name, tensor.detach(), persistent=False)
    for target, training in recorder.flags.items():
        set_submodule(root, target, TrainingFlag().train(training))
    graph_module = fx.GraphModule(root, recorder.graph, type(root).__name__)
    graph_module.meta["replfx"] = CaptureInfo(
        "recorded", root, recorder.nodes, recorder.calls, recorder.notes, measured=True
    )
    return graph_module
