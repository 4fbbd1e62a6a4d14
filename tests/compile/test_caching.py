"""Without gradients the backend synthesises once for each version of the weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import replfx
import replfx.compile
from replfx.compile.caching import Cached
from tests.support.compiled import Compiled
from tests.support.models import Plain, Tower, tower

X = torch.randn(2, 4)


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.fixture(scope="module")
def transformed() -> nn.Module:
    return replfx.transform(tower(), operator="light", neighbour_gradient=0.5)


def keeping(model: nn.Module, inner: str = "eager", **options: Any) -> Compiled:
    return Compiled(model, inner, **{"cache": True, **options})


def evaluated(transformed: nn.Module, **options: Any) -> Compiled:
    """A compiled model that ran twice without gradients: the first graph synthesises, the second is the rest."""
    compiled = keeping(copy.deepcopy(transformed).eval(), **options)
    check(compiled)
    check(compiled)
    return compiled


# Single precision: a norm's weight that is folded into a matrix multiplies in another order. Where weights changed and
# were not made anew, results are off by more than a hundredth.
ROUNDED = {"rtol": 1e-5, "atol": 1e-5}


def check(compiled: Compiled, x: Tensor = X) -> None:
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), compiled.model(x), **ROUNDED)


def test_it_synthesises_once(transformed: nn.Module) -> None:
    compiled = evaluated(transformed)
    assert compiled.batches == [[2, 2], []]
    assert not [n for n in compiled.graphs[1].graph.nodes if "matmul" in str(n.target) or n.target is torch.lerp]
    assert compiled.calls == [1, 2]
    check(compiled)
    assert compiled.calls == [1, 3]
    with torch.inference_mode():
        compiled(X)
    check(compiled)


def test_by_default_nothing_is_kept_so_that_each_write_is_seen(transformed: nn.Module) -> None:
    compiled = Compiled(copy.deepcopy(transformed).eval())
    check(compiled)
    for name, parameter in compiled.model.named_parameters():
        parameter.data.mul_(0.5 if name.endswith("weight") else 2.0)  # as averages and clipping of weights do
        check(compiled)
    assert compiled.batches == [[2, 2]]
    assert compiled.calls == [1 + len(list(compiled.model.parameters()))]


def test_with_gradients_nothing_is_kept(transformed: nn.Module) -> None:
    compiled = keeping(copy.deepcopy(transformed))
    compiled(X)
    compiled(X)
    assert compiled.batches == [[2, 2]]
    assert compiled.calls == [2]


def test_frozen_models_need_no_gradient_either(transformed: nn.Module) -> None:
    compiled = keeping(copy.deepcopy(transformed).requires_grad_(False))
    x = X.clone().requires_grad_()
    for _ in range(2):
        (found,) = torch.autograd.grad(compiled(x).sum(), x)
        (wanted,) = torch.autograd.grad(compiled.model(x).sum(), x)
        assert torch.equal(found, wanted)
    assert compiled.calls == [1, 2]


def _step(model: nn.Module, kind: type[torch.optim.Optimizer], **options: Any) -> None:
    optimizer = kind(model.parameters(), lr=0.1, **options)
    model(X).sum().backward()
    optimizer.step()


class _ThroughData(torch.optim.Optimizer):
    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    def step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.data.add_(parameter.grad, alpha=-group["lr"])


def _compiled_step(model: nn.Module, **options: Any) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, **options)
    model(X).sum().backward()
    torch.compile(optimizer.step, backend="aot_eager")()


def _replace_coefficients(model: Any) -> None:
    fusion = model.blocks[1].replfx.fusion
    fusion.previous = nn.Parameter(torch.full_like(fusion.previous, 0.7))


def _swap_twice(model: Any) -> None:
    """The second time the memory that was freed first may be given out again."""
    for factor in (2.0, 3.0):
        weight = model.blocks[0].fc2.weight
        weight.data = weight.data.clone() * factor


CHANGES: dict[str, Callable[[Any], object]] = {
    "sgd": lambda model: _step(model, torch.optim.SGD),
    "adamw foreach": lambda model: _step(model, torch.optim.AdamW, foreach=True),
    "adamw fused": lambda model: _step(model, torch.optim.AdamW, fused=True),
    "through .data in an optimizer": lambda model: _step(model, _ThroughData),
    "compiled step": _compiled_step,
    "compiled fused step": lambda model: _compiled_step(model, fused=True),
    "load_state_dict": lambda model: model.load_state_dict({k: v * 1.5 for k, v in model.state_dict().items()}),
    "assigned state_dict": lambda model: model.load_state_dict(
        {k: v * 1.5 for k, v in model.state_dict().items()}, assign=True
    ),
    "copy_": lambda model: model.blocks[2].fc2.weight.detach().copy_(torch.ones(8, 16)),
    "through a view": lambda model: model.blocks[2].fc2.weight.detach()[0].zero_(),
    "gain": lambda model: model.blocks[3].replfx.operator.gain.detach().mul_(3),
    "data": _swap_twice,
    "another parameter": _replace_coefficients,
}


@pytest.mark.slow
def test_changes_of_weights_are_seen(transformed: nn.Module) -> None:
    compiled = evaluated(transformed)
    for count, (name, change) in enumerate(CHANGES.items(), 2):
        with torch.no_grad():
            before = compiled(X)
        change(compiled.model)
        with torch.no_grad():
            torch.testing.assert_close(compiled(X), compiled.model(X), **ROUNDED, msg=name)
            assert not torch.equal(compiled(X), before), name
        assert compiled.calls[0] == count, name
    assert len(compiled.graphs) == 2, "nothing was compiled anew"


def test_other_dtypes_are_seen(transformed: nn.Module) -> None:
    compiled = evaluated(transformed)
    compiled.model.to(torch.float64)
    check(compiled, X.double())
    compiled.model.to(torch.float32)
    check(compiled)
    check(compiled)


def test_writes_that_torch_does_not_count_are_told_by_forget(transformed: nn.Module) -> None:
    compiled = evaluated(transformed)
    compiled.model.blocks[0].fc2.weight.data.mul_(2)
    replfx.compile.forget()
    check(compiled)
    assert compiled.calls[0] == 2


def test_two_models_that_share_a_graph_do_not_share_values(transformed: nn.Module) -> None:
    compiled = evaluated(transformed)
    other = copy.deepcopy(compiled.model)
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    with torch.no_grad():
        found = torch.func.functional_call(compiled.compiled._orig_mod, dict(other.named_parameters()), (X,))
        assert torch.equal(found, other(X))
        weights = {f"_orig_mod.{name}": p for name, p in other.named_parameters()}
        found = torch.func.functional_call(compiled.compiled, weights, (X,))
        torch.testing.assert_close(found, other(X), **ROUNDED)
    check(compiled)


class HandsOut(nn.Module):
    """Gives a synthesised weight to the caller, who writes into it; or writes into it itself."""

    def __init__(self, inner: Any, writes: bool) -> None:
        super().__init__()
        self.inner, self.writes = inner, writes

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        theta = self.inner.blocks[1].synthesized()["fc1.weight"]
        if self.writes:
            theta.mul_(2)
            return self.inner(x) + theta.sum(), x
        return self.inner(x), theta[:2]


@pytest.mark.parametrize("writes", [True, False])
def test_what_can_be_written_into_is_not_kept(transformed: nn.Module, writes: bool) -> None:
    model = HandsOut(replfx.transform(tower()), writes)
    compiled = keeping(model)
    for _ in range(3):
        with torch.no_grad():
            found, wanted = compiled(X), model(X)
            for one, other in zip(found, wanted, strict=True):
                assert torch.equal(one, other)
            found[1].zero_() if not writes else None


def test_a_kept_value_does_not_keep_weights_alive() -> None:
    weight = torch.ones(3)
    cached = Cached(lambda w: (2 * w,))
    (kept,) = cached([weight])
    assert cached([weight])[0] is kept
    stamp = cached._kept[0][0]
    del weight
    assert stamp.tensor() is None
    assert stamp.storage.expired()


def test_another_tensor_in_the_same_memory_counts_its_own_writes() -> None:
    weight = torch.ones(3)
    cached = Cached(lambda w: (2 * w,))
    cached([weight])
    weight.data.mul_(3)
    assert torch.equal(cached([weight.data])[0], torch.full((3,), 6.0))


def test_tensors_whose_writes_are_not_counted_are_computed_each_time() -> None:
    with torch.inference_mode():
        weight = torch.ones(3)
    cached = Cached(lambda w: (2 * w,))
    assert cached([weight])[0] is not cached([weight])[0]


def test_where_several_processes_train_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    weight = torch.ones(3)
    cached = Cached(lambda w: (2 * w,))
    assert cached([weight])[0] is not cached([weight])[0]


def test_neighbours_that_are_aligned_are_kept_too() -> None:
    """What is split off was compiled on real parameters: their sizes became symbols that Dynamo has no source for."""
    torch.manual_seed(0)
    plain = Tower(Plain(5, 4), Plain(4, 3), Plain(3, 6), width=5)
    plain.head = nn.Linear(6, 3)
    model = replfx.transform(plain, X, select="blocks.1").eval()
    compiled = keeping(model, "aot_eager")
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(compiled(X), model(X))
