"""Dense decoders on C4 (English), with a BPE of 32768 tokens trained on it.

1. The dataset, in TFDS's layout, DIR/c4/en/3.0.1. Prepared files lie in a bucket whose reader pays (about 800 GB, as
   TFRecord, so that tokenising them takes `pip install -e '.[tf]'`; training does not):

    gsutil -u PROJECT -m cp 'gs://allennlp-tensorflow-datasets/c4/en/3.0.1/*' DIR/c4/en/3.0.1

2. The token stores, in shards: 64 processes on any machines that share /data/tokens, for example a Slurm array, where
   $i counts from 0 to 63. The last one joins them; one that was killed is started again. The first ones train the
   BPE on 256 MiB of the training split, each for itself and all with the same result:

    python -m spannorm_jax.prepare --config configs/c4.py --shard $i/64 \\
        --config.data.data_dir=DIR --config.data.cache_dir=/data/tokens

3. The run:

    python -m spannorm_jax.train --config configs/c4.py:124m,placement=span,init=scale --workdir runs/c4 \\
        --config.data.data_dir=DIR --config.data.cache_dir=/data/tokens

The argument is a preset, then any of depth, width, placement, init. A slice of the dataset is another store, and
less to make:  --config.data.train_split='train[:1%]'

preset  blocks  width  heads (kv)  ffn   vocabulary     parameters
124m        12    768   12 (12)    2048  32768, tied   110,119,680   not measured yet
350m        24   1024   16 (16)    2816  32768, tied   341,885,952   not measured yet
1b          20   2048   16 (8)     5504  32768, tied   995,182,592   not measured yet
"""

from ml_collections import ConfigDict

from spannorm_jax.config_file import default_config, parse_arg

PRESETS = {
    "124m": {"depth": 12, "width": 768, "head_dim": 64, "seq_len": 1024, "batch_size": 256, "lr": 1e-3},
    "350m": {"depth": 24, "width": 1024, "head_dim": 64, "seq_len": 1024, "batch_size": 256, "lr": 6e-4},
    "1b": {"depth": 20, "width": 2048, "head_dim": 128, "seq_len": 2048, "batch_size": 512, "lr": 4e-4},
}


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(arg, presets=tuple(PRESETS), depth=0, width=0, placement="span", init="scale")
    preset = PRESETS[arg.preset]
    config = default_config()
    config.model.depth = arg.depth or preset["depth"]
    config.model.width = arg.width or preset["width"]
    config.model.num_heads = max(1, config.model.width // preset["head_dim"])
    config.model.placement = arg.placement
    config.model.init = arg.init
    config.model.tied_head = True
    config.data.dataset = "c4/en:3.0.1"
    config.data.tokenizer = "bpe"
    config.data.bpe_vocab_size = 32768
    config.data.seq_len = preset["seq_len"]
    config.training.batch_size = preset["batch_size"]
    config.training.steps = 20000
    config.training.z_loss = 1e-4
    config.optim.lr = preset["lr"]
    config.checkpoint.every_steps = 1000
    config.metrics.log_every = 10
    config.metrics.block_grad_every = 500
    config.eval.tokens = 2**21
    if arg.preset == "1b":
        config.model.num_kv_heads = config.model.num_heads // 2
        config.execution.remat = "dots"
    return config
