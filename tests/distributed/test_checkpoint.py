"""torch.distributed.checkpoint: saved on two processes, a transformed model goes on on one and on four."""

import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

import replfx

if not torch.distributed.is_available():
    pytest.skip("a build without torch.distributed", allow_module_level=True)

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException

from tests.distributed.checkpointing import (
    AFTER,
    BEFORE,
    CASES,
    build,
    die_while_saving,
    load,
    load_on_these,
    optimizer_of,
    parameters,
    plan_in,
    save_on_these,
    train,
)

NAMES = [f"{block}-{operator}" for block, operator in CASES]


def _run(worker: Callable[..., None], world: int, folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, args=(world, port, str(folder)), nprocs=world, join=True)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of two processes, and where their training ended."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name in NAMES:
        (folder / name).mkdir()
    _run(save_on_these, 2, folder)
    return folder


@pytest.fixture(scope="module")
def gone_on(saved: Path) -> Path:
    """The same, and where training ended that went on on four processes."""
    _run(load_on_these, 4, saved)
    return saved


def _assert_same_end(found: dict[str, torch.Tensor], home: Path) -> None:
    expected = torch.load(home / "end.pt")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():  # float64, summed in another order on another number of processes
        torch.testing.assert_close(tensor, expected[name], rtol=1e-11, atol=1e-13, msg=name)


@pytest.mark.parametrize(("block", "operator"), CASES)
def test_one_process_goes_on(saved: Path, block: str, operator: str) -> None:
    home = saved / f"{block}-{operator}"
    model = build(block, plan_in(home / "checkpoint"))
    optimizer = optimizer_of(model)
    load(model, optimizer, home / "checkpoint")
    train(model, optimizer, block, range(BEFORE, BEFORE + AFTER))
    _assert_same_end(parameters(model), home)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["fsdp", "ddp"])
@pytest.mark.parametrize("name", NAMES)
def test_four_processes_go_on(gone_on: Path, name: str, how: str) -> None:
    _assert_same_end(torch.load(gone_on / name / f"end-{how}-4.pt"), gone_on / name)


@pytest.mark.parametrize("policy", [{"select": ["blocks.2"]}, {"every": 2, "fusion": "scalar"}, {"operator": "light"}])
def test_a_checkpoint_of_another_plan_is_refused(saved: Path, policy: dict[str, object]) -> None:
    _assert_refused(build("transformer", **policy), saved / "transformer-block" / "checkpoint", "Missing key|mismatch")


def test_a_checkpoint_of_the_plain_model_is_refused_and_the_other_way_round(saved: Path, tmp_path: Path) -> None:
    plain = replfx.materialize(build("transformer", every=2, operator="block"))
    _assert_refused(plain, saved / "transformer-block" / "checkpoint", "Missing key")
    dcp.save({"model": plain.state_dict(), "optimizer": {}}, checkpoint_id=tmp_path / "plain", no_dist=True)
    _assert_refused(build("transformer", every=2), tmp_path / "plain", "Missing key")


def test_without_a_shard_nothing_is_loaded_for_good(saved: Path, tmp_path: Path) -> None:
    whole, damaged = saved / "cnn-light" / "checkpoint", tmp_path / "damaged"
    damaged.mkdir()
    for file in whole.iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    next(damaged.glob("__1_*.distcp")).unlink()
    model = build("cnn", plan_in(whole))
    with pytest.raises(CheckpointException, match="No such file"):
        load(model, optimizer_of(model), damaged)
    load(model, optimizer_of(model), whole)  # what was read before the gap is overwritten by a checkpoint that is whole


@pytest.mark.slow
def test_a_kill_in_the_middle_of_saving_leaves_the_one_before(tmp_path: Path) -> None:
    with pytest.raises(mp.ProcessExitedException):
        _run(die_while_saving, 2, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["first", "second.part"]
    model = build("transformer", plan_in(tmp_path / "first"))
    load(model, optimizer_of(model), tmp_path / "first")
    with pytest.raises(CheckpointException, match=r"\.metadata"):
        load(model, optimizer_of(model), tmp_path / "second.part")


def _assert_refused(model: nn.Module, checkpoint: Path, message: str) -> None:
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises((CheckpointException, ValueError), match=message):
        load(model, optimizer_of(model), checkpoint)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
