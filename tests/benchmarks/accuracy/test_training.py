"""Runs of the accuracy benchmark: exact resumption, determinism, and every variant."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.accuracy.peers.dropping import Dropped
from benchmarks.accuracy.resnet import BasicBlock, PaddedShortcut, ResNet
from benchmarks.accuracy.tasks import Subject
from benchmarks.accuracy.training import Run, prepared
from benchmarks.accuracy.variants import variant_of
from replfx import ReplfxError
from replfx.fusion.fusions import LinearFusion
from replfx.live import syntheses_of
from replfx.measure import trainable_parameters
from tests.benchmarks.accuracy import toys
from tests.benchmarks.accuracy.toys import CPU


def run_of(subject: Subject, variant: str, seed: int = 0, folder: Path | None = None) -> Run:
    return Run(subject, variant_of(variant), seed, CPU, folder)


def outcome(run: Run) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    curve = [{key: value for key, value in point.items() if key != "seconds"} for point in run.progress.curve]
    return run.model.state_dict(), curve


def assert_same(one: Run, other: Run) -> None:
    (weights, curve), (others, other_curve) = outcome(one), outcome(other)
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert curve == other_curve


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "variant", "at"),  # of six steps; what grows or is unrolled at a half is so after three
    [
        (toys.resnet, "full", 0),
        (toys.resnet, "stacking", 4),
        (toys.resnet, "block+scalar:unroll=0.5", 3),
        (toys.gpt, "block+channel", 5),
        (toys.resnet, "light+scalar:unroll=0.5", 4),
        (toys.gpt, "identity+scalar:unroll=0.3,0.5:start=copies:rewarm=0.3", 4),
        (toys.gpt, "identity+scalar:share=0.34:unroll=0.5:start=copies", 4),
        (toys.gpt, "sharing:every=2:unshare=0.34", 3),
        (toys.gpt, "stochastic-depth", 2),
        (toys.gpt, "mixer+scalar:late=0.5", 2),
        (toys.gpt, "mixer+scalar:late=0.5", 3),
    ],
)
def test_a_run_that_was_stopped_ends_as_one_that_was_not(
    make: Callable[..., Subject], variant: str, at: int, tmp_path: Path
) -> None:
    subject = make()
    whole = run_of(subject, variant)
    assert whole.train()
    assert not run_of(subject, variant, folder=tmp_path).train(lambda step: step >= at)
    torch.rand(3)  # what happens in between is of no account
    last = run_of(subject, variant, folder=tmp_path)
    assert last.progress.step == at
    assert last.train()
    assert_same(whole, last)


@pytest.mark.slow
def test_a_seed_decides_everything() -> None:
    subject = toys.gpt()
    one, same, other = (run_of(subject, "block+scalar", seed) for seed in (1, 1, 2))
    for each in (one, other, same):  # not as they were built: a run has a random state of its own
        each.train()
    assert_same(one, same)
    assert outcome(one)[1] != outcome(other)[1]


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    run_of(toys.gpt(), "full", folder=tmp_path).train(lambda step: step == 2)
    with pytest.raises(ReplfxError, match="move it away"):
        run_of(toys.gpt(learning_rate=0.1), "full", folder=tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".pt"]


def test_what_is_kept_starts_alike() -> None:
    subject = toys.resnet()
    full, replaced = (prepared(subject, variant_of(v), 3, CPU).state_dict() for v in ("full", "block+scalar"))
    shared = full.keys() & replaced.keys()
    assert len(shared) > len(full) / 2
    assert all(torch.equal(full[name], replaced[name]) for name in shared)


# ---- the variants

ALL = (
    "full",
    "removed",
    "removed:every=3",
    "block+scalar",
    "block+scalar:neighbour_gradient=0.5:fraction=0.3",
    "light+channel",
    "rule2024",
    "stochastic-depth",
    "stochastic-depth:survival=0.3",
    "layerdrop",
    "sharing",
    "sharing:every=3",
    "stacking:at=0.2",
    "checkpointing",
    "block+scalar:unroll=0.75:initial=0.7",
    "light+scalar:unroll=0.5",
)
RESNET_ALONE = (
    "block+scalar:select=layer2.0,layer3.0",
    "removed:select=layer2.0,layer3.0",
    "light+scalar:select=layer1.1",
    "narrow+scalar",
    "narrow-own+scalar",
    "coarse+scalar",
    "point+channel",
    "one-map-own+channel",
)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ALL)
@pytest.mark.parametrize("make", [toys.resnet, toys.gpt])
def test_every_variant_trains(make: Callable[..., Subject], variant: str) -> None:
    run = run_of(make(), variant)
    before = {name: p.clone() for name, p in run.model.named_parameters()}
    assert run.train()
    assert all(math.isfinite(point["loss"]) for point in run.progress.curve)
    after = dict(run.model.named_parameters())
    assert any(not torch.equal(value, after[name]) for name, value in before.items() if name in after)


@pytest.mark.slow
@pytest.mark.parametrize("variant", RESNET_ALONE)
def test_variants_of_single_blocks_train(variant: str) -> None:
    assert run_of(toys.resnet(), variant).train()


CAUSAL_ALONE = (
    "mixer+scalar",
    "mixer+scalar:unroll=0.5",
    "attention-reused+scalar",
    "mixer+low-rank",
    "mixer+own",
    "block+copy:unroll=0.5",
)


@pytest.mark.slow
@pytest.mark.parametrize("variant", CAUSAL_ALONE)
def test_variants_of_causal_blocks_train(variant: str) -> None:
    assert run_of(toys.gpt(schedule="plateau"), variant).train()


def test_what_is_replaced_late_is_full_until_then() -> None:
    late, full = (run_of(toys.gpt(), variant) for variant in ("mixer+scalar:late=0.5", "full"))
    half = late.recipe.steps // 2
    for run in (late, full):
        assert not run.train(lambda step: step >= half)
    weights = full.model.state_dict()
    assert weights.keys() == late.model.state_dict().keys()
    assert all(torch.equal(value, weights[name]) for name, value in late.model.state_dict().items())
    states = {p: copy.deepcopy(late.optimizer.state[p]) for p in late.model.parameters()}
    late.train(lambda step: step > half)
    held = [p for group in late.optimizer.param_groups for p in group["params"]]
    assert set(held) == set(late.model.parameters()) == set(late.optimizer.state)
    assert len(held) == len(set(held)) < len(states)
    for p, state in late.optimizer.state.items():
        assert state["step"] == (half + 1 if p in states else 1)


@pytest.mark.parametrize("variant", ["same-time:as=mixer+scalar:late=0.5", "mixer+scalar:late=0.5:unroll=0.8"])
def test_impossible_schedules_are_refused(variant: str) -> None:
    with pytest.raises(ReplfxError, match=r"not measured beforehand|two schedules"):
        variant_of(variant)


def test_trials_of_other_blocks_are_refused() -> None:
    assert run_of(toys.gpt(), "narrow-mlp+scalar").train()
    with pytest.raises(ReplfxError, match="it is no CausalBlock"):
        run_of(toys.resnet(), "narrow-mlp+scalar")


def test_the_attention_map_of_the_block_before_is_used_again() -> None:
    model = prepared(toys.gpt(), variant_of("attention-reused+scalar"), 0, CPU).eval()
    layer = syntheses_of(model)["blocks.1"]
    before, after = model.get_submodule("blocks.0"), model.get_submodule("blocks.2")
    operator, x = layer.operator, torch.randn(2, 5, 8)
    queries, keys, _ = before.qkv(before.norm1(x)).chunk(3, dim=-1)
    x = before(x)
    y = model.get_submodule("blocks.1")(x)

    theta = [(before.get_parameter(name) + after.get_parameter(name)) / 2 for name in ("qkv.weight", "proj.weight")]
    values = F.linear(operator.norm(x), theta[0][16:], operator.inner)
    q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in (queries, keys, values))
    scores = (q @ k.mT / 2).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(y, x + F.linear(mixed, theta[1], operator.bias))


@pytest.mark.slow
def test_the_vision_transformer_takes_the_variants() -> None:
    pytest.importorskip("timm")
    from benchmarks.accuracy.tasks import TASKS

    task = TASKS["cifar10-vit"]
    subject = Subject(task, "small", task.recipes["small"], toys.images(size=32))
    full, removed, light = (prepared(subject, variant_of(v), 0, CPU) for v in ("full", "removed", "light+channel"))
    counts = [trainable_parameters(model) for model in (full, light, removed)]
    assert counts == sorted(counts, reverse=True)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "no variant 'nothing'"),
        ("removed:evry=2", "there is no option evry"),
        ("removed:every=x", "invalid literal"),
        ("stochastic-depth:survival=2", "over 0 and at most 1"),
        ("same-time", "say which other, as in same-time:as=removed"),
        ("full-time:as=removed", "say which other, as in full-time:of=removed"),
        ("full-time:of=same-time:as=removed", "fills a time itself"),
        ("same-time:as=nothing", "no variant 'nothing'"),
    ],
)
def test_a_variant_that_cannot_be_is_refused(name: str, message: str) -> None:
    with pytest.raises(ReplfxError, match=message):
        variant_of(name)


def test_the_time_of_a_variant_that_grows_is_of_both_its_halves() -> None:
    assert variant_of("removed").share_of_full(0.6) == 0.6
    assert variant_of("stacking:at=0.25").share_of_full(0.6) == pytest.approx(0.25 * 0.6 + 0.75)
    assert variant_of("stacking:at=0.2,0.6").share_of_full(0.6) == pytest.approx(0.2 * 0.6 + 0.4 * 0.8 + 0.4)


def test_what_is_shared_no_more_goes_its_own_way() -> None:
    run, full = run_of(toys.gpt(), "sharing:every=2:unshare=0.5"), run_of(toys.gpt(), "full")
    run.train(lambda step: step >= 3)
    assert trainable_parameters(run.model) < trainable_parameters(full.model)
    run.train(lambda step: step >= 4)
    assert trainable_parameters(run.model) == trainable_parameters(full.model)
    blocks = run.model.get_submodule("blocks")
    states = [run.optimizer.state[next(block.parameters())] for block in blocks.children()]
    assert all(state["step"] == 4 for state in states)
    assert not torch.equal(next(blocks.get_submodule("0").parameters()), next(blocks.get_submodule("1").parameters()))


def test_a_model_grows_in_parts_and_warms_up_once_more() -> None:
    grown = "identity+scalar:start=copies:moments=none:unroll=0.34,0.5:rewarm=0.34"  # after 2 and 3 of 6 steps
    run = run_of(toys.gpt(schedule="plateau"), grown)
    before = set(run.model.parameters())
    rates, sizes = [], []

    def note(optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        rates.append(optimizer.param_groups[0]["lr"])
        sizes.append(len(list(run.model.parameters())) - len(before))

    run.optimizer.register_step_pre_hook(note)
    assert run.train()
    block = len(list(run.model.get_submodule("blocks.1").parameters()))
    assert sizes == [0, 0, block, 2 * block, 2 * block, 2 * block]
    scheduled = [run.recipe.learning_rate * min(1, 10 * (k + 1) / 6, 5 * (1 - k / 6)) for k in range(6)]
    warmed = [1, 1, 1 / 2.04, 1 / 2.04, 2 / 2.04, 1]
    assert rates == pytest.approx([rate * factor for rate, factor in zip(scheduled, warmed, strict=True)])
    ages = {int(state["step"]) for p, state in run.optimizer.state.items() if p not in before}
    assert ages == {3, 4}


def test_full_depth_with_a_higher_rate_at_first() -> None:
    run = run_of(toys.gpt(schedule="plateau"), "full:at=0.5:lr=2e-2:after=0.5")
    rates = []
    run.optimizer.register_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    assert run.train()
    plateau = [2e-2 * min(1, 10 * (k + 1) / 6, 5 * (1 - k / 6)) for k in range(6)]
    assert rates == pytest.approx([*plateau[:3], *(rate / 2 for rate in plateau[3:])])


def test_moments_are_mixed_as_weights_are_and_coefficients_have_a_decay_of_their_own() -> None:
    run = run_of(toys.gpt(weight_decay=0.1), "block+scalar:unroll=0.5:moments=mixed:decay=0.5")
    assert [g["weight_decay"] / run.recipe.weight_decay for g in run.optimizer.param_groups] == [1, 0.5]
    run.train(lambda step: step >= 3)
    fusion, (left, _, right) = syntheses_of(run.model)["blocks.1"].fusion, list(run.model.get_submodule("blocks"))[:3]
    assert isinstance(fusion, LinearFusion)
    assert set(run.optimizer.param_groups[1]["params"]) >= {fusion.previous, fusion.next}
    (name, a), b = next(iter(fusion.parts(fusion.previous).items())), next(iter(fusion.parts(fusion.next).values()))
    one, other = (run.optimizer.state[side.get_parameter(name)] for side in (left, right))
    first = a * one["exp_avg"] + b * other["exp_avg"]
    second = a**2 * one["exp_avg_sq"] + b**2 * other["exp_avg_sq"]
    run._grow(0)
    state = run.optimizer.state[run.model.get_parameter(f"blocks.1.{name}")]
    assert torch.equal(state["exp_avg"], first)
    assert torch.equal(state["exp_avg_sq"], second)


def test_a_variant_that_does_not_fit_is_refused_with_the_reason() -> None:
    with pytest.raises(ReplfxError, match=r"layer2\.0"):
        prepared(toys.resnet(), variant_of("light+scalar:select=layer2.0"), 0, CPU)
    with pytest.raises(ReplfxError, match="no neighbour with parameters of its shapes"):
        prepared(toys.resnet(), variant_of("sharing:select=layer2.0"), 0, CPU)


# ---- the models and the peers, each against what it is to compute


@pytest.mark.parametrize(("depth", "count"), [(20, 269_722), (32, 464_154), (110, 1_727_962)])
def test_the_residual_networks_have_the_published_size(depth: int, count: int) -> None:
    assert trainable_parameters(ResNet(depth)) == count


def test_of_a_removed_block_that_changes_the_shape_the_shortcut_stays() -> None:
    subject = toys.resnet()
    full = prepared(subject, variant_of("full"), 0, CPU)
    removed = prepared(subject, variant_of("removed:select=layer2.0,layer1.2"), 0, CPU)
    x = torch.rand(2, 4, 8, 8)
    assert isinstance(removed.get_submodule("layer2.0"), PaddedShortcut)
    y = removed.get_submodule("layer2.0")(x)
    assert torch.equal(y[:, 2:6], x[:, :, ::2, ::2])
    assert not y[:, [0, 1, 6, 7]].any()
    # The block with a branch of nothing gives the same.
    block = full.get_submodule("layer2.0")
    assert isinstance(block, BasicBlock)
    nn.init.zeros_(block.bn2.weight)
    assert torch.equal(block(x), y)
    assert isinstance(removed.get_submodule("layer1.2"), nn.Identity)


def test_checkpointing_changes_nothing_but_the_memory() -> None:
    subject = toys.resnet()
    full, checkpointed = (run_of(subject, variant) for variant in ("full", "checkpointing"))
    full.train()
    checkpointed.train()
    values = {name.replace(".block.", "."): value for name, value in checkpointed.model.state_dict().items()}
    for name, value in full.model.state_dict().items():
        torch.testing.assert_close(values[name], value, rtol=0, atol=0)


def test_shared_parameters_count_once_and_norms_stay_apart() -> None:
    subject = toys.resnet()
    full, shared = (prepared(subject, variant_of(v), 0, CPU) for v in ("full", "sharing:select=layer1.1"))
    assert shared.get_parameter("layer1.1.conv1.weight") is shared.get_parameter("layer1.0.conv1.weight")
    assert shared.get_parameter("layer1.1.bn1.weight") is not shared.get_parameter("layer1.0.bn1.weight")
    assert trainable_parameters(full) - trainable_parameters(shared) == 2 * 4 * 4 * 9
    blocks = prepared(toys.gpt(), variant_of("sharing"), 0, CPU).get_submodule("blocks")
    assert len(set(blocks.parameters())) == len(list(blocks[0].parameters()))


def test_a_grown_model_starts_as_copies_of_the_blocks_before() -> None:
    run = run_of(toys.gpt(), "stacking")
    shallow = trainable_parameters(run.model)
    run.train(lambda step: step == 3)
    run._grow(0)
    blocks = run.model.get_submodule("blocks")
    one, copy = list(blocks[0].parameters()), list(blocks[1].parameters())
    assert all(torch.equal(a, b) for a, b in zip(one, copy, strict=True))
    state = run.optimizer.state
    assert all(torch.equal(state[a]["exp_avg"], state[b]["exp_avg"]) for a, b in zip(one, copy, strict=True))
    full = trainable_parameters(prepared(toys.gpt(), variant_of("full"), 0, CPU))
    assert shallow < trainable_parameters(run.model) == full


@pytest.mark.parametrize("scaled", [True, False])
def test_blocks_are_dropped_as_often_as_asked_and_scaled_in_evaluation(scaled: bool) -> None:
    torch.manual_seed(0)
    block, x = BasicBlock(4, 8, 2), torch.rand(2, 4, 6, 6)
    dropped = Dropped(block, 0.75, scaled=scaled)
    runs = sum(not torch.equal(dropped(x), block.shortcut(x)) for _ in range(400))
    assert abs(runs - 300) < 5 * math.sqrt(400 * 0.75 * 0.25)
    dropped.eval()
    expected = torch.relu(block.shortcut(x) + (0.75 if scaled else 1.0) * block.branch(x))
    torch.testing.assert_close(dropped(x), expected)
    certain = Dropped(nn.Linear(3, 3), 1.0, scaled=True).eval()
    z = torch.rand(2, 3)
    torch.testing.assert_close(certain(z), certain.block(z))
