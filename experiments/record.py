"""What a campaign's record says besides its results: command, commit, versions, device."""

import datetime
from pathlib import Path
from typing import Any

from spannorm_jax.durable import write_json
from spannorm_jax.run.provenance import machine_facts


def about(module: str, argv: list[str]) -> dict[str, Any]:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"time": now, "command": " ".join(["python", "-m", module, *argv]), **machine_facts()}


def save_record(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, record)
