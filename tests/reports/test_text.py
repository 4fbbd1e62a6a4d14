"""The report in a terminal: widths, roles, equal blocks."""

import io

import pytest
import torch
from rich.console import Console
from torch import nn

import replfx
from replfx.reports.text import ReportText
from tests.support.models import Mlp, Plain, tower


def printed(report: replfx.Report, width: int, *, every_block: bool = False) -> list[str]:
    text = io.StringIO()
    Console(file=text, width=width, color_system=None).print(ReportText(report, every_block=every_block))
    return [line.rstrip() for line in text.getvalue().splitlines()]


class Two(nn.Module):
    """Two chains under long names, and a frozen block."""

    def __init__(self) -> None:
        super().__init__()
        self.a_rather_long_name_of_an_encoder = nn.Sequential(*(Mlp() for _ in range(12)))
        self.a_rather_long_name_of_a_decoder = nn.Sequential(*(Plain(6) for _ in range(5)))
        self.between = nn.Linear(8, 6)
        self.a_rather_long_name_of_an_encoder[5].requires_grad_(False)

    def forward(self, x):
        return self.a_rather_long_name_of_a_decoder(self.between(self.a_rather_long_name_of_an_encoder(x)))


@pytest.fixture(scope="module")
def report() -> replfx.Report:
    return replfx.inspect(Two(), torch.rand(3, 8))


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("every_block", [False, True])
def test_a_table_row_is_a_line_with_all_of_its_figures(report, width, every_block):
    lines = printed(report, width, every_block=every_block)
    assert max(map(len, lines)) <= width
    table = lines[: next(i for i, line in enumerate(lines) if "blocks replaced by" in line)]
    rows = [line for line in table if any(f" {role} " in line for role in ("neighbour", "replaced", "kept", "refused"))]
    # A saved size ends each row: none is cut off, none wrapped.
    assert all(line.split()[-1].lstrip("<").replace(".", "").isdigit() for line in rows)
    if every_block:
        assert len(rows) == 17
        assert any("…" in line for line in rows) == (width < 120)


def test_roles(report):
    encoder, decoder = report.chains
    roles = [report.roles[path] for path in (*encoder, *decoder)]
    # The sixth block is frozen; it is read all the same.
    assert roles[:6] == ["neighbour", "replaced", "neighbour", "replaced", "neighbour", "refused"]
    assert roles[12:] == ["neighbour", "replaced", "neighbour", "replaced", "neighbour"]
    assert report.to_dict()["roles"] == report.roles


def test_equal_blocks_share_a_row_and_a_reason():
    report = replfx.inspect(tower(length=12), every=6)
    text = " ".join(" ".join(printed(report, 80)).split())
    assert "2 × blocks.4, 6 neighbour" in text
    assert "9 × blocks.0, 1, 2, 3, 7, 8, 9, 10, 11 kept" in text
    assert "kept: blocks.11: it is the last block of its chain" in text


def test_costs_say_of_which_batch(report):
    assert report.example == "3×8"
    text = " ".join(" ".join(printed(report, 80)).split())
    assert "for 3×8: forward FLOPs:" in text


@pytest.mark.parametrize("inplace", [False, True])
def test_a_transformed_models_report_has_the_costs_that_inspect_said(inplace):
    x = torch.rand(3, 4)
    wanted = replfx.inspect(tower(), x, operator="light")
    assert wanted.before is not None
    made = replfx.transform(tower(), x, operator="light", inplace=inplace)
    applied = replfx.apply(tower(), replfx.plan_of(made), x, inplace=inplace)
    for model in (made, applied):
        report = replfx.report(model)
        assert (report.before, report.after, report.example) == (wanted.before, wanted.after, "3×4")
    assert replfx.report(replfx.transform(tower())).before is None
