"""Blocks by their paths: a submodule, a window of siblings in a container, or a region of the graph.

A *window* "features[3:5]" is what `features[3]` and `features[4]` compute one after the other, counted by
position among the children of `features`; "[0:2]" are children of the model itself. Its members stay where they are
when it is replaced, and its first one holds its coefficients. Under an operator that frees them, one module stands in
the place of the first, and `nn.Identity` in those of the others.

A *region* "@weights.3" is the piece of the captured graph that begins with the parameter `weights.3`. It is no
module until it is replaced: in the rewritten graph it is `replaced_weights_3`.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from replfx.errors import PlanError
from replfx.modules.structure import redirect, set_submodule
from replfx.modules.tree import inner_path

__all__ = [
    "ancestors",
    "as_paths",
    "bare_path",
    "block_at",
    "head_of",
    "is_named",
    "is_region",
    "is_window",
    "members_of",
    "named",
    "parameters_of",
    "parent_of",
    "put_blocks",
    "region_path",
    "some",
    "window_path",
]

_WINDOW = re.compile(r"(?P<parent>.*)\[(?P<start>\d+):(?P<stop>\d+)\]")
_MOST = 12  # paths in a message


def ancestors(path: str) -> Iterator[str]:
    """The paths of the modules that hold the one at `path`, the innermost first, without the root."""
    if is_window(path):  # it lies in its container
        path = path.rpartition("[")[0]
        if path:
            yield path
    while "." in path:
        path = path.rpartition(".")[0]
        yield path


def window_path(parent: str, start: int, stop: int) -> str:
    """The path of a window: children start … stop − 1 of the container at `parent`."""
    return f"{parent}[{start}:{stop}]"


def is_window(path: str) -> bool:
    """Whether the path is that of a window."""
    return path.endswith("]")


def region_path(path: str) -> str:
    """The path of the region that begins with a parameter, or that is a module; that of a region is one already."""
    return f"@{bare_path(path)}"


def bare_path(path: str) -> str:
    """The path of the parameter with which a region begins, or of the module that it is; another path as it is."""
    return path.removeprefix("@")


def is_region(path: str) -> bool:
    """Whether the path is that of a region."""
    return path.startswith("@")


def is_named(path: str, glob: str) -> bool:
    """Whether a path or a glob names a block; a window's own path ("[3:5]") would be a glob of other names."""
    return path == glob or fnmatchcase(path, glob)


def named(
    globs: object, paths: Iterable[str], option: str, no_match: Callable[[str], str | None] = lambda glob: None
) -> list[str]:
    """Those of some blocks' paths that a user's paths and globs name, in the order of the blocks.

    Args:
        globs: one, or a sequence of them; each must name at least one block.
        paths: of the blocks that may be named, the replaced ones as a rule.
        option: what the user calls it, for messages.
        no_match: what more is known of a glob that names none.

    Raises:
        PlanError: what is given are no paths or globs, or one of them names nothing.
    """
    wanted, known = as_paths(globs, option, "a path or a glob,"), list(paths)
    for glob in wanted:
        if not any(is_named(path, glob) for path in known):
            raise PlanError(no_match(glob) or f"{option}={glob!r} matches no replaced block; they are: {some(known)}")
    return [path for path in known if any(is_named(path, glob) for glob in wanted)]


def as_paths(given: object, option: str, what: str) -> tuple[str, ...]:
    """A user's path, or several of them; a PlanError that says what is wanted if it is anything else."""
    paths = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, Iterable) else ()
    if not paths or not all(isinstance(path, str) for path in paths):
        raise PlanError(f"{option} must be {what} or a sequence of them, not {given!r}")
    return paths


def some(paths: Sequence[str]) -> str:
    """The first of these paths, for a message."""
    more = f", … ({len(paths) - _MOST} more)" if len(paths) > _MOST else ""
    return ", ".join(paths[:_MOST]) + more


def parent_of(path: str) -> str | None:
    """Where the container of a window is; None if the path is that of another block."""
    found = _WINDOW.fullmatch(path)
    return None if found is None else found["parent"]


def members_of(model: nn.Module, path: str) -> list[str]:
    """The paths of the modules that make up a block: itself, the members of a window, what replaced a region.

    Raises:
        AttributeError: the model has no such block.
    """
    if is_region(path):
        return ["replaced_" + re.sub(r"\W", "_", path[1:])]
    found = _WINDOW.fullmatch(path)
    if found is None:
        return [path]
    parent, start, stop = found["parent"], int(found["start"]), int(found["stop"])
    names = list(model.get_submodule(parent)._modules)
    if not start < stop <= len(names):
        raise AttributeError(f"`{parent}` has {len(names)} children, no [{start}:{stop}]")
    return [inner_path(parent, name) for name in names[start:stop]]


def head_of(model: nn.Module, path: str) -> str:
    """Where the coefficients of a block are: at its path, or at that of a window's first member."""
    return members_of(model, path)[0]


def block_at(model: nn.Module, path: str) -> nn.Module:
    """The block at `path`; for a window, an `nn.Sequential` that holds the very siblings.

    Raises:
        AttributeError: the model has no such block.
    """
    members = members_of(model, path)
    if members == [path]:
        return model.get_submodule(path)
    window = nn.Sequential(*(model.get_submodule(member) for member in members))
    window.training = window[0].training  # not .train(), which would reach into the siblings
    return window


def put_blocks(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Put each module in its block's place, wherever the model holds that block.

    A Sequential as long as the window that it is for is spread over the window's members.
    """
    swaps: dict[nn.Module, nn.Module] = {}
    for path, module in modules.items():
        head, *rest = members_of(model, path)
        spread = bool(rest) and type(module) is nn.Sequential and len(module) == 1 + len(rest)
        parts = list(module.children()) if spread else [module, *(nn.Identity() for _ in rest)]
        for member, part in zip((head, *rest), parts, strict=True):
            before = set_submodule(model, member, part)
            if before is not None:
                swaps[before] = part
    redirect(model, swaps)


def parameters_of(model: nn.Module, path: str) -> dict[str, nn.Parameter]:
    """The block's parameters by their names in the model, a tied one under each of its names."""
    return {
        name: parameter
        for member in members_of(model, path)
        for name, parameter in model.get_submodule(member).named_parameters(prefix=member, remove_duplicate=False)
    }
