"""Run folders of sweeps as raw records: archives of what a report reads, and a table of the runs beside them.

    python -m experiments.sweep_records keep placement_init,lr --out runs/sweeps
    python -m experiments.sweep_records page

`keep` packs the runs of each sweep (size cpu) that have ended, without checkpoints, into one archive a seed in
experiments/results/sweeps: NAME-seed0.tar.xz. An archive is never written again: runs that end later go into
NAME-seed0-2.tar.xz and so on. (NAME.tar.xz has all seeds, and is as old.) NAME-runs.csv is the runs.csv of a report on
all of them. Unpacked into a folder of runs, they are done there, and the sweep goes on with what is missing:

    for archive in experiments/results/sweeps/lr[.-]*tar.xz; do tar -xf $archive -C runs/sweeps; done

`page` makes docs/results.md, docs/claims.md and docs/stability.md, with figures, from the archives, other records and
their templates in experiments.
"""

import collections
import contextlib
import io
import lzma
import re
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import polars as pl

from experiments import claims, stability_records
from experiments.results_page import TEMPLATE, write_page
from spannorm_jax.command import Parser, run_command
from spannorm_jax.errors import UserError, did_you_mean, one_line
from spannorm_jax.paths import user_path
from spannorm_jax.report.page import read_study
from spannorm_jax.report.study import RUNS
from spannorm_jax.run.folder import CONFIG, DIVERGED, DONE, EVAL, METRICS, STARTS
from spannorm_jax.sweep.expansion import Run, Sweep, expand
from spannorm_jax.sweep.records import ENDED, RunPlace

RECORDS = Path("experiments/results/sweeps")
_FILES = (CONFIG, STARTS, METRICS, EVAL, DONE, DIVERGED)
_VERBS = ("keep", "page")


def archives(folder: Path = RECORDS) -> dict[str, list[Path]]:
    """Sweep -> its archives."""
    found = collections.defaultdict(list)
    for path in sorted(folder.glob("*.tar.xz")):
        found[re.split(r"[-.]", path.name)[0]].append(path)
    return dict(found)


def ended(sweep: Sweep, out: Path) -> list[Run]:
    return [run for run in sweep.runs if RunPlace(out, run.name).state_at_rest() in ENDED]


def keep(
    name: str, runs: Iterable[Run], out: Path, folder: Path = RECORDS, preset: int = 9 | lzma.PRESET_EXTREME
) -> int:
    """Packs those runs of a sweep, ended in `out`, that no archive in `folder` holds. Returns how many they are.

    The same runs give the same bytes. A `preset` of 1 takes a tenth of the time, for a tenth more.

    Raises:
      UserError: an archive is damaged.
    """
    held = {run for path in archives(folder).get(name, ()) for run in runs_in(path)}
    new = collections.defaultdict(list)
    for run in runs:
        if run.name not in held:
            new[run.config.seed].append(run.name)
    for seed, names in new.items():
        first = folder / f"{name}-seed{seed}.tar.xz"
        later = len(list(folder.glob(f"{name}-seed{seed}-*.tar.xz"))) + 2
        _pack(names, out, folder / f"{name}-seed{seed}-{later}.tar.xz" if first.exists() else first, preset)
    return sum(map(len, new.values()))


def _pack(runs: Sequence[str], out: Path, path: Path, preset: int) -> None:
    """Packs runs into a new archive, which has its name when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    with tarfile.open(unfinished, "w:xz", preset=preset) as archive:
        for run in sorted(runs):
            for file in (out / run / file for file in _FILES):
                if file.exists():
                    _add(archive, f"{run}/{file.name}", file.read_bytes())
    unfinished.replace(path)


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    """Adds a file without what differs from machine to machine: times, owners, where the folder of all runs was."""
    run = Path(name).parent.name
    content = re.sub(rb"--workdir \S*/(?=%s\b)" % re.escape(run).encode(), b"--workdir runs/sweeps/", content)
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[tarfile.TarFile]:
    """Opens an archive. Raises UserError if it is damaged."""
    try:
        with tarfile.open(path) as archive:
            yield archive
    except (tarfile.TarError, lzma.LZMAError, EOFError) as error:
        raise UserError(f"{path} is damaged ({one_line(error)}); bring it here again") from error


def runs_in(path: Path) -> set[str]:
    with _reading(path) as archive:
        return {name.partition("/")[0] for name in archive.getnames()}


def unpack(path: Path, folder: Path) -> None:
    """Raises UserError if the archive is damaged."""
    with _reading(path) as archive:
        archive.extractall(folder, filter="data")


def unpack_sweep(name: str, into: Path, folder: Path = RECORDS) -> Path:
    """Unpacks all archives of a sweep into the folder `into`/NAME."""
    for path in archives(folder)[name]:
        unpack(path, into / name)
    return into / name


def table(runs: Path) -> pl.DataFrame:
    """What runs.csv of a report on the folder `runs` has, with the runs' names as `folder`."""
    return read_study([runs])[0].runs.select(*RUNS).with_columns(pl.col("folder").str.split("/").list.last())


def write_tables(names: Iterable[str], scratch: Path, folder: Path = RECORDS) -> None:
    """Writes NAME-runs.csv of each sweep, whose archives are unpacked into `scratch` for it."""
    for name in names:
        table(unpack_sweep(name, scratch, folder)).write_csv(folder / f"{name}-runs.csv")


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
    if not TEMPLATE.exists():
        raise UserError(f"there is no {TEMPLATE} here; call it in the folder of the repository")
    if args.verb == "page":
        with tempfile.TemporaryDirectory() as scratch:
            write_tables(archives(), Path(scratch))
            print(write_page(Path(scratch), Path("docs/results.md"), RECORDS))
            lab = stability_records.read(Path(scratch))
            print(write_page(Path(scratch), Path("docs/stability.md"), RECORDS, stability_records.TEMPLATE, lab=lab))
            print(claims.write_page(Path(scratch), Path("docs/claims.md"), Path("README.md")))
        return 0
    found = {name: ended(expand(name, "cpu"), args.out) for name in args.names.split(",")}
    for name in (name for name, runs in found.items() if not runs):
        raise UserError(f"no run of sweep {name} has ended in {args.out}; do them: sweep {name} local --out {args.out}")
    for name, runs in found.items():
        print(f"{name}: {keep(name, runs, args.out)} of {len(runs)} runs are new")
    with tempfile.TemporaryDirectory() as scratch:
        write_tables(found, Path(scratch))
    return 0


if __name__ == "__main__":
    run_command(main)
