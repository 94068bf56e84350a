"""lm-evaluation-harness on a run: `make test-eval`, in a venv that has it. Each fault that others met is a test."""

import importlib.util
import itertools
import json
import logging
import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from small_run import SEQ_LEN, small_config, write_small_run

from spannorm_jax import evaluate as command
from spannorm_jax import train
from spannorm_jax.config import DataConfig
from spannorm_jax.data import bpe
from spannorm_jax.data.tokenizer import vocab_size
from spannorm_jax.errors import UserError
from spannorm_jax.report.folders import read_run
from spannorm_jax.run import folder as run_folder

pytestmark = [
    pytest.mark.eval,
    pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lm_eval: make test-eval"),
]
CLOSE = 1e-5  # as in test_loaded.py
TEXT = "def f(x):\n    return x  # é€😀\n" * 5
QUESTIONS = [
    {"q": "def f(x", "c": ["):", "import", "é€😀"], "a": 0},
    {"q": "import o", "c": ["s", "zzz", "yy"], "a": 0},
    {"q": "for é i", "c": ["n range", "qq", "1"], "a": 2},
]


def letters(params):
    """The weights with a head that prefers letters, so that what is made is text."""
    head = params["head"]
    return params | {"head": (0 * head).at[:, 97:123].set(5 * head[:, 97:123])}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return write_small_run(tmp_path_factory.mktemp("runs") / "run", small_config(), letters)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of the embedded data, whose windows are shorter than documents."""
    workdir = tmp_path_factory.mktemp("runs") / "trained"
    sizes = ("steps=3", "batch_size=8")
    argv = ["--config", "configs/dense.py:depth=1,width=16", "--workdir", str(workdir)]
    argv += ["--config.data.seq_len=64", "--config.eval.tokens=4000", "--config.eval.batch_size=16"]
    assert train.main([*argv, *(f"--config.training.{size}" for size in sizes)]) == 0
    return workdir


@pytest.fixture(scope="module")
def lm(workdir):
    from spannorm_jax.inference.harness import SpanNormLM

    return SpanNormLM(str(workdir))


def asked(*args):
    return [SimpleNamespace(args=arg) for arg in args]


def whole_nll(lm, context, continuation):
    [(nll, _)] = lm.run.score([([*context, *continuation], len(continuation))])
    return float(nll.sum())


@pytest.fixture(scope="module")
def bpe_lm(tmp_path_factory):
    """A run whose tokenizer merges across what a task splits."""
    from spannorm_jax.inference.harness import SpanNormLM

    data = {"data__tokenizer": "bpe", "data__bpe_vocab_size": 300}
    size = vocab_size(DataConfig(tokenizer="bpe", bpe_vocab_size=300))
    source = bpe.train([b"foobar foobar foobar barfoo ab ab ab"] * 20, 300, 0)
    config = small_config(size, **data, data__tokenizer_hash=bpe.load(source, size).hash)
    workdir = write_small_run(tmp_path_factory.mktemp("runs") / "bpe", config)
    (workdir / run_folder.TOKENIZER).write_text(source)
    return SpanNormLM(str(workdir))


# ---- faults that others met ----------------------------------------------------------------------------------


def test_a_token_that_spans_the_join_leaves_no_continuation_empty(bpe_lm):
    encode = bpe_lm.tok_encode
    assert len(encode("foobar")) == 1 and len(encode("foo")) > 0  # one token, whose parts a task asks for
    context, continuation = bpe_lm._encode_pair("foo", "bar")
    assert (context, continuation) == (encode("foo"), encode("bar")) and continuation
    [(value, _)] = bpe_lm.loglikelihood(asked(("foo", "bar")))
    assert value == pytest.approx(-whole_nll(bpe_lm, encode("foo"), encode("bar")), rel=CLOSE) and value < 0
    # Where none spans it, both are encoded together, and the spaces between go with the continuation.
    context, continuation = bpe_lm._encode_pair("foobar ", "foobar")
    assert context + continuation == encode("foobar foobar") and context == encode("foobar")


def test_an_empty_context_is_an_end_of_text_and_an_empty_continuation_costs_nothing(lm):
    end = lm.run.tokenizer.end_of_text
    (value, _), (spaces, _), empty, nothing = lm.loglikelihood(asked(("", "ab"), (" ", "ab"), ("ab", ""), ("", "")))
    assert value == pytest.approx(-whole_nll(lm, [end], list(b"ab")), rel=CLOSE)
    assert spaces == pytest.approx(-whole_nll(lm, [end], list(b" ab")), rel=CLOSE)
    assert empty == nothing == (0, True)


def test_long_contexts_are_cut_by_tokens_and_the_boundary_stays(lm):
    context = "é" * 100
    [(value, _)] = lm.loglikelihood(asked((context, "ab")))
    want = whole_nll(lm, list(context.encode())[-(SEQ_LEN - 1) :], list(b"ab"))
    assert value == pytest.approx(-want, rel=CLOSE)


def test_a_continuation_longer_than_the_model_is_scored_whole(lm):
    [(value, _)] = lm.loglikelihood(asked(("x", TEXT)))
    ids = list(b"x" + TEXT.encode())
    pieces = [whole_nll(lm, ids[i : i + 1], ids[i + 1 : i + 1 + SEQ_LEN]) for i in range(0, len(ids) - 1, SEQ_LEN)]
    assert value == pytest.approx(-sum(pieces), rel=CLOSE)


def test_the_last_token_is_scored_and_greedy_is_what_sampling_takes(lm):
    greedy = lm.run.sample("def", max_tokens=6, temperature=0)[0]
    assert greedy.isalpha() and len(greedy) == 6
    other = greedy[:-1] + ("a" if greedy[-1] != "a" else "b")
    (value, is_greedy), (worse, is_not) = lm.loglikelihood(asked(("def", greedy), ("def", other)))
    assert (is_greedy, is_not) == (True, False) and value > worse


def test_rolling_begins_each_document_once_and_is_evaluates_loss(lm):
    """No second end of text, in no later window either: `Run.loss` is tested against `evaluate`'s program."""
    short, long = "x = 1\n", TEXT
    values = lm.loglikelihood_rolling(asked((long,), ("",), (short,)))
    want = [lm.run.loss(text) for text in (long, short)]
    assert values[1] == 0
    for value, loss in zip((values[0], values[2]), want, strict=True):
        assert -value == pytest.approx(loss["loss"] * loss["tokens"], rel=CLOSE)


def test_texts_are_made_in_order_until_a_stop_and_a_shape_compiles_once(lm, caplog):
    plain = {"max_gen_toks": 8, "do_sample": False}
    prompts = ["def ", "x", "import os and", "a" * 100]
    free = lm.generate_until(asked(*((p, plain) for p in prompts)))
    assert free[:3] == lm.run.sample(*prompts[:3], max_tokens=8, temperature=0)
    assert free[3] == lm.run.sample("a" * (SEQ_LEN - 8), max_tokens=8, temperature=0)[0]  # cut by tokens
    stop = free[1][2:4]
    cut = lm.generate_until(asked(*((p, plain | {"until": [stop]}) for p in prompts)))
    assert cut == [text.split(stop)[0] for text in free]
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        lm.generate_until(asked(("if ", plain), ("z", plain)))
    assert not [r for r in caplog.records if "prefill" in r.getMessage() or "decode" in r.getMessage()]


# ---- tasks ---------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A user's own tasks, one of each kind."""
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS), encoding="utf-8")
    source = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path}/q.jsonl\ntest_split: test\n"
    choice = "output_type: multiple_choice\ndoc_to_text: q\ndoc_to_choice: c\ndoc_to_target: a\ntarget_delimiter: ''\n"
    rolling = "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: q\n"
    text = "output_type: generate_until\ndoc_to_text: q\ndoc_to_target: '{{c[0]}}'\n"
    for name, kind, metrics in (
        ("choice", choice, ("acc", "acc_norm")),
        ("rolling", rolling, ("bits_per_byte", "word_perplexity")),
        ("text", text, ("exact_match",)),
    ):
        listed = "metric_list:\n" + "".join(f"  - metric: {metric}\n" for metric in metrics)
        (tmp_path / f"{name}.yaml").write_text(f"task: {name}\n{source}{kind}{listed}")
    return tmp_path


def judged(capsys, workdir, tasks, *argv, out="none"):
    """(task, metric) -> its score, from the one line that --json prints."""
    assert command.main(["--workdir", str(workdir), "--tasks", tasks, "--out", out, "--json", *map(str, argv)]) == 0
    line = json.loads(capsys.readouterr().out)
    return {(score["task"], score["metric"]): score for score in line["tasks"]}


def test_the_held_out_tasks_are_evaluates_bits_per_byte_and_a_question_of_four(capsys, trained):
    assert command.main(["--workdir", str(trained), "--out", "none", "--json"]) == 0
    loss = json.loads(capsys.readouterr().out)
    scores = judged(capsys, trained, "held_out_rolling,held_out_continuation")
    rolling, choice = scores["held_out_rolling", "bits_per_byte"], scores["held_out_continuation", "acc"]
    assert rolling["value"] == pytest.approx(loss["bits_per_byte"], rel=CLOSE)
    assert rolling["n"] == math.ceil(4000 / 64) and 0 < rolling["stderr"] < rolling["value"]
    assert rolling["chance"] == pytest.approx(8 * loss["tokens"] / loss["bytes"], rel=CLOSE)
    assert choice["chance"] == 0.25 and choice["n"] > 400
    assert choice["stderr"] == pytest.approx(math.sqrt(choice["value"] * (1 - choice["value"]) / (choice["n"] - 1)))


def test_every_continuation_is_true_once_and_false_three_times(trained):
    """So that a preference for some continuations, whatever the context, is right for one of four."""
    from spannorm_jax.inference import harness

    data, config = harness.task_of(run_folder.read_config(trained)).open(run_folder.read_config(trained))
    docs = harness._continuation(config, data).eval_docs
    true = [doc["choices"][doc["label"]] for doc in docs]
    assert sorted(itertools.chain.from_iterable(doc["choices"] for doc in docs)) == sorted(4 * true)
    assert {doc["label"] for doc in docs} == {0, 1, 2, 3}
    text = data.tokenizer.decode(data.eval.tokens)
    assert all(doc["context"] + own in text for doc, own in zip(docs, true, strict=True))


def test_tasks_on_the_users_disk_have_chance_and_error(capsys, workdir, lm, folder):
    scores = judged(capsys, workdir, "choice,rolling,text", "--include_path", folder)
    assert {pair: score["chance"] for pair, score in scores.items() if pair[0] != "rolling"} == {
        ("choice", "acc"): pytest.approx(1 / 3),
        ("choice", "acc_norm"): pytest.approx(1 / 3),
        ("text", "exact_match"): None,
    }
    losses = [lm.run.loss(question["q"]) for question in QUESTIONS]
    nats = np.array([loss["loss"] * loss["tokens"] for loss in losses])
    sizes = np.array([len(question["q"].encode()) for question in QUESTIONS])  # bytes of the text as it was read
    rolling = scores["rolling", "bits_per_byte"]
    assert rolling["value"] == pytest.approx(nats.sum() / sizes.sum() / math.log(2), rel=CLOSE)
    # Of resampled documents, by the definition; the linear form is good to a few percent of the error.
    drawn = np.random.default_rng(0).integers(3, size=(20_000, 3))
    resampled = (nats[drawn].sum(1) / sizes[drawn].sum(1) / math.log(2)).std() * math.sqrt(3 / 2)
    assert rolling["stderr"] == pytest.approx(resampled, rel=0.15) and rolling["n"] == 3
    one = judged(capsys, workdir, f"{folder}/choice.yaml", "--limit", 1)
    assert one["choice", "acc"]["n"] == 1
    argv = ["--tasks", "choice", "--include_path", str(folder), "--out", "none"]
    assert command.main(["--workdir", str(workdir), *argv]) == 0
    assert "chance 0.3333  (3 documents)" in capsys.readouterr().out


def test_a_judgement_is_recorded_beside_the_held_out_loss_and_not_as_one(capsys, workdir, folder):
    target = workdir / "eval.jsonl"
    judged(capsys, workdir, "choice", "--include_path", folder, out=str(target))
    run = read_run(workdir)
    assert run.held_out is None and run.evals == () and {score["task"] for score in run.tasks} == {"choice"}
    target.unlink()


@pytest.mark.parametrize(
    ("task", "words"), [("chioce", "did you mean 'choice'"), ("zzzz", "held_out_rolling"), ("broken", "cannot be read")]
)
def test_a_task_that_is_not_there_or_cannot_be_read_is_one_line(workdir, folder, task, words):
    (folder / "broken.yaml").write_text((folder / "choice.yaml").read_text().replace("q.jsonl", "nowhere.jsonl"))
    name = f"{folder}/broken.yaml" if task == "broken" else task
    with pytest.raises(UserError) as refused:
        command.main(["--workdir", str(workdir), "--tasks", name, "--include_path", str(folder)])
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_the_harness_finds_the_model_in_its_own_registry(workdir, lm, folder):
    import lm_eval
    from lm_eval.tasks import TaskManager

    tasks = TaskManager(include_path=str(folder), include_defaults=False)
    found = lm_eval.simple_evaluate("spannorm", f"workdir={workdir},step=1", tasks=["choice"], task_manager=tasks)
    assert found["n-samples"]["choice"]["effective"] == 3
