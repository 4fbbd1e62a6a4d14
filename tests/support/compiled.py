"""Models that the backend compiled, with a look at what it made of their graphs."""

from __future__ import annotations

import copy
import operator
import re
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.registry import lookup_backend

import replfx
from tests.support.compare import assert_close, assert_same_gradients, loss_of, run
from tests.support.models import tower
from tests.support.strategies import randomize

OPERATION = "synthesize"


class Compiled:
    """`model` compiled in one graph by the backend; `graphs` are those that reached the inner compiler, `calls` how
    often each was called since, and `batches` how many syntheses each batched one in them made."""

    def __init__(self, model: nn.Module, inner: str = "eager", *, dynamic: bool | None = None, **options: Any) -> None:
        torch.compiler.reset()
        self.model, self.inner = model, inner
        self.graphs: list[fx.GraphModule] = []
        self.calls: list[int] = []
        self.batches: list[list[int]] = []
        backend = replfx.backend(inner=self._compile, **options)
        self.compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)

    def _compile(self, graph_module: fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
        index = len(self.graphs)
        self.graphs.append(graph_module)
        self.calls.append(0)
        self.batches.append(batches(graph_module))  # now: Inductor rewrites the graph
        made: Any = lookup_backend(self.inner)(graph_module, list(inputs))

        def run(*args: Any) -> Any:
            self.calls[index] += 1
            return made(*args)

        return run

    def __call__(self, *args: Any) -> Any:
        return self.compiled(*args)


def batches(graph_module: fx.GraphModule) -> list[int]:
    """How many syntheses each batched one in the graph makes."""
    found = [node for node in graph_module.graph.nodes if OPERATION in str(node.target)]
    return [len(node.args[0]) for node in found if node.op == "call_function"]


def products(graph_module: fx.GraphModule) -> int:
    """Multiplications left in the graph: two of each synthesis that is not batched, and the model's own."""
    return sum(node.target is operator.mul for node in graph_module.graph.nodes)


X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


def captured(model: nn.Module, x: Tensor = X) -> tuple[fx.GraphModule, list[Tensor]]:
    """Dynamo's graph, as a backend gets it, and what it is called with."""
    found: list[tuple[fx.GraphModule, list[Tensor]]] = []

    def keep(graph_module: fx.GraphModule, inputs: list[Tensor]) -> Any:
        found.append((graph_module, list(inputs)))
        return graph_module.forward

    torch.compile(model, backend=keep, fullgraph=True)(x)
    (only,) = found
    return only


def graph_of(model: nn.Module, x: Tensor = X) -> fx.GraphModule:
    """Dynamo's graph, as a backend gets it."""
    return captured(model, x)[0]


def small(length: int = 7, **options: Any) -> nn.Module:
    """Three replaced blocks of seven, each with two synthesised weights of 16×8 floats: 512 bytes."""
    return replfx.transform(tower(length), **options)


def forward_and_backward(model: nn.Module, x: Tensor, **options: Any) -> dict[str, fx.GraphModule]:
    """The graphs that AOTAutograd makes of a forward, and of its backward pass, after the backend's passes."""
    found: dict[str, fx.GraphModule] = {}

    def compiler(name: str) -> Any:
        def keep(graph_module: fx.GraphModule, inputs: Any) -> Any:
            found[name] = graph_module
            return make_boxed_func(graph_module.forward)

        return keep

    inner = aot_autograd(fw_compiler=compiler("forward"), bw_compiler=compiler("backward"))
    torch.compile(model, backend=replfx.backend(inner=inner, **options))(x).sum().backward()
    return found


def noting(graphs: list[fx.GraphModule]) -> Callable[..., Any]:
    """An inner compiler that notes what reaches it, and runs it as it is."""

    def inner(graph_module: fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
        graphs.append(graph_module)
        return graph_module.forward

    return inner


def replacing(
    model: Any, inner: Any = "aot_eager", *, fullgraph: bool = True, dynamic: bool | None = None, **options: Any
) -> tuple[Any, Any]:
    """The compiled model and its backend, afresh."""
    torch.compiler.reset()
    backend = replfx.backend(inner=inner, **options)
    return torch.compile(model, backend=backend, fullgraph=fullgraph, dynamic=dynamic), backend


def paths(backend: Any) -> list[str]:
    return [replacement.path for replacement in backend.plan.replacements]


needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="Inductor needs a compiler"
)


def by_block(blocks: list[nn.Module], x: Tensor) -> nn.Module:
    """Every second one replaced by its own computation."""
    model = nn.Sequential(*blocks)
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.1, 0.1)
    return replfx.transform(model.double(), x, operator="block")


def as_in_eager_mode(model: nn.Module, x: Tensor, **options: Any) -> Compiled:
    """Outputs and gradients, and twice the outputs without gradients."""
    compiled = Compiled(model, "aot_eager", **options)
    found = []
    for call in (compiled, model):
        model.zero_grad()
        y = call(x)
        y.square().sum().backward()
        with torch.no_grad():
            found.append((y, call(x), call(x), [p.grad for p in model.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)  # float64, through five blocks; sums in another order
    return compiled


def in_graph(name: str, blocks: list[str]) -> str:
    """A name of the transformed model's, as the plain model or its backend has it."""
    for block in blocks:
        window = re.fullmatch(r"(.*)\[(\d+):\d+\]", block)
        head = block if window is None else f"{window[1]}.{window[2]}".strip(".")
        if name.startswith(f"{head}.replfx."):
            return block + name.removeprefix(head)
    return name


def assert_is_what_transform_makes(
    model: nn.Module, inputs: Callable[[], tuple[Tensor, ...]], policy: dict[str, Any]
) -> None:
    """Outputs, buffers and all gradients of `model`, replaced in Dynamo's graph and by `transform`.

    `transform` itself is held against a reference elsewhere.
    """
    transformed = replfx.transform(copy.deepcopy(model), inputs(), **policy)
    compiled, backend = replacing(model, "eager", **policy)
    state = copy.deepcopy(model.state_dict())  # the first call is there for the coefficients alone
    compiled(*inputs())
    model.load_state_dict(state)
    replaced = replfx.report(transformed).replaced
    assert [path[1:] for path in paths(backend)] == replaced
    randomize(transformed, 2)
    names = {name: in_graph(name, replaced) for name in transformed.state_dict()}
    mine = {**dict(model.named_parameters()), **dict(model.named_buffers()), **dict(backend.named_parameters())}
    with torch.no_grad():
        for name, tensor in transformed.state_dict().items():
            mine[names[name]].copy_(tensor)
    expected, wanted = run(transformed, inputs())
    given = inputs()
    result = compiled(*given)
    assert_close(result, expected[0], "output")
    loss_of([result]).backward()
    found = {name: given[0].grad if name == "input" else mine[names[name]].grad for name in wanted}
    assert_same_gradients(found, wanted)
    for name, buffer in transformed.named_buffers():
        torch.testing.assert_close(mine[in_graph(name, replaced)], buffer)
