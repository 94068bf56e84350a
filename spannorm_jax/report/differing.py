"""In what runs differ: config keys that set them apart, and those that follow from others."""

import json
from collections.abc import Mapping, Sequence

from spannorm_jax.config import is_runtime
from spannorm_jax.report.runs import NOT_RECORDED, RunFolder
from spannorm_jax.resolution import NAMES_OF_DATA

# What a report compares; a difference in any other config key is said aloud.
COMPARED_KEYS = ("model.placement", "model.init", "model.variance_exponent", "model.depth_factor", "seed")
# What a figure has an axis for: a sweep goes over them, with every method alike.
AXES = ("model.depth", "model.width", "optim.lr")


def differing_keys(runs: Sequence[RunFolder]) -> dict[str, list[str]]:
    """Config keys that differ, but for those compared -> each run's value as JSON.

    What names the data is left out where they are the same, and an option that a run of another
    version does not have is no difference.
    """
    all_options = [run.options | {"data.fingerprint": run.fingerprint} for run in runs]
    same_data = len({run.fingerprint for run in runs}) == 1 and runs[0].fingerprint
    left_out = COMPARED_KEYS + (NAMES_OF_DATA if same_data else ())
    keys = list(dict.fromkeys(key for options in all_options for key in options))
    found = {}
    for key in keys:
        texts = [json.dumps(o[key]) if key in o else NOT_RECORDED for o in all_options]
        if key not in left_out and len(set(texts) - {NOT_RECORDED}) > 1:
            found[key] = texts
    return found


def in_words(key: str, value: str, short: bool = False) -> str:
    """`model.ffn=relu`, or `ffn=relu` in short; of the number of experts `dense` or `8 experts`."""
    if key == "model.moe.num_experts":
        return "dense" if value == "0" else f"{value} experts"
    return f"{key.rsplit('.', 1)[-1] if short else key}={value}"


def followers(differing: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Keys that say nothing more than others -> these: their value is the same wherever those are.

    They are depth, width and learning rate, which `model.ffn_dim` follows, or these and one key that comes earlier in
    the config: `model.moe.expert_dim` follows the number of experts.
    """
    others = [key for key in differing if key not in AXES and key != "data.fingerprint" and not is_runtime(key)]
    axes = [axis for axis in AXES if axis in differing]
    found: dict[str, str] = {}
    for i, key in enumerate(others):
        for leader in [[], *([earlier] for earlier in others[:i] if earlier not in found)]:
            at = list(zip(*(differing[k] for k in leader + axes), strict=True))
            if at and len(set(zip(at, differing[key], strict=True))) == len(set(at)):
                found[key] = " and ".join([*leader, *["depth, width and learning rate"] * bool(axes)])
                break
    return found


def variants(runs: Sequence[RunFolder]) -> list[tuple[tuple[str, str], ...]]:
    """Of each run the keys and values that set it apart: neither of runtime, nor following from others."""
    differing = differing_keys(runs)
    following = followers(differing)
    kept = {key: texts for key, texts in differing.items() if not is_runtime(key) and key not in following}
    return [tuple((key, texts[i].strip('"')) for key, texts in kept.items()) for i in range(len(runs))]
