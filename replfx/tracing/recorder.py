"""The recorder: run the model once and record what happens into the same kind of graph.

Every call of a torch function, of a tensor method, of a leaf module and of a custom autograd function becomes
a node; which node made a tensor is known by the tensor's identity. Operators that none of those calls, as under
`torch.func.vmap`, become nodes of their own. Run under fake tensors it costs no compute and no memory; where
the model's control flow asks for values, it is run for real on a copy of its buffers.
"""

import inspect
import operator
import types
from collections.abc import Callable
from contextlib import AbstractContextManager
from enum import Enum
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import base_types
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from replfx.modules.structure import set_submodule
from replfx.modules.tree import arguments_hold, named_tensors, parts_of, shapes_in, tensors_in
from replfx.torch_internals import SET_GRAD_ENABLED, FakeTensor, LazyGraphModule, functorch_is_active, is_mutable
from replfx.tracing.chance import is_draw, steering
from replfx.tracing.costs import Meter, innermost_path, parameter_count, set_shapes
from replfx.tracing.held import Held
from replfx.tracing.info import CaptureInfo, Cost, Frozen, ModuleCall, OfClass, Place
from replfx.tracing.inputs import Inputs
from replfx.tracing.rebuild import Rebuild
from replfx.tracing.symbolic import flag_path, is_composite, is_leaf, is_small, own_tensors, training_flag
from replfx.tracing.undisturbed import having
from replfx.tracing.watch import (
    ApplyFunction,
    holds_modules,
    is_autocast_node,
    runs_modules,
    watching,
    watching_modules,
)

__all__ = ["HiddenResult", "record"]

_KINDS = ("bool", "int", "float", "complex", "index", "array")
_TO_PYTHON = frozenset(("item", "tolist", "numpy", "is_nonzero", *(f"__{kind}__" for kind in _KINDS)))
_DETACH = torch.ops.aten.detach.default


class HiddenResult(Exception):  # noqa: N818 - not an error: it says how to record
    """A tensor made inside a module that was called whole came out in another way than through its result."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__(kind)
        self.kind = kind


class Recorder(TorchFunctionMode):
    """Records one run of `ghost` into `graph`; see the module's docstring.

    Args:
        ghost: the module to be run.
        held: the parts of the model that `ghost` was copied from, which its code may reach too.
        opened: classes of modules that are not to be called whole.
        real: the run is on real tensors, so constants have to be copied before they are changed in place.
    """

    def __init__(self, ghost: nn.Module, held: Held, opened: frozenset[type[nn.Module]], real: bool) -> None:
        super().__init__()
        self.ghost = ghost
        self.held = held
        self.opened = opened
        self.real = real
        self.meter = Meter(ghost, self.run_operator)
        self.graph = fx.Graph()
        self.nodes: list[fx.Node] = []
        self.calls: list[ModuleCall] = []
        self.notes: list[str] = []
        self.constants: dict[str, Tensor] = {}
        self.flags: dict[str, bool] = {}  # targets of the `training_flag` submodules that the graph needs
        self.frozen: set[Frozen] = set()
        self._node_of: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._cast: list[tuple[Tensor, fx.Node | None]] = []  # what calls gave back as it was, with its node before
        self._hidden: WeakIdKeyDictionary = WeakIdKeyDictionary()  # tensor → path of the module that made it
        self._constant_names: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._names = {**held.names, **{id(t): n for n, t in named_tensors(ghost)}}
        self._targets = frozenset(self._names.values())
        self._modules = list(ghost.modules())  # kept: a model may drop some on the way, and their ids would be others'
        self._paths = {id(m): path for path, m in ghost.named_modules()}
        self._own = {id(m): own_tensors(m) for m in ghost.modules()}
        self._stack: dict[str, tuple[str, type[nn.Module]]] = {}
        self._signatures: dict[Any, inspect.Signature | None] = {}
        self._paused = False
        self._owner = ""  # path of the module that is being called whole
        self._mutated = False
        self._detaching = False
        self._inside = False  # of a Function that runs modules

    # ---- values to nodes

    def node(self, op: str, target: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> fx.Node:
        """Append a node that costs nothing; `bind` says otherwise."""
        made = self.graph.create_node(op, target, args, kwargs or {})
        made.meta["nn_module_stack"] = dict(self._stack)
        made.meta["replfx"] = Cost(innermost_path(made), 0, 0, 0)
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
        indexed = isinstance(value, dict | tuple | list)
        for key, item in parts_of(value):
            if tensors_in(item):
                part = self.node("call_function", operator.getitem if indexed else getattr, (node, key))
                set_shapes(part, item)
                self._bind_parts(part, item)

    def to_nodes(self, tree: Any) -> Any:
        """The same structure of tuples, lists and dicts, with a node for every tensor in it."""
        if isinstance(tree, Tensor):
            return self._node_for(tree)
        if isinstance(tree, dict):
            return {key: self.to_nodes(item) for key, item in tree.items()}
        if isinstance(tree, slice):
            return slice(self.to_nodes(tree.start), self.to_nodes(tree.stop), self.to_nodes(tree.step))
        if isinstance(tree, torch.Size):
            return tuple(tree)
        if isinstance(tree, tuple) and hasattr(tree, "_fields"):
            return tuple.__new__(type(tree), [self.to_nodes(item) for item in tree])
        if isinstance(tree, tuple | list):
            kind = tuple if type(tree) is tuple else list
            return kind(self.to_nodes(item) for item in tree)
        if (found := OfClass.of(tree, self.to_nodes)) is not None:
            return found
        # An object, such as a cache of keys and values, is kept in mind by its class: it may get fake tensors yet.
        return tree if _is_plain(tree) or isinstance(tree, Enum) or not hasattr(tree, "__dict__") else type(tree)

    def to_arguments(self, tree: Any) -> Any:
        """What a node's arguments can hold: other objects are put together by nodes of their own."""
        if isinstance(tree, Tensor):
            return self._node_for(tree)
        if isinstance(tree, fx.Node):  # a training flag
            return tree
        if isinstance(tree, torch.Size):
            return tuple(tree)
        if type(tree) in (tuple, list):
            return type(tree)(self.to_arguments(item) for item in tree)
        if type(tree) is dict and all(isinstance(key, str) for key in tree):
            return {key: self.to_arguments(item) for key, item in tree.items()}
        if isinstance(tree, slice):
            return slice(*(self.to_arguments(part) for _, part in parts_of(tree)))
        if _is_plain(tree):
            return tree
        rebuild = Rebuild(tree)
        return self.node("call_function", rebuild, tuple(self._node_for(t) for t in rebuild.forget()))

    def _node_for(self, tensor: Tensor) -> fx.Node:
        node: fx.Node | None = self._node_of.get(tensor)
        if node is None:
            name = self._names.get(id(tensor)) or self._constant(tensor)
            node = self.node("get_attr", name)
            with self._pause():
                node.meta["replfx"] = Cost(innermost_path(node), parameter_count(self.ghost, node), 0, 0)
                set_shapes(node, tensor)
            self._node_of[tensor] = node
        return node

    def _constant(self, tensor: Tensor) -> str:
        """The name under which a tensor that no node made is kept, as it is when it is first seen."""
        name: str | None = self._constant_names.get(tensor)
        if name is None:
            owner = self._hidden.get(tensor)
            if owner:
                raise HiddenResult(type(self.ghost.get_submodule(owner)))
            self.held.check(tensor)
            if isinstance(tensor, FakeTensor):
                raise RuntimeError("a fake tensor of unknown origin")
            name = self._constant_names[tensor] = f"_tensor_constant{len(self.constants)}"
            with self._pause():
                self.constants[name] = tensor.detach().clone() if self.real else tensor
        return name

    def _keep_constants(self, tree: object) -> None:
        """Copy the constants among the arguments before a call can change them."""
        if self.real:
            for tensor in tensors_in(tree):
                if tensor not in self._node_of and id(tensor) not in self._names:
                    self._constant(tensor)

    # ---- what happens to nodes

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types_: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if self._paused or is_autocast_node(func):
            return func(*args, **kwargs)
        if functorch_is_active():  # the tensors are wrapped: what happens is seen below, by `run_operator`
            with having(self, _detaching=self._detaching or func in (Tensor.detach, torch.detach)):
                return func(*args, **kwargs)
        self._note_freezing(func, args)
        target = _target(func)
        if target is None or (self._inside and func is SET_GRAD_ENABLED):  # one of the interpreter's own questions
            return func(*args, **kwargs)
        self._keep_constants((args, kwargs))
        self._mutated = False
        with self._pause():
            result = func(*args, **kwargs)
        if self._mutated or target[1] in (_set_attribute, SET_GRAD_ENABLED) or tensors_in(result):
            args, kwargs = self._follow_training(func, args, kwargs)
            op, name, extra = target
            if op == "call_method" and not isinstance(args[0], Tensor):
                op, name = "call_function", func  # `1 / x` as a method of x
            if not self._mutated and isinstance(result, Tensor) and any(result is given for given in args):
                self._cast.append((result, self._node_of.get(result)))
            self.bind(self.node(op, name, (*self.to_arguments(args), *extra), self.to_arguments(kwargs)), result)
        return result

    def _note_freezing(self, func: Callable[..., Any], args: tuple[Any, ...]) -> None:
        """Python code asks for a tensor's value; on fakes it gets only what was drawn, or what it gave itself."""
        if getattr(func, "__name__", "") in _TO_PYTHON:
            chance = steering()
            if (chance is not None and chance.has_drawn()) or (self.real and self._is_variable(args[0])):
                self.frozen.add("values of tensors")

    def _is_variable(self, tensor: Tensor) -> bool:
        """Whether an input or the model's state takes part in it."""
        if tensor not in self._node_of:
            return id(tensor) in self._names
        above, seen = [self._node_of[tensor]], set[fx.Node]()
        while above:
            node = above.pop()
            if node.op in ("placeholder", "call_module") or (node.op == "get_attr" and node.target in self._targets):
                return True
            above += [other for other in node.all_input_nodes if other not in seen]
            seen.update(above)
        return False

    def run_operator(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call an operator; one that no recorded call is about becomes a node itself."""
        self._mutated |= is_mutable(func)
        if self.real and is_draw(func) and (chance := steering()) is not None:
            chance.steer_torch(kwargs.get("generator"))
        if self._paused:
            result = func(*args, **kwargs)
            if self._owner:
                for tensor in tensors_in(result):
                    self._hidden[tensor] = self._owner
            return result
        self._keep_constants((args, kwargs))
        with self._pause():
            result = func(*args, **kwargs)
        if func is _DETACH and not self._detaching:
            # Autograd's own: another object for what is the same to a reader of the graph.
            if args[0] in self._node_of or id(args[0]) in self._names:
                self._node_of[result] = self._node_for(args[0])
        elif is_mutable(func) or tensors_in(result):
            self.bind(self.node("call_function", func, self.to_arguments(args), self.to_arguments(kwargs)), result)
        return result

    def _follow_training(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Let an argument `training`, as `F.dropout` has, follow the module that the call is made in."""
        signature = self._signature_with_training(func)
        if signature is None:
            return args, kwargs
        path = str(next(reversed(self._stack.values()))[0]) if self._stack else ""
        bound = signature.bind(*args, **kwargs)
        if bound.arguments.get("training") is not self.ghost.get_submodule(path).training:
            return args, kwargs
        target = flag_path(path)
        self.flags[target] = self.ghost.get_submodule(path).training
        bound.arguments["training"] = self.node("call_module", target)
        return bound.args, bound.kwargs

    def _signature_with_training(self, func: Callable[..., Any]) -> inspect.Signature | None:
        if not isinstance(func, types.FunctionType):
            return None
        if func not in self._signatures:
            try:
                signature = inspect.signature(func)
            except ValueError:  # a wrapper around a builtin, as `Tensor.__rpow__`
                self._signatures[func] = None
            else:
                self._signatures[func] = signature if "training" in signature.parameters else None
        return self._signatures[func]

    # ---- modules

    def module_call(self, module: nn.Module, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A module is called: one node if it is a leaf, else what happens inside it."""
        path = self._paths.get(id(module))
        if path is None and (path := self.held.path_of(module)) is not None:
            module = self.ghost.get_submodule(path)
        if path is None or self._paused or functorch_is_active():
            return call(module, *args, **kwargs)
        record = ModuleCall(path, self.to_nodes(args), self.to_nodes(kwargs), len(self.nodes))
        record.held = self._held((args, kwargs))
        key = path if path not in self._stack else f"{path}@{len(self._stack)}"
        self._stack[key], casts = (path, type(module)), len(self._cast)
        try:
            if self._is_whole(path, module, (args, kwargs)):
                result = self._whole_call(path, module, call, args, kwargs)
            else:
                result = call(module, *args, **kwargs)
        finally:
            self._stack.pop(key)
        self._uncast(casts, result)
        record.stop, record.output = len(self.nodes), self.to_nodes(result)
        record.fill(self._held((args, kwargs)))
        self.calls.append(record)
        return result

    def _uncast(self, start: int, result: object) -> None:
        """After a call: what a cast in it gave back as it was is for others what it was before, and no part of it."""
        given = {id(tensor) for tensor in tensors_in(result)}
        for tensor, before in reversed(self._cast[start:]):
            if before is not None and id(tensor) not in given:
                self._node_of[tensor] = before
        del self._cast[start:]

    def _held(self, arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> dict[Place, fx.Node]:
        """What the objects among a call's arguments hold, as far as nodes made it."""
        return {place: node for place, t in arguments_hold(arguments) if (node := self._node_of.get(t)) is not None}

    def _is_whole(self, path: str, module: nn.Module, arguments: tuple[Any, Any]) -> bool:
        """Whether the call can be one node: it computes with its own tensors, on what a graph can hold.

        The model itself never is one, even if it has no submodules but only parameters.
        """
        if not path or type(module) in self.opened or is_composite(module):
            return False
        if not (is_leaf(module) or (is_small(module) and _reads_training(module) and not _are_alike(arguments))):
            return False
        own = all(own_tensors(part) == self._own.get(id(part)) for part in module.modules())
        return own and not holds_modules(arguments)

    def _whole_call(self, path: str, module: nn.Module, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        self._keep_constants((args, kwargs))
        self._mutated = False
        given = [(t, node) for t in tensors_in((args, kwargs)) if (node := self._node_of.get(t)) is not None]
        with self._pause(), having(self, _owner=path):
            result = call(module, *args, **kwargs)
        self.bind(self.node("call_module", path, self.to_arguments(args), self.to_arguments(kwargs)), result)
        if not isinstance(result, Tensor) and not self._mutated:
            self._node_of.update(given)  # what it hands through beside its result is what it was given
        return result

    # ---- what is watched besides

    def applied(self, function: type[torch.autograd.Function], call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A custom autograd function: one node, with its own backward, unless it runs modules."""
        if self._paused or functorch_is_active():
            return call(*args, **kwargs)
        if runs_modules(function, (args, kwargs)):
            with having(self, _inside=True):  # it runs with gradients turned off; what is recorded must have them
                return call(*args, **kwargs)
        self._keep_constants((args, kwargs))
        with self._pause():
            result = call(*args, **kwargs)
        node_args, node_kwargs = self.to_arguments(args), self.to_arguments(kwargs)
        self.bind(self.node("call_function", ApplyFunction(function), node_args, node_kwargs), result)
        return result

    def entered(self, target: Callable[..., Any], args: tuple[Any, ...]) -> object:
        return None if self._paused else self.node("call_function", target, args)

    def left(self, entry: object, target: Callable[..., Any]) -> None:
        if isinstance(entry, fx.Node):
            self.node("call_function", target, (entry,))

    def rewrapped(self, tensor: Tensor, kind: type[Tensor], result: Tensor) -> None:
        if not self._paused:
            self.bind(self.node("call_method", "as_subclass", self.to_arguments((tensor, kind))), result)

    def without_hooks(self) -> AbstractContextManager[None]:
        return self.meter.without_hooks()

    def _pause(self) -> AbstractContextManager[None]:
        return having(self, _paused=True)


def _target(func: Callable[..., Any]) -> tuple[str, Any, tuple[Any, ...]] | None:
    """The fx op and target of a torch function, with what is to follow its arguments."""
    name = getattr(func, "__name__", "")
    if name == "__get__":  # a property of a tensor, such as x.T: kept only if it gives a tensor
        return "call_function", getattr, (func.__self__.__name__,)  # type: ignore[attr-defined]
    wrapped = getattr(func, "__wrapped__", None)
    if isinstance(wrapped, types.MethodDescriptorType) and getattr(Tensor, name, None) is not func:
        # `Tensor.__rpow__` and its like call themselves by the name of what they wrap.
        name = next((n for n, value in vars(Tensor).items() if value is func), name)
    if name == "__set__":
        return "call_function", _set_attribute, (func.__self__.__name__,)  # type: ignore[attr-defined]
    if name in ("__delete__", "__repr__", "__len__", "__bool__", "__format__", "__hash__"):
        return None
    if name in ("__setitem__", "__getitem__"):
        return "call_function", getattr(operator, name), ()
    if isinstance(func, types.MethodDescriptorType | types.WrapperDescriptorType) or (
        getattr(Tensor, name, None) is func
    ):
        return "call_method", name, ()
    return "call_function", func, ()


def _reads_training(module: nn.Module) -> bool:
    """Whether the code of its `forward` names `training`: then only calling it whole follows the mode."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "training" in code.co_names


def _are_alike(arguments: object) -> bool:
    """Whether two activations of one shape go in: one may be added to what is made of the other."""
    shapes = [(t.shape, t.dtype) for t in tensors_in(arguments) if t.is_floating_point() and t.dim() > 1]
    return len(set(shapes)) < len(shapes)


def _set_attribute(tensor: Tensor, value: object, name: str) -> None:
    """`tensor.name = value`, in the order in which a setter's arguments come."""
    setattr(tensor, name, value)


def _is_plain(value: object) -> bool:
    """Whether source code can spell it."""
    return value is None or value is Ellipsis or (type(value) in base_types and not isinstance(value, Tensor))


def record(
    root: nn.Module,
    ghost: nn.Module,
    inputs: Inputs,
    held: Held,
    *,
    opened: frozenset[type[nn.Module]],
    real: bool,
) -> fx.GraphModule:
    """Run `ghost` on `inputs` and give what happened as a graph over `root`.

    Args:
        root: the structural copy that the GraphModule will hold.
        ghost: a copy of the same structure to run, on fake or on real tensors.
        inputs: the example inputs, as fake or as real as `ghost`.
        held: the parts of the model itself.
        opened: classes of modules to look into, however small they are.
        real: whether the tensors are real ones.

    Raises:
        HiddenResult: a module has to be looked into.
        HeldElsewhereError: the code reaches parts of what the model was copied from.
    """
    recorder = Recorder(ghost, held, opened, real)
    with recorder.meter:
        for index, tensor in enumerate(inputs.tensors()):
            recorder.bind(recorder.node("placeholder", f"input_{index}"), tensor)
        with torch.enable_grad(), recorder, watching(recorder), watching_modules(recorder.module_call):
            result = ghost(*inputs.args, **inputs.kwargs)
        recorder.graph.output(_output(recorder, result))
    for name, tensor in recorder.constants.items():
        root.register_buffer(name, tensor, persistent=False)
    for target, training in recorder.flags.items():
        set_submodule(root, target, training_flag(training))
    graph_module = LazyGraphModule(root, recorder.graph, type(root).__name__)
    graph_module.meta["replfx"] = CaptureInfo(
        "recorded",
        root,
        recorder.nodes,
        recorder.calls,
        recorder.notes,
        measured=True,
        outputs=shapes_in(result),
        frozen=recorder.frozen,
    )
    return graph_module


def _output(recorder: Recorder, result: object) -> Any:
    if _has_plain_leaves(result):
        return recorder.to_arguments(result)
    recorder.notes.append(f"the output, a {type(result).__name__}, is given as a list of its tensors")
    return [recorder._node_for(tensor) for tensor in tensors_in(result)]


def _has_plain_leaves(value: object) -> bool:
    if isinstance(value, nn.Module) or callable(value):
        return False
    return not tensors_in(value) or all(_has_plain_leaves(part) for _, part in parts_of(value))
