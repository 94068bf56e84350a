"""The kinds of odd command lines that `experiments.campaigns.fuzz` tries: each makes arguments of train at random."""

import random
from collections.abc import Callable
from pathlib import Path

from spannorm_jax.config import Config, flatten

CONFIG = str(Path(__file__).parents[2] / "configs" / "dense.py")
DEFAULTS = {key: value for key, value in flatten(Config()).items() if key != "platform"}
HUGE = ("2147483647", "2147483646", "2147483648", "1000000007", "99999999999999999999", "9" * 5000, "1e38", "1e39")
HUGE += ("1e308", "1e309", "-1e308", "1e-38", "1e-46", "1e-320", "0.99999999999999", "-99999999999999999999")
NUMBERS = ("0", "-0", "1", "2", "3", "7", "64", "-1", "-2", "0.5", "1.0", "1.5", "-0.1", "nan", "inf", "-inf")
NUMBERS += ("1_000", "0x10", "1e3")
WORDS = ("", " ", "none", "None", "true", "False", "yes", "[]", "[1,2]", "()", "{}", "a,b", ",", "=", "..", "null")
WORDS += ("ffn_out,,attn_out",)
UNICODE = ("é", "12", "①", "−1", "２", "☃", "\u202e", "\x00", "\ud800", "a\nb", "\t", "\x1b[31m", "𝟛", "ｔｒｕｅ")
UNICODE += ("Ｓpan", "x" * 5000)
NAMES = ("pre", "post", "span", "plain", "gpt2", "scale", "gelu", "layernorm", "bfloat16", "block", "dots", "xla")
NAMES += ("train[:10%]",)


def misspelt(rng: random.Random, word: str) -> str:
    i = rng.randrange(len(word))
    letter = rng.choice("abcxyz_.-0É ")
    made = (word[:i] + word[i + 1 :], word[:i] + letter + word[i:], word[:i] + word[i] + word[i:])
    made += (word[:i] + letter + word[i + 1 :], word.upper(), word[: i + 1], word + "." + word, "config." + word)
    return rng.choice([other for other in made if other != word])  # a letter may have replaced itself


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
    sizes = ("model.width", "model.num_heads", "model.num_kv_heads", "model.depth", "execution.scan_unroll")
    sizes += ("model.ffn_dim", "training.batch_size", "training.num_microbatches", "data.seq_len", "mesh.data")
    sizes += ("mesh.fsdp", "mesh.expert", "mesh.tensor", "model.vocab_size", "eval.batch_size")
    sizes += ("optim.warmup_fraction", "training.steps")
    values = ("-1", "0", "1", "2", "3", "5", "6", "8", "30", "48", "64", "97", "255", "257", "65536", "1048576")
    return [override(rng, values, key) for key in rng.sample(sizes, rng.randint(2, 5))]


def _huge_together(rng):
    keys = ("model.width", "model.depth", "model.ffn_dim", "training.batch_size", "data.seq_len", "eval.batch_size")
    keys += ("model.vocab_size", "training.steps", "execution.max_logits_mib")
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
    group = key.split(".")[0]
    odd = [[f"--config.{key}"], [f"--config.{key}", "--config.seed=1"], ["--config."], ["--config.="]]
    odd += [[f"-config.{key}=1"], [f"--{key}=1"], [f"--confg.{key}=1"], ["--config..=1"], [f"--config.{group}=1"]]
    odd += [[f"--config.{key}.x=1"], ["--config", ""], ["--config", "configs"], ["--config", "/dev/null"]]
    odd += [["--config", "\x00.py"], ["stray"], ["--workdri", "x"]]
    odd += [["--config", "x" * 5000], ["--config", CONFIG + "::"], ["--workdir"], ["--config", CONFIG + ":tiny:tiny"]]
    return rng.choice(odd)


def _config_argument(rng):
    name = rng.choice(("depth", "width", "placement", "init", "preset"))
    value = rng.choice(HUGE + NUMBERS + WORDS + UNICODE + NAMES + ("tiny", "350m", "1b"))
    items = [f"{name}={value}", f"{misspelt(rng, name)}={value}", value, f"{name}", f"{name}={value},{name}={value}"]
    item = rng.choice(items)
    return ["--config", f"{CONFIG}:{item}"]


def _folder_name(rng):
    letters = "ab []*?!{}#%:;'\"\\/~.$&|<>-é\u202e\t\n\x1b"
    name = "".join(rng.choice(letters) for _ in range(rng.randint(1, 8)))
    name = rng.choice([name, f"a/{name}/b", rng.choice(("gs", "s3", "file", "c", "")) + "://" + name, "~" + name])
    return [f"--workdir=work/{name}" if rng.random() < 0.7 else f"--workdir={rng.choice(('gs://', '~no_one/'))}{name}"]


def _data_folder(rng):
    key = rng.choice(("data.data_dir", "data.cache_dir"))
    return [f"--config.{key}={_folder_name(rng)[0].removeprefix('--workdir=')}"]


def _legal(rng):
    choices = ["--config.model.depth=4", "--config.model.width=64", "--config.model.qk_norm=true"]
    choices += ["--config.model.ffn=gelu", "--config.model.norm=layernorm", "--config.model.tied_head=true"]
    choices += ["--config.optim.clip_norm=0", "--config.optim.name=lion", "--config.training.batch_size=16"]
    choices += ["--config.execution.remat=block", "--config.model.dtype=bfloat16"]
    choices += ["--config.model.init_targets=ffn_out,attn_out", "--config.data.seq_len=77"]
    choices += ["--config.training.z_loss=1e-4"]
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
    "folder name": _folder_name,
    "data folder": _data_folder,
    "legal": _legal,
}
