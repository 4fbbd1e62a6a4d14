"""Drawings of a model's chains as SVG: what is replaced, what it reads, what stays and why."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from textwrap import wrap
from xml.sax.saxutils import escape

from torch import nn

from replfx.errors import ReplfxError
from replfx.reports.labels import amount, changed, listed, mebibytes, shortened
from replfx.reports.report import BlockReport, Report, Role
from replfx.rewrite.state import state_of

__all__ = ["Drawing", "draw"]


class Drawing(str):
    """SVG text, which notebooks show as a picture."""

    __slots__ = ()

    def _repr_svg_(self) -> str:
        return str(self)


def draw(model_or_report: nn.Module | Report, path: str | Path | None = None) -> Drawing:
    """Draw the chains of a model as SVG: which blocks are replaced, which neighbours they read, what stays and why.

    Each chain runs from left to right in rows of at most thirteen blocks. A row begins with the last block of the row
    before, pale, so that an arc never leaves its row. Under the chains stand the reasons why blocks stay.

    Args:
        model_or_report: a transformed model, or a report, as `replfx.inspect` gives of an untransformed one.
        path: a file to write, which ends in ".svg"; None writes none.

    Returns:
        The SVG text. A notebook shows it as a picture.

    Raises:
        PlanError: the model is not transformed: draw `replfx.inspect(model)` instead.
        ReplfxError: the file's name does not end in ".svg".
        OSError: the file cannot be written.

    Example:
        >>> replfx.draw(replfx.inspect(model, images), "model.svg")
        >>> replfx.draw(replfx.transform(model), "transformed.svg")
    """
    report = model_or_report if isinstance(model_or_report, Report) else state_of(model_or_report).report
    if path is not None and Path(path).suffix != ".svg":
        raise ReplfxError(f"{str(path)!r} does not end in .svg, and a drawing is SVG")
    drawing = Drawing(_Page(report).text())
    if path is not None:
        Path(path).write_text(drawing, encoding="utf-8")
    return drawing


# ---- measures, in pixels

_MARGIN = 28
_CELL, _HEIGHT, _STEP = 76, 46, 90  # width and height of a block, and from one block to the next
_ARC = 26  # how far the arcs rise over the blocks
_ROW = _HEIGHT + _ARC + 30
_COLUMNS = 13  # blocks in a row
_WIDTH = 2 * _MARGIN + _COLUMNS * _STEP - (_STEP - _CELL)
_LINE = 18
_INDENT = 62  # of reasons, behind the role
_NAME = 10  # characters of a block's name
_TEXT = 150  # characters of a line of text
_REASONS = 16  # reasons that are written out
_PATHS = 60  # characters of the paths that go with one

_SANS = "font-family:system-ui,'Segoe UI',Helvetica,Arial,'DejaVu Sans',sans-serif"
_INK, _QUIET, _FLOW = "#1f2933", "#5f6b76", "#9aa5b1"


@dataclass(frozen=True)
class _Look:
    """How the blocks of a role look. Roles differ in lightness, outline and a word, not in hue alone."""

    fill: str
    edge: str
    dash: str
    says: str


_ARCS = "#b45309"
_LOOKS: dict[Role, _Look] = {
    "replaced": _Look("#fde0b2", _ARCS, "5 3", "replaced: made from its neighbours"),
    "neighbour": _Look("#c3daf0", "#1d5a94", "", "kept, and read by a replaced block"),
    "kept": _Look("#f3f7fb", "#7f9bb8", "", "kept"),
    "refused": _Look("url(#hatch)", "#7b8794", "", "refused: cannot be replaced"),
}


class _Page:
    """One drawing, written from top to bottom."""

    def __init__(self, report: Report) -> None:
        self.report, self.roles = report, report.roles
        self.parts: list[str] = []
        self.y: float = _MARGIN

    def text(self) -> str:
        self._heading()
        self._legend()
        for number, blocks in groupby(self.report.blocks, key=lambda block: block.chain):
            self._chain(number, list(blocks))
        self._reasons()
        says = f"{self.report.model}: the chains of its blocks; replaced are {listed(self.report.replaced) or 'none'}"
        return "\n".join([_head(self.y + _MARGIN, says), *self.parts, "</svg>", ""])

    # ---- text

    def _write(self, x: float, y: float, text: str, *, size: float = 12.5, style: str = "", fill: str = _INK) -> None:
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" style="{_SANS};font-size:{size:g}px;{style}" fill="{fill}">'
            f"{escape(text)}</text>"
        )

    def _line(self, text: str, *, size: float = 12.5, style: str = "", fill: str = _INK, x: float = _MARGIN) -> None:
        self.y += _LINE
        self._write(x, self.y, text, size=size, style=style, fill=fill)

    def _heading(self) -> None:
        self.y += 4
        count, every = len(self.report.replaced), len(self.report.blocks)
        self._line(f"{self.report.model}: {count} of {every} blocks replaced", size=20, style="font-weight:600")
        self.y += 4
        for line in _totals(self.report):
            self._line(line, fill=_QUIET)

    def _legend(self) -> None:
        """The roles that occur, and the arc; a legend of what is not there would only ask for attention."""
        shown = {self.roles[block.path] for block in self.report.blocks}
        self.y += 20
        x = float(_MARGIN)
        for role, look in _LOOKS.items():
            if role in shown:
                self._box(x, self.y, 22, 14, look)
                self._write(x + 29, self.y + 11.5, look.says, size=12)
                x += 29 + 6.4 * len(look.says) + 26
        if any(block.previous for block in self.report.blocks):
            self._arc(x + 2, x + 26, self.y + 13, 20)
            self._write(x + 36, self.y + 11.5, "weights are read", size=12)
        self.y += 14

    def _reasons(self) -> None:
        found = self.report.reasons()
        if not found and not self.report.notes:
            return
        self.y += 10
        self._line("Why blocks stay" if found else "Notes", size=14, style="font-weight:600")
        self.y += 2
        for (role, why), paths in list(found.items())[:_REASONS]:
            self._paragraph(role, f"{_some(paths)}: {why}")
        if len(found) > _REASONS:
            self._line(f"… and {len(found) - _REASONS} more reasons in the report", fill=_QUIET)
        for note in self.report.notes:
            self._paragraph("note", note)

    def _paragraph(self, word: str, text: str) -> None:
        self._write(_MARGIN, self.y + _LINE, word, size=12, fill=_QUIET)
        for line in wrap(text, _TEXT):
            self._line(line, size=12, x=_MARGIN + _INDENT)

    # ---- chains

    def _chain(self, number: int, blocks: Sequence[BlockReport]) -> None:
        replaced = [block for block in blocks if block.operator is not None]
        many = len(self.report.chains) > 1
        self.y += 22
        name = f"Chain {number}: " if many else ""
        kinds = ", ".join(dict.fromkeys(block.how for block in replaced))
        title = f"{name}{len(blocks)} blocks, {blocks[0].path} … {blocks[-1].path}"
        done = f"{len(replaced)} replaced by {kinds}" if replaced else "none replaced"
        self._line(f"{title}; {done}", size=13.5, style="font-weight:600")
        self.y += 8
        for row, repeated in _rows(blocks):
            self._row(row, repeated, last=row[-1] is blocks[-1])

    def _row(self, row: Sequence[BlockReport], repeated: bool, *, last: bool) -> None:
        top = self.y + _ARC
        places = {block.path: _MARGIN + position * _STEP for position, block in enumerate(row)}
        for position, block in enumerate(row):
            x = places[block.path]
            self._block(block, x, top, faint=repeated and position == 0)
            if position + 1 < len(row) or not last:
                self._flow(x + _CELL, x + _STEP, top + _HEIGHT / 2)
        for block in row:
            middle = places[block.path] + _CELL / 2
            for side, offset in ((block.previous, -9), (block.next, 9)):
                if side in places:
                    self._arc(places[side] + _CELL / 2 - offset, middle + offset, top - 2, _ARC)
        self.y = top + _HEIGHT + (_ROW - _ARC - _HEIGHT) / 2

    def _block(self, block: BlockReport, x: float, y: float, *, faint: bool) -> None:
        look = _LOOKS[self.roles[block.path]]
        self.parts.append(f'<g opacity="{0.45 if faint else 1:g}"><title>{escape(self._said(block))}</title>')
        self._box(x, y, _CELL, _HEIGHT, look)
        middle = "text-anchor:middle"
        self._write(x + _CELL / 2, y + 19, shortened(block.path, _NAME), size=10.5, style=f"{middle};font-weight:600")
        after = block.parameters_after
        size = amount(block.parameters) + ("" if after is None else f" → {amount(after)}")
        self._write(x + _CELL / 2, y + 35, size, size=9.5, style=middle, fill=_QUIET)
        self.parts.append("</g>")

    def _said(self, block: BlockReport) -> str:
        """What a browser shows beside the pointer."""
        said = [f"{block.path}: {self.roles[block.path]}", f"{block.parameters:,} trainable parameters"]
        if block.operator is not None:
            said.append(f"{block.how}: {block.parameters_after or 0:,} are left")
        if block.flops is not None:
            said.append(f"{amount(block.flops)} FLOPs forward")
        if block.saved_bytes is not None:
            said.append(f"{mebibytes(block.saved_bytes)} MiB saved for backward")
        why = self.report.refused.get(block.path) or block.kept
        return "\n".join([*said, *([why] if why else [])])

    # ---- shapes

    def _box(self, x: float, y: float, width: float, height: float, look: _Look) -> None:
        dash = f' stroke-dasharray="{look.dash}"' if look.dash else ""
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{min(6, height / 4):g}" '
            f'fill="{look.fill}" stroke="{look.edge}" stroke-width="1.5"{dash}/>'
        )

    def _flow(self, start: float, stop: float, y: float) -> None:
        self.parts.append(
            f'<path d="M{start + 2:g} {y:g}H{stop - 5:g}" stroke="{_FLOW}" stroke-width="1.5" marker-end="url(#flow)"/>'
        )

    def _arc(self, start: float, stop: float, y: float, rise: float) -> None:
        self.parts.append(
            f'<path d="M{start:g} {y:g}C{start:g} {y - rise:g} {stop:g} {y - rise:g} {stop:g} {y - 3:g}" fill="none" '
            f'stroke="{_ARCS}" stroke-width="1.5" marker-end="url(#reads)"/>'
        )


def _rows(blocks: Sequence[BlockReport]) -> Iterator[tuple[Sequence[BlockReport], bool]]:
    """The rows of a chain, and whether a row begins with the last block of the one before.

    A row ends with a block that is not replaced, and the next begins with that one again: so a replaced block has both
    neighbours in its row.
    """
    start, repeated = 0, False
    while True:
        stop = min(start + _COLUMNS, len(blocks))
        while stop < len(blocks) and blocks[stop - 1].operator is not None and stop > start + 2:
            stop -= 1
        yield blocks[start:stop], repeated
        if stop == len(blocks):
            return
        start, repeated = stop - 1, True


def _totals(report: Report) -> Iterator[str]:
    yield f"trainable parameters {changed(report.parameters_before, report.parameters_after)}"
    if report.before is not None:
        before, after = report.before, report.after or report.before
        flops = changed(before.flops, after.flops)
        saved = changed(before.saved_bytes, after.saved_bytes, mebibytes, " MiB")
        yield f"for {report.example or 'the example inputs'}: forward FLOPs {flops}; saved for backward {saved}"


def _some(paths: Iterable[str]) -> str:
    text = listed(paths)
    return text if len(text) <= _PATHS else f"{text[:_PATHS]}…"


def _head(height: float, alternative: str) -> str:
    arrow = 'viewBox="0 0 8 8" refX="6" refY="4" markerWidth="5" markerHeight="5" orient="auto"'
    return f"""<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height:g}" \
viewBox="0 0 {_WIDTH} {height:g}" role="img" aria-label="{escape(alternative, {'"': "&quot;"})}">
<defs>
<marker id="reads" {arrow}><path d="M0 0L8 4L0 8z" fill="{_ARCS}"/></marker>
<marker id="flow" {arrow}><path d="M0 0L8 4L0 8z" fill="{_FLOW}"/></marker>
<pattern id="hatch" width="7" height="7" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">\
<rect width="7" height="7" fill="#fafbfc"/><path d="M0 0V7" stroke="#e1e6eb" stroke-width="4"/></pattern>
</defs>
<rect width="100%" height="100%" fill="white"/>"""
