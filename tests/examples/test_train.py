"""examples/train.py: killed at any moment it goes on as if nothing had been; what cannot be resumed is refused."""

from __future__ import annotations

import csv
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.examples.processes import SCRIPT, Job

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="a build without torch.distributed")

KILLS, STEPS, EVERY = 6, 28, 7
# drop_path draws random numbers in training: without their state a resumed run would draw others.
OPTIONS = [
    *("--data", "fake", "--model", "test_vit", "--image-size", "32", "--operator", "light", "--workers", "0"),
    *("--model-options", '{"img_size": 32, "depth": 3, "drop_path_rate": 0.2}', "--batch-size", "2"),
    *("--steps", str(STEPS), "--save-every", str(EVERY)),
]

MODEL_ALONE = '{"img_size": 32, "depth": 3}'  # compiled code draws other random numbers

Rows = list[tuple[str, str, str]]


def rows_of(output: Path) -> Rows:
    """Step, loss and learning rate of each line of a log, as they are written there."""
    with (output / "log.csv").open() as file:
        return [(row["step"], row["loss"], row["learning_rate"]) for row in csv.DictReader(file)]


def checkpoints(output: Path) -> list[str]:
    """Whole ones and parts, by their numbers."""
    return sorted(re.sub("step-0*", "", path.name) for path in output.glob("*step-*"))


def contents(output: Path, pattern: str = "**/*") -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in output.glob(pattern) if path.is_file()}


def resumes(output: Path, reference: tuple[Rows, float]) -> None:
    """Started again as it was started, the run ends as the uninterrupted one did."""
    assert not Job(OPTIONS, output).run()
    assert rows_of(output) == reference[0]
    assert checkpoints(output) == ["21", "28"]


def refuses(output: Path, more: list[str], message: str) -> str:
    """With more options it says so, and changes nothing; gives all that it says."""
    before = contents(output)
    said = Job([*OPTIONS, *more], output).run()
    assert message in said
    assert "Traceback" not in said
    assert contents(output) == before
    return said


def check_killed_often(
    options: list[str], ranks: int, rows: Rows, seconds: float, folder: Path, times: int = KILLS
) -> None:
    """Kill by turns at a drawn time and before a drawn act on its files; what ends before is compared too."""
    drawn = random.Random(ranks)

    def run(output: Path, kills: int) -> str:
        if kills == times:
            return Job(options, output, ranks).run()
        if kills % 2:
            return Job(options, output, ranks, die_at=("", drawn.randint(1, 40))).run()
        return Job(options, output, ranks).run(seconds=drawn.uniform(0.1, 0.9) * seconds)

    kills = 0
    for number in range(4 * times):
        output = folder / f"run{number}"
        while (result := run(output, kills)) == "killed":
            kills += 1
        assert not result
        assert rows_of(output) == rows
        if kills == times:
            return
    pytest.fail(f"only {kills} kills came before the end of a run")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Rows, float]:
    """An uninterrupted run: its log, and the seconds that it took."""
    folder = tmp_path_factory.mktemp("reference")
    Job(["--help"], folder / "warm").run()  # starts the process that the others are forked from
    begun = time.monotonic()
    assert not Job(OPTIONS, folder / "run").run()
    seconds = time.monotonic() - begun
    rows = rows_of(folder / "run")
    assert [row[0] for row in rows] == [str(step) for step in range(1, STEPS + 1)]
    assert len({row[1] for row in rows}) == STEPS
    assert checkpoints(folder / "run") == ["21", "28"]
    return rows, seconds


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_that_unrolls_goes_on_from_either_side(tmp_path: Path, ranks: int) -> None:
    """From a checkpoint of before the switch, which comes after step 21, and from one of that very step."""
    options = [*OPTIONS, "--operator", "block", "--unroll-at", "21", *(["--fsdp"] if ranks > 1 else [])]
    assert not Job(options, tmp_path / "whole", ranks).run()
    for number, die_at in enumerate(("step-000000021", "step-000000028")):
        output = tmp_path / f"killed{number}"
        assert Job(options, output, ranks, die_at=(die_at, 1)).run() == "killed"
        assert not Job(options, output, ranks).run()
        assert rows_of(output) == rows_of(tmp_path / "whole")
    assert json.loads((output / "step-000000028" / "run.json").read_text())["unrolls"]["unrolled"]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed just before it began the checkpoint of step 21."""
    output = tmp_path_factory.mktemp("killed") / "run"
    assert Job(OPTIONS, output, die_at=("step-000000021", 1)).run() == "killed"
    assert checkpoints(output) == ["14", "7"]
    assert len(rows_of(output)) == 21
    return output


@pytest.fixture
def halfway(killed: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(killed, tmp_path / "run"))


# ---- killed


def test_killed_twice_it_has_the_same_losses(reference: tuple[Rows, float], tmp_path: Path) -> None:
    check_killed_often(OPTIONS, 1, *reference, tmp_path, times=2)


@pytest.mark.slow
def test_killed_often_it_has_the_same_losses(reference: tuple[Rows, float], tmp_path: Path) -> None:
    check_killed_often(OPTIONS, 1, *reference, tmp_path)


@pytest.mark.parametrize("act", [2, 5, 8])  # before the tensors, run.json, and the new name
def test_killed_while_it_saves_it_keeps_what_it_had(reference: tuple[Rows, float], halfway: Path, act: int) -> None:
    before = contents(halfway, "step-*/*")
    assert Job(OPTIONS, halfway, die_at=("21.part", act)).run() == "killed"
    assert checkpoints(halfway) == [".21.part", "14", "7"]
    assert contents(halfway, "step-*/*") == before
    resumes(halfway, reference)


def test_killed_while_it_removes_an_old_checkpoint(reference: tuple[Rows, float], halfway: Path) -> None:
    assert Job(OPTIONS, halfway, die_at=("7.part", 1)).run() == "killed"
    assert checkpoints(halfway) == [".7.part", "14", "21"]
    resumes(halfway, reference)


def test_half_a_line_of_the_log_is_written_anew(reference: tuple[Rows, float], halfway: Path) -> None:
    with (halfway / "log.csv").open("a") as log:
        log.write("22,2.3")
    resumes(halfway, reference)


def test_a_finished_run_has_nothing_left_to_do(reference: tuple[Rows, float], halfway: Path) -> None:
    resumes(halfway, reference)
    before = contents(halfway)
    resumes(halfway, reference)
    assert contents(halfway) == before


# ---- bad input: a clear error, and nothing is lost


def test_another_plan_is_refused(halfway: Path) -> None:
    refuses(
        halfway,
        ["--operator", "block"],
        "step-000000014 has another plan: blocks.1 by light (scalar), not blocks.1 by block (scalar). "
        "Start it as it was started, or give another --output",
    )
    refuses(halfway, ["--no-replace"], "has another plan: blocks.1 by light (scalar), not nothing replaced")


def test_another_setting_is_refused(halfway: Path) -> None:
    refuses(halfway, ["--batch-size", "4"], "step-000000014 has another batch_size: 2, not 4.")


@pytest.mark.parametrize(
    ("name", "other", "message"),
    [("replfx", "0.0.1", "another replfx: 0.0.1, not "), ("world_size", 2, "another world_size: 2, not 1.")],
)
def test_another_version_or_world_size_is_refused(halfway: Path, name: str, other: object, message: str) -> None:
    path = halfway / "step-000000014" / "run.json"
    about = json.loads(path.read_text())
    about["identity"][name] = other
    path.write_text(json.dumps(about))
    refuses(halfway, [], message)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


@pytest.mark.parametrize(
    ("name", "harm"),
    [("__0_0.distcp", Path.unlink), ("__0_0.distcp", cut), (".metadata", Path.unlink), ("run.json", cut)],
)
def test_a_checkpoint_that_is_not_whole_is_refused(
    reference: tuple[Rows, float], halfway: Path, name: str, harm: Callable[[Path], None]
) -> None:
    newest = halfway / "step-000000014"
    harm(newest / name)
    said = refuses(halfway, [], f"{newest} is damaged: ")
    assert name in said or name == "run.json"  # a reader of JSON does not know what file it reads
    assert "the run goes on from step-000000007" in said
    newest.rename(halfway / "aside")  # as the message says
    if name == ".metadata":  # whatever was wrong, it is away
        resumes(halfway, reference)


def test_a_full_disk_leaves_the_checkpoints_as_they_were(reference: tuple[Rows, float], halfway: Path) -> None:
    before = contents(halfway, "step-*/*")
    said = Job(OPTIONS, halfway, file_limit=200_000).run()
    assert "step-000000021 could not be written, with " in said
    assert "Whole checkpoints: step-000000007, step-000000014. Make room" in said
    assert contents(halfway, "*step-*/*") == before
    resumes(halfway, reference)


def test_a_log_that_cannot_be_written_ends_the_run(reference: tuple[Rows, float], halfway: Path) -> None:
    size = json.loads((halfway / "step-000000014" / "run.json").read_text())["logged"]
    said = Job(OPTIONS, halfway, file_limit=size + 120).run()
    assert f"{halfway / 'log.csv'} could not be written: [Errno 27] File too large. Make room" in said
    assert checkpoints(halfway) == ["14", "7"]
    resumes(halfway, reference)


def test_a_log_that_was_cut_is_refused(halfway: Path) -> None:
    cut(halfway / "log.csv")
    refuses(halfway, [], "log.csv has 100 bytes, and had ")


def test_a_log_without_its_checkpoints_is_not_written_over(halfway: Path) -> None:
    for path in halfway.glob("step-*"):
        shutil.rmtree(path)
    refuses(halfway, [], "log.csv is of a run whose checkpoints are gone")


def test_two_runs_do_not_write_to_one_folder(reference: tuple[Rows, float], halfway: Path) -> None:
    [first] = Job(OPTIONS, halfway).start()
    while "21" not in checkpoints(halfway):
        assert first.is_alive()
        time.sleep(0.01)
    assert first.pid is not None
    os.kill(first.pid, signal.SIGSTOP)
    try:
        refuses(halfway, [], f"another run writes to {halfway}: wait for its end")
    finally:
        os.kill(first.pid, signal.SIGCONT)
        first.join()
    assert rows_of(halfway) == reference[0]


def test_ranks_with_different_plans_are_refused(tmp_path: Path) -> None:
    said = Job(OPTIONS, tmp_path / "run", ranks=2, of_rank={1: ["--operator", "block"]}).run()
    for rank in range(2):
        assert f"rank {rank}: the ranks would train different models: rank 1 not as rank 0" in said
    assert "rank 1 replaces `blocks.1` with operator block" in said
    assert checkpoints(tmp_path / "run") == []


def test_no_data_and_no_model_are_said(tmp_path: Path) -> None:
    options = ["--data-root", str(tmp_path), "--model", "test_vit"]
    assert f"{tmp_path / 'train'} is no folder: --data-root has" in Job(options, tmp_path / "run").run()
    options = ["--data", "fake", "--model", "test_vti"]
    assert "neither timm nor torchvision has a model 'test_vti'" in Job(options, tmp_path / "run").run()


# ---- what else it can do


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from PIL import Image

    root = tmp_path_factory.mktemp("pictures")
    for number in range(12):
        path = root / "train" / f"class{number % 3}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((40, 40), 20 + number).convert("RGB").save(path)
    return root


def test_a_folder_of_pictures_is_read_alike_by_any_number_of_workers(pictures: Path, tmp_path: Path) -> None:
    """Over the end of an epoch, and also where a killed run goes on with other workers."""
    options = [*OPTIONS, "--data", "folder", "--data-root", str(pictures), "--steps", "12", "--save-every", "4"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert not Job(options, one).run()
    assert Job(options, two, die_at=("8.part", 1)).run() == "killed"
    assert not Job([*options, "--workers", "2"], two).run()
    assert rows_of(one) == rows_of(two)
    assert len(rows_of(one)) == 12


@pytest.mark.parametrize(
    "more",
    [["--amp"], ["--no-replace"], ["--model", "shufflenet_v2_x0_5", "--model-options", "{}", "--operator", "auto"]],
)
def test_options_train(reference: tuple[Rows, float], tmp_path: Path, more: list[str]) -> None:
    assert not Job([*OPTIONS, *more, "--steps", "2"], tmp_path / "run").run()
    rows = rows_of(tmp_path / "run")
    assert len(rows) == 2
    assert rows[0][1] != reference[0][0][1]


@pytest.mark.slow
def test_compiled_it_trains_alike(reference: tuple[Rows, float], tmp_path: Path) -> None:
    assert not Job([*OPTIONS, "--compile", "--model-options", MODEL_ALONE, "--steps", "4"], tmp_path / "run").run()
    assert not Job([*OPTIONS, "--model-options", MODEL_ALONE, "--steps", "4"], tmp_path / "eager").run()
    for compiled, eager in zip(rows_of(tmp_path / "run"), rows_of(tmp_path / "eager"), strict=True):
        assert float(compiled[1]) == pytest.approx(float(eager[1]), rel=1e-3)


# ---- several processes


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--fsdp"]], ids=["ddp", "fsdp"])
def test_two_processes_killed_often(tmp_path: Path, more: list[str]) -> None:
    options = [*OPTIONS, *more]
    begun = time.monotonic()
    assert not Job(options, tmp_path / "whole", ranks=2).run()
    seconds = time.monotonic() - begun
    rows = rows_of(tmp_path / "whole")
    assert [row[0] for row in rows] == [str(step) for step in range(1, STEPS + 1)]
    check_killed_often(options, 2, rows, seconds, tmp_path)
    refuses(tmp_path / "whole", more, "step-000000028 has another world_size: 2, not 1.")


@pytest.mark.slow
def test_started_by_torchrun(tmp_path: Path) -> None:
    """The command of the docstring; of the processes that it starts, one is killed."""
    options = [*OPTIONS, "--output", str(tmp_path / "run")]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(SCRIPT)]
    path = os.pathsep.join([str(SCRIPT.parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    first = subprocess.Popen([*command, *options], env=environment, start_new_session=True)
    while "14" not in checkpoints(tmp_path / "run"):
        assert first.poll() is None
        time.sleep(0.01)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    # The processes that train are in sessions of their own, and end when they miss torchrun or each other.
    subprocess.run([*command, *options], env=environment, check=True, timeout=300)
    assert not Job(OPTIONS, tmp_path / "whole", ranks=2).run()
    assert rows_of(tmp_path / "run") == rows_of(tmp_path / "whole")
