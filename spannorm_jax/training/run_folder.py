"""A run's folder, the interface between programs.

config.json    the resolved config; continuing the run with another one is refused
tokenizer.json the tokenizer, if it was trained: what turns the model's tokens into text
starts.jsonl   one line a start: command, versions, devices, mesh, data (what makes a record reproducible)
metrics.jsonl  one line a logged step; lines beyond a restored step are dropped, so no step stands twice
checkpoints/   Orbax
tensorboard/   the scalars of metrics.jsonl
profile/       traces of the profiler, if asked for
wandb.json     the id of the run at Weights & Biases, whose own files are in wandb/, if asked for
eval.jsonl     one line an evaluation
DONE           {"step": n}, once the last checkpoint is committed
DIVERGED       what was not finite, and at which step, if that stopped the run
"""

import json
import os
from pathlib import Path
from typing import Any

from spannorm_jax.config import Config, changed_keys, from_dict, to_dict
from spannorm_jax.errors import UserError

CONFIG, STARTS, METRICS, EVAL = "config.json", "starts.jsonl", "metrics.jsonl", "eval.jsonl"
CHECKPOINTS, TENSORBOARD, PROFILE = "checkpoints", "tensorboard", "profile"
TOKENIZER, WANDB = "tokenizer.json", "wandb.json"
DONE, DIVERGED = "DONE", "DIVERGED"


def write_json(path: Path, value: Any) -> None:
    """Writes atomically: after a crash the file is the old one or the new one, never half of it."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes atomically, as `write_json`."""
    temp = path.with_name(path.name + ".tmp")
    with open(temp, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temp, path)


def append_line(path: Path, value: dict[str, Any]) -> None:
    """Appends a line, after dropping a last one that a crash cut short."""
    with open(path, "a+b") as file:
        file.seek(0)
        text = file.read()
        file.truncate(text.rfind(b"\n") + 1)
        file.write(json.dumps(value).encode() + b"\n")


def read_config(workdir: Path) -> Config:
    """The config that a run was started with.

    Raises:
      UserError: the folder is not a run, or its config cannot be read.
    """
    path = workdir / CONFIG
    if not path.is_file():
        raise UserError(f"{workdir} is not a run: it has no {CONFIG}; give a folder that train has written")
    try:
        values = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged ({error}); copy it back from a checkpoint's meta") from error
    return from_dict(values, of_older_run=True)


def open_run(workdir: Path, config: Config) -> None:
    """Makes the folder a run of `config`, or checks that it is one already.

    Raises:
      UserError: the folder holds something else, or a run with another config. Nothing is changed then.
    """
    if (workdir / CONFIG).is_file():
        changed = changed_keys(read_config(workdir), config)
        if changed:
            key, old, new = changed[0]
            others = f" (and {len(changed) - 1} more keys)" if len(changed) > 1 else ""
            raise UserError(
                f"{workdir} holds a run with {key}={old!r}, not {new!r}{others}; "
                "repeat its own config to continue it, or give another --workdir"
            )
    elif workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
        raise UserError(f"{workdir} exists and is not a run; give a new or empty folder as --workdir")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        write_json(workdir / CONFIG, to_dict(config))
    except OSError as error:
        raise UserError(f"cannot write in --workdir {workdir}: {error.strerror}; give another folder") from error


def keep_lines_until(path: Path, last_step: int) -> None:
    """Drops the lines of steps after `last_step`, and a last line that a crash cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        if not line.endswith("\n"):
            break
        if json.loads(line)["step"] <= last_step:
            kept.append(line)
    temp = path.with_name(path.name + ".tmp")
    temp.write_text("".join(kept))
    os.replace(temp, path)
