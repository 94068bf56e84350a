"""The campaign's cases of names and files against what the records say: removed folders, checkpoints of another step or
run, evaluations that cannot be recorded, and runs that diverged."""

import json
import shutil
import signal

from experiments.campaigns.fault_runs import ROOT, STEPS, TINY, Campaign, ended, metrics, refused, until

DIVERGES = (
    f"--config={ROOT}/configs/dense.py:depth=1,width=16,placement=pre,init=plain",
    "--config.optim.lr=2e8",
    "--config.optim.warmup_fraction=1",
    "--config.optim.weight_decay=0",
    "--config.checkpoint.every_steps=1",
)


def removed_folder(c: Campaign) -> None:
    for when, every in (("before its end", 0), ("between saves", 4), ("while it saves", 1)):
        for what in ("removed", "without its LOCK", "moved away"):
            workdir = c.folder / f"{what} {when}"
            more = (f"--config.checkpoint.every_steps={every}", "--config.training.steps=400")
            process = c.start(c.command("train", *TINY, *more, "--workdir", workdir))
            until(process, "step 5/")
            process.send_signal(signal.SIGSTOP)  # `rm -r` fails where a save puts a file into a folder meanwhile
            if what == "without its LOCK":
                (workdir / "LOCK").unlink()
            elif what == "moved away":
                workdir.rename(f"{workdir} to here")
            else:
                shutil.rmtree(workdir)
            process.send_signal(signal.SIGCONT)
            code, out = ended(process)
            said = refused(code, out, workdir, "was removed or replaced", noisy=True)
            left = workdir.exists() == (what == "without its LOCK") and not (workdir / "DONE").exists()
            c.check(f"a folder {what} {when}", "one line, exit code 2; nothing is made anew", said and left, out)
            if what == "removed":
                c.check_finishes(f"a folder {what} {when}, and the same command again", workdir)


def other_checkpoints(c: Campaign) -> None:
    other = c.folder / "another seed"
    code, out = c.train(other, "--config.seed=1")
    assert code == 0, out
    newest = f"checkpoints/{STEPS}"
    kinds = (("renamed", STEPS + 1, f"of step {STEPS} under another name"), ("foreign", STEPS, "seed=1"))
    for case, name, says in kinds:
        workdir = c.copy(f"a {case} checkpoint")
        if case == "renamed":
            (workdir / newest).rename(workdir / "checkpoints" / str(name))
        else:
            shutil.rmtree(workdir / newest)
            shutil.copytree(other / newest, workdir / newest)
        for module, more in (("evaluate", ("--json",)), ("sample", ("--max_tokens", 3))):
            code, out = c.run(c.command(module, "--workdir", workdir, *more))
            ok = code == 0 and says in out and f"step {STEPS - 2}" in out
            c.check(f"{module} beside a {case} checkpoint", f"says so, takes step {STEPS - 2}", ok, out)
            code, out = c.run(c.command(module, "--workdir", workdir, f"--step={name}"))
            ok = refused(code, out, says)
            c.check(f"{module} --step of a {case} checkpoint", "refused, the reason named", ok, out)
        code, out = c.train(workdir)
        ok = code == 0 and says in out and f"continuing after step {STEPS - 2}" in out
        ok = ok and metrics(workdir) == c.expected and (workdir / "damaged" / str(name)).is_dir()
        c.check(f"train beside a {case} checkpoint", f"said and moved; step {STEPS - 2} is used; bitwise", ok, out)


def unrecorded(c: Campaign) -> None:
    workdir = c.copy("nothing may be written", done=True)
    c.evaluate(workdir, "--out=none")  # so that its program is compiled
    command = c.command("evaluate", "--workdir", workdir, "--json")
    code, out = c.run(command, largest_file=0)
    ok = refused(code, out, "not recorded", "eval.jsonl", noisy=True) and f'"step": {STEPS}' in out
    ok = ok and not (workdir / "eval.jsonl").exists()
    c.check("evaluation with a size limit of 0", "the result, one line, exit code 2; no empty file", ok, out)


def diverged(c: Campaign) -> None:
    for keep in (1, 4):
        workdir = c.folder / f"diverged {keep}"
        code, out = c.train(workdir, *DIVERGES, f"--config.checkpoint.keep_last={keep}")
        mark = json.loads((workdir / "DIVERGED").read_text(encoding="utf-8"))
        good = mark["last_good_checkpoint"]
        ok = code == 3 and bool(good)
        c.check(f"a run that diverges, keep_last={keep}", "exit code 3, a good checkpoint", ok, out)
        code, out = c.evaluate(workdir)
        ok = code == 0 and f"step {good}, its last good checkpoint" in out and f'"step": {good},' in out
        c.check(f"evaluate it, keep_last={keep}", "takes the last good checkpoint and says so", ok, out)
        code, out = c.evaluate(workdir, f"--step={mark['step'] - 1}")
        ok = code in (0, 3) and f'"step": {mark["step"] - 1},' in out
        c.check(f"evaluate the step with which it diverged, keep_last={keep}", "takes what is asked for", ok, out)


PARTS = (removed_folder, other_checkpoints, unrecorded, diverged)
