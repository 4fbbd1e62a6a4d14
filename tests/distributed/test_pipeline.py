"""Pipeline stages: planned with split_at they train as one process; without it a fusion layer says what is missing."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.distributed.pipelining import SplitPoint, pipeline

import replfx
from tests.distributed.pipelines import STAGES, Case, work
from tests.support.models import ConvNet, Tower, tower
from tests.support.processes import assert_all_well, on_ranks

pytestmark = pytest.mark.timeout(1800)  # many cases in one group of processes

TRANSFORMER = Case("transformer", "blocks.4", "block", "scalar")
JOBS = [
    ("transformer-sequence", TRANSFORMER, "sequence"),
    ("transformer-pruned", Case("transformer", "blocks.4", "block", "channel", 0.5), "pruned"),
    ("transformer-traced", TRANSFORMER, "traced"),
    ("transformer-light", Case("transformer", "blocks.3", "light", "scalar_layer"), "sequence"),
    ("cnn-pruned", Case("cnn", "stages.0.3", "block", "scalar"), "pruned"),
    ("cnn-traced", Case("cnn", "stages.0.3", "light", "scalar"), "traced"),
]


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str | None]]:
    """What each process found, from one run of all."""
    return on_ranks(STAGES, work, tmp_path_factory.mktemp("stages"), JOBS)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, _, _ in JOBS])
def test_two_stages_train_as_one_process(findings: list[dict[str, str | None]], name: str) -> None:
    assert_all_well(findings, name)


# ---- what is parted


def transformed() -> Tower:
    """Six blocks, of which 1 and 3 are replaced: 3 reads 2 and 4."""
    return replfx.transform(tower(6))


def pruned(model: Tower, first: int) -> Tower:
    """A copy that begins with a block."""
    part = copy.deepcopy(model)
    part.stem = nn.Identity()
    for number in range(first):
        setattr(part.blocks, str(number), nn.Identity())
    return part


PARTED = r"`{layer}` is a replaced block, .* of its neighbour `{neighbour}`: .* split_at="


def test_a_copy_without_a_neighbour_is_refused_in_its_first_forward_pass() -> None:
    model = transformed()
    model(torch.rand(2, 4))  # that it was whole before says nothing of a copy
    x = torch.rand(2, 8)
    for part in (pruned(model, 3), pickle.loads(pickle.dumps(pruned(model, 3)))):
        with pytest.raises(replfx.FusionError, match=PARTED.format(layer="blocks.3", neighbour="blocks.2")):
            part(x)
    pruned(model, 2)(x)
    pruned(model, 4)(x)
    before = copy.deepcopy(model)
    del before.blocks[4:]
    with pytest.raises(replfx.FusionError, match=PARTED.format(layer="blocks.3", neighbour="blocks.4")):
        before(torch.rand(2, 4))
    replfx.materialize(model)(torch.rand(2, 4))
    pruned(replfx.materialize(model), 3)(x)


def test_a_neighbour_that_is_swapped_after_a_forward_pass_is_noticed() -> None:
    model, x = transformed(), torch.rand(2, 4)
    model(x)
    model.blocks[2] = nn.Sequential(model.blocks[2])  # is still what runs
    model(x)
    model.blocks[2] = copy.deepcopy(model.blocks[2])
    for _ in range(2):
        with pytest.raises(replfx.FusionError, match=PARTED.format(layer="blocks.1", neighbour="blocks.2")):
            model(x)


def test_a_stage_put_together_by_hand_is_checked() -> None:
    model = transformed()
    part = nn.Sequential(*model.blocks[3:])
    part(torch.rand(4, 8))  # no stage, but a part that somebody runs
    with pytest.raises(replfx.FusionError, match=PARTED.format(layer="0", neighbour="blocks.2")):
        replfx.check_stage(part)
    replfx.check_stage(nn.Sequential(*model.blocks[2:]))


@pytest.mark.parametrize(
    ("split_spec", "layer", "neighbour"),
    [
        ({"blocks.2": SplitPoint.BEGINNING}, "blocks.1", "blocks.2"),
        ({"blocks.2": SplitPoint.END}, "blocks.3", "blocks.2"),
        ({"blocks.3": SplitPoint.BEGINNING}, "blocks.3", "blocks.2"),
        ({"blocks.3": SplitPoint.END}, "blocks.3", "blocks.4"),
        ({"blocks.5": SplitPoint.BEGINNING, "blocks.4": SplitPoint.BEGINNING}, "blocks.3", "blocks.4"),
        ({"blocks.4": SplitPoint.END}, None, None),
        ({"blocks.5": SplitPoint.BEGINNING}, None, None),
        ({"stem": SplitPoint.END, "head": SplitPoint.BEGINNING}, None, None),
    ],
)
def test_pipeline_refuses_to_part_them(
    split_spec: dict[str, SplitPoint], layer: str | None, neighbour: str | None
) -> None:
    model, x = transformed(), torch.rand(2, 4)
    model(x)
    if layer is None:
        pipe = pipeline(model, (x,), split_spec=split_spec)
        names = [n for i in range(pipe.num_stages) for n, _ in pipe.get_stage_module(i).named_parameters()]
        assert sorted(names) == sorted(n for n, _ in model.named_parameters())  # none is in two stages
        return
    with pytest.raises(RuntimeError, match="cannot capture your model") as raised:
        pipeline(model, (x,), split_spec=split_spec)
    assert isinstance(raised.value.__cause__, replfx.FusionError)
    with pytest.raises(replfx.FusionError, match=PARTED.format(layer=layer, neighbour=neighbour)):
        raise raised.value.__cause__


def test_what_is_no_stage_goes_on_working() -> None:
    model, x = transformed(), torch.rand(2, 8)
    model.blocks[3](x)
    torch.utils.checkpoint.checkpoint(model.blocks[3], x, use_reentrant=False).sum().backward()
    torch.compile(model, fullgraph=True, backend="eager")(torch.rand(2, 4))
    torch.compile(copy.deepcopy(model.blocks), fullgraph=True, backend="eager")(x)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    torch.func.functional_call(model, weights, (torch.rand(2, 4),))
    torch.func.vmap(lambda one: torch.func.functional_call(model, weights, (one,)))(torch.rand(3, 2, 4))
    torch.export.export(pickle.loads(pickle.dumps(model)), (torch.rand(2, 4),))
    norms = nn.SyncBatchNorm.convert_sync_batchnorm(replfx.transform(ConvNet(), torch.rand(2, 3, 8, 8)))
    replfx.check_stage(norms)  # other modules, and the same parameters


def test_a_stage_is_a_module() -> None:
    with pytest.raises(replfx.FusionError, match=r"a stage is a torch\.nn\.Module, not list"):
        replfx.check_stage([nn.Linear(2, 2)])
