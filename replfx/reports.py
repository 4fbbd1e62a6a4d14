"""Reports: what was found in a model, what was replaced, what it saves, and why not where not."""

from dataclasses import asdict, dataclass, field
from io import StringIO
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # rich is imported where a report is printed
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table

__all__ = ["BlockReport", "Report", "Totals"]


@dataclass(frozen=True)
class BlockReport:
    """One block of a chain.

    Attributes:
        path: the block.
        chain: index of its chain in `Report.chains`.
        parameters: trainable parameters of the block.
        flops: of its forward pass (a multiply-add is two); None without example inputs.
        saved_bytes: what autograd keeps for backward because of it; None without example inputs.
        previous, next, fusion, operator: how it is replaced; None where it is kept.
        parameters_after: trainable parameters of what takes its place; None where it is kept.
        kept: the rule that keeps it, where it is kept.
        not_unrolled: why `replfx.unroll` could not give it back at full depth; None where it could, or it is kept.
    """

    path: str
    chain: int
    parameters: int
    flops: int | None = None
    saved_bytes: int | None = None
    previous: str | None = None
    next: str | None = None
    fusion: str | None = None
    operator: str | None = None
    parameters_after: int | None = None
    kept: str | None = None
    not_unrolled: str | None = None


@dataclass(frozen=True)
class Totals:
    """FLOPs of a forward pass and bytes that autograd keeps for backward, of a whole model."""

    flops: int
    saved_bytes: int


@dataclass(frozen=True)
class Report:
    """What replfx found in a model and did to it.

    Attributes:
        model: name of the model's class.
        capture: "symbolic" or "recorded"; None where a plan was applied without capturing.
        chains: the paths of each chain's blocks, in the order in which they run.
        blocks: one entry a block of a chain.
        refused: block path → why it is in no chain or cannot be replaced.
        parameters_before, parameters_after: trainable parameters of the model.
        before, after: FLOPs and saved bytes; only where example inputs were given and asked for.
        notes: what else a reader should know, such as a branch on `training` that the capture froze.

    Example:
        >>> report = replfx.report(model)
        >>> report.replaced
        ['blocks.1', 'blocks.3', 'blocks.5', 'blocks.7', 'blocks.9']
        >>> print(report)
    """

    model: str
    capture: str | None = None
    chains: list[list[str]] = field(default_factory=list)
    blocks: list[BlockReport] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    parameters_before: int = 0
    parameters_after: int = 0
    before: Totals | None = None
    after: Totals | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def replaced(self) -> list[str]:
        """Paths of the replaced blocks, in the order in which they run."""
        return [block.path for block in self.blocks if block.operator is not None]

    @property
    def unrolls(self) -> bool:
        """Whether `replfx.unroll` can give every replaced block back at full depth."""
        return not any(block.not_unrolled for block in self.blocks)

    def to_dict(self) -> dict[str, object]:
        """As plain JSON values."""
        return {**asdict(self), "replaced": self.replaced}

    def __str__(self) -> str:
        from rich.console import Console

        text = StringIO()
        Console(file=text, width=130, color_system=None).print(self)
        return text.getvalue()

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        from rich.text import Text

        if self.blocks:
            yield self._table()
        yield Text(self._summary())
        for path, reason in self.refused.items():
            yield Text(f"  not replaced: {path}: {reason}")
        for note in self.notes:
            yield Text(f"  note: {note}")

    def _table(self) -> "Table":
        from rich import box
        from rich.table import Table

        measured = any(block.flops is not None for block in self.blocks)
        title = f"{self.model}: {len(self.chains)} chain{'s' * (len(self.chains) != 1)}"
        table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("chain")
        table.add_column("block", overflow="fold")  # a narrow terminal may break text, but no figures
        for name in ("parameters", *(("MFLOPs", "saved MiB") if measured else ()), "after"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("replaced by, or why not", overflow="fold")
        for block in self.blocks:
            how = block.operator if block.fusion is None else f"{block.operator} · {block.fusion}"
            costs = (f"{(block.flops or 0) / 1e6:,.1f}", f"{(block.saved_bytes or 0) / 2**20:,.2f}")
            table.add_row(
                str(block.chain),
                block.path,
                f"{block.parameters:,}",
                *(costs if measured else ()),
                "" if block.parameters_after is None else f"{block.parameters_after:,}",
                how or (f"– {block.kept}" if block.kept else ""),
            )
        return table

    def _summary(self) -> str:
        before, after = self.parameters_before, self.parameters_after
        count = len(self.replaced)
        parts = [f"{count} block{'s' * (count != 1)} replaced; trainable parameters {_change(before, after)}"]
        if self.before is not None and self.after is not None:
            flops = _change(self.before.flops / 1e6, self.after.flops / 1e6)
            saved = _change(self.before.saved_bytes / 2**20, self.after.saved_bytes / 2**20)
            parts += [f"forward MFLOPs {flops}", f"saved for backward, MiB {saved}"]
        return "; ".join(parts)


def _change(before: float, after: float) -> str:
    percent = 100 * (after - before) / before if before else 0.0
    return f"{before:,.0f} → {after:,.0f} ({percent:+.1f} %)"
