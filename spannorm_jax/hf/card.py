"""The model card of an exported run: what its folder records, in words. Nothing here is known from elsewhere."""

import contextlib
import json
from pathlib import Path
from typing import Any

from spannorm_jax.config import Config
from spannorm_jax.config_file import LOCAL_DATA
from spannorm_jax.durable import to_json
from spannorm_jax.hf.custom import CUSTOM
from spannorm_jax.hf.stock import Architecture
from spannorm_jax.model.definition import ModelDef, count_params
from spannorm_jax.model.initialisation import init_of
from spannorm_jax.model.placement import placement_of
from spannorm_jax.run import folder as run_folder
from spannorm_jax.run import lines

_CARD = """---
library_name: transformers
pipeline_tag: {pipeline}
license: unknown
tags: [{tags}]
---

# {title}, {depth} blocks of width {width}

Trained with spannorm_jax from {origin}. {params:,} parameters{active}, norm placement
`{placement}` ({title}), initialisation `{init}`, {stored} weights.

```python
from transformers import {classes}

model = {model_class}.from_pretrained("."{trust})
{reader} = {reader_class}.from_pretrained(".")
```

| | |
| --- | --- |
| data | {data}, fingerprint {fingerprint} |
{inputs}
| training loss of that update | {loss} |
| held-out loss | {held_out} |
| commit | {commit} |
| versions | {versions} |
| command | `{command}` |

{notes}

The records name no licence: of the weights it is for their author to choose, and the data have their own.
{code_licence}
## Config

```json
{config}
```
"""


_LOADED = {  # task -> the class of the model; the name of what reads its inputs, and its class
    "text": ("AutoModelForCausalLM", "tokenizer", "AutoTokenizer"),
    "image": ("AutoModelForImageClassification", "processor", "AutoImageProcessor"),
}


def card(
    workdir: Path,
    config: Config,
    model: ModelDef,
    step: int,
    architecture: Architecture | None,
    dtype: str,
    num_ids: int = 0,
) -> str:
    """The text of README.md for the checkpoint of a step; of images without an architecture and ids."""
    text, rows = config.task == "text", step * config.training.batch_size
    unit = "nats a token" if text else "nats an image"
    starts = _lines(workdir / run_folder.STARTS)
    begun = starts[0].get("command", "") if starts else ""
    start = ([line for line in starts if line.get("first_step", 0) <= step] or [{}])[-1]
    loss, held_out = "not recorded", "not measured"
    for metrics in _lines(workdir / run_folder.METRICS, step):
        loss = f"{_number(metrics.get('loss'))} {unit}"
    second, words, counted = (
        ("bits_per_byte", "bits per byte", "tokens") if text else ("accuracy", "accuracy", "images")
    )
    for measured in _lines(workdir / run_folder.EVAL, step):
        held_out = (
            f"{_number(measured.get('loss'))} {unit}, {_number(measured.get(second))} {words} "
            f"({measured.get(counted, 0):,} {counted} of `{measured.get('split')}`)"
        )
    shown = json.loads((workdir / run_folder.CONFIG).read_text(encoding="utf-8"))
    for key in LOCAL_DATA:  # where data lie on a machine is no business of whoever reads the card
        shown["data"].pop(key.removeprefix("data."), None)
    custom = architecture is CUSTOM
    active = f" ({count_params(model, active=True):,} active)" if config.model.moe.num_experts else ""
    if text:
        notes = ["A document ends in end-of-text, and begins after one."]
        if num_ids < config.model.vocab_size:
            last = config.model.vocab_size - 1
            notes[0] += f" Rows {num_ids:,} to {last:,} of the vocabulary fill it up and stand for nothing."
        T = config.data.seq_len
        inputs = f"| tokenizer | {config.data.tokenizer}, {num_ids:,} tokens |\n| trained on | {rows * T:,} tokens "
        inputs += f"in {step:,} updates, {T:,} tokens at a time |"
    else:
        notes = ["Classes are the dataset's, by number. Pixels enter from -1 to 1, as `preprocessor_config.json` says."]
        inputs = f"| trained on | {rows:,} images in {step:,} updates |"
    model_class, reader, reader_class = _LOADED[config.task]
    if custom:
        notes.append("`modeling_spannorm.py` is the model: read it, then load it with `trust_remote_code=True`.")
    return _CARD.format(
        pipeline="text-generation" if text else "image-classification",
        classes=", ".join(sorted((model_class, reader_class))),
        model_class=model_class,
        reader=reader,
        reader_class=reader_class,
        inputs=inputs,
        tags=", ".join(["spannorm_jax", config.model.placement]),
        title=placement_of(config.model).title,
        depth=config.model.depth,
        width=config.model.width,
        origin=f"the weights of an import (`{begun}`)" if "import_hf" in begun else "random weights",
        params=count_params(model),
        active=active,
        placement=config.model.placement,
        init=init_of(config.model),
        stored=dtype,
        trust=", trust_remote_code=True" if custom else "",
        data=f"{config.data.full_name or config.data.dataset}, split `{config.data.train_split}`",
        fingerprint=config.data.fingerprint,
        loss=loss,
        held_out=held_out,
        commit=start.get("git_commit") or "not recorded",
        versions=", ".join(f"{k} {v}" for k, v in start.get("versions", {}).items()) or "not recorded",
        command=start.get("command", "not recorded"),
        notes="\n".join(notes),
        code_licence="The modelling file is under the Apache License 2.0.\n" if custom else "",
        config=to_json(shown, indent=2),
    )


def _lines(path: Path, step: int | None = None) -> list[dict[str, Any]]:
    """The objects in a file of JSON lines, those of a step if one is given."""
    found = []
    for text in lines.read(path).splitlines() if lines.exists(path) else []:
        with contextlib.suppress(ValueError):  # half a line, which a crash leaves
            line = json.loads(text)
            if isinstance(line, dict) and step in (None, line.get("step")):
                found.append(line)
    return found


def _number(number: Any) -> str:
    return f"{number:.4f}" if isinstance(number, int | float) else "not finite"
