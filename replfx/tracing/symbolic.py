"""The first rung: symbolic tracing with a tracer of ours. Needs no inputs, is free of the batch size.

Two things beside torch.fx's own tracer. Every module call is recorded, so that passes can speak of blocks.
And `module.training` is not frozen into the graph: reading it gives a call to a `TrainingFlag` submodule,
so that `F.dropout(x, p, self.training)` goes on following `train()` and `eval()`; a small module whose
Python code branches on it becomes a leaf and is called as it is.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import ParameterProxy, Proxy
from torch.utils import _pytree as pytree

from replfx.tracing.info import CaptureInfo, ModuleCall
from replfx.tracing.inputs import Inputs

__all__ = ["TrainingFlag", "is_leaf", "is_small", "trace_symbolically"]


class TrainingFlag(nn.Module):
    """Gives its own `training`, as a node of the graph."""

    def forward(self) -> bool:
        return self.training


def is_leaf(module: nn.Module) -> bool:
    """Modules that are called as they are: torch.nn's own (but containers), scripted ones, those without parts."""
    if isinstance(module, torch.jit.ScriptModule):
        return True
    if isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        return False
    return not module._modules or type(module).__module__.startswith(("torch.nn", "torch.ao.nn"))


def is_small(module: nn.Module) -> bool:
    """No submodule of it has parts of its own: calling it whole hides no block."""
    return all(is_leaf(child) for child in module.children())


class _UntraceableError(Exception):
    """Something that symbolic tracing cannot represent, found by us rather than by torch.fx."""


class SymbolicTracer(fx.Tracer):
    """torch.fx's tracer, which also records module calls and keeps `training` symbolic."""

    def __init__(self, inputs: Inputs | None, whole: frozenset[str]) -> None:
        super().__init__(param_shapes_constant=True)
        self.inputs = inputs
        self.whole = whole
        self.calls: list[ModuleCall] = []
        self.nodes: list[fx.Node] = []
        self.branched: set[str] = set()  # paths of modules whose code branches on `training`
        self._flags: dict[str, nn.Module] = {}
        self._parameter_names: dict[int, str] = {}

    def prepare(self, root: nn.Module) -> None:
        """Index the parameters by identity: torch.fx searches all of them at each access."""
        self._parameter_names = {id(p): n for n, p in root.named_parameters()}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name in self.whole or is_leaf(m)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        self.nodes.append(node)
        return node

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Proxy]) -> Any:
        name = self._parameter_names.get(id(attr_val)) if isinstance(attr_val, nn.Parameter) else None
        if name is None:
            return attr_val
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = self.create_proxy(
                "get_attr",
                name,
                (),
                {},
                proxy_factory_fn=lambda node: ParameterProxy(self, node, name, attr_val),
            )
        return parameter_proxy_cache[name]

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        call = ModuleCall(self.path_of_module(m), _to_nodes(args), _to_nodes(kwargs), len(self.nodes))
        result = super().call_module(m, forward, args, kwargs)
        call.stop, call.output = len(self.nodes), _to_nodes(result)
        self.calls.append(call)
        return result

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
                raise _UntraceableError(f"input `{name}` is a {type(value).__name__}, not a tensor")
        return set(bound)

    def training_of(self, module: nn.Module) -> Any:
        """What a traced module reads as its `training`."""
        path = self.path_of_module(module)
        flag = self._flags.get(path)
        if flag is None:
            flag = self._flags[path] = TrainingFlag()
            flag.train(module.__dict__["training"])
            module._modules["training_flag"] = flag
            assert self.submodule_paths is not None
            self.submodule_paths[flag] = f"{path}.training_flag" if path else "training_flag"
        return self.create_proxy("call_module", f"{path}.training_flag" if path else "training_flag", (), {})

    def to_bool(self, obj: Proxy) -> bool:
        target = str(obj.node.target)
        if obj.node.op == "call_module" and target.split(".")[-1] == "training_flag":
            path = target.rpartition(".")[0]
            self.branched.add(path)
            return self._flags[path].training
        return super().to_bool(obj)


def _to_nodes(tree: Any) -> Any:
    return pytree.tree_map(lambda leaf: leaf.node if isinstance(leaf, Proxy) else leaf, tree)


@contextmanager
def _symbolic_training(root: nn.Module, tracer: SymbolicTracer) -> Iterator[None]:
    """While open, `module.training` of every module that is traced through asks the tracer.

    A property on the class wins over the instance's attribute, so each module gets a subclass of its own
    class for as long as the trace lasts.
    """
    changed: list[tuple[nn.Module, type[nn.Module]]] = []
    twins: dict[type[nn.Module], type[nn.Module]] = {}
    for path, module in root.named_modules():
        if isinstance(module, torch.jit.ScriptModule) or (path and tracer.is_leaf_module(module, path)):
            continue
        cls = type(module)
        if cls not in twins:
            fields = {"training": property(tracer.training_of), "__module__": cls.__module__}
            twins[cls] = type(cls.__name__, (cls,), fields)
        changed.append((module, cls))
    try:
        for module, cls in changed:
            module.__class__ = twins[cls]
        yield
    finally:
        for module, cls in changed:
            module.__class__ = cls


def trace_symbolically(root: nn.Module, inputs: Inputs | None) -> fx.GraphModule:
    """Trace `root` (a structural copy; it gains `training_flag` submodules) into a GraphModule.

    Raises whatever torch.fx raises when the model's Python code cannot be traced.
    """
    whole: frozenset[str] = frozenset()
    while True:
        tracer = SymbolicTracer(inputs, whole)
        tracer.prepare(root)
        with _symbolic_training(root, tracer):
            graph = tracer.trace(root)
        found = {p for p in tracer.branched if p and is_small(root.get_submodule(p))} - whole
        if not found:
            break
        whole |= found
        for path in found:
            root.get_submodule(path)._modules.pop("training_flag", None)
    for node in reversed(graph.nodes):
        if node.op == "call_module" and str(node.target).endswith("training_flag") and not node.users:
            graph.erase_node(node)
    graph_module = fx.GraphModule(root, graph, type(root).__name__)
    alive = set(graph.nodes)
    notes = [
        f"`{p or type(root).__name__}` branches on `training`: captured as it is now" for p in sorted(tracer.branched)
    ]
    info = CaptureInfo("symbolic", root, tracer.nodes, tracer.calls, notes)
    _drop_dead(info, alive)
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
