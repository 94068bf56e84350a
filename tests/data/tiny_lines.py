"""A tiny TFDS text dataset of the tests' own, with a feature name and splits of its own."""

from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

TINY_TRAIN = [f"line {i} of the tiny set: " + "ü€x" * (i % 7) for i in range(100)]
TINY_TEST = ["held out", "", "and more"]


# Not registered: TFDS has its files only, as with a dataset that another machine prepared.
class TinyLines(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version("1.2.3")
    train = tuple(TINY_TRAIN)

    def _info(self):
        features = {"line": tfds.features.Text(), "number": tfds.features.Scalar(np.int32)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {
            "train": self._generate_examples(self.train),
            "test": self._generate_examples(TINY_TEST),
            "blank": self._generate_examples(["", ""]),
        }

    def _generate_examples(self, lines):
        for i, line in enumerate(lines):
            yield i, {"line": line, "number": i}


def prepare_tiny(data_dir, train=None):
    tfds.disable_progress_bar()
    builder = TinyLines(data_dir=data_dir)
    if train is not None:
        builder.train = train
    builder.download_and_prepare(file_format="array_record")
    return Path(builder.data_dir)
