"""A replaced block that Dynamo runs eagerly in a call of the compiled model is an error, whatever made it do so."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import replfx
from tests.support.compiled import noting, replacing
from tests.support.models import GPT, ConvNet, Mlp, Products, Row, Tower, tower
from tests.support.slow import some_slow

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Changing(Row):
    """A chain that a flag breaks: after the first block, or in the second."""

    def __init__(self) -> None:
        super().__init__(*(Mlp() for _ in range(5)))
        self.broken = self.direct = False

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            if self.broken and i == 1:
                torch._dynamo.graph_break()
            x = block.forward(x) if self.direct else block(x)
        return x


def begun(model: Any, x: Tensor, *, fullgraph: bool = False, **options: Any) -> tuple[Any, Any]:
    """The model compiled and called once, with coefficients that are nothing like their start."""
    compiled, backend = replacing(model, "eager", fullgraph=fullgraph, every=2, **options)
    compiled(x)
    with torch.no_grad():
        for parameter in backend.parameters():
            parameter.fill_(3.0)
    return compiled, backend


def rows(count: int = 4) -> Tensor:
    return torch.randn(count, 8)


def calls(compiled: Any, inputs: Iterator[Any]) -> list[Any]:
    """The results, or the errors."""
    found: list[Any] = []
    for x in inputs:
        try:
            found.append(compiled(x))
        except replfx.CompileError as error:
            found.append(error)
    return found


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "modules": (lambda: Tower(*(Mlp() for _ in range(5))), lambda n: torch.randn(n, 4)),
    "direct forward": (lambda: _direct(Changing()), rows),
    "windows": (lambda: nn.Sequential(*(m for _ in range(5) for m in (nn.Linear(8, 8), nn.ReLU()))), rows),
    "attention": (lambda: GPT(depth=3), lambda n: torch.zeros(1, n, dtype=torch.long)),
    "convolutions": (lambda: ConvNet(depth=4), lambda n: torch.randn(n, 3, 8, 8)),
}

SLOW = {"attention", "convolutions", "modules"}


def _direct(model: Any) -> nn.Module:
    model.direct = True
    return model


@pytest.mark.parametrize("name", some_slow(MODELS, SLOW))
def test_past_the_limit_of_recompilations_a_call_is_an_error(name: str) -> None:
    make, given = MODELS[name]
    model = make().train(name not in ("attention", "windows"))
    with torch._dynamo.config.patch(recompile_limit=2):
        compiled, _ = begun(model, given(2), dynamic=False)
        found = calls(compiled, (given(n) for n in range(3, 6)))
    assert [isinstance(each, replfx.CompileError) for each in found] == [False, True, True]
    assert "is replaced, but here Dynamo runs it as it is" in str(found[-1])
    assert "2 times, which is its limit" in str(found[-1])
    assert "dynamic=True" in str(found[-1])
    assert "replfx.transform" in str(found[-1])
    torch.testing.assert_close(compiled(given(2)).shape, model(given(2)).shape)  # what was compiled goes on


def test_past_the_limit_of_all_recompilations() -> None:
    with torch._dynamo.config.patch(accumulated_recompile_limit=2):
        compiled, _ = begun(Changing(), rows(2), dynamic=False)
        found = calls(compiled, (rows(n) for n in (3, 4)))
    assert [isinstance(each, replfx.CompileError) for each in found] == [False, True]


def test_in_one_graph_dynamo_says_so_itself() -> None:
    with torch._dynamo.config.patch(recompile_limit=2):
        compiled, _ = begun(Changing(), rows(2), dynamic=False, fullgraph=True)
        compiled(rows(3))
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            compiled(rows(4))


@pytest.mark.parametrize("suppress", [True, False])
def test_a_block_that_a_graph_break_leaves_outside_later(suppress: bool) -> None:
    model = Changing()
    compiled, _ = begun(model, rows())
    model.broken = True
    with (
        torch._dynamo.config.patch(suppress_errors=suppress),
        pytest.raises(replfx.CompileError, match=r"`@blocks\.1` (is|was) replaced"),
    ):
        compiled(rows())


def test_an_error_that_is_suppressed_is_named() -> None:
    model = Changing()
    compiled, _ = begun(model, rows(), dynamic=False)
    model.blocks[2].extra = nn.Parameter(torch.zeros(8))  # it reads other parameters than before
    model.blocks[2].register_forward_hook(lambda module, args, y: y + module.extra)
    torch.compiler.reset()
    with (
        torch._dynamo.config.patch(suppress_errors=True),
        pytest.raises(replfx.CompileError, match="an error was suppressed"),
    ):
        compiled(rows())


@pytest.mark.parametrize("stance", ["force_eager", "eager_on_recompile"])
def test_a_stance_is_named(stance: Any) -> None:
    compiled, _ = begun(Changing(), rows(), dynamic=False)
    stances: AbstractContextManager[Any] = torch.compiler.set_stance(stance)
    with stances, pytest.raises(replfx.CompileError, match=rf"set_stance\('{stance}'\)"):
        compiled(rows(7))


@pytest.mark.parametrize("part", ["blocks.1", "blocks.3.fc1"])
def test_a_block_that_is_switched_off_later(part: str) -> None:
    model = Changing()
    compiled, _ = begun(model, rows())
    module: Any = model.get_submodule(part)
    module.forward = torch.compiler.disable(module.forward)
    with pytest.raises(replfx.CompileError, match=r"`@blocks\.\d` (is|was) replaced"):
        compiled(rows())


@pytest.mark.slow
@pytest.mark.parametrize("how", ["in place", "in a function", "twice"])
def test_it_does_not_matter_how_the_model_is_compiled(how: str) -> None:
    model, backend = Changing(), replfx.backend(every=2, inner="eager")
    compiled: Any = model
    if how == "in place":
        model.compile(backend=backend, dynamic=False)
    elif how == "in a function":
        compiled = torch.compile(lambda x: model(x), backend=backend, dynamic=False)
    else:
        compiled = torch.compile(model, backend=backend, dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=3):
        found = calls(compiled, (rows(n) for n in range(2, 5)))
        if how == "twice":
            compiled = torch.compile(model, backend=backend, dynamic=False)
        found += calls(compiled, (rows(n) for n in range(5, 7)))
    assert [isinstance(each, replfx.CompileError) for each in found] == [False, False, False, True, True]


def test_blocks_that_nothing_would_tell_of_need_one_graph() -> None:
    with pytest.raises(replfx.CompileError, match=r"`@w\.1` is no call of a module.*fullgraph=True"):
        begun(Products(width=8), rows())
    with torch._dynamo.config.patch(recompile_limit=2):
        compiled, backend = begun(Products(width=8), rows(2), dynamic=False, fullgraph=True)
        assert len(backend.plan.replacements) == 2
        compiled(rows(3))
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            compiled(rows(4))


# ---- what stays as it was


def test_the_model_alone_its_copies_and_its_pickles_run_as_they_are() -> None:
    model, x = tower(5), torch.randn(2, 4)
    expected = model(x)
    begun(model, x)
    data = pickle.dumps(model.blocks[1]._forward_pre_hooks)
    assert b"replfx" not in data
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(each(x), expected)
        assert torch.equal(each.blocks[1](torch.ones(2, 8)), model.blocks[1](torch.ones(2, 8)))


@pytest.mark.slow
def test_another_backend_may_run_the_model_eagerly() -> None:
    model, x = Changing(), rows(2)
    begun(model, x)
    torch.compiler.reset()
    other = torch.compile(model, backend="eager", dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=2):
        for n in range(2, 6):
            x = rows(n)
            assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("skip", [True, False])
def test_the_watch_compiles_nothing_anew(skip: bool) -> None:
    graphs: list[Any] = []
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=skip):
        compiled = torch.compile(Changing(), backend=replfx.backend(every=2, inner=noting(graphs)), fullgraph=True)
        for _ in range(3):
            compiled(rows())
    assert len(graphs) == 1


def test_nothing_is_watched_if_the_backend_refuses() -> None:
    model = Changing()
    with torch.no_grad():
        model.blocks[2].fc1.weight[0, 0] = torch.nan
    with pytest.raises(replfx.CompileError, match="not finite"):
        begun(model, rows())
    assert not any(module._forward_pre_hooks for module in model.modules())
