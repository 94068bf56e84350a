import os
import sys
from pathlib import Path

import pytest
import tensorflow_datasets as tfds
from processes import LIMIT_S

from spannorm_jax.data import python_source, stdlib_files
from spannorm_jax.errors import UserError


@pytest.fixture(scope="module")
def builder(source_data):
    return python_source.prepare(Path(source_data.data_dir))


def examples(builder, split):
    return {e["path"].decode(): e["text"].decode() for e in builder.as_data_source(split)}


def write(root, files):
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def test_it_is_a_tfds_dataset_that_tfds_finds_by_name(builder, source_data):
    found = tfds.builder("python_source", data_dir=source_data.data_dir)
    assert found.info.full_name == stdlib_files.full_name() == builder.info.full_name
    assert found.info.splits["train"].num_examples > 400
    assert "tensorflow" not in sys.modules


def test_splits_are_disjoint_and_together_all_of_the_library(builder):
    train, validation = examples(builder, "train"), examples(builder, "validation")
    root = Path(os.__file__).parent
    assert not train.keys() & validation.keys()
    everything = train | validation
    assert everything["os.py"] == (root / "os.py").read_text(encoding="utf-8")
    assert {"json/decoder.py", "asyncio/tasks.py", "argparse.py"} <= everything.keys()
    assert not any("test" in Path(p).parts or "site-packages" in p for p in everything)
    assert 0.02 < len(validation) / len(everything) < 0.12


def test_the_split_of_a_file_never_changes():
    # Fixed by hand: a change here makes every published validation loss incomparable.
    known = {"os.py": "train", "argparse.py": "train", "ast.py": "train"}
    assert {path: stdlib_files.split_of(path) for path in known} == known
    held_out = [i for i in range(4096) if stdlib_files.split_of(f"{i}.py") == "validation"]
    assert len(held_out) == 263 and held_out[:3] == [8, 13, 27]


def test_which_files_belong(tmp_path):
    names = ["a.py", "b/c.py", "b/test.py", "b/data.txt", "test/t.py", "b/tests/t.py"]
    names += ["site-packages/p.py", "dist-packages/p.py", "b/__pycache__/c.py", "idle_test/t.py"]
    names += ["pydoc_data/topics.py"]
    write(tmp_path, dict.fromkeys(names, b""))
    assert stdlib_files.list_files(tmp_path) == ["a.py", "b/c.py", "b/test.py"]


def test_declared_encodings_are_read_and_undecodable_files_skipped(tmp_path):
    latin = "# -*- coding: latin-1 -*-\n# é\n"
    write(tmp_path, {"latin.py": latin.encode("latin-1"), "bad.py": b"# \xe9\n"})
    write(tmp_path, {"unknown.py": b"# coding: no-such-codec\n"})
    assert stdlib_files.read_source(tmp_path / "latin.py") == latin
    assert stdlib_files.read_source(tmp_path / "bad.py") is None
    assert stdlib_files.read_source(tmp_path / "unknown.py") is None


def test_the_hash_sees_names_contents_and_their_borders(tmp_path):
    variants = [
        {"a.py": b"1", "b.py": b"2"},
        {"a.py": b"1", "b.py": b"3"},
        {"a.py": b"1", "c.py": b"2"},
        {"a.py": b"12", "b.py": b""},
        {"a.py": b"1b.py2"},  # the first one's names and contents, run together
    ]
    for i, files in enumerate(variants):
        write(tmp_path / str(i), files)
    write(tmp_path / "same", dict(reversed(variants[0].items())))
    hashes = [stdlib_files.content_hash(tmp_path / str(i)) for i in range(len(variants))]
    assert len(set(hashes)) == len(variants)
    assert stdlib_files.content_hash(tmp_path / "same") == hashes[0]


def test_no_sources_is_the_users_to_mend(tmp_path):
    with pytest.raises(UserError, match=r"data\.dataset"):
        stdlib_files.content_hash(tmp_path)


def test_preparing_is_silent_reproducible_and_safe_in_two_processes(builder, tmp_path, start_python):
    # Equal seeds: TFDS alone would give both the same temporary folder.
    code = """
import random, sys
from pathlib import Path
random.seed(0)
from spannorm_jax.data import python_source
python_source.prepare(Path(sys.argv[1]))
"""
    both = [start_python(code, tmp_path) for _ in range(2)]
    assert [(p.communicate(timeout=LIMIT_S), p.returncode) for p in both] == [(("", ""), 0)] * 2
    assert [p.name for p in (tmp_path / "python_source").iterdir()] == [stdlib_files.config_name()]
    again = tfds.builder("python_source", data_dir=tmp_path)
    for split in ("train", "validation"):
        assert list(examples(again, split).items()) == list(examples(builder, split).items())


def test_importing_the_package_hashes_nothing(start_python):
    code = """
import sys
import spannorm_jax.data.loader
from spannorm_jax.data import stdlib_files
assert 'tensorflow_datasets' not in sys.modules
import spannorm_jax.data.python_source
assert stdlib_files.content_hash.cache_info().misses == 0
"""
    process = start_python(code)
    assert process.communicate(timeout=LIMIT_S) == ("", "")


def test_a_folder_that_cannot_be_written_is_the_users_to_mend(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.data_dir"):
        python_source.prepare(tmp_path / "file")
