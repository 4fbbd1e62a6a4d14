"""The models of segmentation and detection: their blocks, and runs of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import replfx
from benchmarks.accuracy.peers.dropping import Dropped
from benchmarks.accuracy.resnet import classifier, skipped
from benchmarks.accuracy.tasks import TASKS, Subject
from benchmarks.accuracy.training import Run, prepared
from benchmarks.accuracy.variants import chosen_blocks, variant_of
from replfx.measure import trainable_parameters
from tests.benchmarks.accuracy import toys
from tests.benchmarks.accuracy.toys import CPU

pytest.importorskip("torchvision")

pytestmark = pytest.mark.slow

MAKERS = (toys.fcn, toys.fcos)
# One of each kind: the others do no other things to a model.
VARIANTS = ("removed", "light+channel", "stochastic-depth", "sharing", "stacking", "checkpointing")


@pytest.mark.parametrize("make", MAKERS)
def test_every_variant_takes_a_step(make: Callable[[], Subject]) -> None:
    for variant in VARIANTS:
        run = Run(make(), variant_of(variant), 0, CPU)
        run.train(lambda step: step == 1)
        assert run.progress.step == 1
        assert run.progress.loss > 0


@pytest.mark.parametrize("make", MAKERS)
def test_a_run_that_was_stopped_ends_as_one_that_was_not(make: Callable[[], Subject], tmp_path: object) -> None:
    for module in ("torchmetrics", "pycocotools"):
        pytest.importorskip(module)
    whole = Run(make(), variant_of("block+scalar"), 0, CPU)
    assert whole.train()
    assert not Run(make(), variant_of("block+scalar"), 0, CPU, tmp_path).train(lambda step: step >= 2)
    rest = Run(make(), variant_of("block+scalar"), 0, CPU, tmp_path)
    assert rest.progress.step == 2
    assert rest.train()
    values = rest.model.state_dict()
    assert all(torch.equal(value, values[name]) for name, value in whole.model.state_dict().items())
    assert [p["metric"] for p in whole.progress.curve] == [p["metric"] for p in rest.progress.curve]


@pytest.mark.parametrize(("name", "make", "count"), [("camvid-fcn", toys.fcn, 6), ("bccd-fcos", toys.fcos, 8)])
def test_the_blocks_of_the_small_models_are_found(name: str, make: Callable[[], Subject], count: int) -> None:
    task = TASKS[name]
    subject = Subject(task, "small", task.recipes["small"], make().data)
    model = subject.build().train()
    example = subject.data.inputs(subject.data.batch(0, 0, 2))
    paths = chosen_blocks(model, example, {})
    assert len(paths) == count
    removed = prepared(subject, variant_of("removed"), 0, CPU)
    assert all(isinstance(removed.get_submodule(path), nn.Identity) for path in paths)
    deleted = sum(trainable_parameters(model.get_submodule(path)) for path in paths)
    assert trainable_parameters(removed) == trainable_parameters(model) - deleted


def test_the_small_classifier_works_at_a_quarter_of_the_resolution() -> None:
    model = classifier(4, (2, 3), 10).eval()
    x = torch.rand(2, 3, 32, 32)
    assert model(x).shape == (2, 10)
    trunk = model.get_submodule("trunk")
    assert trunk(x).shape == (2, 8, 4, 4)
    assert torch.equal(model.get_submodule("fc")(trunk(x).mean((2, 3))), model(x))
    assert len(replfx.inspect(model).chains) >= 1


def test_of_a_block_of_torchvision_the_shortcut_stays() -> None:
    from torchvision.models import resnet50

    model = resnet50(weights=None).eval()
    assert isinstance(skipped(model.layer1[1]), nn.Identity)
    block, x = model.layer2[0], torch.randn(1, 256, 4, 4)
    nn.init.zeros_(block.bn3.weight)
    # With a branch of nothing the block gives what is left of it.
    torch.testing.assert_close(skipped(block)(x), block(x))
    nn.init.ones_(block.bn3.weight)
    expected = 0.75 * block(x) + 0.25 * skipped(block)(x)
    torch.testing.assert_close(Dropped(block, 0.75, scaled=True).eval()(x), expected)
    assert torch.equal(Dropped(block, 1e-9, scaled=False).train()(x), skipped(block)(x))


@pytest.mark.parametrize("variant", ["removed", "stochastic-depth:survival=0.1", "sharing", "light+channel"])
def test_a_model_of_torchvision_takes_the_variants(variant: str) -> None:
    task = TASKS["camvid-fcn"]
    subject = Subject(task, "full", task.recipes["full"], toys.fcn().data)
    model = prepared(subject, variant_of(variant), 0, CPU)
    assert torch.isfinite(subject.data.loss(model, subject.data.batch(0, 0, 2)))
