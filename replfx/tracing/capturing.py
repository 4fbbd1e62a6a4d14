"""From any model to one torch.fx.GraphModule: symbolic tracing first, recording where that stops."""

import inspect
from collections.abc import Callable, Iterator
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx, nn

from replfx.errors import CaptureError
from replfx.modules.copying import structural_copy
from replfx.modules.tree import leaf_copy, shapes_in, tensors_in
from replfx.torch_internals import FakeTensor, FakeTensorMode, is_mutable, pytree
from replfx.tracing.chance import Draws, Steering, is_draw, restart, steered, steered_generators, steering
from replfx.tracing.costs import Meter, annotate, innermost_path, parameter_count, parameters_read
from replfx.tracing.held import Held, HeldElsewhereError
from replfx.tracing.info import Cost, Look, info_of
from replfx.tracing.inputs import ExampleInputs, Inputs, check_is_whole
from replfx.tracing.leaks import Traces
from replfx.tracing.recorder import HiddenResult, record
from replfx.tracing.symbolic import trace_symbolically
from replfx.tracing.undisturbed import undisturbed

__all__ = ["capture", "capture_lazily", "ghost_of", "real_twin"]


def capture(model: nn.Module, example_inputs: ExampleInputs | None = None) -> fx.GraphModule:
    """Capture `model` as a graph whose nodes know their module path, shapes, parameters and cost.

    Symbolic tracing comes first; it is free of the batch size and needs no inputs. Where the model's Python
    code stops it, the model is run once on the example inputs, under fake tensors if its control flow
    allows, and what happens is recorded; such a graph holds for inputs of the same shapes.

    Args:
        model: any module, in training or evaluation mode; it is not changed, and its hooks do not fire.
        example_inputs: a tensor, a tuple of positional inputs, or a dict of keyword inputs.

    Returns:
        A GraphModule that shares the parameters and buffers of `model`. `node.meta["shape"]` and
        `["dtype"]` describe each node's result (with example inputs), `node.meta["replfx"]` is its `Cost`,
        and `graph_module.meta["replfx"]` the `CaptureInfo` with every module call. Dropout, drop-path and
        BatchNorm keep following `graph_module.train()` and `.eval()`.

    Raises:
        CaptureError: the model does not run on the inputs; it needs example inputs and has none; its
            weights are on the meta device.

    Example:
        >>> graph = replfx.capture(torchvision.models.resnet18(), torch.rand(1, 3, 224, 224))
        >>> sum(n.meta["replfx"].flops for n in graph.graph.nodes if "replfx" in n.meta)
        3628146688
    """
    lazy = capture_lazily(model, example_inputs)
    root = info_of(lazy).root
    graph_module = fx.GraphModule(root, lazy.graph, type(root).__name__)
    graph_module.meta.update(lazy.meta)
    return graph_module


def capture_lazily(
    model: nn.Module, example_inputs: ExampleInputs | None = None, original: nn.Module | None = None
) -> fx.GraphModule:
    """Capture as `capture` does; Python code is generated only when the graph is run.

    For passes: torch.fx generates and compiles the code of the whole graph after each, for nobody.

    Args:
        model: as for `capture`.
        example_inputs: as for `capture`.
        original: what `model` was copied from, of which its code may reach nothing.
    """
    check_is_whole(model)
    inputs = Inputs.of(example_inputs, model)
    with undisturbed(model):
        return _fullest(model, inputs, Held(model, original))


def _fullest(model: nn.Module, inputs: Inputs | None, held: Held) -> fx.GraphModule:
    """The capture of the look that sees the most of the model: chance may skip some of it in another one."""
    first, drawn = _look(model, inputs, held, Look(Draws.HIGH, model.training))
    if not drawn or _seen(first)[0] == len(list(model.parameters())):
        return first
    return max((first, *_other_looks(model, inputs, held, first)), key=_seen)  # the first of equals


def _other_looks(
    model: nn.Module, inputs: Inputs | None, held: Held, first: fx.GraphModule
) -> Iterator[fx.GraphModule]:
    """One capture with low draws; if it differs from the first, chance decides: then one in evaluation mode too."""
    decides = False
    for look in (Look(Draws.LOW, model.training), Look(Draws.HIGH, False)):
        if look.draws is Draws.LOW or (decides and model.training):
            try:
                other, _ = _look(model, inputs, held, look)
            except CaptureError:  # with less of its blocks it need not run
                continue
            decides = decides or _seen(other) != _seen(first)
            yield other


def _seen(graph_module: fx.GraphModule) -> tuple[int, int]:
    """How many of the parameters a capture has seen, and how many calls."""
    info = info_of(graph_module)
    read = {id(parameter) for node in graph_module.graph.nodes for parameter in parameters_read(info.root, node)}
    return len(read), len(info.calls)


def _look(model: nn.Module, inputs: Inputs | None, held: Held, look: Look) -> tuple[fx.GraphModule, bool]:
    """A capture, and whether random numbers were drawn that its code could see."""
    seen = model if look.training == model.training else structural_copy(model, plain=_same).train(look.training)
    traces = Traces(model)
    try:
        with steered(look.draws, model) as steering:
            made = _symbolic(seen, None, traces) if inputs is None else _measured(seen, inputs, held, traces)
            info, drawn = info_of(made), steering.has_drawn()
            info.look = look
            if steering.has_drawn_in_python():
                info.frozen.add("random numbers")
    finally:
        traces.close()
    if seen is not model:
        _put_in_mode_of(model, info.root)
    return made, drawn


def _put_in_mode_of(model: nn.Module, root: nn.Module) -> None:
    """Give each module of a copy the mode that it has in the model; one that was added, that of its parent."""
    modes = {path: module.training for path, module in model.named_modules()}
    for path, module in root.named_modules():
        modes.setdefault(path, modes[path.rpartition(".")[0]] if path else model.training)
        module.training = modes[path]


def _symbolic(model: nn.Module, inputs: Inputs | None, traces: Traces | None) -> fx.GraphModule:
    root = structural_copy(model)
    restart()
    try:
        graph_module = trace_symbolically(root, inputs, traces)
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} cannot be captured without example inputs, because symbolic tracing "
            f"stops at: {_first_line(error)}. Pass example_inputs=(a tensor, a tuple or a dict)"
        ) from error
    for node in graph_module.graph.nodes:
        node.meta["replfx"] = Cost(innermost_path(node), parameter_count(root, node))
    return graph_module


def _measured(model: nn.Module, inputs: Inputs, held: Held, traces: Traces) -> fx.GraphModule:
    try:
        return symbolic_on_fakes(model, inputs, traces)
    except Exception:  # any reason will do: the recorder is the answer to all of them
        pass
    traces.clear()
    return _recorded(model, inputs, held, traces)


def symbolic_on_fakes(model: nn.Module, inputs: Inputs, traces: Traces | None = None) -> fx.GraphModule:
    """Symbolic tracing; the graph is measured and held against the model: same inputs, same output, same costs."""
    graph_module = _symbolic(model, inputs, traces)
    info, expected = info_of(graph_module), _fake_run(model, inputs, traces)
    mode, ghost, fakes = ghost_of(info.root, inputs, traces)
    with mode, torch.enable_grad():
        output = annotate(graph_module, ghost, _bind_to_placeholders(graph_module, model, fakes))
    costs = [node.meta["replfx"] for node in graph_module.graph.nodes if node.op != "output"]
    actual = (_facts(output), sum(cost.flops for cost in costs), sum(cost.saved_bytes for cost in costs))
    if actual != expected:
        raise CaptureError(f"the symbolic graph gives {actual}, the model {expected}")
    info.measured, info.outputs = True, shapes_in(output)
    return graph_module


def _bind_to_placeholders(graph_module: fx.GraphModule, model: nn.Module, inputs: Inputs) -> tuple[object, ...]:
    """The inputs in the order of the graph's placeholders, which bear the names of forward's parameters."""
    bound = inspect.signature(model.forward).bind(*inputs.args, **inputs.kwargs).arguments
    names = [str(node.target) for node in graph_module.graph.nodes if node.op == "placeholder"]
    return tuple(bound[name] for name in names)


class _NotedFakes(FakeTensorMode):
    """Tells `traces` what it makes."""

    def __init__(self, traces: Traces | None) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.traces = traces

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = MappingProxyType({})) -> Any:
        result = super().dispatch(func, types, args, kwargs)
        if is_draw(func) and (chance := steering()) is not None and isinstance(result, FakeTensor):
            result = self._drawn(chance, result, func, args, kwargs)
        if self.traces is not None:
            self.traces.note(result)
        return result

    def _drawn(self, chance: Steering, result: FakeTensor, func: Any, args: object, kwargs: object) -> FakeTensor:
        """The result of a draw, with its value if it is a single one: a model may ask for it, to skip a block."""
        given = [arg.constant for arg in pytree.tree_leaves((args, kwargs)) if isinstance(arg, FakeTensor)]
        if result.numel() != 1 or result.device.type != "cpu" or is_mutable(func) or None in given:
            return result
        real = pytree.tree_map_only(FakeTensor, lambda tensor: tensor.constant, (args, kwargs))
        return self.fake_tensor_converter.from_real_tensor(self, chance.draw(func, *real), make_constant=True)


def ghost_of(
    model: nn.Module, inputs: Inputs, traces: Traces | None = None
) -> tuple[FakeTensorMode, nn.Module, Inputs]:
    """A fake mode, the structure of `model` with fake tensors in it, and fake inputs for it."""
    mode = _NotedFakes(traces)
    # Plain attributes stay as they are: an operator on them gives a fake tensor, and so keeps them unchanged.
    ghost = structural_copy(model, mode.from_tensor, plain=_same, given=steered_generators(model))
    return mode, ghost, inputs.map(mode.from_tensor)


def real_twin(model: nn.Module, inputs: Inputs) -> tuple[nn.Module, Inputs]:
    """A copy of a model to be run for real, with the same parameters and buffers of its own; and inputs for it."""

    def own(tensor: Tensor) -> Tensor:
        return tensor if isinstance(tensor, nn.Parameter) else leaf_copy(tensor)

    return structural_copy(model, own, given=steered_generators(model)), inputs.map(leaf_copy)


def _fake_run(model: nn.Module, inputs: Inputs, traces: Traces | None) -> tuple[object, int, int]:
    """Run `model` under fake tensors: facts of its output, FLOPs and saved bytes, at no compute and no memory."""
    mode, ghost, fakes = ghost_of(model, inputs, traces)
    restart()
    with mode, torch.enable_grad(), Meter(ghost) as meter:
        output = ghost(*fakes.args, **fakes.kwargs)
        return _facts(output), *meter.take()


def _recorded(model: nn.Module, inputs: Inputs, held: Held, traces: Traces) -> fx.GraphModule:
    try:
        return record_on_fakes(model, inputs, traces, held)
    except HeldElsewhereError:
        raise
    except Exception:  # values are needed, or an operator has no fake form: run it for real
        pass
    traces.close()
    try:
        return record_on_values(model, inputs, held)
    except HeldElsewhereError:
        raise
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} does not run on the example inputs in "
            f"{'training' if model.training else 'evaluation'} mode: {_first_line(error)}"
        ) from error


def record_on_fakes(model: nn.Module, inputs: Inputs, traces: Traces, held: Held) -> fx.GraphModule:
    """Recording on fake tensors: no compute, no memory."""

    def attempt(opened: frozenset[type[nn.Module]]) -> fx.GraphModule:
        mode, ghost, fakes = ghost_of(model, inputs, traces)
        root = structural_copy(model, plain=_same)
        restart()
        with mode:
            return record(root, ghost, fakes, held, opened=opened, real=False)

    return _opening(attempt)


def record_on_values(model: nn.Module, inputs: Inputs, held: Held) -> fx.GraphModule:
    """Recording a real run, on copies of the buffers and of the inputs."""

    def attempt(opened: frozenset[type[nn.Module]]) -> fx.GraphModule:
        ghost, given = real_twin(model, inputs)
        restart()
        return record(structural_copy(model), ghost, given, held, opened=opened, real=True)

    return _opening(attempt)


def _opening(attempt: Callable[[frozenset[type[nn.Module]]], fx.GraphModule]) -> fx.GraphModule:
    """Record; again, if a module that was called whole has to be looked into."""
    opened: frozenset[type[nn.Module]] = frozenset()
    while True:
        try:
            return attempt(opened)
        except HiddenResult as hidden:
            if hidden.kind in opened:
                raise
            opened |= {hidden.kind}


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _facts(tree: object) -> list[tuple[object, ...]]:
    return [(tuple(t.shape), t.dtype, t.requires_grad) for t in tensors_in(tree)]


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
