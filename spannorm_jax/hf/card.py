"""The model card of an exported run: what its folder records, in words. Nothing here is known from elsewhere."""

import contextlib
import json
from pathlib import Path
from typing import Any

from spannorm_jax.config_file import LOCAL_DATA
from spannorm_jax.durable import to_json
from spannorm_jax.hf.custom import CUSTOM
from spannorm_jax.hf.stock import Architecture
from spannorm_jax.model.definition import count_params
from spannorm_jax.model.initialisation import init_of
from spannorm_jax.model.placement import placement_of
from spannorm_jax.run import folder as run_folder
from spannorm_jax.run import lines
from spannorm_jax.run.trained import Trained


def card(workdir: Path, trained: Trained, architecture: Architecture | None, dtype: str, num_ids: int) -> str:
    """The text of README.md for a run's checkpoint; of images without an architecture, and with no ids."""
    config, model, step = trained.config, trained.model, trained.step
    cfg, data = config.model, config.data
    starts = _lines(workdir / run_folder.STARTS)
    begun = starts[0].get("command", "") if starts else ""
    origin = f"the weights of an import (`{begun}`)" if "import_hf" in begun else "random weights"
    start = ([line for line in starts if line.get("first_step", 0) <= step] or [{}])[-1]
    versions = ", ".join(f"{k} {v}" for k, v in start.get("versions", {}).items()) or "not recorded"
    rows = step * config.training.batch_size
    if config.task == "text":
        pipeline, model_class = "text-generation", "AutoModelForCausalLM"
        reader, reader_class = "tokenizer", "AutoTokenizer"
        unit, second, words, counted = "nats a token", "bits_per_byte", "bits per byte", "tokens"
        notes = "A document ends in end-of-text, and begins after one."
        if num_ids < cfg.vocab_size:
            notes += f" Rows {num_ids:,} to {cfg.vocab_size - 1:,} of the vocabulary fill it up and stand for nothing."
        inputs = f"| tokenizer | {data.tokenizer}, {num_ids:,} tokens |\n| trained on | {rows * data.seq_len:,} tokens "
        inputs += f"in {step:,} updates, {data.seq_len:,} tokens at a time |"
    else:
        pipeline, model_class = "image-classification", "AutoModelForImageClassification"
        reader, reader_class = "processor", "AutoImageProcessor"
        unit, second, words, counted = "nats an image", "accuracy", "accuracy", "images"
        notes = "Classes are the dataset's, by number. Pixels enter from -1 to 1, as `preprocessor_config.json` says."
        inputs = f"| trained on | {rows:,} images in {step:,} updates |"
    loss, held_out = "not recorded", "not measured"
    for metrics in _lines(workdir / run_folder.METRICS, step):
        loss = f"{_number(metrics.get('loss'))} {unit}"
    for measured in _lines(workdir / run_folder.EVAL, step):
        held_out = (
            f"{_number(measured.get('loss'))} {unit}, {_number(measured.get(second))} {words} "
            f"({measured.get(counted, 0):,} {counted} of `{measured.get('split')}`)"
        )
    shown = json.loads((workdir / run_folder.CONFIG).read_text(encoding="utf-8"))
    for key in LOCAL_DATA:  # where data lie on a machine is no business of whoever reads the card
        shown["data"].pop(key.removeprefix("data."), None)
    active = f" ({count_params(model, active=True):,} active)" if cfg.moe.num_experts else ""
    title, trust, code_licence = placement_of(cfg).title, "", ""
    if architecture is CUSTOM:
        trust = ", trust_remote_code=True"
        notes += "\n`modeling_spannorm.py` is the model: read it, then load it with `trust_remote_code=True`."
        code_licence = "The modelling file is under the Apache License 2.0.\n"
    return f"""---
library_name: transformers
pipeline_tag: {pipeline}
license: unknown
tags: [spannorm_jax, {cfg.placement}]
---

# {title}, {cfg.depth} blocks of width {cfg.width}

Trained with spannorm_jax from {origin}. {count_params(model):,} parameters{active}, norm placement
`{cfg.placement}` ({title}), initialisation `{init_of(cfg)}`, {dtype} weights.

```python
from transformers import {", ".join(sorted((model_class, reader_class)))}

model = {model_class}.from_pretrained("."{trust})
{reader} = {reader_class}.from_pretrained(".")
```

| | |
| --- | --- |
| data | {data.full_name or data.dataset}, split `{data.train_split}`, fingerprint {data.fingerprint} |
{inputs}
| training loss of that update | {loss} |
| held-out loss | {held_out} |
| commit | {start.get("git_commit") or "not recorded"} |
| versions | {versions} |
| command | `{start.get("command", "not recorded")}` |

{notes}

The records name no licence: of the weights it is for their author to choose, and the data have their own.
{code_licence}
## Config

```json
{to_json(shown, indent=2)}
```
"""


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
