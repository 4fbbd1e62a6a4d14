"""A run that is killed at any moment goes on with the losses that it would have had, to the last bit."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.training.loop import STEPS, Run, build


def whole(run: Run) -> Run:
    """A run that nothing stops."""
    assert run.go()
    assert len(set(run.losses)) == STEPS
    return run


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return whole(Run(tmp_path_factory.mktemp("alone") / "whole"))


def check_killed(run: Run, kills: int, folder: Path) -> None:
    """Kill it before drawn acts on its files, some of them while it saves, and start it again each time."""
    drawn, killed = random.Random(0), 0
    for number in range(4 * kills):
        again = replace(run, folder=folder / f"killed-{number}")
        while killed < kills and not replace(again, die_at=drawn.randint(1, run.acts // 2)).go():
            killed += 1
        assert again.go()
        assert again.losses == run.losses
        if killed == kills:
            return
    pytest.fail(f"only {killed} kills came before the end of a run")


@pytest.mark.slow
def test_killed_it_goes_on_with_the_same_losses(alone: Run, tmp_path: Path) -> None:
    check_killed(alone, 2, tmp_path)


@pytest.mark.parametrize("step", [10, 15])
def test_it_goes_on_from_either_side_of_the_switch(alone: Run, tmp_path: Path, step: int) -> None:
    """Killed in the first act after a checkpoint of before it, and of after it."""
    again = replace(alone, folder=tmp_path / "run", die_after=f"step-{step:03}")
    assert not again.go()
    assert max(path.name for path in again.folder.glob("step-*")) == f"step-{step:03}"
    assert replace(again, die_after=None).go()
    assert again.losses == alone.losses


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp"])
def test_two_processes_killed_ten_times(tmp_path: Path, sharded: bool) -> None:
    check_killed(whole(Run(tmp_path / "whole", ranks=2, sharded=sharded)), 10, tmp_path)


def test_a_checkpoint_of_after_the_switch_is_the_plain_models(alone: Run) -> None:
    saved = torch.distributed.checkpoint.FileSystemReader(alone.folder / f"step-{STEPS:03}").read_metadata()
    names = {name.removeprefix("model.") for name in saved.state_dict_metadata if name.startswith("model.")}
    assert names == set(build().state_dict())
