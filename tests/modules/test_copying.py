"""Copies: all that a user put on a model is on its copy, and nothing of the model is in it."""

import functools
import io
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import replfx
from replfx.modules.copying import faithful_copy, structural_copy
from tests.support.models import Net

X = torch.randn(4, 8)


# ---- marks and hooks of tensors


class Halver:
    def __init__(self, net: nn.Module) -> None:
        self.net, self.seen = net, 0

    def __call__(self, gradient: Tensor) -> Tensor:
        self.seen += 1
        return gradient / 2


def test_marks_are_carried() -> None:
    model = Net()
    shared = {"group": 1}
    for block in model.blocks:
        block.norm.weight._no_weight_decay = True
    model.head.weight.marks = shared
    model.scale.kept = model.head  # a module: the copy's is the copy's
    for made in (faithful_copy(model), replfx.transform(model, X), replfx.apply(model, replfx.plan(model))):
        marked = [name for name, p in made.named_parameters() if getattr(p, "_no_weight_decay", False)]
        assert len(marked) == 5
        assert made.head.weight.marks == shared
        assert made.scale.kept is made.head


def test_hooks_on_gradients_are_carried() -> None:
    model, seen = Net(), []
    model.head.weight.register_hook(lambda gradient: gradient * 0)
    model.head.bias.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter))
    halver = Halver(model)
    model.blocks[0].linear.bias.register_hook(halver)
    model.blocks[4].linear.bias.register_hook(functools.partial(lambda factor, gradient: gradient * factor, 0))
    model.blocks[2].norm.bias.register_hook(lambda gradient: gradient * 0)
    model.blocks[2].norm.bias.requires_grad_(False)  # frozen since: `register_hook` would refuse it
    made = replfx.transform(model, X)
    expected = replfx.transform(Net(), X)
    expected.load_state_dict(made.state_dict())
    made(X).square().sum().backward()
    expected(X).square().sum().backward()
    assert not made.head.weight.grad.any()
    assert not made.blocks[4].linear.bias.grad.any()
    assert torch.equal(made.blocks[0].linear.bias.grad * 2, expected.blocks[0].linear.bias.grad)
    assert len(seen) == 1
    assert seen[0] is made.head.bias
    assert halver.seen == 0  # an object with its state is copied, as those of module hooks are
    assert all(parameter.grad is None for parameter in model.parameters())
    made.blocks[2].norm.bias.requires_grad_()
    made(X).sum().backward()
    assert not made.blocks[2].norm.bias.grad.any()


@pytest.mark.parametrize("place", ["parameter", "module"])
def test_a_hook_that_holds_the_model_itself_is_refused(place: str) -> None:
    model = Net()
    held = [model.head.weight]
    if place == "parameter":
        model.blocks[0].linear.weight.register_hook(lambda gradient: gradient * held[0].sum())
    else:
        model.blocks[0].register_forward_hook(lambda module, args, output: output * held[0].sum())
    with pytest.raises(replfx.CaptureError, match=r"hook on `blocks\.0.*holds `head\.weight`.*inplace=True"):
        replfx.transform(model, X)
    made = replfx.transform(model, X, inplace=True)
    made(X).sum().backward()
    assert made.head.weight.grad is not None


# ---- what copy.deepcopy refuses


def generator() -> Any:
    yield from range(3)


KINDS: dict[str, Callable[[], Any]] = {
    "lock": threading.Lock,
    "rlock": threading.RLock,
    "condition": threading.Condition,
    "event in a dict": lambda: {"ready": [threading.Event()]},
    "python module": lambda: torch.nn.functional,
    "torch generator": torch.Generator,
}
HARD: dict[str, Callable[[], Any]] = {
    "generator": generator,
    "iterator in a list": lambda: [iter({1: 2}.items()), generator()],
    "file": lambda: Path(__file__).open(),  # noqa: SIM115
    "memory": lambda: memoryview(b"abc"),
    "partial of a generator": lambda: functools.partial(print, generator()),
}


def holding(value: object) -> Net:
    model = Net()
    model.blocks[2].held = value
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inplace", [True, False])
def test_what_a_copy_can_have_anew(kind: str, inplace: bool) -> None:
    model = holding(KINDS[kind]())
    made = replfx.transform(model, X, inplace=inplace)
    assert replfx.report(made).replaced == ["blocks.1", "blocks.3"]
    assert replfx.inspect(holding(KINDS[kind]()), X).replaced == ["blocks.1", "blocks.3"]


def test_a_lock_of_a_copy_is_its_own() -> None:
    model = holding(threading.Lock())
    with model.blocks[2].held:  # held while it is transformed: nothing waits for it
        made = replfx.transform(model, X)
    with made.blocks[2].held:
        assert not model.blocks[2].held.locked()


@pytest.mark.parametrize("kind", HARD)
def test_what_can_not_be_copied_is_named_and_stays_in_place(kind: str) -> None:
    with pytest.raises(replfx.CaptureError, match=r"`blocks\.2\.held` holds a .*inplace=True"):
        replfx.transform(holding(HARD[kind]()), X)
    value = HARD[kind]()
    made = replfx.transform(holding(value), X, inplace=True)
    assert made.blocks[2].held is value
    assert torch.isfinite(made(X)).all()


def test_what_would_be_used_up_is_not_used_by_a_capture() -> None:
    class Reading(Net):
        def __init__(self) -> None:
            super().__init__()
            self.steps = iter(generator())

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * next(self.steps)

    model = Reading()
    with pytest.raises(replfx.CaptureError, match="`steps` is a generator"):
        replfx.transform(model, X, inplace=True)
    assert next(model.steps) == 0


def test_a_file_is_not_read_by_a_capture() -> None:
    class Unpicklable(io.StringIO):
        def __deepcopy__(self, memo: object) -> None:
            raise TypeError("no")

    class Reading(Net):
        def __init__(self) -> None:
            super().__init__()
            self.file = Unpicklable("text")

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * len(self.file.read())

    model = Reading()
    with pytest.raises(replfx.CaptureError, match="`file` is a Unpicklable"):
        replfx.transform(model, X, inplace=True)
    assert model.file.read() == "text"


def test_a_module_that_refuses_says_so() -> None:
    class Stubborn(Net):
        def __deepcopy__(self, memo: object) -> None:
            raise RuntimeError("not me")

    with pytest.raises(replfx.CaptureError, match=r"not me.*make it work with copy\.deepcopy"):
        replfx.transform(Stubborn(), X, inplace=True)


def test_a_tensor_that_autograd_made_is_copied_without_its_history() -> None:
    model = Net()
    model.last = model(X)
    made = faithful_copy(model)
    assert torch.equal(made.last, model.last)
    assert made.last.grad_fn is None


def test_a_structural_copy_shares_tensors_and_has_marks() -> None:
    model = Net()
    model.head.weight._mark = 1
    assert structural_copy(model).head.weight is model.head.weight
    other = structural_copy(model, lambda tensor: tensor.detach().clone())
    assert other.head.weight._mark == 1
    assert other.head.weight is not model.head.weight
