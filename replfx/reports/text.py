"""A report as text for the terminal: a table of the blocks, the totals, and why blocks stay."""

from collections.abc import Callable, Iterator

from rich import box
from rich.console import Console, ConsoleOptions, JustifyMethod, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from replfx.reports.labels import amount, changed, listed, mebibytes, shortened
from replfx.reports.report import BlockReport, Report

__all__ = ["ReportText", "hanging"]

_STYLES = {"replaced": "bold", "neighbour": "", "kept": "dim", "refused": "dim"}
_BLOCK, _ROLE = "block", "role"  # the columns of text
_WIDE = 72  # columns of a terminal from which on the table's columns are two apart


class ReportText:
    """What `print(report)` and `replfx inspect` show. It fits 60 columns and more.

    Args:
        report: of a model.
        every_block: give each block a row of its own; by default equal blocks of a chain share one.
    """

    def __init__(self, report: Report, *, every_block: bool = False) -> None:
        self.report, self.every_block = report, every_block

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.report.blocks:
            yield self._table(options.max_width)
        yield from map(Text, self._totals())
        yield from self._reasons()

    def _table(self, width: int) -> Table:
        rows = self._rows()
        columns = self._columns(rows)
        gap = 2 if width >= _WIDE else 1
        widths = {name: max(map(len, [*name.split("\n"), *cells])) for name, cells in columns.items()}
        others = sum(widths.values()) - widths[_BLOCK] + gap * len(columns) + 2  # 2: the edges of the box
        widths[_BLOCK] = min(widths[_BLOCK], max(width - others, 8))
        columns[_BLOCK] = [shortened(cell, widths[_BLOCK]) for cell in columns[_BLOCK]]
        chains = len(self.report.chains)
        title = f"{self.report.model}: {chains} chain{'s' * (chains != 1)}"
        table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, gap - 1, 0, 0), pad_edge=False)
        for name, size in widths.items():
            side: JustifyMethod = "left" if name in (_BLOCK, _ROLE) else "right"
            table.add_column(name, justify=side, vertical="bottom", min_width=size, no_wrap=True)
        for number, blocks in enumerate(rows):
            if number and rows[number - 1][0].chain != blocks[0].chain:
                table.add_section()
            cells = (column[number] for column in columns.values())
            table.add_row(*cells, style=_STYLES[self.report.roles[blocks[0].path]])
        return table

    def _columns(self, rows: list[list[BlockReport]]) -> dict[str, list[str]]:
        """What each column has in each row, by the columns' names; of columns that say something."""
        report, roles = self.report, self.report.roles
        first = [blocks[0] for blocks in rows]
        columns: dict[str, list[str]] = {}
        if len(report.chains) > 1:
            columns["chain"] = [str(block.chain) for block in first]
        if len(rows) < len(report.blocks):
            columns[""] = [f"{len(blocks)} ×" if len(blocks) > 1 else "" for blocks in rows]
        columns[_BLOCK] = [listed(block.path for block in blocks) for blocks in rows]
        columns[_ROLE] = [roles[block.path] for block in first]
        columns["para-\nmeters"] = [amount(block.parameters) for block in first]
        if report.replaced:
            columns["\nafter"] = [_or_blank(amount, block.parameters_after) for block in first]
        if report.measured:
            columns["\nFLOPs"] = [_or_blank(amount, block.flops) for block in first]
            columns["saved\nMiB"] = [_or_blank(mebibytes, block.saved_bytes) for block in first]
        return columns

    def _rows(self) -> list[list[BlockReport]]:
        """The blocks that share a row."""
        roles = self.report.roles
        rows: dict[object, list[BlockReport]] = {}
        for number, block in enumerate(self.report.blocks):
            costs = (block.parameters, block.flops, block.saved_bytes, block.parameters_after)
            alike = (block.chain, roles[block.path], *costs, block.operator, block.fusion)
            rows.setdefault(number if self.every_block else alike, []).append(block)
        return list(rows.values())

    def _totals(self) -> Iterator[str]:
        report = self.report
        count = len(report.replaced)
        kinds = ", ".join(dict.fromkeys(block.how for block in report.blocks if block.operator is not None))
        yield f"{count} block{'s' * (count != 1)} replaced{f' by {kinds}' * bool(kinds)}"
        yield f"trainable parameters: {changed(report.parameters_before, report.parameters_after, '{:,}'.format)}"
        if report.expected is not None:
            yield from report.expected.lines()
        if report.before is None:
            return
        before, after = report.before, report.after or report.before
        yield f"for {report.example or 'the example inputs'}:"
        yield f"  forward FLOPs: {changed(before.flops, after.flops)}"
        yield f"  saved for backward: {changed(before.saved_bytes, after.saved_bytes, mebibytes, ' MiB')}"

    def _reasons(self) -> Iterator[RenderableType]:
        for (role, why), paths in self.report.reasons().items():
            yield hanging(f"{role}: {listed(paths)}: {why}")
        for note in self.report.notes:
            yield hanging(f"note: {note}")


def _or_blank(write: Callable[[int], str], value: int | None) -> str:
    return "" if value is None else write(value)


def hanging(text: str) -> RenderableType:
    """A paragraph behind a dash, whose lines after the first are indented."""
    grid = Table.grid(padding=0)
    grid.add_column(width=2)
    grid.add_column(overflow="fold")
    grid.add_row("–", Text(text))
    return grid
