"""Run folders of sweeps as raw records: one archive a sweep, of what a report reads.

    python -m experiments.sweep_records keep placement_init,lr --out runs/sweeps
    python -m experiments.sweep_records page

`keep` packs the runs of each sweep (size cpu) that have ended into experiments/results/sweeps/NAME.tar.xz, without
checkpoints. Unpacked into a folder of runs, they are done there, and the sweep goes on with what is missing:

    tar -xf experiments/results/sweeps/lr.tar.xz -C runs/sweeps

`page` makes docs/results.md and its figures from the archives and experiments/results.md, its template.
"""

import io
import lzma
import re
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path

from experiments import claims
from experiments.results_page import TEMPLATE, write_page
from spannorm_jax.command import Parser, run_command
from spannorm_jax.errors import UserError, did_you_mean
from spannorm_jax.paths import user_path
from spannorm_jax.run.folder import CONFIG, DIVERGED, DONE, EVAL, METRICS, STARTS
from spannorm_jax.sweep.expansion import expand
from spannorm_jax.sweep.records import ENDED, Place

ARCHIVES = Path("experiments/results/sweeps")
_FILES = (CONFIG, STARTS, METRICS, EVAL, DONE, DIVERGED)
_VERBS = ("keep", "page")


def keep(name: str, out: Path, archives: Path) -> int:
    """Packs a sweep's ended runs, those of its older archive too, and returns how many they are.

    The same runs give the same bytes.

    Raises:
      UserError: no run has ended.
    """
    kept = pack([run.name for run in expand(name, "cpu").runs], out, archives / f"{name}.tar.xz")
    if not kept:
        raise UserError(f"no run of sweep {name} has ended in {out}; do them: sweep {name} local --out {out}")
    return kept


def pack(runs: Iterable[str], out: Path, path: Path, preset: int = 9 | lzma.PRESET_EXTREME) -> int:
    """`keep` of runs by their names, into the archive `path`; an older one stays until the new one is whole.

    A `preset` of 1 takes a tenth of the time, for a tenth more bytes.
    """
    with tempfile.TemporaryDirectory() as scratch:
        if path.exists():
            unpack(path, Path(scratch))
        here = {run: out if Place(out, run).state_at_rest() in ENDED else Path(scratch) for run in sorted(runs)}
        ended = [run for run, folder in here.items() if (folder / run / CONFIG).exists()]
        if not ended:
            return 0
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".tmp")
        with tarfile.open(unfinished, "w:xz", preset=preset) as archive:
            for run in ended:
                for file in (here[run] / run / file for file in _FILES):
                    if file.exists():
                        _add(archive, f"{run}/{file.name}", file.read_bytes())
        unfinished.replace(path)
    return len(ended)


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    """Adds a file without what differs from machine to machine: times, owners, where the folder of all runs was."""
    run = Path(name).parent.name
    content = re.sub(rb"--workdir \S*/(?=%s\b)" % re.escape(run).encode(), b"--workdir runs/sweeps/", content)
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def unpack(path: Path, folder: Path) -> None:
    with tarfile.open(path) as archive:
        archive.extractall(folder, filter="data")


def main(argv: list[str]) -> int:
    parser = Parser(prog="python -m experiments.sweep_records", description=__doc__)
    parser.add_argument("verb", metavar="VERB", help=" | ".join(_VERBS))
    parser.add_argument("names", metavar="NAMES", nargs="?", default="", help="sweeps, with commas between, for keep")
    parser.add_argument("--out", type=user_path, default=Path("runs/sweeps"), help="folder of all runs, for keep")
    args = parser.parse_args(argv)
    if args.verb not in _VERBS:
        raise UserError(f"unknown verb {args.verb!r}; {did_you_mean(args.verb, _VERBS)}")
    if (args.verb == "keep") != bool(args.names):
        raise UserError("keep needs the names of sweeps, and page takes none")
    if args.verb == "page":
        if not TEMPLATE.exists():
            raise UserError(f"there is no {TEMPLATE} here; call it in the folder of the repository")
        with tempfile.TemporaryDirectory() as scratch:
            for path in sorted(ARCHIVES.glob("*.tar.xz")):
                unpack(path, Path(scratch) / path.name.removesuffix(".tar.xz"))
            print(write_page(Path(scratch), Path("docs/results.md"), ARCHIVES))
            print(claims.write_page(Path(scratch), Path("docs/claims.md"), Path("README.md")))
        return 0
    for name in args.names.split(","):
        print(f"{name}: {keep(name, args.out, ARCHIVES)} runs")
    return 0


if __name__ == "__main__":
    run_command(main)
