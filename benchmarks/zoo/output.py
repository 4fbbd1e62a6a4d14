"""The zoo's records as JSON, as Markdown with a row a family, and as a table of totals for the terminal."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.drawing import markdown, write_files
from benchmarks.zoo.peers import PEERS

HEADS = ("models", "replaced", "refused", "failed", *PEERS)
SHOWN = 4
"""How many reasons of a refusal, or models of one failure, are written out."""

INTRODUCTION = """\
Which models can replfx transform, and why not the others? `python -m benchmarks zoo` tries them and writes this page.
A *replaced* model was transformed, trained for a step, saved, loaded and materialized. A *refused* one was left as it
was, for a reason that is given below. *Failed* is everything else. [The benchmarks' page](../benchmarks/README.md#zoo)
has the details. The last four columns are other tools: 3/4 says that the tool was given 4 models, and works on 3.
"""

Records = Sequence[Mapping[str, Any]]


def write(records: Records, config: Mapping[str, object], folder: Path) -> list[Path]:
    """Write ``zoo.json`` and ``zoo.md`` to the folder; returns where they are."""
    environment = {"platform": f"{platform.system()} {platform.machine()}", "versions": _versions(records)}
    ordered = sorted(records, key=lambda record: (_source(record), record["family"], record["name"]))
    document = {"config": config, "environment": environment, "results": ordered}
    return write_files(folder, "zoo", document, "\n".join(_markdown(ordered, config)) + "\n", None, indent=1)


def totals_table(records: Records) -> Table:
    """Lay the totals out for the terminal."""
    table = Table(box=None, pad_edge=False)
    for number, head in enumerate(("source", *HEADS)):
        table.add_column(head, justify="right" if number else "left")
    for label, cells in _totals(records):
        table.add_row(label, *cells)
    return table


def _markdown(records: Records, config: Mapping[str, object]) -> Iterator[str]:
    yield "# Model zoo"
    yield from ("", *INTRODUCTION.splitlines())
    if config.get("peer_parameters"):
        yield f"The other tools were given models of at most {config['peer_parameters']:,.0f} parameters."
    yield from ("", *_table("source", _totals(records)))
    for source, group in _groups(records, _source):
        yield from ("", f"## {source}", "")
        yield from _table("family", ((f, _cells(r)) for f, r in _groups(group, lambda record: record["family"])))
    failures = [record for record in records if record["status"] == "failure"]
    yield from ("", "## Failures", "")
    if not failures:
        yield "None."
    for reason, group in _groups(failures, lambda record: f"{record['stage']}: {record['error']}"):
        yield f"- {', '.join(record['name'] for record in group)}: {_code(reason)}"
    yield from ("", "## Refusals", "")
    for record in records:
        if record["status"] == "refused":
            more = len(record["reasons"]) - SHOWN
            yield f"- {record['name']}"
            yield from (f"  - {reason}" for reason in record["reasons"][:SHOWN])
            if more > 0:
                yield f"  - and {more} more reasons"
    yield from ("", "Versions: " + "; ".join(f"{k} {', '.join(v)}" for k, v in _versions(records).items()) + ".")


def _table(first: str, rows: Iterable[tuple[str, Sequence[str]]]) -> list[str]:
    return markdown((first, *HEADS), [(label, *cells) for label, cells in rows], words=1).splitlines()


def _totals(records: Records) -> list[tuple[str, list[str]]]:
    rows = [(source, _cells(group)) for source, group in _groups(records, _source)]
    return [*rows, ("all", _cells(records))]


def _cells(records: Records) -> list[str]:
    counts = [sum(r["status"] == status for r in records) for status in ("replaced", "refused", "failure")]
    return [str(len(records)), *map(str, counts), *(_peer(records, peer) for peer in PEERS)]


def _peer(records: Records, peer: str) -> str:
    """How many of the models that it has tried a peer works on."""
    results = [record["peers"][peer] for record in records if peer in record["peers"]]
    tried = [result for result in results if result["works"] is not None]
    return f"{sum(result['works'] for result in tried)}/{len(tried)}" if tried else "–"


def _groups(records: Records, key: Callable[[Mapping[str, Any]], str]) -> list[tuple[str, list[Mapping[str, Any]]]]:
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        groups.setdefault(key(record), []).append(record)
    return sorted(groups.items())


def _source(record: Mapping[str, Any]) -> str:
    return str(record["name"]).partition(":")[0]


def _code(text: str) -> str:
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def _versions(records: Records) -> dict[str, list[str]]:
    """All versions that records were made with: a run that went on later may have met others."""
    found: dict[str, set[str]] = {}
    for record in records:
        for name, number in record.get("versions", {}).items():
            found.setdefault(name, set()).add(number)
    return {name: sorted(numbers) for name, numbers in found.items()}
