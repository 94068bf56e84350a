"""What a campaign's record says besides its results: command, commit, versions, device."""

import datetime
import json
from pathlib import Path
from typing import Any

from spannorm_jax.durable import append_line, write_json
from spannorm_jax.run.provenance import machine_facts


def about(module: str, argv: list[str]) -> dict[str, Any]:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"time": now, "command": " ".join(["python", "-m", module, *argv]), **machine_facts()}


def append_record(path: Path, record: dict[str, Any]) -> None:
    """Adds a line to a file of records, which it makes where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    append_line(path, record)


def read_records(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of records; none without the file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def save_record(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, record)
