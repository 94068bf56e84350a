"""Run folders as the trainer leaves them, with numbers of a test's choice."""

import itertools
import json

from spannorm_jax.config import Config, replace, to_dict
from spannorm_jax.report.folders import find_runs, read_run
from spannorm_jax.report.study import study_of

ENTROPY = 4.0
STEPS = 20


def write_run(folder, placement="span", init="scale", losses=None, done=True, entropy=ENTROPY, bits=None, **changes):
    """A run's folder as the trainer leaves it: `losses` from step 1 on; `changes` of the config, or the device."""
    losses = [5.0 - 0.1 * s for s in range(STEPS)] if losses is None else losses
    device, fingerprint = changes.pop("device", "cpu"), changes.pop("fingerprint", "f00d")
    usual = {"model__depth": 3, "training__steps": STEPS, "data__fingerprint": fingerprint}
    config = replace(Config(), **{"model__placement": placement, "model__init": init} | usual | changes)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    start = {
        "command": f"python -m spannorm_jax.train --config x.py:placement={placement}",
        "versions": {"jax": "0.10.2", "flax": "0.12.8"},
        **{"device": device, "num_devices": 1, "mesh": {"data": 1}, "num_params": 1234, "flops_per_token": 7.4e3},
        "data": {"dataset": "python_source", "fingerprint": fingerprint, "unigram_entropy": entropy},
        **{"git_commit": "0123abc", "time": "2026-01-05T10:00:00+00:00"},
    }
    (folder / "starts.jsonl").write_text(json.dumps(start) + "\n")
    with open(folder / "metrics.jsonl", "w", encoding="utf-8") as file:
        for step, loss in enumerate(losses, start=1):
            # The first five steps are slow; then 100, 101, ... tokens/s.
            line = {"step": step, "loss": loss, "tokens_per_s": 1.0 if step <= 5 else 94.0 + step}
            line["grad_norm"] = 2.0 if step <= len(losses) // 4 else 0.5  # clip_norm is 1: a quarter is clipped
            if step in (1, len(losses)):
                line["block_grad_norm"] = [0.1 * step, 0.2, 0.3]
            file.write(json.dumps(line) + "\n")
    if done:
        (folder / "DONE").write_text(json.dumps({"step": len(losses)}))
    if bits is not None:
        write_eval(folder, len(losses), bits)
    return folder


def write_eval(folder, step, bits, split="validation", **more):
    """An evaluation whose loss is one nat a token per bit a byte: a test then has one number to follow."""
    line = {"step": step, "loss": bits, "bits_per_byte": bits, "split": split, "tokens": 99} | more
    with open(folder / "eval.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def reached(folder):
    return read_run(folder).reached


def study_in(root, *options):
    return study_of(find_runs(root), *options)


def write_lr_sweep(root, placements=("pre", "post", "span"), depths=(3,), lrs=(1e-3, 1e-2, 1e-1), seeds=(0, 1, 2)):
    """Every combination: PostNorm diverges at the greatest learning rate, the others are best in the middle."""
    for placement, depth, (i, lr), seed in itertools.product(placements, depths, enumerate(lrs), seeds):
        end = {"pre": 2.0, "post": 2.5, "span": 1.5}[placement] + 0.1 * abs(i - 1) + 0.01 * seed * (1 + i)
        name = f"{placement}-{depth}-{lr:g}-{seed}"
        settings = {"model__depth": depth, "optim__lr": lr, "seed": seed}
        if placement == "post" and lr == max(lrs):
            folder = write_run(root / name, placement, "plain", losses=[5.0, 6.0, 9.0], done=False, **settings)
            (folder / "DIVERGED").write_text(json.dumps({"step": 4, "where": "the loss", "loss": "nan"}))
        else:
            losses = [5.0 + (end - 5.0) * s / (STEPS - 1) for s in range(STEPS)]
            write_run(root / name, placement, "plain", losses=losses, bits=end, **settings)
    return root
