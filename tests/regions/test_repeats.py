"""Runs of a sequence, against the definition taken word by word."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from replfx.regions.repeats import Repeat, runs


def by_definition(word: str, copies: int) -> set[Repeat]:
    found = set()
    for period in range(1, len(word) // copies + 1):
        for start in range(len(word)):
            stop = start + period
            while stop < len(word) and word[stop] == word[stop - period]:
                stop += 1
            before = word[start - 1 : start], word[start - 1 + period : start + period]
            maximal = start == 0 or before[0] != before[1]
            if maximal and stop - start >= copies * period:
                found.add(Repeat(start, stop, period))
    smaller = {(run.start, run.stop): min(r.period for r in found if within(run, r)) for run in found}
    return {run for run in found if run.period == smaller[run.start, run.stop]}


def within(run: Repeat, other: Repeat) -> bool:
    return other.start <= run.start and run.stop <= other.stop


@given(word=st.text("ab", max_size=40) | st.text("abc", max_size=40), copies=st.integers(3, 4))
@example(word="aaa", copies=3)
@example(word="abaabaaba", copies=3)
def test_runs_are_those_of_the_definition(word: str, copies: int) -> None:
    assert set(runs(word, copies)) == by_definition(word, copies)


@given(unit=st.text("ab", min_size=1, max_size=20), count=st.integers(3, 6), around=st.text("abc", max_size=5))
def test_a_word_repeated_is_a_run(unit: str, count: int, around: str) -> None:
    word = around + unit * count + around[::-1]
    assert set(runs(word)) == by_definition(word, 3)


@pytest.mark.parametrize("word", ["", "a", "aa", "abab", "abcabc"])
def test_less_than_three_copies_are_none(word: str) -> None:
    assert runs(word) == []
