"""A process that cannot import replfx."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_BARRED = """
import sys
class Barred:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "replfx":
            raise ImportError("replfx is not here")
sys.meta_path.insert(0, Barred())
"""


def run_without_replfx(script: str, *arguments: Path, folder: Path) -> None:
    """Run a script, which ends with `print("loaded")`, in a folder; it finds the arguments in `sys.argv[1:]`."""
    command = [sys.executable, "-c", _BARRED + script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    assert done.stdout.strip() == "loaded", done.stderr
