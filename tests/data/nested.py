"""A TFDS dataset with everything beside its text that nests or repeats, and texts of other kinds than Text."""

from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

F = tfds.features
FEATURES = {
    "dict": (
        F.FeaturesDict({"id": np.int32, "inner": F.FeaturesDict({"tag": F.Text()})}),
        {"id": 1, "inner": {"tag": "t"}},
    ),
    "translation": (F.Translation(languages=["en", "de"]), {"en": "one", "de": "eins"}),
    "variable_translation": (
        F.TranslationVariableLanguages(languages=["en", "de"]),
        {"en": "one", "de": ["ein", "eins"]},
    ),
    "sequence_of_dict": (F.Sequence({"start": np.int32, "answer": F.Text()}), [{"start": 1, "answer": "a"}] * 2),
    "empty_sequence_of_dict": (F.Sequence({"start": np.int32, "answer": F.Text()}), []),
    "sequence_of_text": (F.Sequence(F.Text()), ["x", "yy"]),
    "tensor": (F.Tensor(shape=(2, 3), dtype=np.float32), np.ones((2, 3), np.float32)),
    "compressed": (F.Tensor(shape=(2,), dtype=np.int32, encoding="zlib"), np.arange(2, dtype=np.int32)),
}


def texts(n: int = 40) -> list[str]:
    return [f"document {i} " + "ü€x" * (i % 5) for i in range(n)]


class Nested(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version("1.0.0")
    text = F.Text()
    beside = tuple(FEATURES)
    documents = tuple(texts())

    def _info(self):
        others = {name: FEATURES[name][0] for name in self.beside}
        return tfds.core.DatasetInfo(builder=self, features=F.FeaturesDict({"text": self.text, **others}))

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(self.documents) for split in ("train", "validation")}

    def _generate_examples(self, documents):
        for i, text in enumerate(documents):
            yield i, {"text": text, **{name: FEATURES[name][1] for name in self.beside}}


def prepare_nested(data_dir: Path, file_format: str = "array_record", **changes) -> Path:
    """Prepares dataset `nested`: a feature `text`, and those of FEATURES that `beside` names.

    `changes` are attributes of the builder: `text`, `beside`, `documents`, `VERSION`, `BUILDER_CONFIGS`.
    """
    tfds.disable_progress_bar()
    builder = type("Nested", (Nested,), changes, skip_registration=True)(data_dir=data_dir)
    builder.download_and_prepare(file_format=file_format)
    return Path(builder.data_dir)
