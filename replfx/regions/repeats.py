"""Repeats: where a sequence says the same thing three times in a row or more."""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

__all__ = ["Repeat", "runs"]


@dataclass(frozen=True)
class Repeat:
    """A maximal stretch `[start, stop)` in which every item equals the one `period` before it.

    The period is the smallest one that the stretch has: `abababab` is a run of period 2 and of no other.
    """

    start: int
    stop: int
    period: int

    @property
    def length(self) -> int:
        """How many items the stretch has."""
        return self.stop - self.start


def runs(items: Sequence[Hashable], copies: int = 3) -> list[Repeat]:
    """All runs that hold at least `copies` whole periods, the smallest periods first.

    Windows of 1, 2, 4, … items are numbered, like windows alike. In a run of period p, a window of p items and
    more is met again exactly p items later and not before, so it is enough to remember where each window was
    met last. O(n log n) for n items.

    Args:
        items: anything that can be compared and hashed.
        copies: at least 3; two copies do not always hold two windows of the length that finds them.
    """
    numbers: dict[Hashable, int] = {}
    ranks = [numbers.setdefault(item, len(numbers)) for item in items]
    found: list[Repeat] = []
    width = 1
    while ranks and max(ranks) < len(ranks) - 1 and width * copies < 2 * len(items):
        found += [run for run in _runs_of_width(ranks, width) if run.length >= copies * run.period]
        pairs: dict[tuple[int, int], int] = {}
        ranks = [pairs.setdefault(pair, len(pairs)) for pair in zip(ranks, ranks[width:], strict=False)]
        width *= 2
    return sorted(found, key=lambda run: (run.period, run.start))


def _runs_of_width(ranks: Sequence[int], width: int) -> Iterator[Repeat]:
    """The runs with a period in (width / 2, width]; `ranks[i]` numbers the window that begins at i."""
    last: dict[int, int] = {}
    first, period = 0, 0  # of the run that is open: the second copy of its first window; 0 if none is
    for index, rank in enumerate(ranks):
        gap = index - last.get(rank, index)
        last[rank] = index
        if not width < 2 * gap <= 2 * width:
            gap = 0
        if gap != period:
            if period:
                yield Repeat(first - period, index - 1 + width, period)
            first, period = index, gap
    if period:
        yield Repeat(first - period, len(ranks) - 1 + width, period)
