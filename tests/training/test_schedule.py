"""Schedules, and what `unroll` does to an optimizer in the middle of training."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import replfx
from tests.support.compiled import noting
from tests.support.models import Mlp, Tower, tower
from tests.support.snapshots import assert_unchanged, snapshot

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True, amsgrad=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
}


def batches(start: int = 0) -> Iterator[Tensor]:
    for number in range(start, 100):
        yield torch.randn(16, 4, generator=torch.Generator().manual_seed(number))


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, data: Iterator[Tensor], steps: int, after: Any = None
) -> None:
    for x, _ in zip(data, range(steps), strict=False):
        optimizer.zero_grad()
        (model(x) - x[:, :3].sin()).square().mean().backward()
        optimizer.step()
        if after is not None:
            after()


# ---- the optimizer


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_new_parameters_go_on_from_the_means_of_their_neighbours_states(name: str) -> None:
    torch.manual_seed(0)
    model = replfx.transform(tower(5), every=2)
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer, batches(), 3)
    x, groups = next(batches(9)), optimizer.param_groups
    expected, states = model(x), {n: copy.deepcopy(optimizer.state[p]) for n, p in model.named_parameters()}
    assert replfx.unroll(model, optimizer) is model
    torch.testing.assert_close(model(x), expected)
    assert optimizer.param_groups is groups  # a scheduler holds them
    plain = dict(model.named_parameters())
    assert list(plain) == [n for n, _ in tower(5).named_parameters()]
    assert optimizer.state.keys() == set(plain.values())
    for key, parameter in plain.items():
        if key in states:
            assert_states_equal(optimizer.state[parameter], states[key])
            continue
        _, number, leaf = key.split(".", 2)
        before, after = (states[f"blocks.{int(number) + step}.{leaf}"] for step in (-1, 1))
        mean = {k: (v + after[k]) / 2 if isinstance(v, Tensor) and v.dim() else v for k, v in before.items()}
        assert_states_equal(optimizer.state[parameter], mean)
    train(model, optimizer, batches(3), 2)


def assert_states_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value)


def test_the_optimizer_is_then_one_of_the_full_model() -> None:
    """Its groups, with weight decay and without, and the order in which a state_dict counts parameters."""
    model, plain = replfx.transform(tower(6), every=2), tower(6)
    optimizer = torch.optim.AdamW(replfx.parameter_groups(model, 0.1))
    train(model, optimizer, batches(), 2)
    replfx.unroll(model, optimizer)
    fresh = torch.optim.AdamW(replfx.parameter_groups(plain, 0.1))
    plain.load_state_dict(model.state_dict())
    decays = {group["weight_decay"]: group for group in fresh.param_groups}
    for group in optimizer.param_groups:
        if group["params"]:
            names = {p: n for n, p in model.named_parameters()}
            theirs = {p: n for n, p in plain.named_parameters()}
            same = decays[group["weight_decay"]]["params"]
            assert [names[p] for p in group["params"]] == [theirs[p] for p in same]


def test_a_checkpoint_of_after_loads_into_the_plain_model_and_its_own_optimizer() -> None:
    model, plain = replfx.transform(tower(5), every=2), tower(5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train(model, optimizer, batches(), 2)
    replfx.unroll(model, optimizer)
    other = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    plain.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, its in ((model, optimizer), (plain, other)):
        train(each, its, batches(2), 3)
    for one, two in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_scheduler_of_the_learning_rate_goes_on() -> None:
    model = replfx.transform(tower(5), every=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    rates = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    train(model, optimizer, batches(), 1)
    rates.step()
    replfx.unroll(model, optimizer)
    train(model, optimizer, batches(), 1)
    rates.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.25]
    assert rates.get_last_lr() == [0.25]


def test_what_keeps_its_parameters_elsewhere_is_refused() -> None:
    model = replfx.transform(tower(5), every=2)
    before = snapshot(model)
    with pytest.raises(replfx.FusionError, match="LBFGS keeps the history"):
        replfx.unroll(model, torch.optim.LBFGS(model.parameters()))
    with pytest.raises(replfx.FusionError, match="optimizer is an empty list"):
        replfx.unroll(model, [])
    wrong: Any = list(model.parameters())
    with pytest.raises(replfx.FusionError, match=r"must be a torch\.optim\.Optimizer, or several .* not Parameter"):
        replfx.unroll(model, wrong)
    with pytest.raises(replfx.PlanError, match=r"blocks='blocks\.2' matches no replaced block; they are: blocks\.1"):
        replfx.unroll(model, blocks="blocks.2")
    for nothing in ([], 3, ["blocks.1", 3]):
        with pytest.raises(replfx.PlanError, match="blocks must be a path or a glob, or a sequence of them, not"):
            replfx.unroll(model, blocks=nothing)
    assert_unchanged(model, before)


# ---- a part of the blocks


@pytest.mark.parametrize("operator", ["block", "identity"])
def test_some_blocks_may_stay_replaced(operator: str) -> None:
    model, x = replfx.transform(tower(7), next(batches()), every=2, operator=operator), next(batches())
    optimizer, expected = torch.optim.AdamW(model.parameters()), model(x)
    replfx.unroll(model, optimizer, blocks="blocks.3")
    torch.testing.assert_close(model(x), expected)
    assert replfx.report(model).replaced == ["blocks.1", "blocks.5"]
    assert [r.path for r in replfx.plan_of(model).replacements] == ["blocks.1", "blocks.5"]
    assert replfx.report(model).parameters_after == sum(p.numel() for p in model.parameters())
    again = replfx.apply(tower(7), replfx.plan_of(model))
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again(x), expected)
    replfx.unroll(model, optimizer)
    torch.testing.assert_close(model(x), expected)
    with pytest.raises(replfx.PlanError, match="not a transformed model"):
        replfx.report(model)


# ---- schedules


@pytest.mark.parametrize(
    ("unroll_at", "expected"),
    [
        (3, {3: [1, 3, 5]}),
        (0.2, {2: [1, 3, 5]}),
        ([2, 0.5], {2: [1, 5], 5: [3]}),
        ([4, 2, 6], {2: [1], 4: [3], 6: [5]}),
        ({0.3: "blocks.[13]", 6: ["blocks.5"]}, {3: [1, 3], 6: [5]}),
    ],
)
def test_blocks_are_unrolled_when_it_is_time(unroll_at: Any, expected: dict[int, list[int]]) -> None:
    model = replfx.transform(tower(7), every=2)
    schedule = replfx.Schedule(model, unroll_at=unroll_at, total_steps=10)
    found = {step: paths for step in range(1, 9) if (paths := schedule.step())}
    assert found == {step: [f"blocks.{number}" for number in numbers] for step, numbers in expected.items()}
    assert schedule.is_done
    assert not any("replfx" in name for name, _ in model.named_modules())


def test_windows_are_unrolled_by_their_own_paths() -> None:
    """ "[2:4]" in a path is no glob of other names."""
    layers = [layer for _ in range(5) for layer in (nn.Linear(4, 4), nn.ReLU())]
    model, x = replfx.transform(nn.Sequential(*layers), every=2), next(batches())
    paths, expected = replfx.report(model).replaced, model(x)
    assert all("[" in path for path in paths)
    schedule = replfx.Schedule(model, unroll_at={1: paths[0], 2: paths[1:]})
    assert schedule.step() + schedule.step() == paths
    torch.testing.assert_close(model(x), expected)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in nn.Sequential(*layers).named_parameters()]


@pytest.mark.parametrize("left", [2, 3, 4, 6])
@pytest.mark.parametrize("unroll_at", [3, [3, 5]])
def test_a_run_goes_on_as_it_was(left: int, unroll_at: Any) -> None:
    """Stopped before, at and after a switch; all states go through JSON or torch's own."""

    def start(seed: int) -> tuple[nn.Module, torch.optim.Optimizer, replfx.Schedule]:
        torch.manual_seed(seed)
        model = replfx.transform(tower(7), every=2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        return model, optimizer, replfx.Schedule(model, optimizer, unroll_at=unroll_at)

    model, optimizer, schedule = start(0)
    train(model, optimizer, batches(), left, schedule.step)
    saved = copy.deepcopy((json.loads(json.dumps(schedule.state_dict())), model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, batches(left), 8 - left, schedule.step)
    other, its, again = start(1)
    for each, state in zip((again, other, its), saved, strict=True):
        each.load_state_dict(state)
    train(other, its, batches(left), 8 - left, again.step)
    for one, two in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(one, two)


def test_states_of_other_times_are_refused() -> None:
    model = replfx.transform(tower(5), every=2)
    schedule = replfx.Schedule(model, unroll_at=2)
    early = schedule.state_dict()
    schedule.step()
    schedule.step()
    with pytest.raises(replfx.StateDictError, match=r"when `blocks\.1` was still replaced"):
        schedule.load_state_dict(early)
    with pytest.raises(replfx.StateDictError, match=r"not the state of a replfx\.Schedule"):
        schedule.load_state_dict({"epoch": 3})
    fresh = replfx.transform(tower(5), every=2)
    with pytest.raises(replfx.StateDictError, match=r"load the state of a replfx\.Schedule before the model's"):
        fresh.load_state_dict(model.state_dict())
    with pytest.raises(replfx.StateDictError, match=r"has unrolled `blocks\.9`"):
        replfx.Schedule(fresh, unroll_at=2).load_state_dict({"steps": 2, "unrolled": [["blocks.9"]]})


def test_a_state_dict_may_unroll_the_model_that_it_is_loaded_into() -> None:
    model, plain = replfx.transform(tower(7), every=2), tower(7)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = replfx.Schedule(model, optimizer, unroll_at=2, follow=True)
    twin = copy.deepcopy(model)
    model.load_state_dict(plain.state_dict())
    assert schedule.is_done
    assert {p for group in optimizer.param_groups for p in group["params"]} == set(model.parameters())
    with pytest.raises(replfx.StateDictError):  # a copy follows nobody
        twin.load_state_dict(plain.state_dict())


def test_averages_of_another_model_are_refused() -> None:
    model, other = replfx.transform(tower(5)), replfx.transform(tower(7))
    for averages in ([other], [model], [twin := copy.deepcopy(model), twin]):
        with pytest.raises(replfx.PlanError, match=r"averages\[\d\] is a Tower that has not"):
            replfx.Schedule(model, unroll_at=2, averages=averages)


def test_averages_are_unrolled_too() -> None:
    torch.manual_seed(0)
    model = replfx.transform(tower(5), every=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    schedule = replfx.Schedule(model, optimizer, unroll_at=2, averages=[average])
    train(model, optimizer, batches(), 4, lambda: (schedule.step(), average.update_parameters(model)))
    assert [n for n, _ in average.module.named_parameters()] == [n for n, _ in model.named_parameters()]
    kept = [average.module.state_dict()["blocks.1.fc1.weight"].clone()]
    average.update_parameters(model)
    expected = (kept[0] + model.state_dict()["blocks.1.fc1.weight"]) / 2
    torch.testing.assert_close(average.module.state_dict()["blocks.1.fc1.weight"], expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unroll_at": 0.2}, "say how many there are with total_steps="),
        ({"unroll_at": 1.5, "total_steps": 9}, "unroll_at=1.5: a share"),
        ({"unroll_at": 0}, "unroll_at=0: at least one step"),
        ({"unroll_at": "late"}, "must be a number of steps or a share of them"),
        ({"unroll_at": None}, "must be a number of steps or a share of them"),
        ({"unroll_at": 0.5, "total_steps": float("inf")}, "total_steps must be a number of steps from 1 up, not inf"),
        ({"unroll_at": 0.5, "total_steps": 0}, "total_steps must be a number of steps from 1 up, not 0"),
        ({"unroll_at": 2, "averages": None}, "averages must be a list of copies of the model"),
        ({"unroll_at": 2, "averages": [None]}, r"averages\[0\] is a NoneType that has not"),
        ({"unroll_at": []}, "0 times for 2 replaced blocks"),
        ({"unroll_at": [1, 2, 3]}, "3 times for 2 replaced blocks"),
        ({"unroll_at": {1: "blocks.1"}}, r"never unrolls `blocks\.3`"),
        ({"unroll_at": {1: "blocks.*", 2: "blocks.3"}}, r"unrolls `blocks\.3` twice"),
        ({"unroll_at": {1: "layers.*"}}, r"unroll_at='layers\.\*' matches no replaced block"),
    ],
)
def test_impossible_schedules_are_refused_before_training(options: dict[str, Any], message: str) -> None:
    with pytest.raises(replfx.PlanError, match=message):
        replfx.Schedule(replfx.transform(tower(5), every=2), **options)


@pytest.mark.parametrize("given", ["adam", 5, [], [None]])
def test_what_is_no_optimizer_is_refused_before_training(given: Any) -> None:
    model = replfx.transform(tower(5))
    with pytest.raises(replfx.FusionError, match="optimizer"):
        replfx.Schedule(model, given, unroll_at=2)
    schedule = replfx.Schedule(model, unroll_at=2)
    with pytest.raises(replfx.FusionError, match="optimizer"):
        schedule.optimizer = given
    assert schedule.optimizer is None


def test_what_cannot_be_unrolled_is_said_before_training() -> None:
    narrow = (Mlp(8, 8) for _ in range(5))  # too narrow to hold the light operator's map
    model = replfx.transform(Tower(*narrow), next(batches()), operator="light")
    assert not replfx.report(model).unrolls
    with pytest.raises(replfx.FusionError, match="cannot be unrolled"):
        replfx.Schedule(model, unroll_at=2)
    with pytest.raises(replfx.PlanError, match="not a transformed model"):
        replfx.Schedule(tower(5), unroll_at=2)


# ---- torch.compile


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo")
def test_a_compiled_model_is_compiled_once_more() -> None:
    torch.manual_seed(0)
    model = replfx.transform(tower(5), every=2)
    twin = copy.deepcopy(model)
    graphs: list[torch.fx.GraphModule] = []
    compiled = torch.compile(model, backend=noting(graphs))
    for each, its in ((compiled, model), (twin, twin)):
        optimizer = torch.optim.AdamW(its.parameters(), lr=1e-2)
        schedule = replfx.Schedule(each, optimizer, unroll_at=2)
        train(each, optimizer, batches(), 5, schedule.step)
    assert len(graphs) == 2
    for one, two in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, two)


def test_a_compiled_model_is_compiled_once_more_for_each_part_however_many() -> None:
    """Dynamo gives a function up after `recompile_limit` versions, and runs it eagerly from then on."""
    torch.compiler.reset()
    graphs: list[Any] = []
    with torch._dynamo.config.patch(recompile_limit=3):
        model = replfx.transform(tower(15), next(batches()), operator="identity")
        compiled = torch.compile(model, backend=noting(graphs))
        optimizer = torch.optim.AdamW(model.parameters())
        schedule = replfx.Schedule(model, optimizer, unroll_at=range(1, 8), start="copies")
        train(compiled, optimizer, batches(), 9, schedule.step)
    assert schedule.is_done
    assert len(graphs) == 8
