"""Short texts for tables and drawings: paths cut from the left, lists of paths, amounts."""

import re
from collections.abc import Callable, Iterable, Sequence

__all__ = ["amount", "changed", "listed", "mebibytes", "shortened"]

_UNITS = ("", "k", "M", "G", "T")
_NUMBERED = re.compile(r"(?P<head>.*?)(?P<number>\d+)(?P<tail>[^\d\[\]]*)")


def shortened(text: str, width: int) -> str:
    """The text cut from the left to `width` characters, before a whole name if that leaves enough of it.

    Example:
        >>> shortened("encoder.layers.encoder_layer_10", 12)
        '…er_layer_10'
        >>> shortened("transformer.decoder.h.10.mlp", 12)
        '…h.10.mlp'
    """
    if len(text) <= width:
        return text
    cut = text[len(text) - width + 1 :]
    names = cut.partition(".")[2]
    return f"…{names if 3 * len(names) >= width else cut}"


def amount(number: float) -> str:
    """A count in at most five characters: three digits and a unit, as in "1.18M"."""
    unit = 0
    while abs(number) >= 999.5 and unit + 1 < len(_UNITS):
        number, unit = number / 1000, unit + 1
    return f"{number:.0f}" if not unit else f"{_three_digits(number)}{_UNITS[unit]}"


def mebibytes(count: int) -> str:
    """Bytes in mebibytes, without the unit.

    Example:
        >>> mebibytes(3 * 2**20), mebibytes(1000)
        ('3.00', '<0.01')
    """
    return "<0.01" if 0 < count < 0.005 * 2**20 else _three_digits(count / 2**20)


def _three_digits(number: float) -> str:
    return f"{number:,.0f}" if number >= 99.95 else f"{number:.1f}" if number >= 9.995 else f"{number:.2f}"


def changed(before: int, after: int, write: Callable[[int], str] = amount, unit: str = "") -> str:
    """From what to what something changed, as in "1.18M → 590k (−50.0 %)"."""
    percent = f"{100 * (after - before) / before if before else 0:+.1f} %".replace("-", "−")
    return f"{write(before)} → {write(after)}{unit} ({percent})"


def listed(paths: Iterable[str]) -> str:
    """Paths in one line: those that differ in their last number alone are written together.

    Example:
        >>> listed(["blocks.1", "blocks.3", "blocks.5", "blocks.7", "norm"])
        'blocks.1, 3 … 7; norm'
    """
    groups: dict[tuple[str, str], list[int]] = {}
    for path in paths:
        found = _NUMBERED.fullmatch(path)
        key = (found["head"], found["tail"]) if found else (path, "")
        groups.setdefault(key, []).extend([int(found["number"])] if found else [])
    return "; ".join(_together(head, numbers, tail) for (head, tail), numbers in groups.items())


def _together(head: str, numbers: Sequence[int], tail: str) -> str:
    if len(numbers) < 2 or not tail:
        return f"{head}{_series(numbers)}{tail}"
    return f"{head}{{{_series(numbers)}}}{tail}"


def _series(numbers: Sequence[int]) -> str:
    step = numbers[1] - numbers[0] if len(numbers) > 1 else 0
    if len(numbers) < 4 or list(numbers) != list(range(numbers[0], numbers[-1] + 1, max(step, 1))):
        return ", ".join(map(str, numbers))
    return f"{numbers[0]}–{numbers[-1]}" if step == 1 else f"{numbers[0]}, {numbers[1]} … {numbers[-1]}"
