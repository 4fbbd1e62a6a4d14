"""Reports: what was found in a model, what was replaced, what it saves, and why not where not."""

from collections.abc import Collection
from dataclasses import asdict, dataclass, field, replace
from io import StringIO
from typing import TYPE_CHECKING, Literal, TypeAlias

from replfx.reports.expectation import Expectation

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

__all__ = ["BlockReport", "Report", "Role", "Totals", "without"]

Role: TypeAlias = Literal["replaced", "neighbour", "kept", "refused"]

_WIDTH = 80  # columns of a terminal


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

    @property
    def how(self) -> str:
        """How it is replaced, "block · scalar"; empty where it is kept."""
        return " · ".join(name for name in (self.operator, self.fusion) if name is not None)


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
        before, after: FLOPs of a forward pass and bytes that it saves for backward; None without example inputs.
        example: the batch that `before` and `after`, and the costs of blocks, are of ("2×3×224×224"); None without.
        notes: what else a reader should know, such as a branch on `training` that the capture froze.
        expected: what the plan was chosen for, and is expected to cost, where there was a `budget=`.

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
    example: str | None = None
    notes: list[str] = field(default_factory=list)
    expected: Expectation | None = None

    @property
    def replaced(self) -> list[str]:
        """Paths of the replaced blocks, in the order in which they run."""
        return [block.path for block in self.blocks if block.operator is not None]

    @property
    def unrolls(self) -> bool:
        """Whether `replfx.unroll` can give every replaced block back at full depth."""
        return not any(block.not_unrolled for block in self.blocks)

    @property
    def measured(self) -> bool:
        """Whether blocks have costs: example inputs were given."""
        return any(block.flops is not None for block in self.blocks)

    @property
    def roles(self) -> dict[str, Role]:
        """What each block is to the plan.

        "replaced"; "neighbour", kept and read by a replaced block; "refused", with a reason in `refused`; or "kept".
        """
        read = {side for block in self.blocks for side in (block.previous, block.next)}
        roles: dict[str, Role] = dict.fromkeys(self.refused, "refused")
        for block in self.blocks:
            if block.operator is not None:
                roles[block.path] = "replaced"
            elif block.path not in self.refused:
                roles[block.path] = "neighbour" if block.path in read else "kept"
        return roles

    def reasons(self) -> dict[tuple[Role, str], list[str]]:
        """Why blocks stay: role and reason → the blocks. That a block is a neighbour needs no other reason."""
        roles, found = self.roles, dict[tuple[Role, str], list[str]]()
        whys = {**{block.path: block.kept for block in self.blocks if roles[block.path] == "kept"}, **self.refused}
        for path, why in whys.items():
            if why is not None:
                found.setdefault((roles[path], why), []).append(path)
        return found

    def to_dict(self) -> dict[str, object]:
        """As plain JSON values."""
        return {**asdict(self), "replaced": self.replaced, "roles": self.roles}

    def __str__(self) -> str:
        from rich.console import Console

        text = StringIO()
        Console(file=text, width=_WIDTH, color_system=None).print(self)
        return text.getvalue()

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        from replfx.reports.text import ReportText

        return ReportText(self).__rich_console__(console, options)


def without(report: Report, paths: Collection[str], parameters: int) -> Report:
    """The report of a model that has some of its blocks back at full depth, and as many trainable parameters."""
    blocks = [
        BlockReport(b.path, b.chain, b.parameters, b.flops, b.saved_bytes, kept="it was unrolled")
        if b.path in paths
        else b
        for b in report.blocks
    ]
    return replace(report, blocks=blocks, parameters_after=parameters, after=None)
