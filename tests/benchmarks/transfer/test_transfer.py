"""The transfer benchmark on images of its own making."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.__main__ import main
from benchmarks.accuracy.images import Images
from benchmarks.transfer import command
from benchmarks.transfer.linear_map import with_linear_maps


def images(count: int = 160) -> Images:
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (2 * count, 3, 32, 32), dtype=torch.uint8)
    labels = torch.arange(2 * count) % 10
    return Images(pixels[:count], labels[:count], pixels[count:], labels[count:])


def test_halves_share_no_class_and_lose_no_image() -> None:
    whole = images()
    first, other = (command.half(whole, start) for start in (0, 5))
    assert len(first.train) + len(other.train) == len(whole.train)
    for part, start in ((first, 0), (other, 5)):
        assert sorted(set(part.train_labels.tolist())) == [0, 1, 2, 3, 4]
        kept = whole.test[(whole.test_labels >= start) & (whole.test_labels < start + 5)]
        assert torch.equal(part.test, kept)


def test_a_linear_map_is_least_squares_over_all_places() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Sequential(nn.Conv2d(4, 4, 1), nn.Tanh())).eval()
    batches = [torch.randn(5, 3, 6, 6) for _ in range(3)]
    with torch.no_grad():
        x = model[0](torch.cat(batches))
        y = model[1](x)
    rows, targets = (t.movedim(1, -1).reshape(-1, 4).double() for t in (x, y))
    wanted = torch.linalg.lstsq(torch.cat([rows, torch.ones(len(rows), 1)], 1), targets).solution
    made = with_linear_maps(model, ["1"], batches)
    assert not any(module._forward_hooks for module in made.modules())
    with torch.no_grad():
        expected = rows @ wanted[:-1] + wanted[-1]
        torch.testing.assert_close(made[1](x).movedim(1, -1).reshape(-1, 4), expected.float())


@pytest.mark.slow
def test_the_command_compares_all_variants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "cifar10", lambda root: images())
    monkeypatch.setattr(command, "PRETRAIN", replace(command.PRETRAIN, batch=16))
    monkeypatch.setattr(command, "FINE_TUNE", replace(command.FINE_TUNE, batch=16))
    monkeypatch.setattr(command, "calibration", lambda data, seed: [data.batch(seed, 0, 16)[0]])
    options = ["--pretrain-steps", "2", "--steps", "2", "--seeds", "0,3", "--device", "cpu"]
    assert main(["transfer", "--data-root", str(tmp_path), "--out", str(tmp_path), *options]) == 0
    found = json.loads((tmp_path / "transfer.json").read_text())
    assert list(found["results"]) == list(command.VARIANTS)
    assert all(len(results) == 2 for results in found["results"].values())
    full, light = (found["results"][name][0]["parameters"] for name in ("full", "light, calibrated"))
    assert light < full
    text = (tmp_path / "transfer.md").read_text()
    assert all(f"| {name} |" in text for name in command.VARIANTS)
    assert (tmp_path / "transfer.png").is_file()


def test_seeds_are_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["transfer", "--data-root", ".", "--seeds", "a"]) == 2
    assert "--seeds a: give whole numbers" in capsys.readouterr().err
