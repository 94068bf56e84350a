"""Fuzzes the command line: every argument list is either a run that can start, or is refused in one line.

    python -m experiments.fuzz --count 300 --seed 0 --json experiments/results/fuzz.json

Each case is train's argument list with something wrong, or merely odd, in it. It goes the way that training goes, up to
where the first program would be compiled: parse, load, open the data, resolve, define the model, trace train and
evaluation step. (Not covered: `platform`, which no one process can try twice.) Exit code 1 if a case ends otherwise.
"""

import os
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.record import about, save_record
from spannorm_jax.config import Config, flatten
from spannorm_jax.errors import Parser, UserError, one_line, run_command
from spannorm_jax.model.decoder import count_params, define, flops_per_token
from spannorm_jax.model.scale_init import weight_stds
from spannorm_jax.paths import user_path
from spannorm_jax.train import parse
from spannorm_jax.training.loop import fit
from spannorm_jax.training.optimizer import learning_rate
from spannorm_jax.training.step import make_program

CONFIG = str(Path(__file__).parents[1] / "configs" / "dense.py")
BASE = ("depth=2", "width=32")
LIMIT_S = 60  # a case; the slowest that is legal prepares a dataset
MAX_LINE = 1000

DEFAULTS = {key: value for key, value in flatten(Config()).items() if key != "platform"}
HUGE = (
    "2147483647",
    "2147483646",
    "2147483648",
    "1000000007",
    "99999999999999999999",
    "9" * 5000,
    "1e38",
    "1e39",
    "1e308",
)
HUGE += ("1e309", "-1e308", "1e-38", "1e-46", "1e-320", "0.99999999999999", "-99999999999999999999")
NUMBERS = (
    "0",
    "-0",
    "1",
    "2",
    "3",
    "7",
    "64",
    "-1",
    "-2",
    "0.5",
    "1.0",
    "1.5",
    "-0.1",
    "nan",
    "inf",
    "-inf",
    "1_000",
    "0x10",
    "1e3",
)
WORDS = (
    "",
    " ",
    "none",
    "None",
    "true",
    "False",
    "yes",
    "[]",
    "[1,2]",
    "()",
    "{}",
    "a,b",
    ",",
    "=",
    "..",
    "null",
    "ffn_out,,attn_out",
)
UNICODE = (
    "é",
    "12",
    "①",
    "−1",
    "２",
    "☃",
    "\u202e",
    "\x00",
    "\ud800",
    "a\nb",
    "\t",
    "\x1b[31m",
    "𝟛",
    "ｔｒｕｅ",
    "Ｓpan",
    "x" * 5000,
)
NAMES = (
    "pre",
    "post",
    "span",
    "plain",
    "gpt2",
    "scale",
    "gelu",
    "layernorm",
    "bfloat16",
    "block",
    "dots",
    "xla",
    "train[:10%]",
)


def misspelt(rng: random.Random, word: str) -> str:
    i = rng.randrange(len(word))
    letter = rng.choice("abcxyz_.-0É ")
    made = (
        word[:i] + word[i + 1 :],
        word[:i] + letter + word[i:],
        word[:i] + word[i] + word[i:],
        word[:i] + letter + word[i + 1 :],
    )
    return rng.choice([*made, word.upper(), word[: i + 1], word + "." + word, "config." + word])


def override(rng: random.Random, values: tuple[str, ...], key: str | None = None) -> str:
    return f"--config.{key or rng.choice(list(DEFAULTS))}={rng.choice(values)}"


def _misspelt_key(rng):
    key = rng.choice(list(DEFAULTS))
    return [f"--config.{misspelt(rng, key)}={DEFAULTS[key]}"]


def _wrong_type(rng):
    return [override(rng, WORDS + NAMES)]


def _out_of_range(rng):
    return [override(rng, NUMBERS)]


def _huge(rng):
    numeric = [k for k, v in DEFAULTS.items() if isinstance(v, int | float)]
    return [override(rng, HUGE, rng.choice(numeric))]


def _unicode(rng):
    item = override(rng, UNICODE)
    return [item if rng.random() < 0.8 else item.replace("=", rng.choice(UNICODE) + "=", 1)]


def _contradictory(rng):
    sizes = (
        "model.width",
        "model.num_heads",
        "model.num_kv_heads",
        "model.depth",
        "model.scan_unroll",
        "model.ffn_dim",
    )
    sizes += (
        "training.batch_size",
        "training.num_microbatches",
        "data.seq_len",
        "mesh.data",
        "mesh.fsdp",
        "mesh.expert",
        "mesh.tensor",
    )
    sizes += ("model.vocab_size", "eval.batch_size", "optim.warmup_fraction", "training.steps")
    values = ("-1", "0", "1", "2", "3", "5", "6", "8", "30", "48", "64", "97", "255", "257", "65536", "1048576")
    return [override(rng, values, key) for key in rng.sample(sizes, rng.randint(2, 5))]


def _huge_together(rng):
    keys = ("model.width", "model.depth", "model.ffn_dim", "training.batch_size", "data.seq_len", "eval.batch_size")
    keys += ("model.vocab_size", "training.steps", "training.max_logits_mib")
    values = ("65536", "1048576", "2147483646", "1073741824", "1000000007")
    return [override(rng, values, key) for key in rng.sample(keys, rng.randint(2, 4))]


def _repeated(rng):
    key = rng.choice(list(DEFAULTS))
    return [f"--config.{key}={DEFAULTS[key]}"] * 2 + [override(rng, NUMBERS + NAMES, key)]


def _spaces(rng):
    key = rng.choice(list(DEFAULTS))
    return [rng.choice([f"--config.{key} ={DEFAULTS[key]}", f"--config.{key}= {DEFAULTS[key]} ", f" --config.{key}=1"])]


def _shape_of_argument(rng):
    key = rng.choice(list(DEFAULTS))
    odd = [
        [f"--config.{key}"],
        [f"--config.{key}", "--config.seed=1"],
        ["--config."],
        ["--config.="],
        [f"-config.{key}=1"],
    ]
    odd += [
        [f"--{key}=1"],
        [f"--confg.{key}=1"],
        ["--config..=1"],
        [f"--config.{key.split('.')[0]}=1"],
        [f"--config.{key}.x=1"],
    ]
    odd += [
        ["--config", ""],
        ["--config", "configs"],
        ["--config", "/dev/null"],
        ["--config", "\x00.py"],
        ["stray"],
        ["--workdri", "x"],
    ]
    odd += [["--config", "x" * 5000], ["--config", CONFIG + "::"], ["--workdir"], ["--config", CONFIG + ":tiny:tiny"]]
    return rng.choice(odd)


def _config_argument(rng):
    name = rng.choice(("depth", "width", "placement", "init", "preset"))
    value = rng.choice(HUGE + NUMBERS + WORDS + UNICODE + NAMES + ("tiny", "350m", "1b"))
    item = rng.choice(
        [f"{name}={value}", f"{misspelt(rng, name)}={value}", value, f"{name}", f"{name}={value},{name}={value}"]
    )
    return ["--config", f"{CONFIG}:{item}"]


def _legal(rng):
    choices = [
        "--config.model.depth=4",
        "--config.model.width=64",
        "--config.model.qk_norm=true",
        "--config.model.ffn=gelu",
    ]
    choices += ["--config.model.norm=layernorm", "--config.model.tied_head=true", "--config.optim.clip_norm=0"]
    choices += ["--config.training.batch_size=16", "--config.model.remat=block", "--config.model.dtype=bfloat16"]
    choices += [
        "--config.model.init_targets=ffn_out,attn_out",
        "--config.data.seq_len=77",
        "--config.training.z_loss=1e-4",
    ]
    return rng.sample(choices, rng.randint(1, 5))


MUTATIONS: dict[str, Callable[[random.Random], list[str]]] = {
    "misspelt key": _misspelt_key,
    "wrong type": _wrong_type,
    "out of range": _out_of_range,
    "huge": _huge,
    "huge together": _huge_together,
    "unicode": _unicode,
    "contradictory": _contradictory,
    "repeated": _repeated,
    "spaces": _spaces,
    "shape of the argument": _shape_of_argument,
    "config argument": _config_argument,
    "legal": _legal,
}


def make_cases(count: int, seed: int) -> list[tuple[str, list[str]]]:
    """`count` pairs of (kind, train's arguments), the kinds in turn."""
    rng = random.Random(seed)
    kinds = [name for _, name in zip(range(count), _cycle(list(MUTATIONS)), strict=False)]
    base = ["--config", f"{CONFIG}:{','.join(BASE)}", "--workdir", "run"]
    return [(kind, [*base, *MUTATIONS[kind](rng)]) for kind in kinds]


def _cycle(items):
    while True:
        yield from items


class _TooLong(BaseException):
    """Not an Exception, so that nothing on the way can take it for the user's mistake."""


@contextmanager
def time_limit(seconds: float):
    def expired(number, frame):
        raise _TooLong

    usual = signal.signal(signal.SIGALRM, expired)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, usual)


def start(argv: list[str]) -> None:
    """What training does up to its first compilation, and what would make its first numbers useless.

    Raises:
      UserError: the arguments are refused.
      ValueError: they were accepted, and the run could not have gone well.
    """
    config, _, mesh, loader = fit(parse(argv)[0])
    loader.rows(1, 0, 1)
    model = define(config.model)
    count_params(model), flops_per_token(model, config.data.seq_len)
    with jax.set_mesh(mesh):
        program = make_program(config, model, mesh)
        rows = jax.ShapeDtypeStruct((config.training.batch_size, config.data.seq_len + 1), np.int32)
        jax.eval_shape(program.train, program.abstract_state, rows)
        rows = jax.ShapeDtypeStruct((config.eval.batch_size, config.data.seq_len + 1), np.int32)
        weights = jax.ShapeDtypeStruct((config.eval.batch_size, config.data.seq_len), np.float32)
        jax.eval_shape(program.evaluate, program.abstract_state.params, rows, weights)
    rates = [float(learning_rate(config, update)) for update in (1, config.training.steps)]
    stds = [float(np.float32(std)) for std in weight_stds(config.model).values()]
    if not np.all(np.isfinite([*rates, *stds])):
        raise ValueError(f"accepted, but the learning rate or a weight's std is not finite: {rates} {stds}")


def attempt(argv: list[str], limit_s: float = LIMIT_S) -> tuple[str, str]:
    """("valid" | "refused" | "hole", what was seen)."""
    try:
        with time_limit(limit_s):
            start(argv)
        return "valid", ""
    except UserError as error:
        line = one_line(error)
        if not line or len(line) > MAX_LINE:
            return "hole", f"a line of {len(line)} characters"
        return "refused", line
    except _TooLong:
        return "hole", f"no answer within {limit_s} s"
    except (Exception, SystemExit) as error:  # whatever else comes out is what we are here to find
        return "hole", f"{type(error).__name__}: {one_line(error)[:300]}"


def campaign(count: int, seed: int, show: Callable[[str], Any] = print) -> list[dict[str, Any]]:
    """Runs the cases in a folder of their own; token stores that they make do not outlive it."""
    made, began = [], time.monotonic()
    here, cache = os.getcwd(), os.environ.get("XDG_CACHE_HOME")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # odd values of data.data_dir are folders here
        os.environ["XDG_CACHE_HOME"] = str(Path(folder) / "cache")
        try:
            for number, (kind, argv) in enumerate(make_cases(count, seed), 1):
                outcome, seen = attempt(argv)
                shown = [ascii(a)[1:-1][:120] for a in argv[4:]]
                made.append({"kind": kind, "arguments": shown, "outcome": outcome, "seen": ascii(seen)[1:-1]})
                if outcome == "hole":
                    show(f"HOLE {kind}: {shown}: {seen}")
                if number % 50 == 0:
                    show(f"{number}/{count} cases, {time.monotonic() - began:.0f} s")
        finally:
            os.chdir(here)
            os.environ.pop("XDG_CACHE_HOME")
            if cache is not None:
                os.environ["XDG_CACHE_HOME"] = cache
    return made


def main(argv: list[str]) -> int:
    parser = Parser(prog="python -m experiments.fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=user_path, help="where the record goes")
    args = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")  # nothing is computed
    began = time.monotonic()
    cases = campaign(args.count, args.seed, lambda text: print(text, flush=True))
    outcomes = Counter(case["outcome"] for case in cases)
    print(", ".join(f"{n} {name}" for name, n in sorted(outcomes.items())), f"in {time.monotonic() - began:.0f} s")
    if args.json:
        facts = {"seed": args.seed, "outcomes": dict(outcomes), "seconds": round(time.monotonic() - began, 1)}
        save_record(args.json, about("experiments.fuzz", argv) | facts | {"cases": cases})
    return 1 if outcomes["hole"] else 0


if __name__ == "__main__":
    run_command(main, lasting=True)
