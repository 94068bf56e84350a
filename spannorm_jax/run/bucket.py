"""Objects of a bucket, gs:// or s3://: whole writes, exclusive creation, leases. No append, no rename, no lock.

A path in a bucket is an `etils.epath.Path`, which has those methods of a `pathlib.Path` that a run's folder needs.
What is said of failures here is an OSError, as a disk's are.
"""

import base64
import contextlib
import errno
import json
import logging
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from spannorm_jax.durable import InUse
from spannorm_jax.errors import UserError, one_line

LEASE_S = 60.0  # without a renewal, after which a lease's holder is taken for dead
RENEW_S = 5.0
_LOOK_S = 0.5
_TRIES = 5  # at creating an object that is said to be there, and is not
_PACKAGES = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}  # scheme -> package, and the extra that has it


def in_bucket(path: Path) -> bool:
    """Whether a path is an object's or a prefix of objects, and no file's or folder's."""
    return not isinstance(path, Path)


def bucket_path(text: str, shown: str) -> Path:
    """`gs://bucket/name` as a path, whose service answers.

    Raises:
      UserError: another scheme, no bucket, its package is not installed, or the service does not let one look there.
    """
    scheme, _, rest = text.partition("://")
    if scheme not in _PACKAGES:
        raise UserError(
            f"{shown} is an address that is not known; gs:// and s3:// are, and folders: mount what it names, and "
            "give the folder"
        )
    bucket, _, name = rest.strip("/").partition("/")
    if not bucket or not name or "//" in name or not {".", ".."}.isdisjoint(name.split("/")):
        raise UserError(f"{shown} names no object; write {scheme}://BUCKET/FOLDER, without . and .. in it")
    if re.search(r"[\\?#*\[\]]", name):
        raise UserError(f"{shown} holds one of \\ ? # * [ ], which mean something else in an address; leave it out")
    package, extra = _PACKAGES[scheme]
    import fsspec

    # What another process has written must be seen: a list is asked for anew each time.
    for protocol in ("gs", "gcs", "s3", "s3a"):
        fsspec.config.conf.setdefault(protocol, {})["use_listings_cache"] = False
    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        raise UserError(f"{shown} needs the package {package}; pip install 'spannorm_jax[{extra}]'") from error
    # What they say at each failure is raised too, with a line that names the object.
    for client in ("gcsfs", "google.auth._default", "s3fs"):
        logging.getLogger(client).setLevel(logging.CRITICAL)
    from etils import epath

    path = epath.Path(f"{scheme}://{bucket}/{name}")
    try:
        entries(path)
    except OSError as error:
        raise UserError(f"{shown} cannot be looked into: {error.strerror}") from error
    return path


def _files(path: Path) -> Any:
    """The file system of a path."""
    import fsspec

    return fsspec.filesystem(str(path).partition("://")[0])


@contextlib.contextmanager
def _asked(path: Path) -> Iterator[None]:
    """A service's refusals, after its client's own tries, as OSErrors that name the object."""
    try:
        yield
    except (FileNotFoundError, FileExistsError):
        raise
    except PermissionError as error:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path)) from error
    except Exception as error:
        why = one_line(error).strip(", ")[:200] or type(error).__name__
        raise OSError(errno.EREMOTEIO, f"the bucket's service fails ({why})", str(path)) from error


def read(path: Path) -> bytes:
    with _asked(path):
        return bytes(_files(path).cat_file(str(path)))


def write(path: Path, data: bytes) -> None:
    """The object is the old one or the new one, never half of it."""
    with _asked(path), _into(path):
        _files(path).pipe_file(str(path), data)


@contextlib.contextmanager
def _into(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, "there is no such bucket", str(path)) from error


def create(path: Path, data: bytes) -> bool:
    """Writes an object that is not there. False if it is: of two writers one has it.

    A request that was answered with an error, and had been done, is repeated by the client: what is there is its own.
    """
    with _asked(path):
        for _ in range(_TRIES):
            try:
                with _into(path):
                    _files(path).pipe_file(str(path), data, mode="create")
                return True
            except OSError as error:
                if not isinstance(error, FileExistsError) and not re.search("(?i)condition", str(error)):
                    raise  # Amazon also says that a conditional request has met another
                with contextlib.suppress(FileNotFoundError):  # refused, and nothing is there
                    return bool(_files(path).cat_file(str(path)) == data)
    raise OSError(errno.EREMOTEIO, "the bucket says that it is there and that it is not", str(path))


def remove(path: Path) -> None:
    """Removes an object, if it is there."""
    with _asked(path), contextlib.suppress(FileNotFoundError):
        _files(path).rm_file(str(path))


def entries(folder: Path) -> dict[str, bool]:
    """What lies directly in a folder, by name, and whether it is a folder."""
    with _asked(folder):
        try:
            listed = _files(folder).ls(str(folder), detail=True, refresh=True)
        except FileNotFoundError:
            return {}
    root = str(folder).partition("://")[2]
    names = {item["name"].rstrip("/"): item["type"] == "directory" for item in listed}
    return {name.removeprefix(root + "/"): names[name] for name in sorted(names) if name.startswith(root + "/")}


def checksums(folder: Path) -> dict[str, str]:
    """What the service itself keeps of each object below a folder, by relative name: `md5:...`, or `etag:...`."""
    with _asked(folder):
        found = _files(folder).find(str(folder), detail=True)
    root = str(folder).partition("://")[2] + "/"
    return {name.removeprefix(root): _checksum(info) for name, info in sorted(found.items())}


def _checksum(info: dict[str, Any]) -> str:
    if "md5Hash" in info:  # of Google, in base64
        return "md5:" + base64.b64decode(info["md5Hash"]).hex()
    etag = str(info.get("ETag") or info.get("etag") or info.get("crc32c")).strip('"')
    return f"md5:{etag}" if re.fullmatch(r"[0-9a-f]{32}", etag) else f"etag:{etag}"


def remove_folder(folder: Path, first: str = "") -> None:
    """Removes all objects below a folder; first the one of this relative name, if it is said."""
    with _asked(folder):
        if first:
            remove(folder / first)
        with contextlib.suppress(FileNotFoundError):
            _files(folder).rm(str(folder), recursive=True)


def copy_folder(source: Path, target: Path) -> None:
    """Copies all objects below a folder, within the service."""
    with _asked(target):
        files, root = _files(source), str(source).partition("://")[2]
        names = files.find(str(source))
        files.copy(names, [f"{str(target).partition('://')[2]}{name.removeprefix(root)}" for name in names])


# ---- leases: what a lock is where there is none ----------------------------------------------------


class Beat:
    """An object that a thread renews from `start` to `close`, which shows that this process is alive."""

    def __init__(self, path: Path):
        self.path, self._closed, self._number = path, threading.Event(), 0
        self.text = {"pid": os.getpid(), "host": socket.gethostname(), "machine": _machine(), "owner": uuid.uuid4().hex}
        self.text["began"] = _began(os.getpid())
        self._thread = threading.Thread(target=self._renew, daemon=True, name=f"lease of {path}")

    def data(self) -> bytes:
        return json.dumps(self.text | {"renewed": self._number}).encode()

    def start(self) -> None:
        self._thread.start()

    def _renew(self) -> None:
        while not self._closed.wait(RENEW_S):
            self._number += 1
            with contextlib.suppress(OSError):  # the next one may get through; until LEASE_S nobody takes it away
                read(self.path)  # which fails where the folder was removed
                write(self.path, self.data())

    def close(self) -> None:
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()


def _machine() -> str:
    """What processes share that see one another by their ids: a start of the system, and a container; "" elsewhere."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _began(pid: Any) -> str:
    """When a process here began, in ticks since the system did: ids are used again. "" if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


class Watch:
    """Tells of objects that others renew whether their holders are alive, by this process's own clock."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[bytes, float]] = {}

    def look(self, path: Path) -> bool | None:
        """True: it was renewed since the last look. False: its holder is dead, or gone. None: not known yet."""
        try:
            data = read(path)
        except FileNotFoundError:
            return False
        values = _values(data)
        if values.get("released"):
            return False
        if values.get("machine") == _machine() != "":
            return bool(values.get("began")) and _began(values.get("pid")) == values["began"]
        before, since = self._seen.get(str(path), (b"", 0.0))
        if data != before:
            self._seen[str(path)] = data, time.monotonic()
            return True if before else None
        return False if time.monotonic() - since > LEASE_S else None


def _values(data: bytes) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        values = json.loads(data)
        if isinstance(values, dict):
            return values
    return {}


@contextlib.contextmanager
def lease(folder: Path, what: str, wait: bool = False) -> Iterator[Callable[[], bool]]:
    """Holds a lease: the object of the highest number in `folder`, which is created by one process and renewed by it.

    Yields a function that tells whether it is still the highest. Whoever is taken for dead and is not learns so there.

    Raises:
      InUse: another process renews its own, and it is not waited for.
    """
    beat = _take(folder, what, wait)
    beat.start()
    name = beat.path.name

    def holds() -> bool:
        there = entries(folder)
        return bool(there) and max(there) == name and _values(read(beat.path)).get("owner") == beat.text["owner"]

    try:
        for old in entries(folder):
            if old < name:
                remove(folder / old)
        yield holds
    finally:
        beat.close()
        with contextlib.suppress(OSError):  # a holder that cannot say so is taken for dead in time
            if holds():
                write(beat.path, json.dumps(beat.text | {"released": True}).encode())


def _take(folder: Path, what: str, wait: bool) -> Beat:
    watch, said = Watch(), False
    while True:
        last = max(entries(folder), default="")
        alive = watch.look(folder / last) if last else False
        if alive and not wait:
            values = _values(read(folder / last))
            holder = f"process {values.get('pid')} on {values.get('host')}"
            raise InUse(f"{what} is in use by {holder}; wait for it, stop it, or use another folder")
        if alive is False:
            beat = Beat(folder / f"{int(last or 0) + 1:08d}")
            if create(beat.path, beat.data()):
                return beat
            continue  # another process was first
        if not said and not wait:
            print(f"{what} was in use; looking for {LEASE_S:.0f} s whether that process is alive", flush=True)
            said = True
        time.sleep(_LOOK_S)


def is_leased(folder: Path) -> bool:
    """Whether a lease is held, or may be: its holder has not been looked at for long enough."""
    last = max(entries(folder), default="")
    return bool(last) and Watch().look(folder / last) is not False
