"""Why a block is in no chain: the rule that kept it out, with the two things that differ."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Set

from torch import nn

from replfx.tracing.symbolic import is_leaf

__all__ = ["ancestors", "why_not"]


def ancestors(path: str) -> Iterator[str]:
    """The paths of the modules that hold the one at `path`, the innermost first, without the root."""
    if path.endswith("]"):  # a window lies in its container
        path = path.rpartition("[")[0]
        if path:
            yield path
    while "." in path:
        path = path.rpartition(".")[0]
        yield path


def why_not(
    modules: Mapping[str, nn.Module],
    difference: Callable[[str, str], str | None],
    counts: Mapping[str, int],
    refused: Mapping[str, str],
    in_chain: Set[str],
) -> dict[str, str]:
    """For every block-like module outside all chains, why.

    Args:
        modules: the model's modules by path.
        difference: names the first thing in which the modules at two paths differ; None if they are alike.
        counts: how often each path was called.
        refused: reasons that are known already.
        in_chain: the paths of all blocks that are in a chain.
    """
    blocks = _block_like(modules, counts, in_chain, composite=True)
    if not blocks and not in_chain:
        blocks = _block_like(modules, counts, in_chain, composite=False)
    called = [path for path in blocks if counts[path]]
    reasons = {}
    for path in blocks:
        if path in called:
            reasons[path] = refused.get(path) or _unlike(path, called, difference)
        else:
            reasons[path] = "it is not called in a forward pass"
    inner = {path: why for path, why in refused.items() if "[" in path and path not in in_chain}
    return {**reasons, **({} if in_chain else inner), **_recurrent(modules)}


def _unlike(path: str, called: list[str], difference: Callable[[str, str], str | None]) -> str:
    """What sets a block apart from the next one (or, for the last, from the one before)."""
    if len(called) < 2:
        return "no other block is like it"
    position = called.index(path)
    twin = called[position + 1] if position + 1 < len(called) else called[position - 1]
    differs = difference(path, twin)
    if differs is None:
        return f"no three like it in a row: it is like `{twin}`, but a block must be kept on each side of it"
    return f"no three like it in a row: it is not like `{twin}`: {differs}"


def _recurrent(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Stacked recurrent layers are one call of one kernel: there is no layer between two others to replace."""
    return {
        path: f"its {module.num_layers} layers run in one call of {type(module).__name__}: none can be taken out"
        for path, module in modules.items()
        if isinstance(module, nn.RNNBase) and module.num_layers > 2
    }


def _block_like(
    modules: Mapping[str, nn.Module], counts: Mapping[str, int], in_chain: Set[str], *, composite: bool
) -> list[str]:
    """Outermost modules with parameters that are called, or whose class occurs, more than once; no containers."""
    above = {ancestor for path in in_chain for ancestor in ancestors(path)}
    found: list[str] = []
    for path, module in modules.items():
        within = path in in_chain or any(ancestor in in_chain for ancestor in ancestors(path))
        container = type(module).__module__ == nn.Sequential.__module__
        if not path or container or within or path in above or is_leaf(module) is composite:
            continue
        if next(module.parameters(), None) is not None:
            found.append(path)
    kinds = Counter(type(modules[path]) for path in (*found, *(p for p in in_chain if p in modules)))
    repeated = {path for path in found if kinds[type(modules[path])] > 1 or (composite and counts[path] > 1)}
    return [p for p in found if p in repeated and not any(a in repeated for a in ancestors(p))]
