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

_CARD = """---
library_name: transformers
pipeline_tag: text-generation
license: unknown
tags: [{tags}]
---

# {title}, {depth} blocks of width {width}

Trained with spannorm_jax from {origin}. {params:,} parameters{active}, norm placement
`{placement}` ({title}), initialisation `{init}`, {stored} weights.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("."{trust})
tokenizer = AutoTokenizer.from_pretrained(".")
```

| | |
| --- | --- |
| data | {data}, fingerprint {fingerprint} |
| tokenizer | {tokenizer}, {num_ids:,} tokens |
| trained on | {tokens:,} tokens in {step:,} updates, {seq_len:,} tokens at a time |
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


def card(
    workdir: Path, config: Config, model: ModelDef, step: int, architecture: Architecture, dtype: str, num_ids: int
) -> str:
    """The text of README.md for the checkpoint of a step."""
    starts = _lines(workdir / run_folder.STARTS)
    begun = starts[0].get("command", "") if starts else ""
    start = ([line for line in starts if line.get("first_step", 0) <= step] or [{}])[-1]
    loss, held_out = "not recorded", "not measured"
    for metrics in _lines(workdir / run_folder.METRICS, step):
        loss = f"{_number(metrics.get('loss'))} nats a token"
    for measured in _lines(workdir / run_folder.EVAL, step):
        held_out = (
            f"{_number(measured.get('loss'))} nats a token, {_number(measured.get('bits_per_byte'))} bits per byte "
            f"({measured.get('tokens', 0):,} tokens of `{measured.get('split')}`)"
        )
    shown = json.loads((workdir / run_folder.CONFIG).read_text(encoding="utf-8"))
    for key in LOCAL_DATA:  # where data lie on a machine is no business of whoever reads the card
        shown["data"].pop(key.removeprefix("data."), None)
    custom = architecture is CUSTOM
    active = f" ({count_params(model, active=True):,} active)" if config.model.moe.num_experts else ""
    notes = [
        f"A document ends in end-of-text, and begins after one. Rows {num_ids:,} to {config.model.vocab_size - 1:,} of "
        "the vocabulary fill it up and stand for nothing."
        if num_ids < config.model.vocab_size
        else "A document ends in end-of-text, and begins after one."
    ]
    if custom:
        notes.append("`modeling_spannorm.py` is the model: read it, then load it with `trust_remote_code=True`.")
    return _CARD.format(
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
        tokenizer=config.data.tokenizer,
        num_ids=num_ids,
        tokens=step * config.training.batch_size * config.data.seq_len,
        step=step,
        seq_len=config.data.seq_len,
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
    for text in path.read_bytes().splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError):  # half a line, which a crash leaves
            line = json.loads(text)
            if isinstance(line, dict) and step in (None, line.get("step")):
                found.append(line)
    return found


def _number(number: Any) -> str:
    return f"{number:.4f}" if isinstance(number, int | float) else "not finite"
