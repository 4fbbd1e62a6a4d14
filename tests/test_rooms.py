"""The house: rooms import each other in one direction, and ARCHITECTURE.md draws them as they are."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import networkx as nx
from torch import nn

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


PRIVATE = re.compile(r"(torch[\w.]*\.)?_[A-Za-z]\w*")
EXEMPT = {*vars(nn.Module()), "_assert", "_post_accumulate_grad_hooks", "_version"}  # replfx/torch_internals says why
NOT_OF_TORCH = {
    *("_asdict", "_exit", "_fields", "_getframe", "_lru_list_elem", "_operator", "_replace"),  # Python's
    *("_bit_generator", "_keys_to_ignore_on_save", "_model_mapping"),  # NumPy's, and those of transformers
    *("_bias", "_features", "_reset_parameters", "_tensor_constant"),  # how parts of modules are named
}


def private_names(tree: ast.Module) -> Iterator[str]:
    """Private names that a file has from elsewhere: imports, attributes of others, and strings that may be names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not str(node.module).startswith(("replfx", "__future__")):
            yield from (
                name for name in (*str(node.module).split("."), *(a.name for a in node.names)) if name[0] == "_"
            )
        elif isinstance(node, ast.Import):
            yield from (name for alias in node.names for name in alias.name.split(".") if name[0] == "_")
        elif isinstance(node, ast.Attribute) and PRIVATE.fullmatch(node.attr):
            yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and PRIVATE.fullmatch(node.value):
            yield node.value


def made_here(tree: ast.Module) -> Iterator[str]:
    """What a file defines, and what it sets on `self`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.id if isinstance(node, ast.Name) else node.attr


def test_private_names_of_torch_are_in_one_room() -> None:
    trees = {module: ast.parse(path.read_text()) for module, path in modules() if room(module) != "torch_internals"}
    ours = {name for tree in trees.values() for name in made_here(tree)} | EXEMPT | NOT_OF_TORCH
    found = {(module, name) for module, tree in trees.items() for name in private_names(tree)}
    assert [each for each in found if each[1] not in ours and not each[1].startswith("_replfx")] == []


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
