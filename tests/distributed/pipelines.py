"""What each process of test_pipeline.py does: one group of processes goes through all ways of splitting a model."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, SplitPoint, pipeline
from torch.nn import functional as F

import replfx
from tests.support.compare import Gradients, assert_close, assert_same_gradients
from tests.support.models import CausalBlock, ConvNet, Tower
from tests.support.processes import tried
from tests.support.strategies import randomize

STAGES, BATCH, MICROBATCHES, STEPS = 2, 8, 4, 3

Split = Callable[[nn.Module, str, int, Tensor], tuple[Any, dict[str, str]]]


@dataclass(frozen=True)
class Case:
    """A model, where its second stage begins, and what replaces its blocks."""

    kind: str
    split_at: str
    operator: str
    fusion: str
    neighbour_gradient: float = 1.0

    def model(self) -> nn.Module:
        """The transformed model, the same in every process."""
        blocks = (CausalBlock(8, 2) for _ in range(7))
        plain = (Tower(*blocks) if self.kind == "transformer" else ConvNet(depth=6, widths=(6,))).double().eval()
        made = replfx.transform(
            plain,
            self.input()[:2],
            split_at=self.split_at,
            operator=self.operator,
            fusion=self.fusion,
            neighbour_gradient=self.neighbour_gradient,
        )
        randomize(made, 3)
        return made.eval()  # statistics of a microbatch are not those of the batch

    def input(self, step: int = 0) -> Tensor:
        shape = (BATCH, 5, 4) if self.kind == "transformer" else (BATCH, 3, 6, 6)
        return torch.randn(shape, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


# ---- ways to split


def _names(model: nn.Module) -> dict[int, str]:
    return {id(parameter): name for name, parameter in model.named_parameters()}


def as_sequence(model: nn.Module, split_at: str, rank: int, x: Tensor) -> tuple[Any, dict[str, str]]:
    """The very modules of the model, in an nn.Sequential."""
    flat = [model.stem, *model.blocks, model.head]
    cut = 1 + int(split_at.rpartition(".")[2])
    part = nn.Sequential(*(flat[:cut] if rank == 0 else flat[cut:]))
    names = _names(model)
    replfx.check_stage(part)
    stage = PipelineStage(part, rank, STAGES, torch.device("cpu"))
    return stage, {name: names[id(parameter)] for name, parameter in part.named_parameters()}


def as_pruned(model: nn.Module, split_at: str, rank: int, x: Tensor) -> tuple[Any, dict[str, str]]:
    """A copy without the other stage's blocks."""
    part = copy.deepcopy(model)
    container, _, cut = split_at.rpartition(".")
    blocks = part.get_submodule(container)
    for name in list(blocks._modules):
        if (int(name) >= int(cut)) == (rank == 0):
            setattr(blocks, name, nn.Identity())
    setattr(part, "head" if rank == 0 else "stem", nn.Identity())
    if rank == 0 and isinstance(part, ConvNet):
        part.forward = lambda x: part.stages(part.stem(x))
    return PipelineStage(part, rank, STAGES, torch.device("cpu")), {n: n for n, _ in part.named_parameters()}


def as_traced(model: nn.Module, split_at: str, rank: int, x: Tensor) -> tuple[Any, dict[str, str]]:
    """What torch makes of an exported graph."""
    pipe = pipeline(model, (x[: BATCH // MICROBATCHES],), split_spec={split_at: SplitPoint.BEGINNING})
    stage = pipe.build_stage(rank, torch.device("cpu"))
    return stage, {name: name for name, _ in stage.submod.named_parameters()}


SPLITS: dict[str, Split] = {"sequence": as_sequence, "pruned": as_pruned, "traced": as_traced}
SCHEDULES: dict[str, Any] = {"sequence": ScheduleGPipe, "pruned": Schedule1F1B, "traced": ScheduleGPipe}


# ---- training


def work(jobs: list[tuple[str, Case, str]]) -> dict[str, str | None]:
    """Run every case split its way; what went wrong, by name."""
    found: dict[str, str | None] = {}
    for name, case, way in jobs:
        found[name] = tried(_check, case, way, dist.get_rank())
        dist.barrier()
    return found


def _check(case: Case, way: str, rank: int) -> None:
    """Training in stages against one process; looked at after all steps, because the other process waits for them."""
    single = case.model()
    stage, names = SPLITS[way](case.model(), case.split_at, rank, case.input())
    schedule = SCHEDULES[way](stage, MICROBATCHES, loss_fn=F.mse_loss)
    one = torch.optim.AdamW(single.parameters(), lr=0.01)
    mine = torch.optim.AdamW(stage.submod.parameters(), lr=0.01)
    found: Gradients = {}
    wanted: Gradients = {}
    for step in range(STEPS):
        x = case.input(step)
        target = torch.randn(single(x).shape, generator=torch.Generator().manual_seed(7), dtype=x.dtype)
        one.zero_grad()
        F.mse_loss(single(x), target).backward()
        mine.zero_grad()
        schedule.step(x) if rank == 0 else schedule.step(target=target)
        for name, parameter in stage.submod.named_parameters():
            found[f"{names[name]} in step {step}"] = parameter.grad
            wanted[f"{names[name]} in step {step}"] = single.get_parameter(names[name]).grad
        one.step()
        mine.step()
    everywhere: list[Any] = [None] * STAGES
    dist.all_gather_object(everywhere, list(names.values()))
    together = sorted(name for part in everywhere for name in part)
    assert together == sorted(name for name, _ in single.named_parameters()), "the stages and the model differ"
    assert any(".fusion." in name for name in names.values()), "there is no fusion layer in this stage"
    assert_same_gradients(found, wanted)
    for name, parameter in stage.submod.named_parameters():
        assert_close(parameter, single.get_parameter(names[name]), names[name])
