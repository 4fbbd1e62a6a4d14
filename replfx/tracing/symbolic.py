"""Symbolic tracing with a tracer of ours. Needs no inputs, is free of the batch size.

Two things beside torch.fx's own tracer. Every module call is recorded, so that passes can speak of blocks.
And `module.training` is not frozen into the graph: reading it gives a call to a `training_flag` submodule,
so that `F.dropout(x, p, self.training)` goes on following `train()` and `eval()`; a small module whose
Python code branches on it becomes a leaf and is called as it is.
"""

import inspect
import operator
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import ParameterProxy, Proxy
from torch.overrides import TorchFunctionMode

from replfx.modules.structure import class_of
from replfx.modules.tree import arguments_hold, inner_path, named_tensors
from replfx.torch_internals import SET_GRAD_ENABLED, LazyGraphModule, pytree
from replfx.tracing.info import FLAG, CaptureInfo, ModuleCall, OfClass, Place, is_flag
from replfx.tracing.inputs import Inputs
from replfx.tracing.leaks import Traces
from replfx.tracing.undisturbed import having
from replfx.tracing.watch import ApplyFunction, runs_modules, watching

__all__ = ["flag_path", "is_composite", "is_leaf", "is_small", "own_tensors", "trace_symbolically", "training_flag"]

_DRAWS = frozenset((torch.rand, torch.randn, torch.randint, torch.randperm, torch.normal, torch.bernoulli))
_DRAWS_IN_PLACE = frozenset(("bernoulli_", "exponential_", "geometric_", "normal_", "random_", "uniform_"))


def training_flag(training: bool) -> nn.Module:
    """A module that gives its own `training`, as a node of the graph.

    It is made of PyTorch's and Python's own parts: so what is materialized of a graph needs no replfx.
    """
    flag = nn.Module().train(training)
    flag.forward = partial(getattr, flag, "training")
    return flag


def flag_path(path: str) -> str:
    """Where the flag of the module at `path` is."""
    return inner_path(path, FLAG)


def is_leaf(module: nn.Module) -> bool:
    """Modules that are called as they are: torch.nn's own (but containers), scripted ones, those without parts."""
    if isinstance(module, torch.jit.ScriptModule):
        return True
    if _is_container(module) or is_composite(module):
        return False
    return not module._modules or class_of(module).__module__.startswith(("torch.nn", "torch.ao.nn"))


def _is_container(module: nn.Module) -> bool:
    return issubclass(class_of(module), nn.Sequential | nn.ModuleList | nn.ModuleDict)


def is_composite(module: nn.Module) -> bool:
    """One of torch.nn's modules whose parts have parts: a transformer or a layer of one, which holds blocks or is one.

    It computes the same in both modes; what it asks of `training` is whether it may take a faster way.
    """
    own = class_of(module).__module__.startswith("torch.nn.modules.") and not _is_container(module)
    return own and any(child._modules for child in module.children())


def is_small(module: nn.Module) -> bool:
    """No submodule of it has parts of its own: calling it whole hides no block."""
    return all(is_leaf(child) for child in module.children())


def own_tensors(module: nn.Module) -> tuple[int, ...]:
    """Which tensors `module` itself holds, by identity; `torch.func.functional_call` swaps them for others."""
    if isinstance(module, torch.jit.ScriptModule):
        return ()
    return tuple(map(id, (*module._parameters.values(), *module._buffers.values())))


class _InPlace:
    """`x += 1` as a node that changes x; torch.fx's own proxies make it `x = x + 1`, which leaves views of x alone."""

    def __setitem__(self: Any, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})


def _in_place(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def method(self: Any, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor"):
    setattr(_InPlace, f"__{_name}__", _in_place(getattr(operator, _name)))


class _Proxy(_InPlace, Proxy):
    """A proxy that knows of updates in place."""


class _TensorProxy(_InPlace, ParameterProxy):
    """Stands for a parameter or buffer, of which everything but the values is known."""

    def __init__(self, tracer: fx.Tracer, node: fx.Node, name: str, tensor: Tensor) -> None:
        Proxy.__init__(self, node, tracer)
        self.param = tensor  # type: ignore[assignment]
        self.name = name

    @property
    def device(self) -> torch.device:
        return self.param.device

    @property
    def dtype(self) -> torch.dtype:
        return self.param.dtype


class _UntraceableError(Exception):
    """Something that symbolic tracing cannot represent, found by us rather than by torch.fx."""


class SymbolicTracer(fx.Tracer):
    """torch.fx's tracer, which also records module calls and keeps `training` symbolic.

    Args:
        root: the model; its buffers become nodes too, so that an update in place is part of the graph and does not
            happen while tracing.
        inputs: what the graph will be called with, if that is known.
        whole: paths of modules that are called as they are.
        traces: is told of each proxy.
    """

    def __init__(self, root: nn.Module, inputs: Inputs | None, whole: frozenset[str], traces: Traces | None) -> None:
        super().__init__(param_shapes_constant=True)
        self.traces = traces
        self._thread = threading.get_ident()
        self.inputs = inputs
        self.whole = whole
        self.calls: list[ModuleCall] = []
        self.nodes: list[fx.Node] = []
        self.branched: set[str] = set()  # paths of modules whose code branches on `training`
        self._flags: dict[str, nn.Module] = {}
        # By identity: torch.fx searches all parameters at each access.
        self._names = {id(t): n for n, t in named_tensors(root)}
        self._own = {id(m): own_tensors(m) for m in root.modules()}
        self.inside = False  # of a Function that runs modules; autograd turns gradients off, the graph must not

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name in self.whole or is_leaf(m)

    def proxy(self, node: fx.Node) -> Proxy:
        made = _Proxy(node, self)
        if self.traces is not None:
            self.traces.note(made)
        return made

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        self.nodes.append(node)
        return node

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Proxy]) -> Any:
        name = self._names.get(id(attr_val)) if isinstance(attr_val, Tensor) else None
        if name is None or threading.get_ident() != self._thread:
            return attr_val
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = self.create_proxy(
                "get_attr",
                name,
                (),
                {},
                proxy_factory_fn=lambda node: _TensorProxy(self, node, name, attr_val),
            )
        return parameter_proxy_cache[name]

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if threading.get_ident() != self._thread:  # torch.fx patches the whole process
            return forward(*args, **kwargs)
        path = self.path_of_module(m)
        if self.is_leaf_module(m, path) and any(own_tensors(p) != self._own.get(id(p)) for p in m.modules()):
            raise _UntraceableError(f"other tensors than its own in `{path}` while it is called")
        call = ModuleCall(path, _to_nodes(args), _to_nodes(kwargs), len(self.nodes), held=_held((args, kwargs)))
        result = super().call_module(m, forward, args, kwargs)
        call.stop, call.output = len(self.nodes), _to_nodes(result)
        call.fill(_held((args, kwargs)))
        self.calls.append(call)
        return result

    # ---- what is watched besides

    def applied(self, function: type[torch.autograd.Function], call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A custom autograd function: one node, with its own backward, unless it runs modules."""
        if not any(isinstance(leaf, Proxy) for leaf in pytree.tree_leaves((args, kwargs))):
            return call(*args, **kwargs)
        if runs_modules(function, (args, kwargs)):
            with having(self, inside=True):
                return call(*args, **kwargs)
        return self.create_proxy("call_function", ApplyFunction(function), args, kwargs)

    def entered(self, target: Callable[..., Any], args: tuple[Any, ...]) -> object:
        return self.create_proxy("call_function", target, args, {})

    def left(self, entry: object, target: Callable[..., Any]) -> None:
        self.create_proxy("call_function", target, (entry,), {})

    def rewrapped(self, tensor: Tensor, kind: type[Tensor], result: Tensor) -> None:
        """The tensor is a constant, so the call is no part of the graph."""

    def without_hooks(self) -> AbstractContextManager[None]:
        return nullcontext()

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """A placeholder for every input that is given or required; the others keep their defaults.

        torch.fx's own version makes a placeholder of `mask=None` too, and `if mask is not None` then
        silently takes the wrong branch.
        """
        del is_module, concrete_args
        parameters = list(inspect.signature(inspect.unwrap(root_fn)).parameters.values())[1:]
        given = self._given(parameters)
        names, proxies = [], []
        for parameter in parameters:
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                continue
            if parameter.name in given or parameter.default is parameter.empty:
                default = () if parameter.default is parameter.empty else (parameter.default,)
                names.append(parameter.name)
                proxies.append(self.create_proxy("placeholder", parameter.name, default, {}))

        def call(*values: Any) -> Any:
            return root_fn(self.root, **dict(zip(names, values, strict=True)))

        return call, proxies

    def _given(self, parameters: list[inspect.Parameter]) -> set[str]:
        if self.inputs is None:
            return set()
        signature = inspect.Signature(parameters)
        bound = signature.bind(*self.inputs.args, **self.inputs.kwargs).arguments
        kinds = {p.name: p.kind for p in parameters}
        if any(kinds[n] in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD) for n in bound):
            raise _UntraceableError("inputs that go through *args or **kwargs")
        for name, value in bound.items():
            if not isinstance(value, Tensor):
                raise _UntraceableError(f"input `{name}` is of type {type(value).__name__}, not a tensor")
        return set(bound)

    def training_of(self, module: nn.Module) -> Any:
        """What a traced module reads as its `training`."""
        path = self.path_of_module(module)
        flag = self._flags.get(path)
        if flag is None:
            flag = self._flags[path] = training_flag(module.__dict__["training"])
            module._modules[FLAG] = flag
            assert self.submodule_paths is not None
            self.submodule_paths[flag] = flag_path(path)
        return self.create_proxy("call_module", flag_path(path), (), {})

    def to_bool(self, obj: Proxy) -> bool:
        if is_flag(obj.node):
            path = str(obj.node.target).rpartition(".")[0]
            self.branched.add(path)
            return self._flags[path].training
        return super().to_bool(obj)


class _WithoutProxies(TorchFunctionMode):
    """Puts into the graph what no proxy takes part in: `torch.no_grad()` and its like, and drawn numbers."""

    def __init__(self, tracer: SymbolicTracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is SET_GRAD_ENABLED and not self.tracer.inside:
            self.tracer.create_proxy("call_function", func, args, {})
        if func in _DRAWS:
            return self.tracer.create_proxy("call_function", func, args, kwargs or {})
        if getattr(func, "__name__", "") in _DRAWS_IN_PLACE:
            raise _UntraceableError("random numbers drawn into a tensor that no input takes part in")
        return func(*args, **(kwargs or {}))


def _to_nodes(tree: Any) -> Any:
    def convert(leaf: Any) -> Any:
        found = leaf.node if isinstance(leaf, Proxy) else OfClass.of(leaf, _to_nodes)
        return leaf if found is None else found

    return pytree.tree_map(convert, tree)


def _held(arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> dict[Place, fx.Node]:
    return {place: proxy.node for place, proxy in arguments_hold(arguments, Proxy)}


@contextmanager
def _symbolic_training(root: nn.Module, tracer: SymbolicTracer) -> Iterator[None]:
    """While open, `module.training` of every module that is traced through asks the tracer.

    A property on the class wins over the instance's attribute, so each module gets a subclass of its own
    class for as long as the trace lasts.
    """
    changed = [
        (module, type(module))
        for path, module in root.named_modules()
        if not isinstance(module, torch.jit.ScriptModule) and not (path and tracer.is_leaf_module(module, path))
    ]
    training = property(tracer.training_of)
    twins = {
        cls: type(cls.__name__, (cls,), {"training": training, "__module__": cls.__module__})
        for cls in {cls for _, cls in changed}
    }
    try:
        for module, cls in changed:
            module.__class__ = twins[cls]
        yield
    finally:
        for module, cls in changed:
            module.__class__ = cls


class _State:
    """What the modules of a model held before its code ran: attributes that the code makes lazily have to go again."""

    def __init__(self, root: nn.Module) -> None:
        self._before = [
            (module, dict(vars(module)), [(store, dict(store)) for store in _stores(module)])
            for module in root.modules()
            if not isinstance(module, torch.jit.ScriptModule)
        ]

    def restore(self, *, only_proxies: bool = False) -> None:
        """Put everything back, or only what proxies have taken the place of."""
        for module, attributes, stores in self._before:
            for holder, before in [(vars(module), attributes), *stores]:
                for name in [n for n, value in holder.items() if value is not before.get(n, holder)]:
                    if only_proxies and not any(isinstance(x, Proxy) for x in pytree.tree_leaves(holder[name])):
                        continue
                    if name in before:
                        holder[name] = before[name]
                    else:
                        del holder[name]

    def empty_caches(self) -> None:
        """Take proxies out of dictionaries that are attributes: tables that a module makes when it first runs."""
        for module, attributes, _ in self._before:
            stores = [id(store) for store in _stores(module)]
            for cache in attributes.values():
                if type(cache) is dict and id(cache) not in stores:
                    for key in [k for k, value in cache.items() if isinstance(k, Proxy) or isinstance(value, Proxy)]:
                        del cache[key]


def _stores(module: nn.Module) -> tuple[dict[str, Any], ...]:
    return module._parameters, module._buffers, module._modules


def trace_symbolically(root: nn.Module, inputs: Inputs | None, traces: Traces | None = None) -> fx.GraphModule:
    """Trace `root` (a structural copy; it gains `training_flag` submodules) into a GraphModule.

    Raises whatever torch.fx raises when the model's Python code cannot be traced.
    """
    whole: frozenset[str] = frozenset()
    state, composite = _State(root), {path for path, module in root.named_modules() if path and is_composite(module)}
    while True:
        tracer = SymbolicTracer(root, inputs, whole, traces)
        try:
            with _symbolic_training(root, tracer), watching(tracer), _WithoutProxies(tracer):
                graph = tracer.trace(root)
        except Exception:
            if inputs is not None or composite <= whole:  # with inputs, the recorder looks into these
                raise
            found = composite
        else:
            found = {p for p in tracer.branched if p and is_small(root.get_submodule(p))} - whole - composite
            if not found:
                break
        whole |= found
        state.restore()
    state.restore(only_proxies=True)
    state.empty_caches()
    for node in reversed(graph.nodes):
        if is_flag(node) and not node.users:
            graph.erase_node(node)
    graph_module = LazyGraphModule(root, graph, type(root).__name__)
    notes = [
        f"`{p or type(root).__name__}` branches on `training`: captured as it is now"
        for p in sorted(tracer.branched - composite)
    ]
    info = CaptureInfo("symbolic", root, tracer.nodes, tracer.calls, notes)
    _drop_dead(info, set(graph.nodes))
    graph_module.meta["replfx"] = info
    return graph_module


def _drop_dead(info: CaptureInfo, alive: set[fx.Node]) -> None:
    """Renumber the calls after nodes were erased."""
    kept_before = [0]
    for node in info.nodes:
        kept_before.append(kept_before[-1] + (node in alive))
    info.nodes = [node for node in info.nodes if node in alive]
    for call in info.calls:
        call.start, call.stop = kept_before[call.start], kept_before[call.stop]
