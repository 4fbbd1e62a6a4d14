"""The GraphModule that is left once regions of a graph are replaced; and the regions put back into it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.overrides import handle_torch_function, has_torch_function

from replfx.errors import CaptureError
from replfx.modules.paths import ancestors
from replfx.modules.structure import attribute_at
from replfx.modules.tree import inner_path
from replfx.regions.region import Region, put_value, root_of
from replfx.tracing import Limits
from replfx.tracing.symbolic import training_flag

__all__ = ["Rewritten", "limit", "restore_region", "without_regions"]


class Rewritten(fx.GraphModule):
    """A GraphModule that can be pickled although modules in it refer to it: it owns parameters that they read.

    torch.fx gives pickle all that is in the module as arguments of a function, before there is a module to refer to.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return _unfilled, (), super().__reduce__()

    def __setstate__(self, state: tuple[Callable[..., fx.GraphModule], tuple[Any, ...]]) -> None:
        rebuild, arguments = state
        body = arguments[0]
        made = rebuild(*arguments)
        self.__dict__.update(made.__dict__)
        # What torch.fx does not restore: what the model remembers of itself, and its hooks.
        self.__dict__.update({name: body[name] for name in body if name == "meta" or name.endswith("_hooks")})
        type(self).__name__ = type(made).__name__
        self.recompile()

    def become_plain(self) -> None:
        """Become a GraphModule of torch's own class, which needs no replfx."""
        for node in self.graph.find_nodes(op="call_function", target=_check):
            node.target = torch._assert
        name = type(self).__name__
        self.__class__ = type(fx.GraphModule.__new__(fx.GraphModule))  # type: ignore[assignment]
        type(self).__name__ = name
        self.recompile()


def _unfilled() -> Rewritten:
    return Rewritten.__new__(Rewritten)


def _check(condition: Any, message: str) -> Any:
    """As `torch._assert`, with an error of ours."""
    if has_torch_function((condition,)):  # it is being traced
        return handle_torch_function(_check, (condition,), condition, message)
    if not condition:
        raise CaptureError(message)
    return None


fx.node.has_side_effect(_check)


def limit(graph_module: fx.GraphModule, limits: Limits) -> None:
    """Let a graph check, whenever it runs, that it holds for its inputs and in its mode."""
    graph = graph_module.graph
    inputs = graph.find_nodes(op="placeholder")
    with graph.inserting_before(next(node for node in graph.nodes if node.op != "placeholder")):
        for node, sizes in zip(inputs, limits.shapes or (), strict=limits.shapes is not None):
            for dimension, size in enumerate(sizes):
                if size is not None:
                    found = graph.call_method("size", (node, dimension))
                    _compare(graph, found, size, _WRONG_SIZE.format(dimension, node.target, size))
        if limits.training is not None:
            if not hasattr(graph_module, "training_flag"):
                graph_module.add_module("training_flag", training_flag(limits.training))
            mode = "training" if limits.training else "evaluation"
            _compare(graph, graph.call_module("training_flag"), limits.training, _WRONG_MODE.format(mode))
    graph_module.recompile()


def _compare(graph: fx.Graph, found: fx.Node, wanted: int, message: str) -> None:
    graph.call_function(_check, (graph.call_function(operator.eq, (found, wanted)), message))


_WRONG_SIZE = (
    "dimension {} of `{}` has to be {}, as it was when the model was recorded: its Python code would compute another "
    "thing for another size, or does not run. Transform it with inputs of that size"
)
_WRONG_MODE = (
    "the model was captured in {} mode and holds in no other: its Python code branches on `training`. Transform a "
    "model in the other mode for that"
)


def without_regions(graph_module: fx.GraphModule, replaced: Sequence[Region]) -> Rewritten:
    """Make a fresh GraphModule of a rewritten graph, without the state that only `replaced` regions read.

    Everything else that the model keeps in its `state_dict` is there under its own name, whether or not the
    graph reads it; so are the modules that were put in. Containers (`nn.ParameterList`) become plain modules.
    Tensors and called modules are shared with `graph_module`. The result knows nothing of its capture; it can be
    copied and pickled as far as torch.fx can: unpickling traces the code again, which runs calls that read no
    value of the graph (such as `torch.zeros(3)`, or `set_grad_enabled`) once and for all.

    Args:
        graph_module: after `replace_regions`.
        replaced: the regions that it replaced.
    """
    root = root_of(graph_module)
    graph = fx.Graph()  # one that knows no tracer class, so that unpickling takes torch.fx's own
    graph.output(graph.graph_copy(graph_module.graph, {}))
    fresh = Rewritten(graph_module, graph, type(root).__name__)
    _keep_state(fresh, root, replaced)
    return fresh


def _keep_state(fresh: fx.GraphModule, root: nn.Module, replaced: Sequence[Region]) -> None:
    """Register what no node reads, and let no buffer be saved that the model does not save."""
    gone = {path for region in replaced for path in (*region.parameters.values(), *region.buffers.values())}
    called = {path for region in replaced for path in region.modules.values()}
    called |= {str(node.target) for node in fresh.graph.nodes if node.op == "call_module"}  # they bring their own
    saved: set[str] = set()
    for prefix, module in root.named_modules(remove_duplicate=False):
        for name, value in (*module._parameters.items(), *module._buffers.items()):
            if value is None or name in module._non_persistent_buffers_set:
                continue
            path = inner_path(prefix, name)
            saved.add(path)
            if path not in gone and called.isdisjoint((prefix, *ancestors(prefix))):
                _register(fresh, path, value)
    for node in fresh.graph.nodes:
        if node.op == "get_attr" and str(node.target) not in saved:
            prefix, _, name = str(node.target).rpartition(".")
            owner = fresh.get_submodule(prefix)
            if name in owner._buffers:  # a constant, which torch.fx makes a buffer
                owner._non_persistent_buffers_set.add(name)


def _register(module: nn.Module, path: str, value: object) -> None:
    """Put a parameter, a buffer or a module at `path` unless something is there, with plain modules on the way."""
    *prefix, name = path.split(".")
    for item in prefix:
        if item not in module._modules:
            module.add_module(item, nn.Module())
        module = module.get_submodule(item)
    if not hasattr(module, name):
        put_value(module, name, value)


def restore_region(graph_module: fx.GraphModule, path: str, region: fx.GraphModule, names: Mapping[str, str]) -> None:
    """Let a region's nodes take the place of the call of the module that replaced it, in place.

    Args:
        graph_module: the graph.
        path: the module that replaced the region; it is gone afterwards.
        region: the region as a module.
        names: where its parameters, buffers and called modules were in the model, by their names in `region`.
    """
    graph = graph_module.graph
    for call in graph.find_nodes(op="call_module", target=path):
        copied = dict(zip(region.graph.find_nodes(op="placeholder"), call.args, strict=True))
        with graph.inserting_before(call):
            output = graph.graph_copy(region.graph, copied)
        for node, twin in copied.items():
            if node.op in ("get_attr", "call_module"):
                twin.target = names[str(node.target)]
        call.replace_all_uses_with(output)
        graph.erase_node(call)
    delattr(graph_module, path)
    for name, home in names.items():
        if "." not in name:  # else it comes with its module
            _register(graph_module, home, attribute_at(region, name))
    graph_module.recompile()
