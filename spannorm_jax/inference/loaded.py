"""A run that is restored to be used from Python: logits, losses and texts of it."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import Array

from spannorm_jax.config import Config
from spannorm_jax.data.tokenizer import Tokenizer
from spannorm_jax.inference.options import SampleOptions, check_options
from spannorm_jax.inference.sampling import encode_prompt, generate, run_tokenizer
from spannorm_jax.inference.scoring import Scored, Scorer
from spannorm_jax.model.definition import define
from spannorm_jax.parallel.mesh import batch_shards, check_divisible, make_mesh
from spannorm_jax.resolution import check_text
from spannorm_jax.run.trained import Trained, open_trained


@dataclass(frozen=True, eq=False)
class Run(Trained):
    """A run's checkpoint: `config`, `model`, `step`, and `params`, nested and sharded over `mesh`."""

    workdir: Path
    tokenizer: Tokenizer

    @functools.cached_property
    def _scorer(self) -> Scorer:
        config, num_ids = self.config, self.tokenizer.num_ids
        return Scorer(self.model, self.mesh, self.params, self.model_state, config.data.seq_len, num_ids)

    @functools.cached_property
    def _logits(self) -> Any:
        return jax.jit(lambda params, state, tokens: self.model.bind(params, state)(tokens))

    def encode(self, text: str) -> np.ndarray:
        """Ids (T,) of a text as it stands within a document, with no end of text around it."""
        return self.tokenizer.encode(text.encode("utf-8", "surrogateescape"))

    def logits(self, tokens: Any) -> Array:
        """Logits (B, T, V), float32, of ids (B, T): at t those of token t + 1. A shape compiles once."""
        with jax.set_mesh(self.mesh):
            return self._logits(self.params, self.model_state, np.asarray(tokens, np.int32))

    def score(self, sequences: Sequence[Scored]) -> list[tuple[np.ndarray, np.ndarray]]:
        """The losses of ids given those before them, of several sequences (ids, n), whose last n ids are scored.

        Returns for each nll (n,) in nats, and whether the id is the likeliest (n,). Context beyond data.seq_len is cut.
        """
        return self._scorer.score(sequences)

    def loss(self, text: str) -> dict[str, float]:
        """The loss of a text as a document: nats per token, bits per byte, and how many of both.

        It begins after an end of text, and is cut into windows of data.seq_len as `evaluate` cuts a split.
        """
        [(nll, _)] = self.score([self.document(text)])
        num_bytes, total = len(text.encode("utf-8", "replace")), float(nll.sum())
        bits = total / math.log(2) / num_bytes if num_bytes else math.nan
        loss = total / len(nll) if len(nll) else math.nan
        return {"loss": loss, "bits_per_byte": bits, "tokens": len(nll), "bytes": num_bytes}

    def document(self, text: str) -> Scored:
        """The sequence that scores a whole text after an end of text."""
        ids = self.encode(text).tolist()
        return [self.tokenizer.end_of_text, *ids], len(ids)

    def sample(self, *prompts: str, **options: Any) -> list[str]:
        """What follows each prompt, without it; `options` are `SampleOptions`: max_tokens, temperature, top_k, seed.

        Raises:
          UserError: an option is out of range, or logits are not finite.
        """
        asked = SampleOptions(**options)
        check_options(asked)
        ids = [encode_prompt(self.tokenizer, prompt) for prompt in prompts or ("",)]
        rows_multiple = batch_shards(dict(self.mesh.shape))
        run = partial(generate, self.model, self.params, self.model_state, self.tokenizer)
        with jax.set_mesh(self.mesh):
            return [self.tokenizer.decode(new) for new in run(ids, asked, rows_multiple=rows_multiple)]


def load_run(config: Config, workdir: Path, step: int | None, doing: str) -> Run:
    """Restores a run's checkpoint (default: that of `open_trained`) onto the devices here; no data are read.

    `config` is the run's, for this machine (`for_this_machine`); `doing` stands in what is said of damaged checkpoints.

    Raises:
      UserError: there is no such sound checkpoint, its tokenizer is missing, or the mesh does not fit.
    """
    check_text(config, doing)
    with open_trained(workdir, step, doing) as restore:
        tokenizer = run_tokenizer(config, workdir)
        mesh = make_mesh(config.mesh)
        check_divisible(config, dict(mesh.shape), "rows", batch_shards(dict(mesh.shape)))
        with jax.set_mesh(mesh):
            trained = restore(config, define(config.model, config.execution), mesh)
    return Run(**vars(trained), workdir=workdir, tokenizer=tokenizer)
