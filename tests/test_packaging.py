"""The distribution holds every package, and works away from the repository."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tomllib
import venv
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def packages_in(folder: Path, name: str) -> set[str]:
    """Dotted names of the packages in a folder, links left out."""
    found = {name} if (folder / "__init__.py").exists() else set()
    for child in folder.iterdir():
        if child.is_dir() and not child.is_symlink():
            found |= packages_in(child, f"{name}.{child.name}")
    return found


def test_every_package_is_listed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(
        packages_in(ROOT / "replfx", "replfx") | packages_in(ROOT / "passes", "replfx.passes")
    )


def test_version_is_the_one_in_pyproject() -> None:
    import replfx

    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert version("replfx") == declared == replfx.__version__
    assert f"\nversion: {declared}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## [{declared}]\n" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.slow
def test_the_wheel_works_in_an_empty_folder(tmp_path: Path) -> None:
    def run(*command: str | Path, cwd: Path = tmp_path) -> str:
        result = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path / "dist", ROOT)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    home, empty = tmp_path / "venv", tmp_path / "empty"
    empty.mkdir()
    venv.create(home, with_pip=True)
    # The dependencies come from this environment by a path file; its own replfx does not: a path file
    # inside a folder that a path file names is not followed.
    site = Path(sysconfig.get_path("purelib", vars={"base": str(home)}))
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    python = home / "bin" / "python"
    run(python, "-m", "pip", "install", "--no-deps", "--no-index", wheel)
    where = run(python, "-c", "import replfx, replfx.passes as p; print(p.__file__)", cwd=empty)
    assert Path(where.strip()).is_relative_to(site)
    assert "demo" in run(python, "-m", "replfx", "--help", cwd=empty)
    assert "demo" in run(home / "bin" / "replfx", "--help", cwd=empty)
