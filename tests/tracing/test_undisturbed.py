"""While a model is looked at, nothing is printed and nothing is compiled."""

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import replfx
from tests.support.models import Net

X = torch.randn(4, 8)


class Deciding(Net):
    """Not to be traced symbolically, nor to be run on fake tensors."""

    def forward(self, x: Tensor) -> Tensor:
        warnings.warn("mind the gap", stacklevel=1)
        return super().forward(x) * (2 if x.sum().item() > 0 else 1)


@pytest.mark.parametrize("kind", [Net, Deciding])
def test_a_dry_run_says_nothing(kind: type[Net], capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        replfx.transform(kind(), X)
        replfx.inspect(kind(), X)
    out, err = capfd.readouterr()
    assert out + err == ""


# ---- compiled parts


def wrapped(model: Net) -> None:
    for index, block in enumerate(model.blocks):
        model.blocks[index] = torch.compile(block, backend=never)


def in_place(model: Net) -> None:
    for block in model.blocks:
        block.compile(backend=never)


def whole(model: Net) -> None:
    model.compile(backend=never)


def function(model: Net) -> None:
    model.last = torch.compile(torch.relu, backend=never)


def never(graph: object, inputs: object) -> Callable[..., object]:
    raise AssertionError("it was compiled")


@pytest.mark.parametrize("compile_parts", [wrapped, in_place, whole, function])
@pytest.mark.parametrize("inplace", [True, False])
def test_compiled_parts_run_as_they_are_written(compile_parts: Callable[[Net], None], inplace: bool) -> None:
    model = Net()
    compile_parts(model)
    made = replfx.transform(model, X, inplace=inplace)
    assert replfx.report(made).replaced == ["blocks.1", "blocks.3"]
    assert replfx.inspect(model if not inplace else Net(), X).replaced == ["blocks.1", "blocks.3"]


def test_a_compiled_model_is_refused() -> None:
    model = torch.compile(Net())
    plan = replfx.plan(Net())
    for use in (
        lambda: replfx.transform(model, X),
        lambda: replfx.transform(model, X, inplace=True),
        lambda: replfx.inspect(model),
        lambda: replfx.plan(model, X),
        lambda: replfx.apply(model, plan),
        lambda: replfx.capture(model, X),
    ):
        with pytest.raises(replfx.CaptureError, match=r"transform the Net in it.*torch\.compile\(replfx\.transform"):
            use()


def test_the_users_stance_stays() -> None:
    compiled = torch.compile(nn.Linear(8, 8), backend="eager")
    replfx.transform(Net(), X)
    seen: list[object] = []
    torch._dynamo.reset()
    other = torch.compile(nn.Linear(8, 8), backend=lambda graph, inputs: seen.append(graph) or graph.forward)
    other(X), compiled(X)
    assert seen


# ---- what a run leaves behind


class Mean:
    """Of all that it was told, as users write it."""

    def __init__(self) -> None:
        self.value = torch.zeros(())


def counted() -> Callable[[Tensor], Tensor]:
    last = torch.zeros(())

    def note(x: Tensor) -> Tensor:
        nonlocal last
        last = (last + x.mean()) / 2
        return last

    return note


MEAN, NOTE, LATEST, HISTORY = Mean(), counted(), {"mean": torch.zeros(())}, [torch.zeros(())]


class Noting(Net):
    """Puts new tensors where others were, outside of itself: a capture's are none for the user."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x)
        MEAN.value = (MEAN.value + y.mean()) / 2
        MEAN.count = x.new_ones(())  # type: ignore[attr-defined]
        LATEST["mean"] = y.mean()
        HISTORY[0] = HISTORY[0] + y.mean()
        return y + 0 * NOTE(y)


def held() -> list[object]:
    return [MEAN.value, LATEST["mean"], HISTORY[0], NOTE.__closure__[0].cell_contents]  # type: ignore[attr-defined]


def test_what_a_dry_run_put_in_the_place_of_the_users_values_gives_way_to_them() -> None:
    model = Noting()
    model(X)
    del MEAN.count  # type: ignore[attr-defined]
    before = held()
    made = replfx.transform(model, X)
    assert [one is other for one, other in zip(before, held(), strict=True)] == [True] * 4
    assert not hasattr(MEAN, "count")
    made(X)
    assert [type(value) for value in held()] == [Tensor] * 4
