"""Small TFDS datasets of the tests' own: of any name, version, config and features."""

from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

LINES = {
    "train": [f"line {i} of the tiny set: " + "ü€x" * (i % 7) for i in range(100)],
    "test": ["held out", "", "and more"],
    "blank": ["", ""],
}


def prepare(
    data_dir,
    name="tiny_lines",
    splits=LINES,
    *,
    version="1.2.3",
    config="",
    text="line",
    kind=None,
    beside=None,
    file_format="array_record",
):
    """Prepares dataset `name`, whose splits hold texts in feature `text`; returns its folder.

    TFDS has its files only, as with a dataset that another machine prepared.

    Args:
      kind: the feature's type (None: Text).
      beside: name -> (feature, value) of what each example holds too.
    """
    beside = beside or {"number": (tfds.features.Scalar(np.int32), 1)}

    class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version(version)
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=config)] if config else []

        def _info(self):
            features = {text: kind or tfds.features.Text(), **{key: feature for key, (feature, _) in beside.items()}}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(texts) for split, texts in splits.items()}

        def _generate_examples(self, texts):
            for i, document in enumerate(texts):
                yield i, {text: document, **{key: value for key, (_, value) in beside.items()}}

    Tiny.name = name
    tfds.disable_progress_bar()
    builder = Tiny(data_dir=data_dir)
    builder.download_and_prepare(file_format=file_format)
    return Path(builder.data_dir)
