"""`import replfx` prints nothing and loads little beyond torch: what is heavy is imported by who needs it."""

import json
import subprocess
import sys

import pytest

HEAVY = [
    "decimal",
    "matplotlib",
    "networkx",
    "numpy.testing",
    "rich",
    "sympy",
    "timm",
    "torch._dynamo",
    "torch._inductor",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.fx.experimental.symbolic_shapes",
    "torchvision",
    "transformers",
    "triton",
]


def loaded_by(code: str) -> set[str]:
    """What code imports beyond torch, by names of modules."""
    program = (
        f"import sys, json, torch; before = set(sys.modules)\n{code}\nprint(json.dumps([*(set(sys.modules) - before)]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    *said, loaded = done.stdout.splitlines()
    assert not said or "--help" in code
    return set(json.loads(loaded))


@pytest.mark.parametrize(
    ("code", "own"),
    [
        ("import replfx", ["replfx.demo", "replfx.kernels", "replfx.measure", "replfx.compile"]),
        (
            "from contextlib import suppress; from replfx.cli import main\nwith suppress(SystemExit): main(['--help'])",
            [],
        ),
    ],
    ids=["library", "command line"],
)
def test_what_is_heavy_waits_for_who_needs_it(code: str, own: list[str]) -> None:
    loaded = loaded_by(code)
    assert "replfx.tracing" in loaded
    assert loaded.isdisjoint([*HEAVY, *own])
