"""The command line, called as a user calls it."""

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from replfx.cli import main


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return x + torch.relu(self.fc(x))


def tower() -> nn.Module:
    return nn.Sequential(*(Block() for _ in range(5)))


def pair() -> nn.Module:
    return nn.Sequential(Block(), Block())


def not_a_model() -> int:
    return 3


def test_inspect_prints_chains_costs_and_savings(capsys):
    assert main(["inspect", f"{__name__}:tower", "--input", "2,4"]) == 0
    out = capsys.readouterr().out
    assert "1 chain" in out
    assert "block · scalar" in out
    # Two of five blocks of 4·4 + 4 parameters become 4 own biases and two coefficients.
    assert "100 → 72" in out


def test_inspect_json_is_the_report(capsys):
    assert main(["inspect", f"{__name__}:tower", "--every", "3", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["replaced"] == ["2"]
    assert report["chains"] == [["0", "1", "2", "3", "4"]]
    assert report["parameters_before"] == 100


def test_select_may_be_repeated(capsys):
    assert main(["inspect", f"{__name__}:tower", "--select", "1", "--select", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["replaced"] == ["1", "3"]


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("resnet18", "names no model"),
        ("timm:vit_tiny_patch16_24", "near it"),
        ("torchvision:resnet19", "near it"),
        ("torchvision:fasterrcnn_resnet50_fpn", "from Python"),
        ("no.such.module:x", "cannot import"),
        (f"{__name__}:nothing", "no callable"),
        (f"{__name__}:not_a_model", "gave int"),
    ],
)
def test_a_wrong_model_name_says_what_to_write(name, word, capsys):
    assert main(["inspect", name]) == 1
    assert word in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [[], ["inspect"], ["inspect", "a:b", "--input", "2,x"], ["inspect", "a:b", "--every", "2", "--fraction", "0.5"]],
)
def test_a_wrong_call_exits_with_2(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2


def test_bad_options_are_errors_with_advice(capsys):
    assert main(["inspect", f"{__name__}:tower", "--every", "1"]) == 1
    assert "at least 2" in capsys.readouterr().err
    assert main(["inspect", f"{__name__}:tower", "--operator", "heavy"]) == 1
    assert "block, identity, light, mixer" in capsys.readouterr().err


def test_a_torchvision_model_by_name(capsys):
    assert main(["inspect", "torchvision:resnet18", "--input", "2,3,32,32"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "3 blocks replaced" in out
    assert "layer3.1 1,180,672" in out
    assert "…" not in out  # no figure is cut off


def test_a_model_with_nothing_to_replace_says_why(capsys):
    assert main(["inspect", f"{__name__}:pair"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "0 blocks replaced" in out
    assert "not replaced: 0: no three like it in a row, only `0` and `1`" in out


def test_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "replfx", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("replfx ")
