"""What an exported folder holds, read without transformers: names, orientation, folded constants, what is refused."""

import ast
import inspect
import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from exported_runs import SEQ_LEN, configure, configure_images, draw, experts, export_run, save
from safetensors.numpy import load_file

from spannorm_jax import export as command
from spannorm_jax.command import run_command
from spannorm_jax.durable import append_line
from spannorm_jax.errors import UserError
from spannorm_jax.hf import files
from spannorm_jax.hf.custom import modelling_file
from spannorm_jax.hf.export import export
from spannorm_jax.hf.stock import STOCK, stock_for
from spannorm_jax.model import placement, rivals
from spannorm_jax.model.placement import PLACEMENTS

ROOM = 1e-6  # of a float32 product of two float32 numbers, relatively: a few units in the last place


@pytest.fixture
def exported(tmp_path):
    """(options of the model, how) -> config, parameters, state, tensors and config.json of an export."""

    def run(changes, **how):
        made, out = export_run(tmp_path, changes, **how), tmp_path / "out"
        return *made, load_file(out / "model.safetensors"), json.loads((out / "config.json").read_text())

    return run


def linear(weight, inputs=1):
    """(out, in) of a weight whose first `inputs` axes are its inputs."""
    return weight.reshape(np.prod(weight.shape[:inputs]), -1).T


def test_llamas_names_and_orientation(exported):
    config, params, _, tensors, said = exported({"placement": "pre"})
    names = [
        *("input_layernorm", "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
        *(f"self_attn.{name}_proj" for name in "qkvo"),
    ]
    ends = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert set(tensors) == ends | {f"model.layers.{i}.{name}.weight" for i in range(4) for name in names}
    block = {name: tensors[f"model.layers.2.{name}.weight"] for name in names}
    attn, ffn, norms = (params["blocks"][name] for name in ("attn", "ffn", "norms"))
    for name, tensor in {
        "self_attn.q_proj": linear(attn["q"][2]),
        "self_attn.k_proj": linear(attn["k"][2]),
        "self_attn.v_proj": linear(attn["v"][2]),
        "self_attn.o_proj": linear(attn["out"][2], inputs=2),
        "mlp.gate_proj": ffn["in_"][2, 0].T,
        "mlp.up_proj": ffn["in_"][2, 1].T,
        "mlp.down_proj": ffn["out"][2].T,
        "input_layernorm": norms["before_attn"]["gain"][2],
        "post_attention_layernorm": norms["before_ffn"]["gain"][2],
    }.items():
        np.testing.assert_array_equal(block[name], tensor, err_msg=name)
    np.testing.assert_array_equal(tensors["lm_head.weight"], params["head"].T)
    np.testing.assert_array_equal(tensors["model.embed_tokens.weight"], params["embed"])
    # Version 4 reads the one, version 5 the other, and each falls back to 10,000 without it.
    assert said["rope_theta"] == said["rope_parameters"]["rope_theta"] == 777.0 == config.model.rope_theta
    assert (said["tie_word_embeddings"], said["max_position_embeddings"], said["head_dim"]) == (False, SEQ_LEN, 8)
    assert (said["bos_token_id"], said["eos_token_id"], said["torch_dtype"]) == (255, 255, "float32")


def test_constants_are_folded_into_what_they_multiply(exported):
    """CompleteP at twice the width and depth of its base, with a tied head: all four constants differ from 1."""
    base = {"parametrisation": "completep", "base_width": 16, "base_depth": 2, "base_head_dim": 2}
    _, params, _, tensors, _ = exported({"placement": "lns", "tied_head": True, "qk_norm": True} | base)
    block, own = (lambda name: tensors[f"model.layers.2.{name}.weight"]), params["blocks"]
    for name, tensor in {
        "self_attn.q_norm": own["attn"]["q_norm"]["gain"][2] * (2 / 8) ** 0.5,  # muP's 1 / K beyond the base's head
        "self_attn.k_norm": own["attn"]["k_norm"]["gain"][2],
        "self_attn.q_proj": linear(own["attn"]["q"][2]),
        "self_attn.o_proj": linear(own["attn"]["out"][2], inputs=2) / 2,  # depth over base_depth
        "mlp.down_proj": own["ffn"]["out"][2].T / 2,
        "input_layernorm": own["norms"]["before_attn"]["gain"][2] / 3**0.5,  # LayerNorm Scaling's, of the third block
    }.items():
        np.testing.assert_allclose(block(name), tensor, rtol=ROOM, err_msg=name)
    np.testing.assert_allclose(tensors["lm_head.weight"], params["embed"] / 2, rtol=ROOM)  # width over base_width
    np.testing.assert_allclose(tensors["model.embed_tokens.weight"], params["embed"] * 32**0.5 / 2**0.5, rtol=ROOM)


@pytest.mark.parametrize("depth_factor", ["weight", "multiplier"])
def test_scaleinits_factor_at_a_branch_is_folded(exported, depth_factor):
    changes = {"placement": "pre", "init": "scale", "depth_factor": depth_factor}
    _, params, _, tensors, _ = exported(changes)
    factor = 1.0 if depth_factor == "weight" else (4 * 2 * 4) ** -0.5  # a budget of 1 / L for 2 L additions
    got = tensors["model.layers.0.mlp.down_proj.weight"]
    np.testing.assert_allclose(got, params["blocks"]["ffn"]["out"][0].T * factor, rtol=ROOM)


def test_a_branch_that_ends_in_a_norm_has_its_constant_in_the_gain(exported):
    base = {"parametrisation": "completep", "base_width": 32, "base_depth": 2}
    _, params, _, tensors, _ = exported({"placement": "peri"} | base)
    gain = params["blocks"]["norms"]["after_ffn"]["gain"][1] / 2
    # Gemma adds 1 to what is stored, and multiplies embeddings by sqrt(width).
    got = tensors["model.layers.1.post_feedforward_layernorm.weight"]
    np.testing.assert_allclose(got + 1, gain, rtol=ROOM)
    np.testing.assert_allclose(tensors["model.embed_tokens.weight"] * 32**0.5, params["embed"], rtol=ROOM)
    np.testing.assert_array_equal(tensors["model.layers.1.mlp.down_proj.weight"], params["blocks"]["ffn"]["out"][1].T)


def test_experts_have_tensors_of_their_own(exported):
    moe = experts(scores="sigmoid", balance="bias", num_shared=2, first_dense=1)
    _, params, state, tensors, said = exported({"placement": "pre"} | moe)
    own, at = params["moe_blocks"]["ffn"], "model.layers.2.mlp"  # the second block with experts
    for name, tensor in {
        "gate.weight": own["router"][1].T,
        "gate.e_score_correction_bias": state["moe_blocks"]["ffn"]["bias"][1],
        "experts.3.gate_proj.weight": own["in_"][1, 3, 0].T,
        "experts.3.up_proj.weight": own["in_"][1, 3, 1].T,
        "experts.0.down_proj.weight": own["out"][1, 0].T,
        "shared_experts.down_proj.weight": own["shared"]["out"][1].T,
    }.items():
        np.testing.assert_array_equal(tensors[f"{at}.{name}"], tensor, err_msg=name)
    assert "model.layers.0.mlp.down_proj.weight" in tensors
    assert (said["model_type"], said["first_k_dense_replace"], said["n_shared_experts"]) == ("glm4_moe", 1, 2)


def test_bfloat16_is_rounded_once_after_folding_and_the_routers_bias_is_not(exported):
    _, params, state, tensors, said = exported(
        {"placement": "lns"} | experts(scores="sigmoid", balance="bias", num_shared=1), dtype="bfloat16"
    )
    gain = params["moe_blocks"]["norms"]["before_ffn"]["gain"][2] * np.float32(3**-0.5)
    got = tensors["model.layers.2.post_attention_layernorm.weight"]
    np.testing.assert_array_equal(got.astype(np.float32), gain.astype(jnp.bfloat16).astype(np.float32))
    bias = tensors["model.layers.2.mlp.gate.e_score_correction_bias"]
    np.testing.assert_array_equal(bias, state["moe_blocks"]["ffn"]["bias"][2])
    assert said["torch_dtype"] == "bfloat16"


def test_large_models_come_in_shards_with_an_index(tmp_path):
    tensors = {f"t{i}": np.full((8, 8), i, np.float32) for i in range(5)}
    files.write_tensors(tmp_path, tensors.items(), shard_bytes=600)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 5 * 256}
    assert sorted({*index["weight_map"].values()}) == [f"model-{i:05}-of-00003.safetensors" for i in (1, 2, 3)]
    read = files.TensorFiles(tmp_path)
    assert all((read(name, (8, 8)) == tensor).all() for name, tensor in tensors.items()) and not read.unread


# ---- the modelling file ------------------------------------------------------------------------------


def test_the_placements_that_are_pasted_know_no_framework():
    """The modelling file holds their text, where there is no JAX: they may import what Python has, and one another."""
    own = {"spannorm_jax.config", "spannorm_jax.model.placement", "spannorm_jax.model.traced"}
    for module in (placement, rivals):
        nodes = list(ast.walk(ast.parse(inspect.getsource(module))))
        names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        assert {name for name in names - own if name.split(".")[0] not in sys.stdlib_module_names} == set()


def test_the_modelling_file_holds_every_equation_word_for_word():
    text = modelling_file()
    assert all(inspect.getsource(one.block) in text for one in PLACEMENTS.values())
    imported = [line for line in text.splitlines() if line.lstrip().startswith(("import ", "from "))]
    assert not any("jax" in line for line in imported)  # transformers refuses a file over an import that is not there
    compile(text, "modeling_spannorm.py", "exec")


# ---- tokenizers ---------------------------------------------------------------------------------------

TEXT = "def f(x):\n    return 'é 漢字 🙂\0' + \"<|endoftext|>\"\n" * 20


@pytest.mark.parametrize("trained", [False, True])
def test_the_tokenizer_gives_the_runs_ids_and_no_text_forges_an_end(exported, tmp_path, trained):
    exported({"placement": "span"}, text=TEXT if trained else "")
    read = tokenizers.Tokenizer.from_file(str(tmp_path / "out/tokenizer.json"))
    read.encode_special_tokens = True  # what transformers does for split_special_tokens
    said = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert said["split_special_tokens"] and said["tokenizer_class"] == "PreTrainedTokenizerFast"
    ids = read.encode(TEXT).ids
    if trained:
        source = (tmp_path / "run/tokenizer.json").read_text(encoding="utf-8")
        assert ids == tokenizers.Tokenizer.from_str(source).encode(TEXT).ids
    else:
        assert ids == list(TEXT.encode())
    end = json.loads((tmp_path / "out/config.json").read_text())["eos_token_id"]
    assert read.decode(ids) == TEXT and end not in ids and read.id_to_token(end) == said["eos_token"]


def test_rows_that_fill_up_the_vocabulary_are_never_drawn(exported, tmp_path):
    config, *_ = exported({"placement": "span"}, text=TEXT)
    said = json.loads((tmp_path / "out/generation_config.json").read_text())
    unused = said["suppress_tokens"]
    assert unused == list(range(unused[0], config.model.vocab_size)) and said["eos_token_id"] == unused[0] - 1


# ---- the card -----------------------------------------------------------------------------------------


def test_the_card_says_what_the_records_say(tmp_path):
    config = configure(placement="span")
    _, params, state = draw(config)
    workdir = tmp_path / "run"
    save(workdir, config, params, state, step=3)
    start = {"git_commit": "abc123", "command": "python -m x", "versions": {"jax": "0.1"}}
    measured = {"loss": 2.25, "bits_per_byte": 3.25, "tokens": 512, "split": "validation"}
    append_line(workdir / "starts.jsonl", {"first_step": 1} | start)
    append_line(workdir / "metrics.jsonl", {"step": 3, "loss": 2.5})
    append_line(workdir / "eval.jsonl", {"step": 3} | measured)
    export(config, workdir, None, tmp_path / "out", "", "float32")
    text = (tmp_path / "out/README.md").read_text(encoding="utf-8")
    tokens = 3 * config.training.batch_size * SEQ_LEN
    said = ("abc123", "python -m x", "jax 0.1", "2.5000", "2.2500", f"{tokens:,} tokens", "licence")
    for part in (*said, '"placement": "span"'):
        assert part in text, part


# ---- what is refused ----------------------------------------------------------------------------------


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """The line that an export of a model is refused with; nothing is written."""

    def run(changes, *argv, state=None, prepare=lambda out: None):
        config = configure(**changes)
        _, params, drawn = draw(config)
        save(tmp_path / "run", config, params, state or drawn)
        out = tmp_path / "out"
        prepare(out)
        before = sorted(tmp_path.iterdir())
        monkeypatch.setattr("sys.argv", ["export", "--workdir", str(tmp_path / "run"), "--out", str(out), *argv])
        with pytest.raises(SystemExit) as exit_:
            run_command(command.main)
        printed = capsys.readouterr()
        assert exit_.value.code == 2 and printed.err.count("\n") == 1 and "Traceback" not in printed.err
        assert sorted(tmp_path.iterdir()) == before
        return printed.err

    return run


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"placement": "span"}, "no architecture of transformers has model.placement=span"),
        ({"placement": "pre", "norm": "layernorm", "qk_norm": True}, "Qwen3ForCausalLM, lacks model.norm=layernorm"),
        ({"placement": "pre"} | experts(num_shared=1), "MixtralForCausalLM, lacks model.moe.num_shared=1"),
        ({"placement": "olmo2"} | experts(), "Qwen3MoeForCausalLM, lacks model.placement=olmo2"),
    ],
)
def test_stock_is_refused_where_none_is_exact(refused, changes, says):
    line = refused(changes, "--arch", "stock")
    assert says in line and line.endswith("write --arch custom\n")


def test_a_branch_that_warms_up_is_refused(refused):
    state = {"blocks": {"warmup_factor": np.float32([1, 1, 0.5, 0.25])}}
    line = refused({"placement": "pre", "branch_warmup_steps": 2.0}, state=state)
    assert "block 3 of 4 is still warming up" in line and "update 8 or after" in line


def test_a_folder_that_holds_something_is_refused(refused):
    def prepare(out):
        out.mkdir()
        (out / "mine").touch()

    assert "exists and is not an empty folder" in refused({"placement": "pre"}, prepare=prepare)


def test_unknown_arguments_are_refused(refused):
    assert "'stock', 'custom'" in refused({"placement": "pre"}, "--arch", "llama")


def test_a_placement_declared_elsewhere_is_refused(tmp_path, monkeypatch):
    @placement.declare("theirs", "Theirs", like=placement.post)
    def theirs(x, attn, ffn, n, layer, cfg):
        return n.after_ffn(ffn(n.after_attn(attn(x))))

    try:
        with pytest.raises(UserError, match=r"model\.placement=theirs was declared in .*test_export"):
            export(configure(placement="theirs"), tmp_path, None, tmp_path / "out", "", "float32")
    finally:
        del PLACEMENTS["theirs"]


def test_a_model_that_a_stock_architecture_carries_goes_there_unless_custom_is_asked_for(exported, tmp_path):
    *_, said = exported({"placement": "pre"}, arch="custom")
    assert said["model_type"] == "spannorm" and (tmp_path / "out/modeling_spannorm.py").exists()
    assert stock_for(configure(placement="pre").model)[0].model_type == "llama"
    assert len({architecture.model_type for architecture in STOCK}) == len(STOCK)


# ---- images -----------------------------------------------------------------------------------------------------


def test_images_by_their_names_in_transformers_and_a_card(tmp_path):
    config = configure_images(image__channels=1)
    _, params, state = draw(config)
    save(tmp_path / "run", config, params, state)
    measured = {"step": 1, "loss": 0.5, "accuracy": 0.75, "images": 9, "split": "test"}
    append_line(tmp_path / "run" / "eval.jsonl", measured)
    assert export(config, tmp_path / "run", None, tmp_path / "out", "stock", "float32") == "ViTForImageClassification"
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    kernel = tensors["vit.embeddings.patch_embeddings.projection.weight"]
    assert kernel.shape == (32, 1, 4, 4)
    np.testing.assert_array_equal(kernel[7, 0, 2, 3], params["embed"][2 * 4 + 3, 7])
    np.testing.assert_array_equal(tensors["vit.embeddings.position_embeddings"][0, 0], np.zeros(32))
    biased = ("attention.output.dense", "layernorm_before", "layernorm_after", "intermediate.dense", "output.dense")
    block = [f"attention.attention.{name}.weight" for name in ("query", "key", "value")]
    block += [f"{name}.{kind}" for name in biased for kind in ("weight", "bias")]
    assert {name for name in tensors if ".layer.1." in name} == {f"vit.encoder.layer.1.{name}" for name in block}
    assert not any(tensor.any() for name, tensor in tensors.items() if name.endswith("bias"))
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    for words in ("image-classification", "AutoModelForImageClassification", "32 images in 1 updates"):
        assert words.replace("32", str(config.training.batch_size)) in card
    assert "0.5000 nats an image, 0.7500 accuracy (9 images of `test`)" in card
    assert "token" not in card.split("## Config")[0]


@pytest.mark.parametrize(
    ("changes", "arch", "says"),
    [
        ({"image__pool": "mean"}, "", "it lacks image.pool=mean"),
        ({"model__placement": "span", "model__norm": "rmsnorm"}, "", "model.placement=span, model.norm=rmsnorm"),
        ({"model__ffn": "swiglu"}, "stock", "model.ffn=swiglu"),
        ({"model__qk_norm": True, "model__num_kv_heads": 2}, "", "model.qk_norm=True, model.num_kv_heads=2 of 4 heads"),
        ({"model__moe__num_experts": 4}, "", "model.moe.num_experts=4"),
        ({}, "custom", "--arch custom is of task=text"),
    ],
)
def test_images_that_are_no_vit_of_transformers_are_refused(tmp_path, changes, arch, says):
    with pytest.raises(UserError, match=says):
        export(configure_images(**changes), tmp_path / "run", None, tmp_path / "out", arch, "float32")
    assert not (tmp_path / "out").exists()
