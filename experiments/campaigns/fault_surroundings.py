"""The campaign's cases of what surrounds a run: folder names, locales, outputs, a live folder, environment switches."""

import json
import os
import shutil
import signal
from pathlib import Path

from experiments.campaigns.fault_runs import STEPS, TINY, Campaign, ended, filling, metrics, refused, until
from experiments.record import read_records

NAMES = ("seed[0]", "team [ml]/run", "[!a]", "a*", "a?", "{a,b}", "$HOME", "a b", " lead", "a%20b", "a#b", "a:b")
NAMES += ("a'b", 'a"b', "-dash", "é", "e\u0301", "日本", "\U0001f9ea", "line\nend", "tab\tx", "esc\x1b[31m")
NAMES += ("x" * 200, "a/../b")
REFUSED_NAMES = ("gs://bucket/x", "s3://b", "file:///x", "a\\b", "~nobody_of_that_name/x", "x" * 300, "a\udce9")
# Locales that every machine has; each is set as LC_ALL, and Python's own help against the first is switched off.
LOCALES = {"C": {"PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}, "POSIX": {}, "C.UTF-8": {}, "xx_XX.nonsense": {}}
REDIRECTIONS = (">&-", "2>&-", "<&-", ">&- 2>&- <&-", ">/dev/full", ">/dev/full 2>/dev/full", "| head -1", "2>&1 | :")
TWO = f"""
from spannorm_jax.config_file import read_config_file
from spannorm_jax.sweep.definition import options

def get_config(arg=None):
    return read_config_file({TINY[0].removeprefix("--config=")!r})

def sweep_two(size):
    return options({{"seed": (0, 1)}})
"""
SWITCHES = {
    "JAX_ENABLE_X64": "1",
    "JAX_DEFAULT_PRNG_IMPL": "unsafe_rbg",
    "JAX_ENABLE_CUSTOM_PRNG": "1",
    "JAX_THREEFRY_PARTITIONABLE": "0",
    "JAX_RANDOM_SEED_OFFSET": "3",
    "JAX_DEFAULT_MATMUL_PRECISION": "bfloat16",
    "JAX_NUMPY_DTYPE_PROMOTION": "strict",
    "JAX_NUMPY_RANK_PROMOTION": "raise",
    "JAX_DEBUG_NANS": "1",
    "JAX_DISABLE_JIT": "1",
    "JAX_OPTIMIZATION_LEVEL": "O0",
    "PYTHONHASHSEED": "5",
    "PYTHONOPTIMIZE": "1",
    "OMP_NUM_THREADS": "1",
    "TZ": "Pacific/Kiritimati",
}


def folder_names(c: Campaign) -> None:
    for number, name in enumerate(NAMES):
        base = c.folder / f"names{number}"
        base.mkdir()
        argv = ("--config.training.steps=4",)
        code, out = c.run(c.command("train", *TINY, *argv, f"--workdir={name}"), cwd=base)
        again, read = c.run(c.command("evaluate", f"--workdir={name}", "--json"), cwd=base)
        sound = code == again == 0 and '"step": 4' in read and "Traceback" not in out + read
        c.check(f"a run in {name!a}", "trained, and evaluated from its checkpoint", sound, out + read)
    for number, name in enumerate(REFUSED_NAMES):
        base = c.folder / f"refused{number}"
        base.mkdir()
        code, out = c.run(c.command("train", *TINY, f"--workdir={name}"), cwd=base)
        ok = refused(code, out) and not any(base.iterdir())
        c.check(f"a run in {ascii(name)[:40]}", "refused, nothing made", ok, out)


def locales(c: Campaign) -> None:
    bpe = ("--config.data.tokenizer=bpe", "--config.data.bpe_vocab_size=300", "--config.data.bpe_train_mib=1")
    for name, more in LOCALES.items():
        env = c.env | {"LC_ALL": name} | more
        workdir = c.folder / f"locale {name}"
        cache = f"--config.data.cache_dir={c.folder / f'cache {name}'}"
        code, out = c.run(c.command("train", *TINY, *bpe, cache, "--workdir", workdir), env=env)
        again, read = c.run(c.command("evaluate", "--workdir", workdir), env=env)
        text, said = c.run(c.command("sample", "--workdir", workdir, "--max_tokens", 20, "--prompt", "é"), env=env)
        c.check(f"LC_ALL={name}", "trains BPE, evaluates, samples", code == again == text == 0, out + read + said)


def outputs(c: Campaign) -> None:
    for number, redirection in enumerate(REDIRECTIONS):
        workdir = c.folder / f"output{number}"
        shell = ["sh", "-c", f'"$@" {redirection}', "sh"]
        c.run([*shell, *c.command("train", *TINY, "--workdir", workdir)])
        done = (workdir / "DONE").exists() and metrics(workdir) == c.expected
        c.check(f"train {redirection}", "the run ends as unbroken", done)
        c.run([*shell, *c.command("evaluate", "--workdir", workdir)])
        c.check(f"evaluate {redirection}", "one line in eval.jsonl", len(read_records(workdir / "eval.jsonl")) == 1)
    workdir = c.folder / "hung up"
    process = c.start(c.command("train", *TINY, "--workdir", workdir))
    until(process, "step 3/")
    process.send_signal(signal.SIGHUP)
    code, out = ended(process)
    c.check("SIGHUP in a step", "saves, exit code 0", code == 0 and "stopped by SIGHUP" in out, out)
    c.check_finishes("after SIGHUP", workdir)


def live_folder(c: Campaign, readers: int = 10) -> None:
    """Evaluation and sampling beside a trainer that saves, and removes, at every step."""
    workdir = c.folder / "live"
    often = ("--config.training.steps=1000000", "--config.checkpoint.every_steps=1")
    trainer = c.start(c.command("train", *TINY, *often, "--workdir", workdir), stderr=None)
    until(trainer, "step 4/")
    for number in range(readers):
        command = c.command("evaluate", "--workdir", workdir, "--json")
        if number % 3 == 2:
            command = c.command("sample", "--workdir", workdir, "--max_tokens", 3)
        code, out = c.run(command)
        c.check(f"{command[2].split('.')[-1]} beside a trainer", "a result", code == 0 and "Traceback" not in out, out)
    trainer.send_signal(signal.SIGTERM)
    code, _ = ended(trainer)
    left = sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())
    expected = "saves at the end; no more than keep_last and one held"
    c.check("the trainer beside its readers", expected, code == 0 and len(left) <= 3)


def switches(c: Campaign) -> None:
    for name, value in SWITCHES.items():
        workdir = c.folder / f"switch {name}"
        code, out = c.run(c.command("train", *TINY, "--workdir", workdir), env=c.env | {name: value})
        same = code == 0 and metrics(workdir) == c.expected
        c.check(f"{name}={value}", "metrics bitwise as without", same, out)
        shutil.rmtree(workdir, ignore_errors=True)


def nobody_at_home(c: Campaign) -> None:
    """A user id without a name, and no HOME: as in a container that is started with `--user`."""
    folder = c.folder / "nobody"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        "import pwd\ndef nobody(uid):\n    raise KeyError(uid)\npwd.getpwuid = nobody\n", encoding="utf-8"
    )
    env = {k: v for k, v in c.env.items() if k not in ("HOME", "XDG_CACHE_HOME", "TFDS_DATA_DIR")}
    env |= {"PYTHONPATH": f"{folder}{os.pathsep}{c.env['PYTHONPATH']}"}
    code, out = c.run(c.command("train", *TINY, "--workdir", folder / "run"), env=env)
    c.check("no home", "refused, what to set named", refused(code, out, "data.cache_dir"), out)
    cache = Path(c.env["XDG_CACHE_HOME"], "spannorm_jax", "tokens")
    places = (f"--config.data.cache_dir={cache}", f"--config.data.data_dir={c.env['TFDS_DATA_DIR']}")
    code, out = c.run(c.command("train", *TINY, *places, "--workdir", folder / "run"), env=env)
    done = code == 0 and metrics(folder / "run") == c.expected
    c.check("no home, with data_dir and cache_dir", "metrics bitwise as with one", done, out)


def foreign_configs(c: Campaign) -> None:
    workdir = c.copy("from elsewhere", done=True)
    kept = (workdir / "config.json").read_text(encoding="utf-8")
    config = json.loads(kept)
    changes = {"model.placement": "novel", "model.init": "novel", "model.ffn": "relu2", "optim.schedule": "sine"}
    for key, value in changes.items():
        group, name = key.split(".")
        newer = config | {group: config[group] | {name: value}}
        (workdir / "config.json").write_text(json.dumps(newer), encoding="utf-8")
        for module in ("evaluate", "sample"):
            code, out = c.run(c.command(module, "--workdir", workdir))
            ok = refused(code, out, "config.json", key)
            c.check(f"{module} of a run with {key}={value}", "refused, file and key named", ok, out)
    older = config | {"model": {k: v for k, v in config["model"].items() if k != "moe"}}
    (workdir / "config.json").write_text(json.dumps(older), encoding="utf-8")
    (workdir / "DONE").unlink()
    shutil.rmtree(workdir / "checkpoints" / str(STEPS))
    c.check_finishes("a dense run from before experts", workdir)


def full_under_a_runner(c: Campaign) -> None:
    """The disk of a sweep's folder fills up: at the first files of a run, and at one of its checkpoints."""
    file = c.folder / "two.py"
    file.write_text(TWO, encoding="utf-8")
    more = (*TINY[1:], "--config.checkpoint.keep_last=100")
    for size, when in (("4k", "the first files"), ("1m", "a checkpoint")):
        for verb in (("local",), ("run", "0")):
            kept = c.folder / f"kept {size} {verb[0]}"
            sweep = ("two", *verb, "--config", file, *more, "--out")
            seen = filling(c, size, kept, lambda point, sweep=sweep: c.command("sweep", *sweep, point))
            if seen is None:
                return
            first, code, out = seen
            errors = [line for line in out.splitlines() if line.startswith("error:")]
            named = len(errors) == 1 and str(kept) in errors[0] and "the disk is full" in errors[0]
            ok = first == 2 and named and (size != "4k" or "Traceback" not in out)
            c.check(f"sweep {verb[0]}: a disk that is full at {when}", "one line, exit code 2", ok, out)
            done = code == 0 and all(metrics(run) == c.expected for run in kept.glob("*seed0*"))
            failed = list(kept.glob(".sweep/*/FAILED")) if code == 0 else ["never ended"]
            expected = "goes on, nothing recorded as failed; metrics bitwise as unbroken"
            c.check(f"sweep {verb[0]}: room again after {when}", expected, done and not failed)


PARTS = (folder_names, locales, outputs, live_folder, switches, nobody_at_home, foreign_configs, full_under_a_runner)
