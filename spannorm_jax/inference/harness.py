"""A run as a model of lm-evaluation-harness, two tasks of its held-out text, and what tasks' results say.

Importing this registers the model `spannorm` with the harness: lm_eval.simple_evaluate("spannorm",
{"workdir": "runs/x"}, ...). No torch is needed, nor a network.
"""

import importlib.metadata
import itertools
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import jax
import numpy as np

# Tasks come from this disk. Whoever wants others sets these to 0.
os.environ |= {name: os.environ.get(name, "1") for name in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE")}
import lm_eval
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.api.task import ConfigurableTask
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.tasks import TaskManager

from spannorm_jax.config import Config
from spannorm_jax.config_file import for_this_machine
from spannorm_jax.data.loader import eval_batches
from spannorm_jax.data.open import OpenData
from spannorm_jax.errors import UserError, did_you_mean, one_line
from spannorm_jax.inference.evaluation import add_line, begin
from spannorm_jax.inference.loaded import Run, load_run
from spannorm_jax.inference.options import SampleOptions
from spannorm_jax.inference.sampling import encode_prompt, generate
from spannorm_jax.parallel import distributed
from spannorm_jax.parallel.liveness import in_step
from spannorm_jax.parallel.mesh import batch_shards
from spannorm_jax.parallel.platform import start_jax
from spannorm_jax.parallel.rank import ProcessFlags
from spannorm_jax.run import folder as run_folder
from spannorm_jax.run.provenance import check_agreement
from spannorm_jax.training.tasks import task_of

_NEW_TOKENS = 256  # that are generated where a task does not say how many
_GENERATED_TOGETHER = 32  # prompts
_PLACES, _PLACE_TOKENS = 500, 320  # of the continuation task: questions, and tokens of text that one is made of
_CHOICES = 4


class Ids(str):
    """A text that is scored as these ids (the first is context), where another cut would give others."""

    ids: Sequence[int]


@register_model("spannorm")
class SpanNormLM(TemplateLM):
    """A run's checkpoint behind the harness's interface. Answers stand in the order of their requests.

    A document begins after an end of text, and nothing else adds one. What is longer than data.seq_len is scored in
    the windows of `evaluate`; context is cut from the left, by tokens.
    """

    def __init__(self, workdir: str | Run, step: int | None = None, **ignored: Any):
        """`ignored` holds what the harness adds: batch_size, max_batch_size, device. The mesh and lengths decide."""
        super().__init__()
        if isinstance(workdir, Run):
            self.run = workdir
        else:
            start_jax("auto")
            path = run_folder.run_folder_path(workdir)
            self.run = load_run(for_this_machine(run_folder.read_config(path)), path, step, "evaluating")

    @property
    def eot_token_id(self) -> int:
        return self.run.tokenizer.end_of_text

    @property
    def tokenizer_name(self) -> str:
        return self.run.tokenizer.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **ignored: Any) -> list[int]:
        return self.run.encode(string).tolist()

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Encoded together, with the spaces between them in the continuation, unless a token spans the join."""
        end = len(context.rstrip())
        context, continuation = context[:end], context[end:] + continuation
        own, whole = self.tok_encode(context), self.tok_encode(context + continuation)
        if whole[: len(own)] != own or len(whole) == len(own):
            whole = own + self.tok_encode(continuation)
        return own or [self.prefix_token_id], whole[len(own) :]

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        pairs = [request.args[:2] for request in requests]
        return self._loglikelihood_tokens([(pair, *self._encode_pair(*pair)) for pair in pairs])

    def _loglikelihood_tokens(self, requests: list[Any], **ignored: Any) -> list[tuple[float, bool]]:
        scored = self.run.score([([*context, *own], len(own)) for _, context, own in requests])
        return [(-float(nll.sum()), bool(right.all())) for nll, right in scored]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        texts = [request.args[0] for request in requests]
        documents = [(t.ids, len(t.ids) - 1) if isinstance(t, Ids) else self.run.document(t) for t in texts]
        return [-float(nll.sum()) for nll, _ in self.run.score(documents)]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        if jax.process_count() > 1:
            raise UserError("a task that generates text runs in one process; start one, or leave that task out")
        seq_len, made = self.run.config.data.seq_len, [""] * len(requests)
        groups: dict[tuple[Any, ...], list[tuple[int, np.ndarray]]] = {}
        for i, (context, asked) in enumerate(request.args[:2] for request in requests):
            new = int(asked.get("max_gen_toks") or min(_NEW_TOKENS, seq_len // 2))
            ids = encode_prompt(self.run.tokenizer, context)[-max(1, seq_len - new) :]
            temperature = float(asked.get("temperature") or 0) if asked.get("do_sample") else 0.0
            until = asked.get("until") or []
            key = (SampleOptions(new, temperature, 0), (until,) if isinstance(until, str) else tuple(until))
            groups.setdefault((1 << (len(ids) - 1).bit_length(), *key), []).append((i, ids))
        for (slots, options, until), members in groups.items():
            for first in range(0, len(members), _GENERATED_TOGETHER):
                places, prompts = zip(*members[first : first + _GENERATED_TOGETHER], strict=True)
                for i, text in zip(places, self._generate(list(prompts), options, until, slots), strict=True):
                    made[i] = text
        return made

    def _generate(
        self, prompts: list[np.ndarray], options: SampleOptions, until: Sequence[str], slots: int
    ) -> list[str]:
        """Each prompt's continuation up to the first of `until`; the batch ends once all have ended."""
        run, end = self.run, self.eot_token_id
        shards = batch_shards(dict(run.mesh.shape))
        rows_multiple = -(-_GENERATED_TOGETHER // shards) * shards  # one shape, however many prompts are left
        columns: list[np.ndarray] = []
        open_rows = set(range(len(prompts)))

        def stopped(tokens: np.ndarray) -> bool:
            columns.append(tokens)
            for row in list(open_rows):
                text = run.tokenizer.decode(np.array(columns)[:, row])
                if tokens[row] == end or any(stop in text for stop in until):
                    open_rows.remove(row)
            return not open_rows

        with jax.set_mesh(run.mesh):
            weights = (run.params, run.model_state)
            new = generate(run.model, *weights, run.tokenizer, prompts, options, stopped, rows_multiple, slots)
        texts = []
        for text in map(run.tokenizer.decode, new):
            texts.append(text[: min((at for stop in until if (at := text.find(stop)) >= 0), default=len(text))])
        return texts


# ---- tasks of the held-out text ----------------------------------------------------------------------------


class _Docs(list[dict[str, Any]]):
    """A data set as the harness wants it."""

    features: dict[str, None] = {}  # noqa: RUF012


def _task(name: str, docs: Sequence[dict[str, Any]], metric: tuple[str, str, bool], **options: Any) -> ConfigurableTask:
    made = _Docs(docs)
    made.features = dict.fromkeys(docs[0])
    names = ("metric", "aggregation", "higher_is_better")
    config = {"task": name, "custom_dataset": lambda **ignored: {"test": made}, "test_split": "test"}
    config |= {"metric_list": [dict(zip(names, metric, strict=True))], "target_delimiter": ""}
    return ConfigurableTask(config=config | options)


def _rolling(config: Config, data: OpenData) -> ConfigurableTask:
    """Bits per byte on the predictions of `evaluate`: a document is one of its windows, and scored as its ids."""
    texts: list[Ids] = []
    docs: list[dict[str, Any]] = []
    size = (config.data.seq_len, config.eval.tokens, config.eval.batch_size)
    for tokens, weights in eval_batches(data.eval, *size):
        for row, weight in zip(tokens, weights, strict=True):
            if n := int(weight.sum()):
                texts.append(Ids(data.tokenizer.decode(row[: n + 1])))
                texts[-1].ids = row[: n + 1]
                docs.append({"window": len(docs), "bytes": int(data.tokenizer.token_bytes[row[1 : n + 1]].sum())})
    return _task(
        *("held_out_rolling", docs, ("bits_per_byte", "bits_per_byte", False)),
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target=lambda doc: texts[doc["window"]],
        process_results=lambda doc, results: {"bits_per_byte": (results[0], doc["bytes"])},
    )


def _continuation(config: Config, data: OpenData) -> ConfigurableTask:
    """Four continuations of a held-out text, of which one is its own.

    Each is the true one once and a false one three times, so that no preference among continuations beats chance.
    """
    span = min(config.data.seq_len, _PLACE_TOKENS)
    available = data.eval.num_tokens // span
    n = min(_PLACES, available)
    pieces = []
    for start in np.arange(n) * available // max(n, 1) * span:
        ids = np.asarray(data.eval.tokens[start : start + span])
        ends = [-1, *np.flatnonzero(ids == data.tokenizer.end_of_text), len(ids)]
        first, last = max(itertools.pairwise(ends), key=lambda pair: pair[1] - pair[0])
        text = data.tokenizer.decode(ids[first + 1 : last]).strip("\ufffd")  # characters that the cut has broken
        at = len(text) * 4 // 5
        if text[:at].strip() and text[at:].strip():
            pieces.append((text[:at], text[at:]))
    if len(pieces) < _CHOICES:
        raise UserError(f"task held_out_continuation: {data.eval.split!r} has text for {len(pieces)} questions only")
    docs = []
    for i, (context, _) in enumerate(pieces):
        others = [pieces[(i + j * len(pieces) // _CHOICES) % len(pieces)][1] for j in range(_CHOICES)]
        docs.append({"context": context, "choices": np.roll(others, i % _CHOICES).tolist(), "label": i % _CHOICES})
    return _task(
        *("held_out_continuation", docs, ("acc", "mean", True)),
        output_type="multiple_choice",
        doc_to_text="context",
        doc_to_choice="choices",
        doc_to_target="label",
    )


OWN: dict[str, Callable[[Config, OpenData], ConfigurableTask]] = {
    "held_out_rolling": _rolling,
    "held_out_continuation": _continuation,
}


# ---- evaluation --------------------------------------------------------------------------------------------


def evaluate_tasks(
    config: Config,
    workdir: Path,
    step: int | None,
    flags: ProcessFlags,
    out: Path | None,
    names: Sequence[str],
    include_path: Path | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """Evaluates a checkpoint (default: that of `open_trained`) on tasks, appends a line to `out`, and returns it.

    `names` are those of OWN, of tasks below `include_path`, of the harness's own, or YAML files; `limit` is the most
    documents of each. The line's `tasks` has of each task and metric the value, its standard error, the value that
    chance gives, and the number of documents, n; null is what is not known.

    Raises:
      UserError: as `evaluation.evaluate`, and if there is no such task or its data are not on this disk.
    """
    begin(config, workdir, flags, out)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    data = None
    if any(name in OWN for name in names):
        data, config = distributed.run_on_all(lambda: task_of(config).open(config))
    check_agreement(config)
    tasks = distributed.run_on_all(lambda: {t.task_name: t for t in _tasks(config, data, names, include_path)})
    for task in tasks.values():  # as `lm_eval.simple_evaluate` does, which also asks git and pip, and seeds all else
        task.set_config("num_fewshot", task.get_config("num_fewshot") or 0)
        task.set_fewshot_seed(DEFAULT_OTHER_SEED)
    with in_step():
        run = load_run(config, workdir, step, "evaluating")
        results = lm_eval.evaluate(SpanNormLM(run), {"tasks": tasks}, limit=limit)
    line: dict[str, Any] = {"step": run.step, "tasks": list(_results(results, run))}
    line |= {"limit": limit, "lm_eval": importlib.metadata.version("lm_eval"), "seq_len": config.data.seq_len}
    line |= run_folder.what_is_evaluated(config, run.step) | {"mesh": dict(run.mesh.shape)}
    add_line(out, line)
    return line


def _tasks(config: Config, data: OpenData | None, names: Sequence[str], include_path: Path | None) -> Iterator[Any]:
    """The task, or the tasks of the group or tag, of each name."""
    manager = TaskManager(include_path=include_path, include_defaults=False)
    for name in names:
        if name in OWN and data:
            yield OWN[name](config, data)
            continue
        if name not in manager.all_tasks and not Path(name).is_file():
            # The harness's own are thousands, and read only now.
            manager = TaskManager(include_path=include_path)
            if name not in manager.all_tasks:
                near = get_close_matches(name, [*OWN, *manager.all_tasks], n=1) or OWN
                raise UserError(f"--tasks {name} is no task and no YAML file; {did_you_mean(name, near)}")
        try:
            yield from manager.load([name])["tasks"].values()
        except Exception as error:  # whatever its YAML file and its data set's library raise
            raise UserError(
                f"--tasks {name} cannot be read: {type(error).__name__}: {one_line(error)[:300]}"
            ) from error


def _results(results: Any, run: Run) -> Iterator[dict[str, Any]]:
    """The scores of each task, as a line of eval.jsonl has them."""
    for name, samples in results["samples"].items():
        found = results["results"][name]
        for key, value in found.items():
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("_stderr") or not isinstance(value, int | float | np.number):
                continue
            own = [sample for sample in samples if sample["filter"] == filtered]
            error = found.get(f"{metric}_stderr,{filtered}")  # or words
            error = float(error) if isinstance(error, float) else _ratio_stderr(metric, float(value), own)
            label = metric if filtered == "none" else f"{metric}, {filtered}"
            score = {"task": name, "metric": label, "value": float(value), "stderr": error}
            yield score | {"chance": _chance(metric, own, run), "n": len(own)}


_ROLLING: dict[str, Callable[[float], float]] = {  # metric -> its derivative by the loss in nats a byte or word
    "bits_per_byte": lambda value: 1 / math.log(2),
    "byte_perplexity": lambda value: value,
    "word_perplexity": lambda value: value,
}


def _ratio_stderr(metric: str, value: float, samples: Sequence[dict[str, Any]]) -> float | None:
    """The standard error, over documents, of a sum of losses by a sum of bytes or words: the harness gives none."""
    if metric not in _ROLLING or len(samples) < 2:
        return None
    losses, sizes = np.array([sample[metric] for sample in samples], np.float64).T
    residuals = losses - losses.sum() / sizes.sum() * sizes
    deviation = math.sqrt(len(samples) / (len(samples) - 1) * residuals @ residuals)
    return _ROLLING[metric](value) * deviation / float(sizes.sum())


def _chance(metric: str, samples: Sequence[dict[str, Any]], run: Run) -> float | None:
    """What guessing gives: 1 of the choices, or each token of the vocabulary as likely as any other."""
    if metric in _ROLLING:
        texts = [sample["arguments"][0][0] for sample in samples]
        tokens = sum(len(t.ids) - 1 if isinstance(t, Ids) else run.document(t)[1] for t in texts)
        nats = tokens * math.log(run.tokenizer.num_ids) / sum(sample[metric][1] for sample in samples)
        return nats / math.log(2) if metric == "bits_per_byte" else math.exp(nats) if nats < 700 else None
    asked = 2 if "acc_mutual_info" in samples[0]["metrics"] else 1  # of each choice: also without its context
    choices = [len(sample["arguments"]) // asked for sample in samples]
    guessed = metric.startswith("acc") and min(choices) > 1
    return sum(1 / n for n in choices) / len(choices) if guessed else None
