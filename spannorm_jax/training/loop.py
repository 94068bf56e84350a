"""The training story, straight from top to bottom."""

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import jax
from jax import Array
from jax.sharding import Mesh

from spannorm_jax.config import Config, replace, to_dict
from spannorm_jax.data.loader import TrainLoader, check_held_out
from spannorm_jax.data.open import OpenData, open_data, say_overlap
from spannorm_jax.durable import append_line, write_json, write_text
from spannorm_jax.errors import DIVERGED_EXIT, UserError
from spannorm_jax.model.definition import count_params, define, flops_per_token
from spannorm_jax.model.kernels.attention import chosen
from spannorm_jax.model.moe import grouped_matmul
from spannorm_jax.parallel import distributed
from spannorm_jax.parallel.devices import memory_bytes, peak_flops
from spannorm_jax.parallel.liveness import Stop, Watchdog, in_step, stop_signals
from spannorm_jax.parallel.mesh import check_divisible, make_mesh
from spannorm_jax.parallel.platform import start_jax
from spannorm_jax.run import folder as run_folder
from spannorm_jax.run import wandb_log
from spannorm_jax.run.checkpoint import Checkpoints
from spannorm_jax.run.metrics import MetricsWriter, NoWriter
from spannorm_jax.run.provenance import check_agreement, start_record
from spannorm_jax.training.metrics import (
    Progress,
    first_nonfinite,
    host_metrics,
)
from spannorm_jax.training.profiling import StepTrace, check_steps
from spannorm_jax.training.step import Program, make_program

ROUTER_METRICS = ("aux_loss", "router_z_loss", "expert_load_max", "router_entropy", "expert_overflow")


class Diverged(Exception):
    """A loss or gradient was not finite."""

    def __init__(self, step: int, where: str, loss: float):
        super().__init__(f"step {step}: {where} is not finite (loss {loss})")
        self.record = {"step": step, "where": where, "loss": str(loss)}


def train(
    config: Config, workdir: Path, argv: list[str], profile_steps: range, flags: distributed.Flags, stop_code: int
) -> int:
    """Trains until `training.steps`, a signal, or a non-finite number; returns 0, `stop_code`, or 3.

    Started again with the same config and folder, it goes on from the newest committed checkpoint. `profile_steps`
    are traced by the profiler, as far as they are still to come. Of several processes (`flags`), process 0 writes the
    folder and the console; all of them read their own rows of each batch and write their part of the checkpoints.

    Raises:
      UserError: the config does not fit the devices, the data, the folder or the other processes; nothing is written
        then.
    """
    start_jax(config.platform, flags)
    distributed.check_devices()
    full_name = distributed.from_first(lambda: run_folder.data_opened_as(workdir, config))
    config = replace(config, data__full_name=full_name)
    config, data, mesh, loader = distributed.together(lambda: fit(config))
    check_steps(profile_steps, config.training.steps)
    check_agreement(config)
    with ExitStack() as stack:
        wandb = distributed.together(lambda: _open_folder(stack, config, workdir))
        stop = stack.enter_context(stop_signals())
        return _train(config, workdir, argv, data, mesh, loader, stop, profile_steps, wandb, stop_code)


def _open_folder(stack: ExitStack, config: Config, workdir: Path) -> Any:
    """Opens the run's folder on process 0, and returns wandb if it is asked for; the others must see that folder."""
    if distributed.is_first():
        wandb = wandb_log.load(config)
        stack.enter_context(run_folder.open_run(workdir, config))
        return wandb
    if not (workdir / run_folder.CONFIG).exists():
        raise UserError(f"--workdir {workdir} is not shared: process 0 has opened it, and it is not here; share it")
    return None


def fit(config: Config) -> tuple[Config, OpenData, Mesh, TrainLoader]:
    """What is asked for, against what is here: resolved config, data, mesh and loader. Raises UserError."""
    data, config = open_data(config)
    check_held_out(data.eval, data.tokenizer)
    chosen(config.model, config.data.seq_len)
    _grouped_matmul(config)
    mesh = make_mesh(config.mesh)
    microbatch = config.training.batch_size // config.training.num_microbatches
    check_divisible(config, dict(mesh.shape), "training.batch_size / num_microbatches", microbatch)
    return config, data, mesh, TrainLoader(data.train, config.data.seq_len, config.training.batch_size, config.seed)


def _grouped_matmul(config: Config) -> str:
    """What the start says of it; nothing without experts. Raises UserError if it cannot run here."""
    if not config.model.moe.num_experts:
        return ""
    name, why = grouped_matmul.chosen(config.model.moe.grouped_matmul)
    return f", grouped matmul {name}{f' ({why})' if why else ''}"


def _train(
    config: Config,
    workdir: Path,
    argv: list[str],
    data: OpenData,
    mesh: Mesh,
    loader: TrainLoader,
    stop: Stop,
    profile_steps: range,
    wandb: Any,
    stop_code: int,
) -> int:
    steps, seq_len, batch_size = config.training.steps, config.data.seq_len, config.training.batch_size
    first_process = distributed.is_first()
    profile_steps = profile_steps if first_process else range(0)
    if data.tokenizer.source and first_process:
        write_text(workdir / run_folder.TOKENIZER, data.tokenizer.source)
    if distributed.from_first((workdir / run_folder.DONE).exists):
        distributed.say(f"{workdir} is done already (step {steps})")
        return 0

    model = define(config.model)
    flops = flops_per_token(model, seq_len)
    attention, why = chosen(config.model, seq_len)
    matmul = _grouped_matmul(config)
    facts = {
        "mesh": dict(mesh.shape),
        "num_params": count_params(model),
        "active_params": count_params(model, active=True),
        "flops_per_token": flops,
    }
    start = start_record("spannorm_jax.train", argv, data, facts)
    active = f"{facts['active_params']:,} active" if config.model.moe.num_experts else "all active"
    processes = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
    distributed.say(
        f"{config.model.placement} / {config.model.init}: {config.model.depth} blocks, width {config.model.width}, "
        f"{facts['num_params']:,} parameters ({active}), {flops / 1e6:,.1f} MFLOP a token\n"
        f"{start['num_devices']} x {start['device']}{processes}, mesh {facts['mesh']}, compute {config.model.dtype}, "
        f"attention {attention}{f' ({why})' if why else ''}{matmul}\n"
        f"data {data.train.dataset} ({config.data.tokenizer}), {data.train.num_tokens:,} training tokens, "
        f"fingerprint {config.data.fingerprint}"
    )
    say_overlap(config, data)

    with (
        jax.set_mesh(mesh),
        closing(Watchdog(config.training.watchdog_minutes)) as watchdog,
        closing(Checkpoints(workdir / run_folder.CHECKPOINTS, config.checkpoint)) as checkpoints,
        in_step(),
    ):
        # ---- state: the newest sound checkpoint, or a new one
        program = make_program(config, model, mesh)
        restored, faults = checkpoints.resume(workdir / run_folder.DAMAGED)
        for found in faults:
            distributed.say(f"passed over a checkpoint: {found}")
        if restored is None:
            state = program.init(config.seed)
        else:
            state = checkpoints.restore(restored, program.abstract_state)
            distributed.say(f"continuing after step {restored}")
        first = (restored or 0) + 1
        watchdog.alive("the state was made")
        if first_process:
            append_line(workdir / run_folder.STARTS, start | {"first_step": first})
            (workdir / run_folder.DIVERGED).unlink(missing_ok=True)
        tensorboard = workdir / run_folder.TENSORBOARD if config.metrics.tensorboard else None

        # ---- steps
        with (
            closing(
                MetricsWriter(
                    workdir / run_folder.METRICS,
                    tensorboard,
                    first - 1,
                    wandb_log.open_run(wandb, config, workdir),
                )
                if first_process
                else NoWriter()
            ) as writer,
            closing(_Batches(loader, program, (batch_size, seq_len + 1), range(first, steps + 1))) as batches,
            closing(StepTrace(profile_steps, first, workdir / run_folder.PROFILE)) as trace,
        ):
            began = time.monotonic()
            train_step = program.train.lower(state, batches.abstract).compile()
            distributed.say(f"compiled in {time.monotonic() - began:.1f} s")
            watchdog.alive("the step was compiled")
            progress = Progress(steps, config.metrics.console_every_s, silent=not first_process)
            log = _StepLog(config, program, flops, writer, progress)
            try:
                for step in range(first, steps + 1):
                    trace.before(step, state)
                    with jax.profiler.StepTraceAnnotation("train", step_num=step):
                        state, metrics = train_step(state, next(batches))
                    trace.after(step, state)
                    log.read_previous()  # waits for the step before, while the device works on this one
                    watchdog.alive(f"step {step - 1}")
                    log.dispatched(step, metrics)
                    due = config.checkpoint.every_steps and step % config.checkpoint.every_steps == 0
                    stopped_by = stop.at(step)
                    if due or stopped_by or step == steps:
                        log.read_previous()  # a state is saved only when its own step is known to be finite
                        writer.sync()
                        checkpoints.save(step, state, {"step": step, "config": to_dict(config)})
                    if stopped_by and step < steps:
                        progress.end_line()
                        checkpoints.wait()
                        distributed.say(f"stopped by {stopped_by}, saved at step {step}; the same command goes on")
                        return stop_code
                checkpoints.wait()  # within in_step, where a process that is lost meanwhile is told apart
            except Diverged as diverged:
                progress.end_line()
                checkpoints.wait()  # within in_step, where a process that is lost meanwhile is told apart
                # A step's numbers are of the weights before it: those that this step met are not good.
                met, kept = diverged.record["step"] - 1, checkpoints.steps()
                good = max((saved for saved in kept if saved < met), default=None)
                last = f"the last good checkpoint is step {good}" if good else "there is no good checkpoint"
                if met in kept:
                    last += f" (that of step {met} holds the weights with which this happened)"
                if first_process:
                    write_json(workdir / run_folder.DIVERGED, diverged.record | {"last_good_checkpoint": good})
                distributed.say(f"stopped: {diverged}; {last}")
                return DIVERGED_EXIT
    if first_process:
        write_json(workdir / run_folder.DONE, {"step": steps})
    distributed.say(f"done: {workdir}")
    return 0


class _StepLog:
    """Reads a step's metrics one step late, so that the device never waits for the host."""

    def __init__(self, config: Config, program: Program, flops: int, writer: MetricsWriter, progress: Progress):
        self._config, self._writer, self._progress = config, writer, progress
        self._device = program.mesh.local_devices[0]
        self._tokens = config.training.batch_size * config.data.seq_len
        self._flops = flops * self._tokens
        self._peak = peak_flops(self._device, config.metrics.peak_flops)
        self._pending: tuple[int, dict[str, Array]] | None = None
        self._last_read = time.monotonic()

    def dispatched(self, step: int, metrics: dict[str, Array]) -> None:
        self._pending = (step, metrics)

    def read_previous(self) -> None:
        """Logs the pending step. Raises Diverged if its loss or gradient is not finite."""
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        values = host_metrics(metrics)
        now = time.monotonic()
        step_time, self._last_read = now - self._last_read, now
        where = first_nonfinite(values)
        if where:
            raise Diverged(step, where, values["loss"])
        steps, every = self._config.training.steps, self._config.metrics
        self._progress.show(step, values["loss"], self._tokens / step_time)
        if step % every.log_every and step not in (1, steps):
            return
        line = {
            "step": step,
            **{key: values[key] for key in ("loss", "accuracy", "grad_norm", "lr", "z_loss")},
            **{key: values[key] for key in ROUTER_METRICS if key in values},
            "tokens": step * self._tokens,
        }
        if step in (1, steps) or (every.block_grad_every and step % every.block_grad_every == 0):
            line["block_grad_norm"] = values["block_grad_norm"]
        flops_per_s = self._flops / step_time
        line |= {
            "tokens_per_s": self._tokens / step_time,
            "step_time_s": step_time,
            "model_flops_per_s": flops_per_s,
            "machine_s": {
                "mfu": flops_per_s / (self._peak * jax.device_count()) if self._peak else None,
                "memory_bytes": memory_bytes(self._device),
            },
        }
        self._writer.write(line)


class _Batches:
    """Iterates over device batches; the next one is read while the device works on this one."""

    def __init__(self, loader: TrainLoader, program: Program, shape: tuple[int, int], steps: range):
        self.abstract = jax.ShapeDtypeStruct(shape, "int32", sharding=program.batch_sharding)
        self._loader = loader
        self._steps = iter(steps)
        self._reader = ThreadPoolExecutor(max_workers=1)
        self._submit()

    def _read(self, step: int) -> Array:
        def rows(index: tuple[slice, ...]):  # each process reads the rows of its own devices
            start, stop, _ = index[0].indices(self.abstract.shape[0])
            return self._loader.rows(step, start, stop)

        return jax.make_array_from_callback(self.abstract.shape, self.abstract.sharding, rows)

    def _submit(self) -> None:
        step = next(self._steps, None)
        if step is not None:
            self._next = self._reader.submit(self._read, step)

    def __next__(self) -> Array:
        batch = self._next.result()
        self._submit()
        return batch

    def close(self) -> None:
        self._reader.shutdown(wait=True, cancel_futures=True)
