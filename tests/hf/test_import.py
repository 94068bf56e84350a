"""A model on disk becomes a run: weights to the bit, config.json read key by key, tokenizers of others, and then
everything that a run is for."""

import json
from operator import attrgetter

import chex
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from exported_runs import configure, experts, export_run, read_model
from safetensors.numpy import load_file, save_file
from tokenizers import decoders, models, normalizers, pre_tokenizers

from spannorm_jax import evaluate, import_hf, sample, train
from spannorm_jax import export as export_command
from spannorm_jax.analysis import signal
from spannorm_jax.command import run_command
from spannorm_jax.config import DataConfig
from spannorm_jax.data.tokens import open_tokenizer
from spannorm_jax.errors import UserError
from spannorm_jax.hf.files import read_json
from spannorm_jax.hf.tokenizer import run_tokenizer_json

LLAMA = {"placement": "pre"}
LAYOUTS = [LLAMA, LLAMA | {"qk_norm": True}, LLAMA | experts()]


@pytest.fixture
def exported(tmp_path):
    """options of a model -> its parameters and the folder that it was exported to."""

    def run(changes, text=""):
        _, params, _ = export_run(tmp_path, changes, "stock", text=text)
        return params, tmp_path / "out"

    return run


def rewrite(folder, tensors=None, **changes):
    """Changes keys of config.json (None: removes one), and tensors."""
    values = read_json(folder / "config.json") | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    if tensors:
        save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("changes", LAYOUTS, ids=["llama", "qwen3", "mixtral"])
def test_what_leaves_comes_back_to_the_bit(exported, changes):
    params, folder = exported(changes)
    model, back = read_model(folder)
    chex.assert_trees_all_equal(back, params)
    want = configure(**changes).model
    names = ("depth", "width", "num_heads", "num_kv_heads", "vocab_size", "placement", "norm_eps", "rope_theta")
    names += ("qk_norm", "moe.num_experts", "moe.top_k")
    assert {name: attrgetter(name)(model) for name in names} == {name: attrgetter(name)(want) for name in names}


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
def test_weights_of_half_the_bits_are_exact(exported, dtype):
    _, folder = exported(LLAMA)
    tensors = {name: tensor.astype(dtype) for name, tensor in load_file(folder / "model.safetensors").items()}
    rewrite(folder, tensors)
    _, back = read_model(folder)
    np.testing.assert_array_equal(back["embed"], tensors["model.embed_tokens.weight"].astype(np.float32))


@pytest.mark.parametrize("stored", [False, True])
def test_a_tied_head_becomes_a_matrix_of_its_own(exported, stored):
    params, folder = exported(LLAMA)
    tensors = load_file(folder / "model.safetensors")
    if not stored:
        del tensors["lm_head.weight"]
    rewrite(folder, tensors, tie_word_embeddings=True)
    model, back = read_model(folder)
    assert not model.tied_head
    np.testing.assert_array_equal(back["head"], params["embed"].T)


def test_what_is_left_out_is_what_transformers_takes(exported):
    _, folder = exported(LLAMA)
    rewrite(folder, rope_theta=None, rope_parameters=None, rms_norm_eps=None, head_dim=None)
    model, _ = read_model(folder)
    assert (model.rope_theta, model.norm_eps) == (10_000.0, 1e-6)
    rewrite(folder, rope_parameters={"rope_type": "default", "rope_theta": 5e5}, rope_theta=1e4)
    assert read_model(folder)[0].rope_theta == 5e5  # version 5's key counts


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "gpt2"}, "model_type='gpt2' cannot be imported; valid ones are llama, mixtral, qwen3"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu', which our model has not"),
        ({"attention_bias": True}, "attention_bias=True, which our model has not"),
        ({"sliding_window": 4096}, "sliding_window=4096, which our model has not"),
        ({"layer_types": ["sliding_attention"]}, "layer_types=['sliding_attention'], which our model has not"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling="),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_parameters="),
        ({"head_dim": 16}, "head_dim=16, where ours is hidden_size / num_attention_heads = 8"),
        ({"some_new_option": 3}, "some_new_option=3, which our model has not"),
        ({"hidden_size": None}, "hidden_size=None must be an integer above 0"),
        ({"num_attention_heads": 3}, "head_dim=8, where ours is"),
        ({"num_attention_heads": 0}, "num_attention_heads=0 must be an integer above 0"),
        ({"rms_norm_eps": "x"}, "model.norm_eps='x' must be"),
        ({"rope_parameters": 3}, "rope_parameters=3"),
        ({"num_hidden_layers": 5}, "has no tensor model.layers.4."),
        ({"num_hidden_layers": 3}, "has a tensor model.layers.3.input_layernorm.weight, which our model has not"),
        ({"intermediate_size": 50}, "tensor model.layers.0.mlp.gate_proj.weight has shape (48, 32)"),
        ({"eos_token_id": None}, "eos_token_id=None names no token that ends a document"),
    ],
)
def test_what_our_model_has_not_is_one_line(exported, tmp_path, monkeypatch, capsys, changes, says):
    _, folder = exported(LLAMA)
    rewrite(folder, **changes)
    monkeypatch.setattr("sys.argv", ["import_hf", str(folder), "--workdir", str(tmp_path / "new")])
    with pytest.raises(SystemExit) as exit_:
        run_command(import_hf.main)
    printed = capsys.readouterr()
    assert exit_.value.code == 2 and printed.err.count("\n") == 1 and "Traceback" not in printed.err
    assert says in printed.err and not (tmp_path / "new").exists()


def test_a_window_that_is_switched_off_is_none(exported):
    _, folder = exported(LLAMA | {"qk_norm": True})
    rewrite(folder, sliding_window=4096, use_sliding_window=False, layer_types=["full_attention"] * 4)
    read_model(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_missing_or_damaged_file_is_named(exported, tmp_path, name):
    _, folder = exported(LLAMA)
    for damage in (lambda path: path.write_bytes(b"{"), lambda path: path.unlink()):
        damage(folder / name)
        with pytest.raises(UserError, match=str(folder)):
            import_hf.main([str(folder), "--workdir", str(tmp_path / "new")])
        assert not (tmp_path / "new").exists()


# ---- tokenizers ---------------------------------------------------------------------------------------

TEXT = "def f(x):\n    return 'é 漢字 🙂' + \"<|endoftext|>\"\n"
SPECIAL = ("<|begin|>", "<|end|>", "<think>")


def trained(path):
    """A byte-level BPE as Llama 3 and Qwen 3 have it: added tokens beyond its vocabulary, and a begin of each text."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made.train_from_iterator(
        [TEXT * 9], tokenizers.trainers.BpeTrainer(vocab_size=280, special_tokens=[], initial_alphabet=alphabet)
    )
    made.add_special_tokens([*SPECIAL[:2]])
    made.add_tokens([SPECIAL[2]])
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|begin|> $0", special_tokens=[("<|begin|>", made.token_to_id("<|begin|>"))]
    )
    made.enable_truncation(4)
    made.save(str(path))
    made.no_truncation()
    return made


def sentence_pieces(path):
    """A BPE of characters with bytes for the others, as Llama 2 and Mixtral have it."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *"▁defrtun(x):é\n", "▁d", "▁de", "▁def"]
    merges = [("▁", "d"), ("▁d", "e"), ("▁de", "f")]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    made = tokenizers.Tokenizer(models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.save(str(path))
    return made


def opened(path, end, rows):
    """Our tokenizer of a tokenizer.json from elsewhere, as an import leaves it to the run."""
    path.write_text(run_tokenizer_json(read_json(path), end), encoding="utf-8")
    return open_tokenizer(DataConfig(tokenizer="bpe", bpe_vocab_size=rows, tokenizer_file=str(path)))


def test_a_byte_level_tokenizer_of_others_gives_its_ids(tmp_path):
    theirs = trained(tmp_path / "tokenizer.json")
    end = theirs.token_to_id("<|end|>")
    ours = opened(tmp_path / "tokenizer.json", end, rows=end + 1)  # as many as there are, and no multiple of 128
    assert ours.encode(TEXT.encode()).tolist() == theirs.encode(TEXT, add_special_tokens=False).ids
    forged = "".join(SPECIAL)
    ids = ours.encode(forged.encode())
    assert ids.max() < theirs.token_to_id("<|begin|>") and ours.decode(ids) == forged
    assert (ours.end_of_text, ours.decode([end])) == (end, "")
    assert int(ours.token_bytes[ids].sum()) == len(forged)


def test_a_tokenizer_of_characters_and_bytes_gives_its_ids(tmp_path):
    theirs = sentence_pieces(tmp_path / "tokenizer.json")
    ours = opened(tmp_path / "tokenizer.json", 2, rows=384)
    for text in ("def f", TEXT.replace("<|endoftext|>", "")):
        ids = ours.encode(text.encode())
        assert ids.tolist() == theirs.encode(text, add_special_tokens=False).ids
        assert ours.decode(ids) == " " + text  # SentencePiece's own space before a text
    assert 2 not in ours.encode(b"a</s>b") and ours.end_of_text == 2


def test_several_ends_of_a_document_are_refused(tmp_path):
    trained(tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match=r"3 added tokens.*data\.tokenizer_file"):
        open_tokenizer(DataConfig(tokenizer="bpe", tokenizer_file=str(tmp_path / "tokenizer.json")))


# ---- the run ------------------------------------------------------------------------------------------


@pytest.mark.process
@pytest.mark.parametrize("text", ["", TEXT * 9], ids=["bytes", "bpe"])
def test_the_run_is_evaluated_sampled_measured_trained_on_and_exported(exported, tmp_path, monkeypatch, capsys, text):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    _, folder = exported(LLAMA, text=text)
    workdir = str(tmp_path / "imported")
    small = ("--config.training.steps=4", "--config.training.batch_size=8", "--config.eval.tokens=512")
    assert import_hf.main([str(folder), "--workdir", workdir, "--config.data.eval_split=train[:1%]", *small]) == 0
    # The same text as the run that it was exported from: same weights, same tokenizer.
    prompt = ("--prompt", "def f", "--max_tokens", "8", "--temperature", "0")
    capsys.readouterr()
    assert sample.main(["--workdir", str(tmp_path / "run"), *prompt]) == 0
    before = capsys.readouterr().out
    assert sample.main(["--workdir", workdir, *prompt]) == 0
    assert capsys.readouterr().out == before
    assert evaluate.main(["--workdir", workdir, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["step"] == 0 and 0 < result["loss"] < 20
    assert signal.main(["--workdir", workdir, "--json", "--rows=1", "--only=forward"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 0
    assert train.main(["--config", f"{workdir}/config.json", "--workdir", workdir]) == 0
    assert "continuing after step 0" in capsys.readouterr().out
    assert export_command.main(["--workdir", workdir, "--out", str(tmp_path / "again")]) == 0
    card = (tmp_path / "again/README.md").read_text(encoding="utf-8")
    assert "Trained with spannorm_jax from the weights of an import" in card and "spannorm_jax.import_hf" in card
