"""torch.distributed.checkpoint: saved on 2 processes, loaded on 1 and on 4; and what cannot be loaded."""

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.multiprocessing.spawn import ProcessExitedException
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map

import replfx
from tests.distributed.layouts import by_block
from tests.distributed.ranks import BATCH, whole_tensor
from tests.support.processes import on_ranks
from tests.support.strategies import Case, case_of

pytestmark = pytest.mark.timeout(1800)  # many cases in one group of processes

STEPS = 3  # before the checkpoint, and after
TOLERANCE = 1e-9  # float64 sums in another order, through some steps of AdamW


def transformer(fusion: str, operator: str, seed: int = 13) -> Case:
    return case_of("transformer", operator, fusion, training=False, width=6, depth=5, seed=seed)


CASE = transformer("channel", "block")
# Begins with other numbers: what is not loaded is not equal.
FRESH = transformer("channel", "block", seed=14)

Weights = dict[str, Tensor]


class Run:
    """A model in training, spread by `wrap` over the processes that there are."""

    def __init__(self, model: nn.Module, wrap: Callable[[Any], nn.Module]) -> None:
        self.model = model
        self.wrapped = wrap(model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.mine = slice(*(BATCH // dist.get_world_size() * (dist.get_rank() + end) for end in (0, 1)))

    def train(self, first: int, steps: int = STEPS) -> None:
        for step in range(first, first + steps):
            x = CASE.inputs(BATCH)[0].detach()[self.mine] + step
            self.optimizer.zero_grad()
            (self.wrapped(x) ** 2).mean().backward()
            self.optimizer.step()

    def state(self) -> dict[str, Any]:
        weights, moments = get_state_dict(self.model, self.optimizer)
        return {"model": weights, "optimizer": moments}

    def load(self, folder: Path) -> None:
        """Into copies first, so that a checkpoint that cannot be read to its end leaves all as it was."""
        state = tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, self.state())
        dcp.load(state, checkpoint_id=folder)
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])

    def weights(self) -> Weights:
        return {name: whole_tensor(p).detach().clone() for name, p in self.model.named_parameters()}


def save(run: Run, folder: Path) -> None:
    """Written beside and then renamed, so that `folder` is a whole checkpoint or is not there."""
    beside = folder.with_name(f".{folder.name}.part")
    dcp.save(run.state(), checkpoint_id=beside)
    if dist.get_rank() == 0:
        beside.rename(folder)
    dist.barrier()


def differs(run: Run, wanted: Weights) -> list[str]:
    found = run.weights()
    assert found.keys() == wanted.keys()
    return [name for name, theta in wanted.items() if not torch.allclose(found[name], theta, rtol=0, atol=TOLERANCE)]


# ---- what the processes do


def _save(folder: Path) -> tuple[Weights, Weights]:
    """The weights at the checkpoint, and those after it without an interruption."""
    run = Run(CASE.transformed(), by_block)
    run.train(0)
    save(run, folder / "step-3")
    halfway = run.weights()
    run.train(STEPS)
    save(Run(CASE.model(), by_block), folder / "untransformed")
    save(Run(transformer("scalar", "light").transformed(), by_block), folder / "another")
    return halfway, run.weights()


def _resume(folder: Path, halfway: Weights, ended: Weights) -> list[str]:
    """In each layout; what is not as in the uninterrupted run."""
    found = []
    for wrap in (by_block, DistributedDataParallel):
        run = Run(FRESH.transformed(), wrap)
        assert differs(run, halfway)
        run.load(folder)
        found += differs(run, halfway)
        run.train(STEPS)
        found += differs(run, ended)
    return found


def _refuse(folders: list[Path]) -> list[tuple[str, list[str]]]:
    """What loading each says, and what it changed."""
    said = []
    for folder in folders:
        run = Run(FRESH.transformed(), by_block)
        run.train(0, 1)
        before = run.weights()
        with pytest.raises(CheckpointException) as raised:
            run.load(folder)
        said.append((str(raised.value), differs(run, before)))
    return said


def _killed(folder: Path) -> None:
    run = Run(CASE.transformed(), by_block)
    run.train(0, 1)

    def die(event: str, values: tuple[object, ...]) -> None:
        if event == "open" and "__1_0.distcp" in str(values[0]):  # of the second process, while both write
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(die)
    save(run, folder / "step-6")


# ---- tests


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Weights, Weights]:
    """Checkpoints that two processes wrote, and what the run was there and came to."""
    folder = tmp_path_factory.mktemp("saved")
    (halfway, ended), _ = on_ranks(2, _save, folder / "found", folder)
    return folder, halfway, ended


@pytest.mark.slow
def test_saved_on_two_it_goes_on_in_one_and_in_four(saved: tuple[Path, Weights, Weights], tmp_path: Path) -> None:
    folder, halfway, ended = saved
    for ranks in (1, 4):
        found = on_ranks(ranks, _resume, tmp_path / str(ranks), folder / "step-3", halfway, ended)
        assert found == [[]] * ranks


@pytest.mark.slow
def test_what_does_not_fit_is_refused_and_changes_nothing(saved: tuple[Path, Weights, Weights], tmp_path: Path) -> None:
    folder, *_ = saved
    lacking = Path(shutil.copytree(folder / "step-3", tmp_path / "lacking"))
    (lacking / "__1_0.distcp").unlink()
    folders = [folder / "untransformed", folder / "another", lacking]
    for found in on_ranks(2, _refuse, tmp_path / "found", folders):
        (of_full, *changes), (of_another, *more), (of_lacking, *most) = found
        assert changes == more == most == [[]]
        for said in (of_full, of_another):
            assert "Missing key in checkpoint state_dict: model.blocks.1." in said
        assert "__1_0.distcp" in of_lacking


@pytest.mark.slow
def test_a_kill_during_a_save_leaves_the_checkpoint_before(
    saved: tuple[Path, Weights, Weights], tmp_path: Path
) -> None:
    folder, halfway, ended = saved
    shutil.copytree(folder / "step-3", tmp_path / "step-3")
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        on_ranks(2, _killed, tmp_path / "killed", tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*step*")) == [".step-6.part", "step-3"]
    assert on_ranks(1, _resume, tmp_path / "found", tmp_path / "step-3", halfway, ended) == [[]]


def test_the_plan_beside_a_checkpoint_tells_another_plan_and_version() -> None:
    """DCP reads what a model asks for, and of a model with fewer weights would not tell that there was more."""
    plan = replfx.plan(CASE.model(), CASE.inputs(), **CASE.policy.arguments())
    text = plan.to_json()
    assert replfx.Plan.from_json(text) == plan
    other = transformer("channel", "identity")
    assert replfx.Plan.from_json(text) != replfx.plan(other.model(), other.inputs(), **other.policy.arguments())
    with pytest.raises(replfx.PlanError, match="the plan is of version 1, this replfx reads version 2; make it anew"):
        replfx.Plan.from_json(text.replace('"version": 2', '"version": 1'))
