"""A run's folder, the interface between programs.

config.json    the resolved config; continuing the run with another one is refused
tokenizer.json the tokenizer, if it was trained: what turns the model's tokens into text
starts.jsonl   one line a start: command, versions, devices, mesh, data (what makes a record reproducible)
metrics.jsonl  one line a logged step; lines beyond a restored step are dropped, so no step stands twice
checkpoints/   Orbax
tensorboard/   the scalars of metrics.jsonl
profile/       traces of the profiler, if asked for
wandb.json     the id of the run at Weights & Biases, whose own files are in wandb/, if asked for
eval.jsonl     one line an evaluation, of held-out loss or of tasks
DONE           {"step": n}, once the last checkpoint is committed
DIVERGED       what was not finite, and at which step, if that stopped the run
LOCK           held by the trainer at work, with its process and host
damaged/       checkpoints whose files had changed, or of another step or run, moved out of the way
"""

import contextlib
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from spannorm_jax.config import Config, replace, to_dict
from spannorm_jax.config_file import recorded_config
from spannorm_jax.data import names
from spannorm_jax.durable import read_object, unwritable
from spannorm_jax.errors import UserError
from spannorm_jax.paths import is_address, user_path
from spannorm_jax.resolution import changed_keys
from spannorm_jax.run import bucket, lines
from spannorm_jax.run.bucket import in_bucket
from spannorm_jax.run.store import exclusive, make_folder, write_json

CONFIG, STARTS, METRICS, EVAL = "config.json", "starts.jsonl", "metrics.jsonl", "eval.jsonl"
CHECKPOINTS, TENSORBOARD, PROFILE = "checkpoints", "tensorboard", "profile"
TOKENIZER, WANDB = "tokenizer.json", "wandb.json"
DONE, DIVERGED, LOCK, DAMAGED = "DONE", "DIVERGED", "LOCK", "damaged"
_REMOVAL_S = 0.5  # that removing a run's folder may take: whoever does begins with what lies in it
_FIRST_FILES = (LOCK, CONFIG + ".tmp")  # all that a start which was killed at once leaves


def run_folder_path(text: str) -> Path:
    """`--workdir` as a path, of a disk or a bucket. Raises UserError for a name that checkpoints cannot have."""
    if is_address(text):
        return bucket.bucket_path(text, repr(text))
    if re.match("(gs|s3):", text):
        raise UserError(
            f"{text!r} is neither an address nor a usual folder; write {text[:2]}://BUCKET/FOLDER, or ./{text}"
        )
    if not text:
        raise UserError("the name of a folder of runs is empty; write . for this folder")
    path = user_path(text, "--workdir")
    if "\\" in str(path.absolute()):
        raise UserError(
            f"--workdir {text!r} holds a backslash, which the checkpoints' library takes for a slash; write / instead"
        )
    user_path(path / CONFIG, "--workdir")  # which tells whether the folder may be looked into
    return path


def read_config(workdir: Path) -> Config:
    """The config that a run was started with, checked as one that is typed.

    Raises:
      UserError: the folder is not a run, its config cannot be read, or this version does not know what it names.
    """
    path = workdir / CONFIG
    if not path.is_file():
        raise UserError(f"{workdir} is not a run: it has no {CONFIG}; give a folder that train has written")
    try:
        values = read_object(path)
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); copy it back from a checkpoint's meta") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); mend its permissions") from error
    try:
        config = recorded_config(values)
    except UserError as error:
        raise UserError(f"{path}: {error} (if a newer version of this code wrote it, use that one)") from error
    return config if config.data.full_name else replace(config, data__full_name=_started_with(workdir))


def _started_with(workdir: Path) -> str:
    """Full name of the data as the last start recorded it, for runs from before their config did; "" if none did."""
    started = lines.read(workdir / STARTS).splitlines() if lines.exists(workdir / STARTS) else []
    for line in reversed(started):
        with contextlib.suppress(ValueError, KeyError, TypeError):  # half a line, which a crash leaves
            return str(json.loads(line)["data"]["dataset"])
    return ""


def data_opened_as(workdir: Path, config: Config) -> str:
    """The `data.full_name` by which `config` opens its data.

    It is that of the run in `workdir` if `config` continues it and leaves its own open: a newer
    version of the dataset beside the run's does not change what the run goes on with.

    Raises:
      UserError: the run's config cannot be read.
    """
    if not (workdir / CONFIG).is_file():
        return config.data.full_name
    old = read_config(workdir).data
    return old.full_name if names.goes_on(config.data, old) else config.data.full_name


@contextlib.contextmanager
def open_run(workdir: Path, config: Config) -> Iterator[Callable[[], None]]:
    """Makes the folder a run of `config`, or checks that it is one already, and keeps other trainers out of it.

    Yields a function that raises UserError once the folder is no longer the one that was opened.

    Raises:
      UserError: the folder holds something else, a run with another config, or a trainer at work. Nothing is changed
        then. Also while it is held: nothing more can be written.
    """
    _check_fits(workdir, config)
    with contextlib.ExitStack() as stack:
        try:
            make_folder(workdir)
            holds_lock = stack.enter_context(exclusive(workdir / LOCK, f"--workdir {workdir}"))
            _check_fits(workdir, config)  # another trainer may have been first
            write_json(workdir / CONFIG, to_dict(config))
        except (OSError, ValueError) as error:  # ValueError: a path that no system has
            reason = getattr(error, "strerror", None) or error
            again = "repeat the command once it does" if in_bucket(workdir) else "give another folder"
            raise UserError(f"cannot write in --workdir {workdir}: {reason}; {again}") from error

        def is_own() -> bool:
            return holds_lock() and (workdir / CONFIG).is_file()

        def check_own() -> None:
            if not is_own():
                if in_bucket(workdir) and (workdir / CONFIG).is_file():
                    raise UserError(
                        f"--workdir {workdir} was taken over by another process, which had no sign of life of this "
                        "one; that one goes on, and this one writes nothing more there"
                    )
                raise UserError(
                    f"--workdir {workdir} was removed or replaced while the run was at work ({LOCK} or {CONFIG} is not "
                    "its own any more); nothing more is written there; put the folder back and repeat the command to "
                    "go on, or remove what is left and repeat it to begin anew"
                )

        try:
            yield check_own
        except UserError:
            raise
        except Exception as error:
            why = unwritable(error)
            if why is None:
                time.sleep(_REMOVAL_S)
                check_own()
                raise
            raise UserError(
                f"cannot write in --workdir {workdir}: {why}; mend that and repeat the command, which goes on from "
                "the last sound checkpoint"
            ) from error
        finally:
            if not in_bucket(workdir) and not is_own():
                time.sleep(_REMOVAL_S)
                _remove_remade(workdir)


def _remove_remade(workdir: Path) -> None:
    """Removes a folder that holds one checkpoint and nothing else: what a save has made while the run was removed.

    Orbax makes all folders above its own, and `rm -r` fails where one is not empty any more. What is left would keep
    the same command from beginning anew.
    """
    with contextlib.suppress(OSError):  # it is not there, or is no folder any more
        if [path.name for path in workdir.iterdir()] != [CHECKPOINTS]:
            return
        if len({path.name.partition(".")[0] for path in (workdir / CHECKPOINTS).iterdir()}) <= 1:
            shutil.rmtree(workdir)


def _check_fits(workdir: Path, config: Config) -> None:
    if (workdir / CONFIG).is_file():
        changed = changed_keys(read_config(workdir), config)
        if changed:
            key, old, new = changed[0]
            others = f" (and {len(changed) - 1} more keys)" if len(changed) > 1 else ""
            raise UserError(
                f"{workdir} holds a run with {key}={old!r}, not {new!r}{others}; "
                "repeat its own config to continue it, or give another --workdir"
            )
    elif workdir.exists() and (not workdir.is_dir() or any(p.name not in _FIRST_FILES for p in workdir.iterdir())):
        raise UserError(f"{workdir} exists and is not a run; give a new or empty folder as --workdir")


# ---- what came of a run ---------------------------------------------------------------------------


def read_mark(path: Path) -> dict[str, Any] | None:
    """What DONE or DIVERGED says: None if the file is not there, nothing if it cannot be read."""
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def what_is_evaluated(config: Config, step: int) -> dict[str, Any]:
    """What a line of eval.jsonl says of its evaluation, besides the result: two that say the same measured the same."""
    return {
        "step": step,
        "split": config.data.eval_split,
        "fingerprint": config.data.fingerprint,
        "asked_tokens": config.eval.tokens,
    }


def is_evaluated(workdir: Path, config: Config, step: int) -> bool:
    """Whether eval.jsonl holds the evaluation of a step that `config` asks for."""
    asked = what_is_evaluated(config, step)
    try:
        texts = lines.read(workdir / EVAL).splitlines()
    except OSError:
        return False
    for text in texts:
        with contextlib.suppress(ValueError):  # half a line, which a crash leaves
            line = json.loads(text)
            if not isinstance(line, dict) or "step" not in line or "tasks" in line:
                continue  # the last is lm-eval's judgement
            # A line from before a key came agrees with whatever is asked.
            if all(line.get(k, v) == v for k, v in asked.items()):
                return True
    return False
