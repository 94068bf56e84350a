"""A small C4 in the layout of the real one: builder c4, config en, version 3.0.1."""

from pathlib import Path

import tensorflow_datasets as tfds

TRAIN = [f"Page {i} of the web. " + "It says naïve things. " * (i % 11) for i in range(200)]
VALIDATION = [f"Held-out page {i}, never trained on. " * 3 for i in range(20)]


class C4(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # TFDS has a builder of that name
    VERSION = tfds.core.Version("3.0.1")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="en")]  # noqa: RUF012

    def _info(self):
        names = ("text", "url", "timestamp", "content-type", "content-length")
        features = tfds.features.FeaturesDict({name: tfds.features.Text() for name in names})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(TRAIN), "validation": self._generate_examples(VALIDATION)}

    def _generate_examples(self, texts):
        for i, text in enumerate(texts):
            others = {"timestamp": "2019-04-25T12:57:54Z", "content-type": "text/plain", "content-length": "1"}
            yield i, {"text": text, "url": f"http://{i}", **others}


def prepare_c4(data_dir: Path, file_format: str = "array_record") -> Path:
    tfds.disable_progress_bar()
    builder = C4(data_dir=data_dir, config="en")
    builder.download_and_prepare(file_format=file_format)
    return Path(builder.data_dir)
