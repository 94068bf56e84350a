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

from .common import DENSE, dense_decoder, full_size


def get_config(arg: str | None = None) -> ConfigDict:
    _, config = dense_decoder(arg, DENSE)
    full_size(config)
    config.data.dataset = "c4/en:3.0.1"
    config.data.tokenizer = "bpe"
    config.data.bpe_vocab_size = 32768
    return config
