"""What transformers makes of exported folders, as JSON. It runs where torch is, and this package is not.

python torch_side.py CASES: each folder in CASES holds `export` and `reference.npz` (tokens, logits).
python torch_side.py CASES images: the same of models of images, with `images` (B, S, S, C) in place of tokens.
python torch_side.py CASES make: makes CASES, models of transformers' own, each with such a `reference.npz`.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageClassification, AutoTokenizer, logging

NEW, PADDING = 6, 5


def greedy(model, tokens, new, cached):
    """The continuation's ids: token by token over all that came before, or by `generate` and its cache."""
    if cached:
        return model.generate(
            tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=new, min_new_tokens=new
        )[:, tokens.shape[1] :]
    first = tokens.shape[1]
    config = model.generation_config
    never = [config.eos_token_id, *(config.suppress_tokens or [])]  # the former by min_new_tokens
    for _ in range(new):
        logits = model(tokens, use_cache=False).logits[:, -1]
        logits[:, never] = -float("inf")
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], dim=1)
    return tokens[:, first:]


@torch.no_grad()
def look_at_images(folder):
    reference = np.load(folder / "reference.npz")
    model, loading = AutoModelForImageClassification.from_pretrained(folder / "export", output_loading_info=True)
    scaling = json.loads((folder / "export/preprocessor_config.json").read_text())
    pixels = torch.tensor(reference["images"]).permute(0, 3, 1, 2).float() * scaling["rescale_factor"]
    mean, std = (torch.tensor(scaling[f"image_{name}"])[:, None, None] for name in ("mean", "std"))
    logits = model.eval()((pixels - mean) / std).logits.numpy()
    return {
        "class": type(model).__name__,
        "keys": {name: sorted(map(str, keys)) for name, keys in loading.items() if keys},
        "off": float(np.abs(logits - reference["logits"]).max()),
    }


@torch.no_grad()
def look(folder, implementation):
    reference = np.load(folder / "reference.npz")
    tokens, logits = torch.tensor(reference["tokens"]).long(), reference["logits"]
    model, loading = AutoModelForCausalLM.from_pretrained(
        folder / "export",
        trust_remote_code=True,
        attn_implementation=implementation,
        output_loading_info=True,
        torch_dtype=torch.float32,
    )
    model.eval()
    padded = torch.cat([torch.zeros(len(tokens), PADDING, dtype=torch.long), tokens], dim=1)
    mask = torch.ones_like(padded)
    mask[:, :PADDING] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    of_padded = model(padded, attention_mask=mask, position_ids=positions).logits[:, PADDING:]
    prompt = tokens[:, : tokens.shape[1] // 2]
    # A batch of two lengths, as `generate` pads it: the shorter row's text must not change.
    short = prompt[:1, 4:]
    together = torch.cat([torch.cat([torch.zeros(1, 4, dtype=torch.long), short], dim=1), prompt[1:2]])
    of_both = torch.ones_like(together)
    of_both[0, :4] = 0
    generated = model.generate(
        together, attention_mask=of_both, do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW
    )[:, prompt.shape[1] :]
    alone = greedy(model, short, NEW, cached=True), greedy(model, prompt[1:2], NEW, cached=True)
    return {
        "class": type(model).__name__,
        "keys": {name: sorted(map(str, keys)) for name, keys in loading.items() if keys},
        "off": float(np.abs(model(tokens).logits.numpy() - logits).max()),
        "padded_off": float(np.abs(of_padded.numpy() - logits).max()),
        "cached": greedy(model, prompt, NEW, cached=True).tolist(),
        "recomputed": greedy(model, prompt, NEW, cached=False).tolist(),
        "padded_text_is_the_same": torch.equal(generated, torch.cat(alone)),
    }


def text(folder):
    """What the tokenizer does with the texts beside an export, and the greedy text after a prompt."""
    asked = json.loads((folder / "asked.json").read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(folder / "export")
    model = AutoModelForCausalLM.from_pretrained(folder / "export", trust_remote_code=True)
    ids = [tokenizer(line).input_ids for line in asked["texts"]]
    prompt = tokenizer(asked["prompt"], return_tensors="pt")
    [made] = model.generate(**prompt, do_sample=False, max_new_tokens=asked["new"], max_length=None)
    return {
        "ids": ids,
        "decoded": [tokenizer.decode(line) for line in ids],
        "end": [tokenizer.eos_token_id, tokenizer.bos_token_id, model.generation_config.eos_token_id],
        "decoded_end": tokenizer.decode([tokenizer.eos_token_id]),
        "greedy": tokenizer.decode(made, skip_special_tokens=True),
    }


@torch.no_grad()
def make(folder):
    """Small models of the architectures that are imported, random in everything, in several files."""
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "head_dim": 8}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": 95, "max_position_embeddings": 64}
    kinds = {"llama": {}, "llama-tied": {"tie_word_embeddings": True}, "qwen3": {}, "mixtral": {"num_local_experts": 4}}
    torch.manual_seed(0)
    for name, own in kinds.items():
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name.partition("-")[0], **sizes, **own)).eval()
        for key, weight in model.named_parameters():
            weight.uniform_(0.5, 1.5) if "norm" in key else weight.normal_(0, 0.2)
        model.save_pretrained(folder / name, max_shard_size="20KB")
        tokens = torch.randint(95, (2, 40))
        np.savez(folder / name / "reference.npz", tokens=tokens.numpy(), logits=model(tokens).logits.numpy())


if __name__ == "__main__":
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    if sys.argv[2:] == ["make"]:
        sys.exit(make(Path(sys.argv[1])))
    found = {}
    for folder in sorted(Path(sys.argv[1]).iterdir()):
        if sys.argv[2:] == ["images"]:
            found[folder.name] = look_at_images(folder)
            continue
        found[folder.name] = look(folder, "eager") | {"by_default": look(folder, None)}
        if (folder / "asked.json").exists():
            found[folder.name]["text"] = text(folder)
    print("RESULT " + json.dumps(found))
