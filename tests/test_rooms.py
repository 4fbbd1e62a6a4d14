"""The house: rooms import each other in one direction, and ARCHITECTURE.md draws them as they are."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import networkx as nx

ROOT = Path(__file__).parent.parent
FOLDERS = {"replfx": ROOT / "replfx", "replfx.passes": ROOT / "passes"}


def modules() -> Iterator[tuple[str, Path]]:
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            if package != "replfx" or parts[0] != "passes":  # the link to the other folder
                yield ".".join([package, *parts]).removesuffix(".__init__"), path


def room(module: str) -> str:
    """The folder right below the package, or the file."""
    return module.split(".")[1] if "." in module else "__init__"


def imports() -> nx.DiGraph:
    """Room → room, for every import of the library's own modules wherever it stands in a file."""
    graph, known = nx.DiGraph(), dict(modules())
    for module, path in known.items():
        graph.add_node(room(module))
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "replfx":
                names = (f"{node.module}.{alias.name}" for alias in node.names)
                targets = {name if name in known else str(node.module) for name in names}
            elif isinstance(node, ast.Import):
                targets = {alias.name for alias in node.names if alias.name.split(".")[0] == "replfx"}
            else:
                continue
            graph.add_edges_from((room(module), room(target)) for target in targets if target != "replfx")
    graph.remove_edges_from(nx.selfloop_edges(graph))
    return graph


def test_no_room_is_above_and_below_another() -> None:
    assert list(nx.simple_cycles(imports())) == []


def test_the_passes_are_passes() -> None:
    for path in FOLDERS["replfx.passes"].glob("[!_]*.py"):
        classes = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)]
        bases = [ast.unparse(base).partition("[")[0] for node in classes for base in node.bases]
        assert bases.count("PassBase") + bases.count("Rewrite") == 1, path.name


def test_architecture_names_every_room_once_and_from_the_top_down() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    rows = [re.findall(r"`([\w.]+?)/?`", line.split("|")[1]) for line in text.splitlines() if line.startswith("| `")]
    floors = {name.removesuffix(".py"): number for number, names in enumerate(rows) for name in names}
    graph = imports()
    assert sorted(floors) == sorted(graph.nodes)
    assert [(a, b) for a, b in graph.edges if floors[a] > floors[b]] == []


def test_what_tests_share_is_in_no_test_module() -> None:
    found = [
        path for path in (ROOT / "tests").rglob("*.py") if re.search(r"^from tests\.\S*test_", path.read_text(), re.M)
    ]
    assert found == []
