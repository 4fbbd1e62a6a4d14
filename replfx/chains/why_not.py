"""Why a block is in no chain: the rule that kept it out, with the two things that differ."""

from collections import Counter
from collections.abc import Callable, Mapping, Set

from torch import nn

from replfx.modules.paths import ancestors, bare_path, is_region, is_window, members_of
from replfx.modules.structure import class_of
from replfx.regions.obstacles import called_again
from replfx.tracing.symbolic import is_leaf

__all__ = ["why_not"]


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
        difference: why the modules at two paths cannot follow each other in a chain; None if they can.
        counts: how often each path was called.
        refused: reasons that are known already.
        in_chain: the paths of all blocks that are in a chain.
    """
    blocks = _block_like(modules, counts, in_chain, composite=True)
    pieces = {path: why for path, why in refused.items() if is_window(path) or is_region(path)}
    if not blocks and not in_chain:
        inside = {member for path in filter(is_window, pieces) for member in members_of(modules[""], path)}
        blocks = [p for p in _block_like(modules, counts, in_chain, composite=False) if p not in inside]
    reasons = {path: refused.get(path) or _why(path, blocks, modules, difference, counts, in_chain) for path in blocks}
    if in_chain:
        pieces = {}
    pieces = {path: why for path, why in pieces.items() if reasons.keys().isdisjoint(ancestors(bare_path(path)))}
    return {**reasons, **pieces, **_recurrent(modules, in_chain)}


def _why(
    path: str,
    blocks: list[str],
    modules: Mapping[str, nn.Module],
    difference: Callable[[str, str], str | None],
    counts: Mapping[str, int],
    in_chain: Set[str],
) -> str:
    """What sets a block apart from the next one of its class (or else from the one before)."""
    if not counts[path]:
        return _not_called(path, modules, counts)
    if again := called_again(counts[path]):
        return again
    if all(parameter.dim() < 2 for parameter in modules[path].parameters()):
        return "its parameters are vectors alone, which no fusion makes"
    order = {path: position for position, path in enumerate(modules)}
    others = [p for p in (*blocks, *in_chain) if p in modules and p != path and counts[p]]
    alike = sorted((p for p in others if class_of(modules[p]) is class_of(modules[path])), key=order.__getitem__)
    if not alike:
        kind = class_of(modules[path])
        parts = [p for p, module in modules.items() if class_of(module) is kind and p != path and counts[p]]
        return f"the others of its class are parts of blocks (`{parts[0]}`)" if parts else "no other is of its class"
    twin = next((p for p in alike if order[p] > order[path]), alike[-1])
    differs = difference(path, twin)
    if differs is None:
        return f"no three like it in a row: it is like `{twin}`, but no chain of three goes through it"
    return f"no three like it in a row: it is not like `{twin}`: {differs}"


def _not_called(path: str, modules: Mapping[str, nn.Module], counts: Mapping[str, int]) -> str:
    above = next((ancestor for ancestor in ancestors(path) if counts[ancestor]), None)
    if above is None or any(counts[inner] for inner in modules if inner.startswith(f"{above}.")):
        return "it is not called in a forward pass"
    kind = type(modules[above]).__name__
    if is_leaf(modules[above]):
        return f"it is a part of `{above}`, which is one call of {kind}"
    return f"it is a part of `{above}`, and without example_inputs {kind} cannot be looked into"


def _recurrent(modules: Mapping[str, nn.Module], in_chain: Set[str]) -> dict[str, str]:
    """Stacked recurrent layers are one call of one kernel: there is no layer between two others to replace."""
    return {
        path: f"its {module.num_layers} layers run in one call of {type(module).__name__}: none can be taken out"
        for path, module in modules.items()
        if isinstance(module, nn.RNNBase) and module.num_layers > 1 and in_chain.isdisjoint((path, *ancestors(path)))
    }


def _block_like(
    modules: Mapping[str, nn.Module], counts: Mapping[str, int], in_chain: Set[str], *, composite: bool
) -> list[str]:
    """Outermost modules with parameters whose class occurs or is called more than once, containers not counted."""
    above = {ancestor for path in in_chain for ancestor in ancestors(path)}
    found: list[str] = []
    for path, module in modules.items():
        within = path in in_chain or any(ancestor in in_chain for ancestor in ancestors(path))
        container = class_of(module).__module__ == nn.Sequential.__module__
        if not path or container or within or path in above or is_leaf(module) is composite:
            continue
        if next(module.parameters(), None) is not None:
            found.append(path)
    kinds: Counter[type[nn.Module]] = Counter()
    for path, module in modules.items():
        kinds[class_of(module)] += max(counts[path], 1)
    repeated = {path for path in found if kinds[class_of(modules[path])] > 1}
    return [p for p in found if p in repeated and not any(a in repeated for a in ancestors(p))]
