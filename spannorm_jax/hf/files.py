"""A folder of tensors as Hugging Face keeps them: model.safetensors, or shards and their index."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from spannorm_jax.durable import read_object, write_json
from spannorm_jax.errors import UserError, one_line

_SHARD_BYTES = 5 * 10**9  # of a file, at most, unless one tensor has more
_INDEX = "model.safetensors.index.json"


def write_tensors(folder: Path, tensors: Iterable[tuple[str, np.ndarray]], shard_bytes: int = _SHARD_BYTES) -> None:
    """Writes tensors as they come, holding one shard at a time."""
    files: list[list[str]] = []
    shard: dict[str, np.ndarray] = {}
    total = held = 0

    def flush() -> None:
        save_file(shard, folder / f"shard-{len(files)}", {"format": "pt"})
        files.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        if shard and held + tensor.nbytes > shard_bytes:
            flush()
            held = 0
        shard[name] = np.ascontiguousarray(tensor)
        held, total = held + tensor.nbytes, total + tensor.nbytes
    flush()
    weight_map: dict[str, str] = {}
    for i, names in enumerate(files):
        file = "model.safetensors" if len(files) == 1 else f"model-{i + 1:05}-of-{len(files):05}.safetensors"
        (folder / f"shard-{i}").rename(folder / file).chmod(0o644)  # safetensors keeps it from others
        weight_map |= dict.fromkeys(names, file)
    if len(files) > 1:
        write_json(folder / _INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


class TensorFiles:
    """The tensors in a folder, each read when it is asked for. Raises UserError for what cannot be read."""

    def __init__(self, folder: Path):
        self.folder = folder
        index = folder / _INDEX
        names = ["model.safetensors"]
        if index.is_file():
            names = sorted(set(read_json(index).get("weight_map", {}).values()))
        missing = next((name for name in names if not (folder / name).is_file()), None)
        if missing:
            raise UserError(f"{folder / missing} is missing; give a folder with the model's *.safetensors")
        try:
            opened = [safe_open(folder / name, "np") for name in names]
        except (OSError, SafetensorError) as error:
            raise UserError(f"{folder} holds a damaged *.safetensors ({one_line(error)}); copy it again") from error
        self._files = {name: file for file in opened for name in file.keys()}  # noqa: SIM118 (no mapping)
        self.unread = set(self._files)

    def __call__(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """A tensor by its name; its shape must be what the config says."""
        if name not in self._files:
            raise UserError(f"{self.folder} has no tensor {name}, which its config.json asks for")
        tensor = self._files[name].get_tensor(name)
        if tensor.shape != shape:
            raise UserError(f"{self.folder}: tensor {name} has shape {tensor.shape}, and its config.json says {shape}")
        self.unread.discard(name)
        return tensor


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises UserError if the file holds none."""
    try:
        return read_object(path)
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; give a folder of a model, as Hugging Face lays it out") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({one_line(error)})") from error


def check_new(path: Path, flag: str) -> None:
    """Raises UserError if there is something at `path`, which `flag` gave, that is not an empty folder."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{flag} {path} exists and is not an empty folder; give a new one")
