"""The records of a command: a JSON line for each piece of work, so that one that was stopped goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def read(path: Path) -> dict[str, Record]:
    """Records by name, the last of each; a line that was cut short when the run was stopped does not count."""
    records: dict[str, Record] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        records.pop(record["name"], None)
        records[record["name"]] = record
    return records


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Add a record, on a line of its own even where the last line was cut short."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        if file.seek(0, 2):
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(record).encode() + b"\n")
