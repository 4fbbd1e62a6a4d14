"""The other modules of this folder once more, with Triton's kernels interpreted on the CPU.

Triton reads the variable as kernels are defined, so they run in a process of its own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from replfx.kernels.synthesis import INSTALLED, INTERPRETED

MODULES = ("synthesis", "operators", "backend")  # what is refused is so before any kernel
HERE = Path(__file__).parent
ROOT = HERE.parent.parent


@pytest.mark.skipif(not INSTALLED or INTERPRETED, reason="needs triton, and not to be in its interpreter already")
@pytest.mark.slow
def test_in_the_interpreter(tmp_path: Path) -> None:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    options = ["-q", "-m", "not gpu", "-p", "no:xdist", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *(str(HERE / f"test_{name}.py") for name in MODULES)],
        cwd=ROOT,
        env={**kept, "TRITON_INTERPRET": "1", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.findall(r"(\d+) passed", done.stdout)[-1]) > 20, done.stdout
