"""The check of one model: what passes, what is refused, and in which stage it sees what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import replfx
from benchmarks.zoo.check import FAILURE, REFUSED, REPLACED, check
from benchmarks.zoo.subject import loss_of, tensors_of
from tests.benchmarks.zoo.toys import subject


def test_replaced() -> None:
    stages = []
    outcome = check(subject("toys:tower"), on_stage=lambda draft: stages.append(draft.stage))
    assert (outcome.status, outcome.stage, outcome.error) == (REPLACED, None, None)
    assert (outcome.chains, outcome.blocks, outcome.replaced) == (1, 5, 2)
    assert outcome.capture == "symbolic"
    assert outcome.parameters_after < outcome.parameters_before
    assert stages[0] == "original"
    assert stages[-1] == "materialize"


def test_refused_with_reasons() -> None:
    outcome = check(subject("toys:short"))
    assert outcome.status == REFUSED
    assert outcome.reasons
    assert outcome.error.startswith("NoChainError: ")


def test_the_first_variant_that_runs_is_taken() -> None:
    outcome = check(subject("toys:second"))
    assert (outcome.status, outcome.variant, outcome.variant_label) == (REPLACED, 1, "way 1")


def test_a_model_that_does_not_run_is_a_failure_of_its_own() -> None:
    outcome = check(subject("toys:fails"))
    assert (outcome.status, outcome.stage, outcome.error) == (FAILURE, "original", "RuntimeError: not today")


# ---- a library that is broken, and the stage that sees it

Transform = Callable[..., nn.Module]
transform, apply, materialize = replfx.transform, replfx.apply, replfx.materialize


def raising(error: Exception) -> Callable[..., Any]:
    def raise_it(*args: Any, **kwargs: Any) -> Any:
        raise error

    return raise_it


def another_class(*args: Any, **kwargs: Any) -> nn.Module:
    new = transform(*args, **kwargs)
    new.__class__ = type("Other", (type(new),), {})
    return new


def one_more_parameter(*args: Any, **kwargs: Any) -> nn.Module:
    new = transform(*args, **kwargs)
    new.more = nn.Parameter(torch.zeros(1))
    return new


def hooked(hook: Callable[..., Any]) -> Transform:
    def transform_and_hook(*args: Any, **kwargs: Any) -> nn.Module:
        new = transform(*args, **kwargs)
        new.get_submodule("stem").register_forward_hook(hook)
        return new

    return transform_and_hook


def fail_in(training: bool) -> Transform:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        if module.training is training:
            raise RuntimeError("hook")

    return hooked(hook)


def another_plan(model: nn.Module, plan: replfx.Plan, **kwargs: Any) -> nn.Module:
    return apply(model, replfx.plan(model, select="blocks.2"), **kwargs)


def slightly_wrong(model: nn.Module) -> nn.Module:
    plain = materialize(model)
    with torch.no_grad():
        next(plain.parameters()).mul_(1.1)
    return plain


@pytest.mark.parametrize(
    ("function", "broken", "stage", "error"),
    [
        ("transform", raising(RuntimeError("oh")), "transform", "RuntimeError: oh"),
        ("transform", raising(replfx.CaptureError("oh")), "capture", "CaptureError: oh"),
        ("transform", raising(replfx.VerifyError("oh")), "transform", "VerifyError: oh"),
        ("transform", another_class, "class", "Other for a Tower"),
        ("transform", one_more_parameter, "report", "the report says"),
        ("transform", fail_in(training=True), "forward", "RuntimeError: hook"),
        ("transform", fail_in(training=False), "eval", "RuntimeError: hook"),
        ("transform", hooked(lambda module, args, output: output.detach()), "gradient", "stem.weight"),
        ("transform", hooked(lambda module, args, output: output * float("nan")), "gradient", "and"),
        ("apply", another_plan, "state_dict", "StateDictError"),
        ("materialize", slightly_wrong, "materialize", "differs by"),
    ],
)
def test_what_is_wrong_is_seen(
    monkeypatch: pytest.MonkeyPatch, function: str, broken: Callable[..., Any], stage: str, error: str
) -> None:
    monkeypatch.setattr(replfx, function, broken)
    outcome = check(subject("toys:tower"))
    assert (outcome.status, outcome.stage) == (FAILURE, stage)
    assert error in outcome.error


def test_a_refusal_without_a_reason_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replfx, "inspect", lambda *args, **kwargs: replfx.Report("Tower"))
    outcome = check(subject("toys:short"))
    assert (outcome.status, outcome.stage) == (FAILURE, "inspect")


def test_weights_that_are_not_loaded_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def apply_and_ignore(*args: Any, **kwargs: Any) -> nn.Module:
        new = apply(*args, **kwargs)
        monkeypatch.setattr(type(new), "load_state_dict", lambda *args, **kwargs: None)
        return new

    monkeypatch.setattr(replfx, "apply", apply_and_ignore)
    outcome = check(subject("toys:tower"))
    assert (outcome.status, outcome.stage) == (FAILURE, "state_dict")


# ---- outputs


def test_loss_takes_all_that_needs_a_gradient() -> None:
    x = torch.ones(2, requires_grad=True)
    output = {"a": [2 * x, (x, torch.ones(1))], "b": None, "c": torch.tensor([1])}
    assert len(list(tensors_of(output))) == 4
    loss_of(output).backward()
    assert torch.equal(x.grad, torch.full((2,), 1.5))
    with pytest.raises(ValueError, match="no floating-point tensor"):
        loss_of([torch.ones(1)])
