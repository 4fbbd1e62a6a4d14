"""Models of libraries, narrow and with random weights: they run forward and backward, and stay what they were.

tests/benchmarks/zoo has more of them, each replaced in one way; here are all operators, the chains, and the ways back.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import replfx
from replfx.measure import trainable_parameters
from replfx.modules.tree import tensors_in as tensors
from tests.support.compiled import Compiled
from tests.support.models import GPT
from tests.support.snapshots import assert_unchanged, snapshot

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")


@dataclass(frozen=True)
class Case:
    """A model, how to feed it, and what is known of its chains.

    Attributes:
        pixels: side of its images; 0 for token ids.
        chains: the number of blocks of each chain.
        replaced: how many are replaced: every second one, counted anew in each stage.
        light: whether its blocks have a light operator.
    """

    name: str
    build: Callable[[], nn.Module]
    pixels: int
    chains: tuple[int, ...]
    replaced: int
    light: bool = True


def vision(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: torchvision.models.get_model(name, weights=None, **options)


def image_model(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, pretrained=False, **options)


def bottlenecks() -> nn.Module:
    return torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [3, 4, 3, 2], width_per_group=8)


def convnext() -> nn.Module:
    stage = torchvision.models.convnext.CNBlockConfig
    return torchvision.models.ConvNeXt([stage(16, 24, 3), stage(24, 32, 3), stage(32, 40, 4), stage(40, None, 2)])


def gmlp(blocks: int) -> nn.Module:
    mixer = timm.models.mlp_mixer
    kinds = {"block_layer": mixer.SpatialGatingBlock, "mlp_layer": mixer.GatedMlp}
    return mixer.MlpMixer(10, 64, num_blocks=blocks, embed_dim=48, mlp_ratio=6, **kinds)


def volo() -> nn.Module:
    return timm.models.volo.VOLO((4, 4, 8, 2), 64, embed_dims=(24, 48, 48, 48), num_heads=(2, 4, 4, 4))


VIT = {"img_size": 64, "embed_dim": 48, "depth": 6}
CASES = [
    Case("resnet", bottlenecks, 64, (12,), 4),
    Case("convnext", convnext, 32, (12,), 4),
    Case("vit", lambda: torchvision.models.VisionTransformer(32, 16, 6, 2, 24, 48), 32, (6,), 2),
    Case(
        "swin", lambda: torchvision.models.SwinTransformer([4, 4], 24, [2, 2, 2, 2], [1, 2, 2, 2], [7, 7]), 64, (8,), 3
    ),
    Case("efficientnet_b0", vision("efficientnet_b0"), 64, (16,), 6),
    Case("vit_tiny", image_model("vit_tiny_patch16_224", **VIT), 64, (6,), 2),
    Case("deit3_small", image_model("deit3_small_patch16_224", **VIT), 64, (6,), 2),
    Case("convnext_atto", image_model("convnext_atto", dims=(16, 24, 32, 40)), 32, (12,), 5),
    Case("cait_xxs24", image_model("cait_xxs24_224", **VIT), 64, (6,), 2),
    # Its attention mixes the channels of a head: no row of the value map alone makes what the output map takes.
    Case("xcit_nano_12", image_model("xcit_nano_12_p8_224", **VIT), 64, (6,), 2, light=False),
    Case("gmlp_ti16", lambda: gmlp(6), 64, (6,), 2, light=False),
    Case("volo_d1", volo, 64, (4, 14), 7),
    Case("regnety_004", image_model("regnety_004"), 64, (16,), 6),
    Case("gpt", lambda: GPT(), 0, (6,), 2),
]


def batch(case: Case) -> Tensor:
    return torch.rand(2, 3, case.pixels, case.pixels) if case.pixels else torch.randint(0, 31, (2, 12))


def with_gradient(model: nn.Module, x: Tensor) -> set[str]:
    """Names of the parameters that got a gradient, which must be finite."""
    model.train().zero_grad()
    torch.manual_seed(0)
    loss = torch.stack([out.double().square().mean() for out in tensors(model(x))]).sum()
    loss.backward()
    assert torch.isfinite(loss)
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    broken = [name for name, grad in found.items() if not torch.isfinite(grad).all()]
    assert not broken
    return set(found)


SLOW = ("cait_xxs24", "convnext", "deit3_small", "efficientnet_b0", "regnety_004", "swin", "volo_d1", "xcit_nano_12")
every_case = pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.name, marks=[pytest.mark.slow] * (case.name in SLOW)) for case in CASES]
)


@every_case
def test_it_runs_forward_and_backward_and_stays_what_it_was(case: Case) -> None:
    torch.manual_seed(0)
    model = case.build()
    x = batch(case)
    before = snapshot(model)
    operators = ("block", "light", "identity") if case.light else ("block", "identity")
    lighter = {op: replfx.transform(model, x, operator=op, fusion="scalar") for op in operators}
    assert_unchanged(model, before)
    originally = with_gradient(model, x)
    shapes = [out.shape for out in tensors(model(x))]
    for op, made in lighter.items():
        report = replfx.report(made)
        assert type(made) is type(model)
        assert tuple(len(chain) for chain in report.chains) == case.chains
        assert len(report.replaced) == case.replaced
        check_report(report, model, made, op)
        assert [out.shape for out in tensors(made(x))] == shapes
        check_gradients(made, originally, with_gradient(made, x))
        check_state_dict(made, model, x)


# Why a light block does not go back into the full one: what carries its map there.
STAYS = {
    "resnet": "its normalisation follows the light map",
    "regnety_004": "its normalisation follows the light map",
    "efficientnet_b0": "its normalisation follows the light map",
}


@every_case
def test_light_blocks_go_back_into_full_ones(case: Case) -> None:
    if not case.light:
        pytest.skip("its blocks have no light operator")
    torch.manual_seed(0)
    made, x = replfx.transform(case.build(), batch(case), operator="light").double().eval(), batch(case)
    x = x.double() if case.pixels else x
    with torch.no_grad():
        for parameter in made.parameters():  # heads and scales that start at zero would hide all
            parameter.add_(0.05 * torch.randn_like(parameter))
    before = [out.detach() for out in tensors(made(x))]
    if case.name in STAYS:
        with pytest.raises(replfx.FusionError, match=STAYS[case.name]):
            replfx.unroll(made, None, x)
    else:
        made = replfx.unroll(made, None, x)
        assert list(made.state_dict()) == list(case.build().state_dict())
    for one, other in zip(tensors(made(x)), before, strict=True):
        # Float64 through a few dozen layers; a map in the wrong place is off by more than 1e-3.
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9 * float(other.abs().max()))


def test_costs_before_and_after_are_those_of_both_models() -> None:
    """Flops as torch's own counter has them; `block` runs what the block ran."""
    model, x = torchvision.models.resnet18(), torch.rand(2, 3, 64, 64)
    report = replfx.inspect(model, x, operator="block")
    with FlopCounterMode(display=False) as counter:
        model(x)
    assert report.before.flops == report.after.flops == counter.get_total_flops()
    assert report.before.saved_bytes < report.after.saved_bytes  # the synthesised weights


def check_report(report: replfx.Report, model: nn.Module, made: nn.Module, op: str) -> None:
    for chain in report.chains:  # none beside another, none at the ends
        replaced = [index for index, path in enumerate(chain) if path in report.replaced]
        assert not {0, len(chain) - 1, *(index + 1 for index in replaced)} & set(replaced)
    for block in report.blocks:
        assert (block.operator is not None) == (block.path in report.replaced) == (block.kept is None)
        assert block.flops > 0
        assert block.saved_bytes is not None
        if block.operator is None:
            continue
        chain = report.chains[block.chain]
        at = chain.index(block.path)
        assert block.operator == op
        if op != "identity":
            assert (block.previous, block.next, block.fusion) == (chain[at - 1], chain[at + 1], "scalar")
        assert block.parameters_after < block.parameters
        assert block.parameters_after == trainable_parameters(made.get_submodule(block.path))
        assert block.parameters == trainable_parameters(model.get_submodule(block.path))
    assert report.parameters_before == trainable_parameters(model)
    assert report.parameters_after == trainable_parameters(made)


def check_gradients(made: nn.Module, originally: set[str], now: set[str]) -> None:
    """All that had a gradient have one, and so has all that is new."""
    for name, parameter in made.named_parameters():
        is_new = ".fusion." in name or ".operator." in name
        if parameter.requires_grad and (is_new or name in originally):
            assert name in now


def check_state_dict(made: nn.Module, model: nn.Module, x: Tensor) -> None:
    twin = replfx.apply(model, made._replfx.plan)
    twin.load_state_dict(made.state_dict(), strict=True)
    made.eval(), twin.eval()
    with torch.no_grad():
        for one, other in zip(tensors(made(x)), tensors(twin(x)), strict=True):
            assert torch.equal(one, other)


def test_resnet18_has_unlike_neighbours() -> None:
    model = vision("resnet18")()
    for inputs in (None, torch.rand(2, 3, 64, 64)):
        report = replfx.report(replfx.transform(model, inputs, operator="block"))
        assert report.replaced == ["layer1.1", "layer2.1", "layer3.1"]
        assert (report.blocks[1].previous, report.blocks[1].next) == ("layer1.0", "layer2.0")
        gains = 3 * 128 + 64 + 64  # two maps of two differing sizes, one of the first kernel's that does not
        assert 0 < report.blocks[1].parameters_after < 1000 > gains
    made = replfx.transform(model, select="layer2.0", operator="block")  # a change of shape, for who asks
    assert "layer2.0.downsample.0.weight" in made.state_dict()  # neither neighbour has its like


def test_gmlp_has_no_light_operator_and_says_so() -> None:
    model = gmlp(3)
    with pytest.raises(replfx.NoChainError, match=r"`blocks\.1`: operator 'light' does not fit it: .+"):
        replfx.transform(model, torch.rand(2, 3, 64, 64), operator="light")
    with pytest.raises(replfx.FusionError, match=r"`blocks\.1`: operator 'light' does not fit it: .+"):
        replfx.transform(model, torch.rand(2, 3, 64, 64), operator="light", select="blocks.1")


def test_chains_run_across_containers() -> None:
    model = volo()
    chains = replfx.inspect(model, torch.rand(2, 3, 64, 64)).chains
    assert ["network.0.0", "network.0.1", "network.0.2", "network.0.3"] in chains
    (long,) = (chain for chain in chains if len(chain) == 14)
    assert (long[0], long[-1]) == ("network.2.0", "network.4.1")


def detection() -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    images = [torch.rand(3, 64, 64), torch.rand(3, 64, 56)]
    target = {"boxes": torch.tensor([[4.0, 4.0, 40.0, 40.0]]), "labels": torch.tensor([1])}
    return images, [target, copy.deepcopy(target)]


def detector() -> nn.Module:
    torch.manual_seed(0)
    models = torchvision.models.detection
    body = models.backbone_utils.resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, trainable_layers=5, norm_layer=nn.BatchNorm2d
    )
    return models.FasterRCNN(body, 3, min_size=64, max_size=64)


def test_a_detector_still_takes_images_and_targets() -> None:
    model = detector()
    images, targets = detection()
    made = replfx.transform(model, (images, targets), operator="block")
    report = replfx.report(made)
    assert type(made) is type(model)
    assert next(len(chain) for chain in report.chains) == 8
    assert report.replaced[:3] == [f"backbone.body.layer{i}.1" for i in (1, 2, 3)]
    losses = made.train()(images, targets)
    assert set(losses) == {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}
    torch.stack(list(losses.values())).sum().backward()
    for name, parameter in made.named_parameters():
        if ".fusion." in name or ".operator." in name:
            assert torch.isfinite(parameter.grad).all()
    with torch.no_grad():
        found = made.eval()(images)
    assert [set(each) for each in found] == [{"boxes", "labels", "scores"}] * 2


@pytest.mark.slow
def test_a_detector_in_evaluation_mode() -> None:
    model = detector().eval()
    images, _ = detection()
    before = snapshot(model)
    made = replfx.transform(model, (images,), operator="light")
    assert next(len(chain) for chain in replfx.report(made).chains) == 8
    assert [set(each) for each in made(images)] == [{"boxes", "labels", "scores"}] * 2
    assert_unchanged(model, before)


COMPILED = [
    ("resnet", "block"),
    ("vit_tiny", "block"),
    ("vit_tiny", "light"),
    ("convnext_atto", "light"),
    ("regnety_004", "light"),
    ("gpt", "block"),
    ("gpt", "light"),
]


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(
    ("name", "operator"), [pytest.param(*case, marks=[pytest.mark.slow] * (case[0] != "gpt")) for case in COMPILED]
)
def test_compile_and_export_where_the_original_did(name: str, operator: str) -> None:
    (case,) = (case for case in CASES if case.name == name)
    torch.manual_seed(0)
    x = batch(case)
    made = replfx.transform(case.build(), x, operator=operator, fusion="channel").eval()
    with torch.no_grad():
        expected = made(x)
        exported = torch.export.export(made, (x,)).module()
        torch.testing.assert_close(exported(x), expected)
    compiled = Compiled(made, "aot_eager")  # in one graph, by the backend
    actual = compiled(x)
    torch.testing.assert_close(actual, expected)
    assert compiled.batches[0]
    actual.sum().backward()
    lost = [n for n, p in made.named_parameters() if (".fusion." in n) and p.grad is None]
    assert not lost
