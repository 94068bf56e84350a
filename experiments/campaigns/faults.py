"""Breaks training on purpose, in real processes, and checks what docs/reliability.md promises.

    python -m experiments.campaigns.faults --json experiments/results/faults.json [--kills 50] [--seed 0]

A run of a tiny model with a checkpoint at every second step is killed at random moments, stopped, starved of disk
space, damaged file by file, taken for what they are not (`fault_records`), and run in odd surroundings
(`fault_surroundings`). Every case says what it expects and what it saw; exit code 1 if one differs. CPU only.
"""

import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.campaigns import fault_records, fault_surroundings
from experiments.campaigns.fault_runs import STEPS, TINY, Campaign, cut, ended, filling, flip, metrics, refused, until
from experiments.record import about, read_records, save_record
from spannorm_jax.command import Parser, run_command
from spannorm_jax.paths import user_path

# A clock that falls back an hour every 50 times that it is read.
CLOCK = """
import runpy, sys, time
read, calls = time.time, [0]
def back():
    calls[0] += 1
    return read() - 3600 * (calls[0] // 50)
time.time, time.time_ns = back, lambda: int(back() * 1e9)
module = sys.argv.pop(1)
sys.argv[0] = module
runpy.run_module(module, run_name='__main__', alter_sys=True)
"""


# ---- the cases --------------------------------------------------------------------------------


def kills(c: Campaign, count: int) -> None:
    """SIGKILL at random moments from start to end; each restart goes on from where the last one died."""
    number = 0
    while number < count:
        workdir, moments = c.folder / f"killed{number}", []
        for _ in range(min(10, count - number)):
            process = c.start(c.command("train", *TINY, "--workdir", workdir))
            if c.random.random() < 0.7:  # between two steps, within a step, or while it saves
                until(process, f"step {c.random.randint(1, STEPS)}/")
                time.sleep(c.random.uniform(0, 0.05))
            else:
                time.sleep(c.random.uniform(0, c.run_s))
            process.kill()
            process.communicate()
            saved = sorted(p.name for p in (workdir / "checkpoints").glob("*")) if workdir.exists() else []
            moments.append(saved[-1] if saved else "none")
            number += 1
            if (workdir / "DONE").exists():
                break
        c.show(f"killed {number}/{count}; newest in checkpoints/ then: {', '.join(moments)}")
        c.check_finishes(f"{len(moments)} SIGKILLs in a row, then to the end", workdir)


def stops(c: Campaign) -> None:
    moments = {
        "before compilation": "data ",
        "in a step": "step 3/",
        "as a save begins": "step 4/",
        "at the end": f"step {STEPS}/",
    }
    for name, text in moments.items():
        workdir = c.folder / f"stopped {name}"
        process = c.start(c.command("train", *TINY, "--workdir", workdir))
        read = until(process, text)
        process.send_signal(signal.SIGTERM)
        code, out = ended(process)
        ok = code == 0 and ("the same command goes on" in out or "done:" in out) and "Traceback" not in read + out
        c.check(f"SIGTERM {name}", "saves, exit code 0", ok, out)
        c.check_finishes(f"after SIGTERM {name}", workdir)
    workdir = c.copy("stopped evaluation", done=True)
    process = c.start(c.command("evaluate", "--workdir", workdir, "--config.eval.tokens=0"))
    time.sleep(c.run_s * 0.7)
    process.send_signal(signal.SIGTERM)
    code, _ = ended(process)
    written = (workdir / "eval.jsonl").read_text(encoding="utf-8") if (workdir / "eval.jsonl").exists() else ""
    whole = not written or (written.endswith("\n") and all(read_records(workdir / "eval.jsonl")))
    c.check("SIGTERM in evaluation", "ends; no part of a line", code in (-signal.SIGTERM, 0) and whole, f"exit {code}")


def two_trainers(c: Campaign) -> None:
    workdir = c.folder / "shared"
    first = c.start(c.command("train", *TINY, "--config.training.steps=2000000", "--workdir", workdir))
    until(first, "step 1/")
    code, out = c.train(workdir, "--config.training.steps=2000000")
    ok = refused(code, out, f"process {first.pid}")
    c.check("a second trainer in the folder", "refused, the first named", ok, out)
    first.kill()
    first.communicate()
    shutil.rmtree(workdir)
    c.check_finishes("the folder after that", workdir)


def damaged_checkpoints(c: Campaign) -> None:
    newest = c.unbroken / "checkpoints" / str(STEPS)
    files = [Path("manifest.json"), *map(Path, json.loads((newest / "manifest.json").read_text(encoding="utf-8")))]
    kinds: dict[str, Path] = {}  # one file of each kind: the chunks of an array store have names of no meaning
    for path in files:
        kinds.setdefault(str(path.parent / ("chunk" if len(path.name) == 32 else path.name)), path)
    for kind, path in kinds.items():
        for way in (flip, cut):
            if way is flip and path.name == "_CHECKPOINT_METADATA":
                continue  # nothing reads what its middle says
            workdir = c.copy(f"{way.__name__} {kind.replace('/', ' ')}")
            victim = workdir / "checkpoints" / str(STEPS) / path
            way(victim)
            name = victim.name
            code, out = c.evaluate(workdir, f"--step={STEPS}")
            c.check(f"{way.__name__} {kind}, evaluate --step", "refused, the file named", refused(code, out, name), out)
            if path.name in ("manifest.json", "manifest.ocdbt") or len(c.cases) % 5 == 0:
                code, out = c.evaluate(workdir)
                ok = code == 0 and "passed over a checkpoint" in out and f'"step": {STEPS - 2}' in out
                c.check(f"{way.__name__} {kind}, evaluate", f"says so, evaluates step {STEPS - 2}", ok)
            code, out = c.train(workdir)
            ok = code == 0 and name in out and f"continuing after step {STEPS - 2}" in out
            ok = ok and metrics(workdir) == c.expected and (workdir / "damaged" / str(STEPS)).is_dir()
            c.check(f"{way.__name__} {kind}, train", f"named; step {STEPS - 2} is used; bitwise", ok)
    workdir = c.copy("no manifest")
    (workdir / "checkpoints" / str(STEPS) / "manifest.json").unlink()
    c.check_finishes("a checkpoint without a manifest", workdir)
    workdir = c.copy("none sound")
    for path in (workdir / "checkpoints").glob("*/manifest.json"):
        flip(path)
    before = metrics(workdir)
    code, out = c.train(workdir)
    c.check("all checkpoints damaged", "refused, nothing lost", refused(code, out) and metrics(workdir) == before, out)


def damaged_store(c: Campaign) -> None:
    store = next((c.folder / "cache").rglob("train/tokens.bin")).parent
    for path in (store / "tokens.bin", store / "meta.json"):
        kept = path.read_bytes()
        for way in (flip, cut):
            way(path)
            code, out = c.train(c.folder / "never made")
            ok = refused(code, out, store) and not (c.folder / "never made").exists()
            c.check(f"{way.__name__} {path.name} of the token store", "refused, named; nothing written", ok, out)
            path.write_bytes(kept)


def damaged_dataset(c: Campaign) -> None:
    dataset = next((c.folder / "tfds").rglob("dataset_info.json")).parent
    sound = json.loads(next((c.folder / "cache").rglob("train/meta.json")).read_text(encoding="utf-8"))["sha256"]
    for path in sorted(p for p in dataset.iterdir() if "validation" not in p.name):
        kept = path.read_bytes()
        for way in (flip, cut):
            way(path)
            cache = c.folder / f"cache {way.__name__} {path.name}"
            argv = (f"--config.data.cache_dir={cache}", "--config.training.steps=2")
            code, out = c.train(c.folder / f"run {way.__name__} {path.name}", *argv)
            metas = list(cache.rglob("train/meta.json"))
            same = code == 0 and metas and json.loads(metas[0].read_text(encoding="utf-8"))["sha256"] == sound
            said = refused(code, out, dataset)
            expected = "refused, the file named; or not a token is changed by it"
            seen = out if said else "no token is changed"
            c.check(f"{way.__name__} {path.name} of the dataset", expected, said or bool(same), seen)
            path.write_bytes(kept)


def half_lines(c: Campaign) -> None:
    workdir = c.copy("half lines")
    for name in ("metrics.jsonl", "starts.jsonl", "eval.jsonl"):
        with open(workdir / name, "a", encoding="utf-8") as file:
            file.write('{"step": 41, "lo')
    c.check_finishes("half a line at the end of each .jsonl", workdir)
    code, out = c.evaluate(workdir)
    whole = all(record for name in ("starts.jsonl", "eval.jsonl") for record in read_records(workdir / name))
    c.check("evaluation after half a line", "appends a whole one", code == 0 and whole)
    workdir = c.copy("broken line")
    lines = (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (workdir / "metrics.jsonl").write_text("".join([*lines[:9], lines[9][:20] + "\n", *lines[10:]]), encoding="utf-8")
    code, out = c.train(workdir)
    ok = refused(code, out, "metrics.jsonl line 10")
    c.check("a damaged line within metrics.jsonl", "refused, file and line named", ok, out)


def no_room(c: Campaign) -> None:
    workdir = c.copy("no room for a save")
    for step in (STEPS, STEPS - 2):
        shutil.rmtree(workdir / "checkpoints" / str(step))
    code, out = c.train(workdir, largest_file=20_000)
    c.check("a size limit below a checkpoint's", "one line, exit code 2", refused(code, out, workdir, noisy=True), out)
    c.check_finishes("with the limit lifted", workdir)
    argv = (f"--config.data.cache_dir={c.folder / 'small cache'}",)
    code, out = c.train(c.folder / "no store", *argv, largest_file=20_000)
    left = [p for p in (c.folder / "small cache").rglob("*") if p.is_file()]
    ok = refused(code, out, "data.cache_dir") and not left
    c.check("a size limit below a token store's", "one line; nothing left behind", ok, out)
    kept = c.folder / "kept"
    argv = ("--config.checkpoint.keep_last=100",)
    seen = filling(c, "1m", kept, lambda point: c.command("train", *TINY, *argv, "--workdir", point / "run"))
    if seen is None:
        return
    first, code, out = seen
    ok = first == 2 and out.count("error: cannot write") == 1 and "the disk is full" in out
    c.check("a tmpfs that fills up with checkpoints", "one line, exit code 2", ok, out)
    whole = code == 0 and metrics(kept / "run") == c.expected
    c.check("the tmpfs made larger", "goes on; metrics bitwise as unbroken", whole)


def read_only(c: Campaign) -> None:
    workdir = c.copy("read only")
    before = {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()}
    folders = [workdir, *(p for p in workdir.rglob("*") if p.is_dir())]
    for path in folders:
        path.chmod(0o555)
    for path in before:
        path.chmod(0o444)
    # Root may write everywhere, unless a process is started without that privilege (capabilities 1 and 2).
    command = c.command("train", *TINY, "--workdir", workdir)
    if os.getuid() == 0:
        command = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search", "--inh-caps", "-all", *command]
    code, out = c.run(command)
    same = {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()} == before
    c.check("a read-only folder", "refused, nothing changed", refused(code, out, workdir) and same, out)
    for path in folders:
        path.chmod(0o755)


def clock_back(c: Campaign) -> None:
    workdir = c.folder / "clock"
    argv = [sys.executable, "-c", CLOCK, "spannorm_jax.train", *TINY, "--workdir", str(workdir)]
    code, out = c.run(argv)
    ok = code == 0 and metrics(workdir) == c.expected
    times = [record["step_time_s"] for record in read_records(workdir / "metrics.jsonl")]
    ok = ok and min(times) > 0 and "-" not in out.split("step 2/")[-1].split("done")[0]
    c.check("a clock that falls back", "bitwise as unbroken, no negative time", ok)


def campaign(folder: Path, num_kills: int, seed: int, show: Callable[[str], Any]) -> list[dict[str, Any]]:
    c = Campaign(folder, seed, show)
    kills(c, num_kills)
    for part in (stops, two_trainers, half_lines, no_room, read_only, clock_back, damaged_store, damaged_dataset):
        part(c)
    damaged_checkpoints(c)
    for part in (*fault_records.PARTS, *fault_surroundings.PARTS):
        part(c)
    return c.cases


def main(argv: list[str]) -> int:
    parser = Parser(prog="python -m experiments.campaigns.faults", description=__doc__)
    parser.add_argument("--json", type=user_path, help="where the record goes")
    parser.add_argument("--kills", type=int, default=50, help="SIGKILLs at random moments")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, and runs would inherit that
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="faults") as folder:
        cases = campaign(Path(folder), args.kills, args.seed, lambda text: print(text, flush=True))
    failed = sum(not case["ok"] for case in cases)
    seconds = round(time.monotonic() - began)
    print(f"{len(cases) - failed} cases as expected, {failed} not, in {seconds} s")
    if args.json:
        facts = {"kills": args.kills, "seed": args.seed, "failed": failed, "seconds": seconds}
        save_record(args.json, about("experiments.campaigns.faults", argv) | facts | {"cases": cases})
    return 1 if failed else 0


if __name__ == "__main__":
    run_command(main, lasting=True)
