"""Sampling as a user sees it, against full forward passes and closed-form probabilities."""

import contextlib
import dataclasses
import logging
import os
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_run import small_config, write_small_run

from spannorm_jax import sample as command
from spannorm_jax.config_file import for_this_machine
from spannorm_jax.data.tokenizer import BYTES
from spannorm_jax.errors import UserError, visible
from spannorm_jax.inference.options import SampleOptions
from spannorm_jax.inference.sampling import TextStream, choose, encode_prompt, generate, sample
from spannorm_jax.model.definition import define

PROMPTS = [np.frombuffer(text, np.uint8) for text in (b"def ", b"x", b"import os\n")]


@pytest.fixture(scope="module")
def config():
    return small_config()


@pytest.fixture(scope="module")
def model(config):
    return define(config.model, config.execution)


def loud_padding(params):
    """The weights with a head that would rather choose ids that the tokenizer lacks."""
    head = jnp.zeros_like(params["head"]).at[:, :256].set(params["head"][:, :256])
    return params | {"head": head.at[:, 256:].set(30 * params["head"][:, 256:])}


def endless(params):
    """The weights with a head that hardly ever ends a text: that logit is 0, and 255 others have either sign."""
    return params | {"head": params["head"].at[:, BYTES.end_of_text].set(0)}


@pytest.fixture(scope="module")
def params(model):
    return loud_padding(jax.jit(model.init)(jax.random.key(3)))


@pytest.fixture(scope="module")
def greedy(model, params):
    """What repeated full forward passes, each row alone and without padding, rank first: 12 tokens a prompt."""
    forward = jax.jit(model.bind(params))
    rows = []
    for prompt in PROMPTS:
        tokens = [int(token) for token in prompt]
        for _ in range(12):
            # Causal: what stands after the last token does not matter, and one shape compiles once.
            padded = np.zeros((1, 24), np.int32)
            padded[0, : len(tokens)] = tokens
            tokens.append(int(np.argmax(forward(padded)[0, len(tokens) - 1, :256])))
        rows.append(tokens[len(prompt) :])
    assert len({tuple(row) for row in rows}) == 3
    return rows


def as_lists(rows):
    return [row.tolist() for row in rows]


@pytest.mark.parametrize(
    "options", [{"temperature": 0}, {"temperature": 5.0, "top_k": 1, "seed": 7}, {"temperature": 1e-45}]
)
def test_temperature_near_zero_or_top_1_is_the_argmax_of_the_full_forward_pass(model, params, greedy, options):
    assert as_lists(generate(model, params, {}, BYTES, PROMPTS, SampleOptions(12, **options))) == greedy


def test_a_row_ends_at_the_end_of_text_and_the_others_go_on(model, params, greedy):
    end = greedy[0][4]
    ends_here = dataclasses.replace(BYTES, end_of_text=end, token_bytes=np.ones(256, np.int32))
    shown = []
    options = SampleOptions(12, temperature=0)
    made = as_lists(generate(model, params, {}, ends_here, PROMPTS, options, show=shown.append))
    want = [row[: row.index(end)] if end in row else row for row in greedy]
    assert made == want and len(made[0]) <= 4 and max(map(len, made)) > len(made[0])
    assert len(shown) == min(12, max(map(len, made)) + 1)  # nothing is computed once all rows have ended
    for row, new in enumerate(made):
        column = [int(tokens[row]) for tokens in shown]
        assert column == new + [end] * (len(shown) - len(new))


@pytest.mark.parametrize("top_k", [0, 300])
def test_ids_that_the_tokenizer_lacks_are_never_drawn(model, params, top_k):
    made = generate(model, params, {}, BYTES, PROMPTS, SampleOptions(40, temperature=3.0, top_k=top_k))
    assert len(set(np.concatenate(made).tolist())) > 30  # a high temperature draws widely
    assert max(row.max() for row in made) < 256


def test_the_seed_decides_and_the_rest_of_the_batch_does_not(model, params):
    def texts(seed, prompts=PROMPTS):
        return as_lists(generate(model, params, {}, BYTES, prompts, SampleOptions(12, temperature=2.0, seed=seed)))

    assert texts(0) == texts(0) != texts(1)
    assert texts(0, PROMPTS[:1]) == texts(0)[:1]
    first, second, _ = texts(0, [PROMPTS[0], PROMPTS[0], PROMPTS[2]])
    assert first != second  # the same prompt twice is two draws


def test_no_token_after_the_first_compiles_anything(model, params, caplog):
    compiled = []

    def show(tokens):
        compiled.append([r for r in caplog.records if r.getMessage().startswith("Compiling")])
        caplog.clear()

    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        generate(model, params, {}, BYTES, PROMPTS, SampleOptions(7), show=show)
    assert len(compiled) == 7 and len(compiled[0]) >= 2  # reading the prompts, one token
    assert not any(compiled[1:])


@pytest.mark.parametrize("top_k", [0, 2])
def test_frequencies_are_those_of_the_softmax(top_k):
    """20,000 draws against exp(z / T), renormalised over the best k; 5 standard deviations of a binomial count."""
    logits, temperature, n = np.array([1.0, -0.5, 2.0, 0.0, 9.0]), 0.7, 20_000  # the last id pads the vocabulary
    keys = jax.random.split(jax.random.key(0), n)
    drawn = choose(jnp.broadcast_to(jnp.float32(logits), (n, 5)), keys, temperature, top_k, vocab_size=4)
    p = np.exp(logits[:4] / temperature) * ([1, 0, 1, 0] if top_k else 1)
    p /= p.sum()
    counts = np.bincount(drawn, minlength=5)
    assert counts[4] == 0
    np.testing.assert_array_less(np.abs(counts[:4] - n * p), 5 * np.sqrt(n * p * (1 - p)) + 1e-9)


# ---- text -----------------------------------------------------------------------------------------------


# A byte that UTF-8 never has is replaced, and so is a character that is cut short.
@pytest.mark.parametrize(
    ("made", "shown"), [("aé€😀\n".encode(), [*"aé€😀\n"]), (b"a\xc0b\xe2\x82", ["a", "\ufffdb", "\ufffd"])]
)
def test_a_stream_writes_whole_characters_as_they_come(made, shown):
    pieces = []
    stream = TextStream(BYTES, pieces.append)
    for byte in made:
        stream.add(np.array([byte]))
    stream.close()
    assert pieces == shown


def test_an_empty_prompt_begins_a_document():
    assert encode_prompt(BYTES, "").tolist() == [BYTES.end_of_text]
    assert encode_prompt(BYTES, "é").tolist() == list("é".encode())
    assert encode_prompt(BYTES, "\udcff").tolist() == list("\ufffd".encode())  # a byte of argv that is not UTF-8


# ---- from a run's folder ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workdir(config, tmp_path_factory):
    return write_small_run(tmp_path_factory.mktemp("runs") / "run", config, lambda p: endless(loud_padding(p)))


def run(capsys, workdir, *argv):
    assert command.main(["--workdir", str(workdir), "--max_tokens", "9", *argv]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    return printed.out


def test_a_prompt_is_continued_from_the_folder_alone(capsys, workdir):
    """Eight devices here: one prompt's row is filled up to eight, whatever the mesh."""
    out = run(capsys, workdir, "--prompt", "def ")
    assert out.startswith("def ") and out.endswith("\n") and len(out) > 5
    assert out == run(capsys, workdir, "--prompt", "def ", "--step", "2", "--seed", "0")
    others = (("--seed", "1"), ("--step", "1"))
    assert len({out, *(run(capsys, workdir, "--prompt", "def ", *other) for other in others)}) == 3
    assert out == run(capsys, workdir, "--prompt", "def ", "--config.mesh.data=4", "--config.mesh.fsdp=2")


def test_prompts_are_continued_together_as_each_alone(capsys, workdir):
    alone = run(capsys, workdir, "--prompt", "def ")
    out = run(capsys, workdir, "--prompt", "def ", "--prompt", "", "--prompt", "import os")
    first, rest = out.removeprefix("--- 1 of 3\n").split("--- 2 of 3\n")
    second, third = rest.split("--- 3 of 3\n")
    assert first == alone and third.startswith("import os")
    assert second.strip() and BYTES.decode([BYTES.end_of_text]) == ""


UNSEEN = "\x1b[31m\x07\r\x9b2J\u202e\u2066\udcff\t\n"


@pytest.mark.parametrize("prompts", [[UNSEEN], [UNSEEN, "x\x1bc"]])
def test_a_terminal_gets_control_characters_as_escapes_and_a_pipe_as_they_are(monkeypatch, workdir, prompts):
    """The prompt's and those that an untrained model draws among 60 tokens."""
    argv = ["--workdir", str(workdir), "--max_tokens", "60", "--temperature", "9", "--top_k", "0"]
    argv += [word for prompt in prompts for word in ("--prompt", prompt)]

    def read_from(ours, theirs):
        """What command.main writes to `theirs`, which a thread reads from `ours`: a terminal holds little."""
        read = []

        def reader():
            with contextlib.suppress(OSError):  # so ends a terminal
                while piece := os.read(ours, 4096):
                    read.append(piece)

        thread = threading.Thread(target=reader)
        thread.start()
        with open(theirs, "w", encoding="utf-8", newline="\n") as stdout, monkeypatch.context() as patched:
            patched.setattr(sys, "stdout", stdout)
            assert command.main(argv) == 0
        thread.join()
        os.close(ours)
        return b"".join(read).decode()

    piped, shown = read_from(*os.pipe()), read_from(*os.openpty())
    assert all(prompt.replace("\udcff", "\ufffd") in piped for prompt in prompts)
    assert len(set(piped) & set(map(chr, range(32)))) > 5  # some are the model's own
    # The terminal itself makes \r\n of \n.
    assert shown.replace("\r\n", "\n") == visible(piped)


def test_one_prompt_is_written_as_it_comes(config, workdir):
    pieces = []
    sample(for_this_machine(config), workdir, None, ["def "], SampleOptions(9, temperature=0), pieces.append)
    assert pieces[0] == "def " and pieces[-1] == "\n" and len(pieces) > 3


def test_a_note_says_where_the_trained_length_ends(capsys, workdir):
    command.main(["--workdir", str(workdir), "--prompt", "def ", "--max_tokens", "29"])
    note = capsys.readouterr().err
    assert note.count("\n") == 1 and "32 tokens" in note and "33" in note


def test_more_than_the_cache_may_hold_is_refused(config, workdir):
    with pytest.raises(UserError, match=r"4 \+ 2000000000 tokens take .* MiB, above --max_cache_mib 4096"):
        sample(for_this_machine(config), workdir, None, ["def "], SampleOptions(2_000_000_000), print)


def test_a_step_that_was_not_saved_is_refused(config, workdir):
    with pytest.raises(UserError, match="no checkpoint of step 3; there are 1, 2"):
        sample(for_this_machine(config), workdir, 3, ["def "], SampleOptions(), print)
