"""Chains: what `find_chains` finds, and which blocks of a chain can be replaced."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from replfx.operators import Site
from replfx.regions.region import Region
from replfx.tracing import CaptureInfo, ModuleCall

__all__ = ["Block", "Chain", "Chains"]


@dataclass(frozen=True, eq=False)
class Block:
    """One block of a chain."""

    call: ModuleCall  # its place in the graph
    site: Site  # what an operator may know of it
    new_stage: bool = False  # it is unlike the block before, and something lies between the two
    shape_change: str | None = None  # how it changes its activation's shape ("(8, 16) → (8, 32)"), None if it does not
    fixed: str | None = None  # why it must stay, though its neighbours may be made from it: it is frozen, or tied
    unlike: str | None = None  # why it cannot be made from its neighbours
    region: Region | None = None  # the piece of the graph that it is, where it is no module

    @property
    def obstacle(self) -> str | None:
        """Why it cannot be replaced, None if it can."""
        return self.fixed or self.unlike

    @property
    def changing(self) -> str | None:
        """That it changes its activation's shape, as a reason; None if it does not."""
        return None if self.shape_change is None else f"it changes the shape of its activation: {self.shape_change}"

    @property
    def path(self) -> str:
        """Where it is in the model."""
        return self.call.path


@dataclass(frozen=True)
class Chain:
    """Blocks of one family, each of which works on what the one before gave, in the order in which they run."""

    blocks: tuple[Block, ...]
    # The blocks beyond its ends, where a chain was cut because a pipeline stage begins there.
    before: str | None = None
    after: str | None = None

    @property
    def paths(self) -> list[str]:
        """The blocks' paths."""
        return [block.path for block in self.blocks]

    def end(self, position: int) -> str | None:
        """Why a block has no neighbour on one side, None if it has both."""
        if position not in (0, len(self.blocks) - 1):
            return None
        if beyond := self.before if position == 0 else self.after:
            return f"its neighbour `{beyond}` would be in another pipeline stage"
        return f"it is the {'last' if position else 'first'} block of its chain"

    def replaceable(self) -> list[int]:
        """Positions of blocks with a neighbour on each side that nothing keeps."""
        return [i for i in range(1, len(self.blocks) - 1) if self.blocks[i].obstacle is None]

    def steady(self) -> list[int]:
        """Those of `replaceable` that keep their activation's shape; if there are none, all of them."""
        every = self.replaceable()
        return [i for i in every if self.blocks[i].shape_change is None] or every

    def every(self, k: int) -> list[int]:
        """The positions that `every=k` replaces: those with a multiple of k for a number."""
        steady = set(self.steady())
        return [position for position, number in enumerate(self.numbers(k)) if number % k == 0 and position in steady]

    def numbers(self, k: int) -> list[int]:
        """The blocks' numbers, by which `every=k` chooses.

        Blocks are counted from 1, anew from each block that changes the shape or begins a new stage. If that chooses
        nothing (stages of one block, a change of shape in every block), they are counted through. If all of these
        have to stay too, the next block that need not stay takes the place of each.
        """
        allowed = set(self.steady())
        stages: list[int] = []
        for block in self.blocks:
            anew = not stages or block.shape_change is not None or block.new_stage
            stages.append(1 if anew else stages[-1] + 1)
        for numbers in (stages, list(range(1, len(self.blocks) + 1))):
            if any(numbers[position] % k == 0 for position in allowed):
                return numbers
        late, count = [], 0
        for position in range(len(self.blocks)):
            count += 1
            chosen = count >= k and position in allowed
            late.append(k if chosen else count)
            count = 0 if chosen else count
        return late

    def fraction(self, part: float) -> list[int]:
        """The positions that `fraction=part` replaces: spread evenly, never two in a row."""
        length, allowed = len(self.blocks), self.steady()
        count = min(int(part * length + 0.5), (length - 1) // 2)
        chosen: list[int] = []
        for i in range(count):
            aim = max(int((length - 1) / count * (i + 0.5)), 1)  # a step of at least 2, so no two are adjacent
            free = [p for p in allowed if not chosen or p > chosen[-1] + 1]
            if free:
                chosen.append(min(free, key=lambda p: abs(p - aim)))
        return chosen

    def keep(self, wanted: int | float) -> list[int]:
        """The positions that `keep=wanted` replaces: all but that number or share of blocks, first and last kept.

        The other kept blocks are spread so that the rows of replaced ones are as short as can be.
        """
        count = wanted if isinstance(wanted, int) else round(wanted * len(self.blocks))
        rows = _rows(self.steady())
        parted = [0] * len(rows)  # how many blocks are kept inside of each row
        lengths = [len(row) for row in rows]
        for _ in range(count - len(self.blocks) + sum(lengths)):
            longest = max(range(len(rows)), key=lambda i: (lengths[i] - parted[i]) / (parted[i] + 1), default=None)
            if longest is None or parted[longest] == lengths[longest]:
                break
            parted[longest] += 1
        kept = {
            row[round((j + 1) * (len(row) + 1) / (n + 1)) - 1]
            for row, n in zip(rows, parted, strict=True)
            for j in range(n)
        }
        return [position for row in rows for position in row if position not in kept]


def _rows(positions: Sequence[int]) -> list[list[int]]:
    """Positions as rows without gaps."""
    rows: list[list[int]] = []
    for position in positions:
        if not rows or position > rows[-1][-1] + 1:
            rows.append([])
        rows[-1].append(position)
    return rows


@dataclass(frozen=True, eq=False)
class Chains:
    """What was found in a captured model."""

    capture: CaptureInfo
    chains: list[Chain]  # all chains of three blocks and more, in the order in which they run
    refused: Mapping[str, str]  # blocks that are in no chain, with the reason

    @property
    def blocks(self) -> dict[str, Block]:
        """The blocks of all chains by path."""
        return {block.path: block for chain in self.chains for block in chain.blocks}
