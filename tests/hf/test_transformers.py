"""transformers computes what we do, with every placement and in every stock architecture: `make test-hf`.

The exports are made here; what needs torch runs in a venv of its own (Makefile), one process for all of them.
"""

import json
import os
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest
from exported_runs import SEQ_LEN, configure, configure_images, draw, experts, read_model, save, with_bpe

from spannorm_jax.durable import write_json
from spannorm_jax.hf import vit
from spannorm_jax.hf.export import export
from spannorm_jax.hf.stock import STOCK
from spannorm_jax.hf.tokenizer import END_OF_TEXT
from spannorm_jax.inference.options import SampleOptions
from spannorm_jax.inference.sampling import run_tokenizer, sample
from spannorm_jax.model.definition import define
from spannorm_jax.model.placement import PLACEMENTS

ROOT = Path(__file__).parents[2]
VENVS = [
    pytest.param(".venv-hf", marks=pytest.mark.process),
    pytest.param(".venv-hf4", marks=pytest.mark.slow),
]
# Logits have entries up to 5. The two sides sum in other orders. The largest difference seen was 6e-6 on one CPU, and
# 1.2e-5 on another.
CLOSE = 2e-5

MUP = {"parametrisation": "completep", "base_width": 16, "base_depth": 2, "base_head_dim": 4}
PRE = {"placement": "pre"}
SIGMOID = {"scores": "sigmoid", "balance": "bias"}
QWEN = {"renormalize": False, "every": 2}
STOCK_CASES = {  # architecture -> models that it carries
    "LlamaForCausalLM": [
        PRE,
        PRE | {"num_kv_heads": 4} | MUP,
        {"placement": "lns"},
        {"placement": "layerscale", "tied_head": False},
        {"placement": "pre_embnorm"},
        {"placement": "pre_embnorm", "tied_head": True},
        PRE | {"init": "scale", "depth_factor": "multiplier"},
        PRE | {"branch_warmup_steps": 1.0},
    ],
    "GraniteForCausalLM": [PRE | {"tied_head": True}, PRE | {"tied_head": True} | MUP],
    "Qwen3ForCausalLM": [PRE | {"qk_norm": True}, PRE | {"qk_norm": True, "tied_head": True} | MUP],
    "Exaone4ForCausalLM": [{"placement": "olmo2"}, {"placement": "olmo2"} | MUP],
    "Gemma2ForCausalLM": [{"placement": "peri"}, {"placement": "peri", "tied_head": True}, {"placement": "peri"} | MUP],
    "Gemma3ForCausalLM": [{"placement": "peri", "qk_norm": True}],
    "BitNetForCausalLM": [{"placement": "subln"}],
    "ArceeForCausalLM": [PRE | {"ffn": "gelu"}, PRE | {"ffn": "relu"}],
    "StableLmForCausalLM": [PRE | {"norm": "layernorm"}],
    "MixtralForCausalLM": [PRE | experts(), {"placement": "layerscale"} | experts() | MUP],
    "Qwen3MoeForCausalLM": [
        PRE | {"qk_norm": True} | experts(**QWEN),
        PRE | {"qk_norm": True} | experts(first_dense=1, every=3),
    ],
    "Glm4MoeForCausalLM": [
        PRE | experts(**SIGMOID, num_shared=2, first_dense=1),
        PRE | {"qk_norm": True} | experts(scores="sigmoid", num_shared=1, renormalize=False),
    ],
}
CUSTOM_CASES = [
    *({"placement": name} for name in PLACEMENTS),
    *({"placement": name} | experts() for name in PLACEMENTS),
    {"placement": "span", "tied_head": True, "qk_norm": True, "norm": "layernorm"} | MUP,
    {"placement": "span", "ffn": "gelu"},
    {"placement": "span_raw", "ffn": "relu"} | experts(renormalize=False),
    {"placement": "mix", "mix_share": 0.5, "init": "scale", "depth_factor": "multiplier"},
    {"placement": "span"} | experts(**SIGMOID, num_shared=2, first_dense=2, every=2),
    {"placement": "subln"} | experts(num_shared=1, every=2),
    {"placement": "siamese"} | experts(**SIGMOID, first_dense=1, top_k=3),
]
CASES = {
    **{f"{name}-{i}": (name, changes) for name, models in STOCK_CASES.items() for i, changes in enumerate(models)},
    **{
        f"custom-{i:02}-{changes['placement']}": ("SpannormForCausalLM", changes)
        for i, changes in enumerate(CUSTOM_CASES)
    },
}


BPE = {"bpe-stock": ("LlamaForCausalLM", PRE), "bpe-custom": ("SpannormForCausalLM", {"placement": "span"})}
WITH_TEXT = ("LlamaForCausalLM-0", "custom-02-span", "custom-42-span", *BPE)
TEXTS = ["def f(x):\n\treturn x", "", " é 漢字 🙂\0 it's 12345", "<|endoftext|>", "a<|endoftext|>b"]
PROMPT, NEW = "def f", 12


def test_every_stock_architecture_has_a_case():
    assert set(STOCK_CASES) == {architecture.name for architecture in STOCK}


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """A folder with one for each case, of the export and our logits of full-length rows; and what we make of texts."""
    folder = tmp_path_factory.mktemp("hf")
    made, cases, texts = folder / "runs", folder / "cases", {}
    for seed, (name, (architecture, changes)) in enumerate((CASES | BPE).items()):
        config, source = configure(**changes), ""
        if name in BPE:
            config, source = with_bpe(config, Path(__file__).read_text(encoding="utf-8"))
        model, params, state = draw(config, seed)
        save(made / name, config, params, state, tokenizer=source)
        (cases / name).mkdir(parents=True)
        arch = "custom" if architecture == "SpannormForCausalLM" else "stock"
        assert export(config, made / name, None, cases / name / "export", arch, "float32") == architecture
        tokens = np.random.default_rng(seed).integers(255, size=(2, SEQ_LEN)).astype(np.int32)
        # Without jit dense models share the programs of their operations, which takes a tenth of the time.
        with jax.disable_jit(not config.model.moe.num_experts):
            logits = jax.jit(lambda p, s, t, model=model: model.bind(p, s)(t))(params, state, tokens)
        np.savez(cases / name / "reference.npz", tokens=tokens, logits=np.asarray(logits))
        if name in WITH_TEXT:
            write_json(cases / name / "asked.json", {"texts": TEXTS, "prompt": PROMPT, "new": NEW})
            said = []
            options = SampleOptions(max_tokens=NEW, temperature=0)
            sample(config, made / name, None, [PROMPT], options, said.append)
            tokenizer = run_tokenizer(config, made / name)
            ours = {"ids": [tokenizer.encode(text.encode()).tolist() for text in TEXTS], "decoded": TEXTS}
            ours |= {"end": [tokenizer.end_of_text] * 3, "decoded_end": END_OF_TEXT}
            texts[name] = ours | {"greedy": "".join(said).removesuffix("\n")}
    return cases, texts


def torch_side(venv, *arguments):
    """What torch_side.py prints, in a venv."""
    python = ROOT / venv / "bin/python"
    assert python.exists(), f"make {venv}/installed makes the environment of this test"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(arguments[0].parent / "home")}
    command = [str(python), str(Path(__file__).with_name("torch_side.py")), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module", params=VENVS)
def looked(request, exports):
    """Case -> what transformers makes of it."""
    return json.loads(torch_side(request.param, exports[0]).split("RESULT ")[1])


IMAGES = {
    "sincos2d": {},
    "learned": {"image__positions": "learned", "image__channels": 1, "image__patch": 2},
    "lns": {"model__placement": "lns", "model__ffn": "relu"},
    "layerscale": {"model__placement": "layerscale", "model__norm_eps": 1e-3},
    "mup": {f"model__{name}": value for name, value in MUP.items()},
}


@pytest.mark.parametrize("venv", VENVS)
def test_its_vit_computes_what_we_do(tmp_path, venv):
    """Of bytes, by what preprocessor_config.json says of pixels."""
    cases = tmp_path / "cases"
    for seed, (name, changes) in enumerate(IMAGES.items()):
        config = configure_images(**changes)
        model, params, state = draw(config, seed)
        save(tmp_path / name, config, params, state)
        assert export(config, tmp_path / name, None, cases / name / "export", "", "float32") == vit.NAME
        shape = (4, 8, 8, config.image.channels)
        images = np.random.default_rng(seed).integers(256, size=shape, dtype=np.uint8)
        np.savez(cases / name / "reference.npz", images=images, logits=model.bind(params, state)(images))
    for name, found in json.loads(torch_side(venv, cases, "images").split("RESULT ")[1]).items():
        assert (found["class"], found["keys"]) == (vit.NAME, {}), name
        assert found["off"] < CLOSE, name


@pytest.mark.parametrize("venv", VENVS)
def test_models_of_transformers_own_compute_here_what_they_do_there(tmp_path, venv):
    """Their config.json is what that version writes, and says nothing that is refused."""
    torch_side(venv, tmp_path / "cases", "make")
    for folder in (tmp_path / "cases").iterdir():
        reference = np.load(folder / "reference.npz")
        config, params = read_model(folder)
        model = define(config)
        logits = jax.jit(lambda params, tokens, model=model: model.bind(params)(tokens))(params, reference["tokens"])
        np.testing.assert_allclose(logits, reference["logits"], rtol=0, atol=CLOSE, err_msg=folder.name)


@pytest.mark.parametrize("name", CASES | BPE)
def test_transformers_computes_what_we_do(looked, name):
    found = looked[name]
    assert (found["class"], found["keys"], found["by_default"]["keys"]) == ((CASES | BPE)[name][0], {}, {})
    for one in (found, found["by_default"]):
        assert one["off"] < CLOSE and one["padded_off"] < CLOSE
        assert one["cached"] == one["recomputed"] and one["padded_text_is_the_same"]


@pytest.mark.parametrize("name", WITH_TEXT)
def test_text_is_what_it_is_here(looked, exports, name):
    """Ids, also of a forged end of text; and the greedy continuation."""
    assert looked[name]["text"] == exports[1][name]
