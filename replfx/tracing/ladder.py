"""From any model to one torch.fx.GraphModule: symbolic tracing first, recording where that stops."""

import inspect
import logging
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from replfx.errors import CaptureError
from replfx.structure import structural_copy
from replfx.tracing.costs import Meter, annotate, innermost_path, parameter_count
from replfx.tracing.info import Cost, info_of
from replfx.tracing.inputs import ExampleInputs, Inputs, check_is_whole
from replfx.tracing.leaks import Traces
from replfx.tracing.recorder import HiddenResult, record
from replfx.tracing.symbolic import trace_symbolically
from replfx.tree import shapes_in, tensors_in

__all__ = ["capture", "capture_lazily", "ghost_of"]


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


def capture_lazily(model: nn.Module, example_inputs: ExampleInputs | None = None) -> fx.GraphModule:
    """Capture as `capture` does; Python code is generated only when the graph is run.

    For passes: torch.fx generates and compiles the code of the whole graph after each, for nobody.
    """
    check_is_whole(model)
    inputs = Inputs.of(example_inputs, model)
    with (
        torch.random.fork_rng(devices=_cuda_devices(model)),
        _python_random_states(),
        _quiet(),
        torch.inference_mode(False),
    ):
        traces = Traces(model)
        try:
            return _symbolic(model, None, traces)[0] if inputs is None else _measured(model, inputs, traces)
        finally:
            traces.close()


def _symbolic(
    model: nn.Module, inputs: Inputs | None, traces: Traces | None = None
) -> tuple[fx.GraphModule, nn.Module]:
    root = structural_copy(model)
    try:
        graph_module = trace_symbolically(root, inputs, traces)
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} cannot be captured without example inputs, because symbolic tracing "
            f"stops at: {_first_line(error)}. Pass example_inputs=(a tensor, a tuple or a dict)"
        ) from error
    for node in graph_module.graph.nodes:
        node.meta["replfx"] = Cost(innermost_path(node), parameter_count(root, node))
    return graph_module, root


def _measured(model: nn.Module, inputs: Inputs, traces: Traces) -> fx.GraphModule:
    try:
        return symbolic_on_fakes(model, inputs, traces)
    except Exception:  # any reason will do: the recorder is the answer to all of them
        pass
    traces.clear()
    return _recorded(model, inputs, traces)


def symbolic_on_fakes(model: nn.Module, inputs: Inputs, traces: Traces | None = None) -> fx.GraphModule:
    """The first rung, with inputs to measure on."""
    graph_module, root = _symbolic(model, inputs, traces)
    _measure(graph_module, root, model, inputs, traces)
    return graph_module


def _measure(
    graph_module: fx.GraphModule, root: nn.Module, model: nn.Module, inputs: Inputs, traces: Traces | None
) -> None:
    """Annotate a symbolic graph, and hold it against the model itself: same inputs, same output, same costs."""
    expected = _fake_run(model, inputs, traces)
    mode, ghost, fakes = ghost_of(root, inputs, traces)
    with mode, torch.enable_grad():
        by_name = _bind_to_placeholders(graph_module, model, fakes)
        output = annotate(graph_module, ghost, by_name)
    costs = [node.meta["replfx"] for node in graph_module.graph.nodes if node.op != "output"]
    actual = (_facts(output), sum(cost.flops for cost in costs), sum(cost.saved_bytes for cost in costs))
    if actual != expected:
        raise CaptureError(f"the symbolic graph gives {actual}, the model {expected}")
    info = info_of(graph_module)
    info.measured, info.outputs = True, shapes_in(output)


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

    def dispatch(self, *args: Any, **kwargs: Any) -> Any:
        result = super().dispatch(*args, **kwargs)
        if self.traces is not None:
            self.traces.note(result)
        return result


def ghost_of(
    model: nn.Module, inputs: Inputs, traces: Traces | None = None
) -> tuple[FakeTensorMode, nn.Module, Inputs]:
    """A fake mode, the structure of `model` with fake tensors in it, and fake inputs for it."""
    mode = _NotedFakes(traces)
    # Plain attributes stay as they are: an operator on them gives a fake tensor, and so keeps them unchanged.
    return mode, structural_copy(model, mode.from_tensor, plain=lambda t: t), inputs.map(mode.from_tensor)


def _fake_run(model: nn.Module, inputs: Inputs, traces: Traces | None) -> tuple[object, int, int]:
    """Run `model` under fake tensors: facts of its output, FLOPs and saved bytes, at no compute and no memory."""
    mode, ghost, fakes = ghost_of(model, inputs, traces)
    with mode, torch.enable_grad(), Meter((*ghost.parameters(), *ghost.buffers())) as meter:
        output = ghost(*fakes.args, **fakes.kwargs)
        return _facts(output), *meter.take()


def _recorded(model: nn.Module, inputs: Inputs, traces: Traces) -> fx.GraphModule:
    try:
        return record_on_fakes(model, inputs, traces)
    except Exception:  # values are needed, or an operator has no fake form: run it for real
        pass
    traces.close()
    try:
        return record_on_values(model, inputs)
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} does not run on the example inputs in "
            f"{'training' if model.training else 'evaluation'} mode: {_first_line(error)}"
        ) from error


def record_on_fakes(model: nn.Module, inputs: Inputs, traces: Traces | None = None) -> fx.GraphModule:
    """The second rung: no compute, no memory."""

    def attempt(opened: frozenset[type[nn.Module]]) -> fx.GraphModule:
        mode, ghost, fakes = ghost_of(model, inputs, traces)
        root = structural_copy(model, plain=lambda t: t)
        with mode:
            return record(root, ghost, fakes, opened=opened)

    return _opening(attempt)


def record_on_values(model: nn.Module, inputs: Inputs) -> fx.GraphModule:
    """The last rung: a real run, on copies of the buffers and of the inputs."""

    def attempt(opened: frozenset[type[nn.Module]]) -> fx.GraphModule:
        ghost = structural_copy(model, lambda t: t if isinstance(t, nn.Parameter) else t.clone())
        return record(structural_copy(model), ghost, inputs.map(_twin), opened=opened, real=True)

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


def _twin(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def _facts(tree: object) -> list[tuple[object, ...]]:
    return [(tuple(t.shape), t.dtype, t.requires_grad) for t in tensors_in(tree)]


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


@contextmanager
def _python_random_states() -> Iterator[None]:
    """Put back the random states of Python and, if it was imported, of numpy."""
    numpy = sys.modules.get("numpy")
    state, numpy_state = random.getstate(), numpy.random.get_state() if numpy else None
    try:
        yield
    finally:
        random.setstate(state)
        if numpy:
            numpy.random.set_state(numpy_state)


@contextmanager
def _quiet() -> Iterator[None]:
    """What fails under fake tensors is tried again for real: PyTorch need not print it."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def _cuda_devices(model: nn.Module) -> list[torch.device]:
    return sorted({p.device for p in model.parameters() if p.device.type == "cuda"}, key=str)
