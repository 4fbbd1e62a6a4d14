"""Pipeline stages: chains are cut where a stage begins, so that no replaced block has a neighbour in another one."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import groupby

from replfx.chains.chain import Chain, Chains
from replfx.errors import PlanError
from replfx.modules.paths import some

__all__ = ["cut_chains"]


def cut_chains(found: Chains, split_at: Sequence[str]) -> list[Chain]:
    """The chains, each cut at the modules or blocks with which a pipeline stage begins.

    Raises:
        PlanError: a path is not in the model, is not called once, or lies inside of a block.
    """
    begins = {_position(found, path): path for path in split_at}
    cuts = sorted(begins)
    pieces = []
    for chain in found.chains:
        for block in chain.blocks:
            inside = bisect_right(cuts, block.call.start)
            if inside < len(cuts) and cuts[inside] < block.call.stop:
                raise PlanError(
                    f"split_at={begins[cuts[inside]]!r} begins a pipeline stage inside of the block `{block.path}`, "
                    f"which would lie in two stages: split between blocks, for example at `{block.path}`"
                )
        parts = [tuple(part) for _, part in groupby(chain.blocks, lambda b: bisect_right(cuts, b.call.start))]
        for number, part in enumerate(parts):
            before = parts[number - 1][-1].path if number else None
            after = parts[number + 1][0].path if number + 1 < len(parts) else None
            pieces.append(Chain(part, before, after))
    return pieces


def _position(found: Chains, path: str) -> int:
    """Where in the graph the module or block at `path` begins."""
    info, blocks = found.capture, found.blocks
    if path in blocks:
        return blocks[path].call.start
    starts = [call.start for call in info.calls if call.path == path]
    advice = f"give paths of modules with which a pipeline stage begins; blocks are: {some(list(blocks))}"
    if len(starts) == 1 and path:
        return starts[0]
    if path not in dict(info.root.named_modules(remove_duplicate=False)) or not path:
        raise PlanError(f"split_at={path!r}: the model has no such module; {advice}")
    if not starts:
        raise PlanError(f"split_at={path!r}: the model never calls that module itself; {advice}")
    raise PlanError(f"split_at={path!r}: that module is called {len(starts)} times in one forward pass; {advice}")
