"""The command line, called as a user calls it."""

import json
import os
import signal
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
from torch import nn

import replfx
from replfx.cli import main
from tests.support.models import Residual


def tower() -> nn.Module:
    return nn.Sequential(*(Residual() for _ in range(5)))


def pair() -> nn.Module:
    return nn.Sequential(Residual(), Residual())


def not_a_model() -> int:
    return 3


def wrong() -> nn.Module:
    return inner()


def inner() -> nn.Module:
    return nn.Linear("four", 4)


def stopped() -> nn.Module:
    raise KeyboardInterrupt


class Words(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(OrderedDict(embed=nn.Embedding(9, 4), blocks=tower()))


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
        ("transformers:gpt3", "near it"),
        ("transformers:llama", "--config num_hidden_layers"),
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
    [
        [],
        ["inspect"],
        ["inspect", "a:b", "--input", "2,x"],
        ["inspect", "a:b", "--every", "2", "--fraction", "0.5"],
        ["inspect", "a:b", "--compare", "--operator", "block"],
        ["inspect", "a:b", "--tokens", "0"],
    ],
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
    assert "layer3.1 replaced 1.18M" in out
    assert "…" not in out  # nothing is cut off


def test_a_model_with_nothing_to_replace_says_why(capsys):
    assert main(["inspect", f"{__name__}:pair"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "0 blocks replaced" in out
    assert "refused: 0, 1: no three like it in a row, only `0` and `1`" in out


def test_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "replfx", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("replfx ")


def test_a_factory_that_raises_shows_the_users_frames_alone(capsys):
    assert main(["inspect", f"{__name__}:wrong"]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    files = [line.split('"')[1] for line in said.err.splitlines() if line.startswith("  File ")]
    assert files == [__file__, __file__]
    assert "return inner()" in said.err
    assert said.err.splitlines()[-1].startswith("TypeError: ")


def test_a_module_that_raises_as_it_is_imported_is_shown_too(tmp_path, monkeypatch, capsys):
    (tmp_path / "broken_models.py").write_text("import no_such_package_anywhere\n")
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", "broken_models:build"]) == 1
    err = capsys.readouterr().err
    assert 'broken_models.py", line 1' in err
    assert "importlib" not in err
    assert "No module named 'no_such_package_anywhere'" in err


def test_ctrl_c_ends_in_one_line(capsys):
    assert main(["inspect", f"{__name__}:stopped"]) == 130
    assert capsys.readouterr().err == "replfx: stopped by Ctrl-C\n"


def test_tokens_are_integers(capsys):
    assert main(["inspect", f"{__name__}:Words", "--input", "2,3", "--tokens", "9", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["replaced"] == ["blocks.1", "blocks.3"]
    # Five linear maps of 4 × 4 on 2 × 3 tokens, a multiply-add being two.
    assert report["before"]["flops"] == 5 * 2 * 4 * 4 * 6
    assert report["example"] == "2×3"
    assert main(["inspect", f"{__name__}:Words", "--tokens", "9"]) == 1
    assert "give its shape too" in capsys.readouterr().err


def test_a_transformers_configuration_made_small(capsys):
    pytest.importorskip("transformers")
    small = ["n_layer=5", "n_embd=8", "n_head=2", "vocab_size=50", "bos_token_id=1", "eos_token_id=1"]
    argv = ["inspect", "transformers:gpt2", *(word for field in small for word in ("--config", field)), "--json"]
    assert main(argv) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["model"] == "GPT2LMHeadModel"
    assert report["replaced"] == ["transformer.h.1", "transformer.h.3"]
    assert report["example"] == "input_ids 2×64"
    assert main(["inspect", "transformers:GPT2Model", "--config", "n_layers=5"]) == 1
    assert "no such field; near it: n_layer" in capsys.readouterr().err
    assert main(["inspect", "timm:resnet18", "--config", "n_layer=5"]) == 1
    assert "--config is for transformers" in capsys.readouterr().err


def test_draw_writes_a_file(tmp_path, capsys):
    file = tmp_path / "tower.svg"
    assert main(["inspect", f"{__name__}:tower", "--draw", str(file)]) == 0
    assert "2 of 5 blocks replaced" in file.read_text(encoding="utf-8")
    capsys.readouterr()
    assert main(["inspect", f"{__name__}:tower", "--draw", str(tmp_path / "no" / "tower.svg")]) == 1
    assert "cannot be written" in capsys.readouterr().err
    assert main(["inspect", f"{__name__}:tower", "--draw", str(tmp_path / "tower.png")]) == 1
    assert "does not end in .svg" in capsys.readouterr().err


def test_all_gives_each_block_a_row(capsys):
    assert main(["inspect", f"{__name__}:tower"]) == 0
    assert "3 × 0, 2, 4 neighbour" in " ".join(capsys.readouterr().out.split())
    assert main(["inspect", f"{__name__}:tower", "--all"]) == 0
    assert "0 neighbour 20 1 replaced 20" in " ".join(capsys.readouterr().out.split())


def test_compare_has_a_row_for_each_operator(capsys):
    argv = ["inspect", f"{__name__}:tower", "--input", "2,4", "--compare", "--repeats", "2"]
    assert main([*argv, "--json"]) == 0
    rows = {row["operator"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert list(rows) == ["full", "block", "identity", "light", "mixer"]
    assert rows["block"]["parameters"] == 72
    assert len(rows["block"]["step"]["raw"]) == 2
    assert "does not fit it" in rows["mixer"]["reason"]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "mixer replaces nothing" in " ".join(out.split())
    assert max(map(len, out.splitlines())) <= 80
    assert main([*argv[:2], "--compare"]) == 1
    assert "give --input" in capsys.readouterr().err
    assert main([*argv, "--all"]) == 1
    assert "leave --draw and --all out" in capsys.readouterr().err


def interruptible() -> None:
    """In the new process: a test run in the background ignores Ctrl-C, and its children would inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.parametrize(
    "begin", [["-m", "replfx"], ["-c", "import sys; sys.argv[0] = 'bin/replfx'; import replfx.cli"]]
)
def test_ctrl_c_while_torch_is_imported_ends_in_one_line(begin, tmp_path):
    """A torch that catches every exception, as some packages do while they are imported."""
    (tmp_path / "torch.py").write_text(
        "import os, signal, time\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(60)\nexcept:\n    pass\n"
    )
    paths = os.pathsep.join([str(tmp_path), str(Path(replfx.__file__).parents[1])])
    done = subprocess.run(
        [sys.executable, *begin],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
        preexec_fn=interruptible,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "replfx: stopped by Ctrl-C\n")


def test_importing_replfx_leaves_ctrl_c_to_the_program():
    code = "import signal, replfx; assert signal.getsignal(signal.SIGINT) is signal.default_int_handler"
    subprocess.run([sys.executable, "-c", code], preexec_fn=interruptible, check=True)


@pytest.mark.slow
def test_the_demo_prints_what_it_writes(tmp_path, capsys):
    (tmp_path / "text").write_bytes(bytes(range(256)) * 200)
    argv = ["demo", "--quick", "--text", str(tmp_path / "text"), "--out", str(tmp_path / "out"), "--json"]
    assert main(argv) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "out" / "demo.json").read_text())
    assert printed["results"][0]["variant"] == "full depth"
