import dataclasses
import os
import sys
from pathlib import Path

import pytest
import tensorflow_datasets as tfds
from processes import LIMIT_S

from spannorm_jax.config import DataConfig
from spannorm_jax.data import python_files, python_source
from spannorm_jax.data.tokens import open_store


@pytest.fixture(scope="module")
def builder(source_data):
    return python_source.prepare(Path(source_data.data_dir), python_files.full_name("stdlib"))


def examples(builder, split):
    return {e["path"].decode(): e["text"].decode() for e in builder.as_data_source(split)}


def write(root, files):
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def test_splits_are_disjoint_and_together_all_of_the_library(builder):
    assert builder.info.full_name == python_files.full_name("stdlib")
    train, validation = examples(builder, "train"), examples(builder, "validation")
    assert not train.keys() & validation.keys()
    everything = train | validation
    assert everything["os.py"] == (Path(os.__file__).parent / "os.py").read_text(encoding="utf-8")
    assert {"json/decoder.py", "asyncio/tasks.py", "argparse.py"} <= everything.keys()
    assert not any("test" in Path(p).parts or "site-packages" in p for p in everything)
    assert 0.02 < len(validation) / len(everything) < 0.12


def test_the_split_of_a_file_never_changes():
    # Fixed by hand: a change here makes every published validation loss incomparable.
    assert {python_files.split_of(path) for path in ("os.py", "argparse.py", "ast.py")} == {"train"}
    held_out = [i for i in range(4096) if python_files.split_of(f"{i}.py") == "validation"]
    assert len(held_out) == 263 and held_out[:3] == [8, 13, 27]


def test_which_files_belong_to_the_library(tmp_path):
    names = ["a.py", "b/c.py", "b/test.py", "b/data.txt", "test/t.py", "b/tests/t.py", "pydoc_data/topics.py"]
    names += ["site-packages/p.py", "dist-packages/p.py", "b/__pycache__/c.py", "idle_test/t.py"]
    write(tmp_path, dict.fromkeys(names, b""))
    assert [name for name, _ in python_files.library_files(tmp_path)] == ["a.py", "b/c.py", "b/test.py"]


def test_declared_encodings_are_read_and_undecodable_files_skipped(tmp_path):
    latin = "# -*- coding: latin-1 -*-\n# é\n"
    files = {"latin.py": latin.encode("latin-1"), "bad.py": b"# \xe9\n", "odd.py": b"# coding: no-such-codec\n"}
    write(tmp_path, files)
    assert [python_files.read_source(tmp_path / name) for name in files] == [latin, None, None]


def test_the_hash_sees_names_contents_and_their_borders(tmp_path):
    variants = [
        {"a.py": b"1", "b.py": b"2"},
        {"a.py": b"1", "b.py": b"3"},
        {"a.py": b"1", "c.py": b"2"},
        {"a.py": b"12", "b.py": b""},
        {"a.py": b"1b.py2"},  # the first one's names and contents, run together
        {"b.py": b"2", "a.py": b"1"},  # the first one again
    ]
    for i, files in enumerate(variants):
        write(tmp_path / str(i), files)
    roots = [tmp_path / str(i) for i in range(len(variants))]
    *hashes, again = [python_files.content_hash(python_files.library_files(root)) for root in roots]
    assert len(set(hashes)) == len(hashes) and again == hashes[0]


def test_preparing_is_silent_reproducible_and_safe_in_two_processes(builder, tmp_path, start_python):
    # Equal seeds: TFDS alone would give both the same temporary folder.
    code = """
import random
from pathlib import Path
random.seed(0)
from spannorm_jax.data import python_files, python_source
python_source.prepare(Path(sys.argv[1]), python_files.full_name("stdlib"))
"""
    both = [start_python(code, DataConfig(), tmp_path) for _ in range(2)]
    assert [(p.communicate(timeout=LIMIT_S), p.returncode) for p in both] == [(("", ""), 0)] * 2
    assert [p.name for p in (tmp_path / "python_source").iterdir()] == [python_files.here("stdlib")[1]]
    again = tfds.builder(f"python_source/{python_files.here('stdlib')[1]}", data_dir=tmp_path)
    for split in ("train", "validation"):
        assert list(examples(again, split).items()) == list(examples(builder, split).items())


def test_no_sources_and_no_room_for_them_are_the_users_to_mend(tmp_path, monkeypatch, refused):
    (tmp_path / "file").write_text("")
    assert "data.data_dir" in refused(python_source.prepare, tmp_path / "file", python_files.full_name("stdlib"))
    python_files.here.cache_clear()
    monkeypatch.setattr(python_files, "_below", lambda *_: [])
    for kind in ("stdlib", "sys_path"):
        line = refused(python_files.here, kind)
        assert "no .py file lies in" in line and "data.dataset" in line


# ---- config sys_path ---------------------------------------------------------------------------


@pytest.fixture
def two_roots(tmp_path, monkeypatch):
    """A library with site-packages inside, as sys.path, and an empty record of what lies there."""
    lib, site = tmp_path / "lib", tmp_path / "lib" / "site-packages"
    write(lib, {"a.py": b"a = 1\n", "same.py": b"same\n", "both.py": b"library's\n", "bad.py": b"# \xe9\n"})
    write(lib, {"test/t.py": b"test\n", "dist-packages/elsewhere.py": b"not importable\n", "no.txt": b"x"})
    write(site, {"p/m.py": b"m = 1\n", "p/copy.py": b"same\n", "both.py": b"package's\n"})
    write(site, {"p/__pycache__/m.py": b"cache\n", "z.py": b"z\n"})
    python_files.here.cache_clear()
    # For the listing only: imports go on as before.
    monkeypatch.setattr(python_files, "sys", type(sys)("sys"))
    python_files.sys.path = [str(site), str(lib), str(tmp_path / "absent"), str(lib)]
    python_files.sys.modules = {"__main__": None}
    yield lib, site
    python_files.here.cache_clear()


NAMES = ["a.py", "bad.py", "both.py", "both.py", "p/copy.py", "p/m.py", "test/t.py", "z.py"]


def test_each_content_once_wherever_the_roots_lie(two_roots, tmp_path):
    lib, site = two_roots
    found = python_files.path_files([lib, site])
    assert [name for name, _ in found] == NAMES and found == python_files.path_files([site, lib])
    here = python_files.content_hash(found)
    (tmp_path / "b").mkdir()
    site.rename(tmp_path / "b" / "site-packages")  # now sorted before, not within, the library
    lib.rename(tmp_path / "c")
    moved = python_files.path_files([tmp_path / "b" / "site-packages", tmp_path / "c"])
    assert python_files.content_hash(moved) == here
    (tmp_path / "c" / "a.py").write_bytes(b"a = 2\n")
    assert python_files.content_hash(moved) != here


def test_the_working_folder_the_programs_and_the_checkout_are_no_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkout = Path(python_files.__file__).parents[2]
    program, site, other = (tmp_path / name for name in ("scripts/run.py", "venv/site-packages", "other"))
    write(tmp_path, {"scripts/run.py": b"", "other/x.py": b"", "venv/site-packages/x.py": b""})
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(program), raising=False)
    library = Path(os.__file__).parent.resolve()
    entries = ["", ".", tmp_path, checkout, checkout / "tests", site, other, site, program.parent, library, "lib.zip"]
    assert python_files.path_roots([str(entry) for entry in entries]) == sorted([library, site, other])


def test_it_stays_what_lay_here_when_it_was_made(two_roots, tmp_path, refused):
    lib, _ = two_roots
    where = {"data_dir": str(tmp_path / "tfds"), "cache_dir": str(tmp_path / "cache")}
    data = DataConfig(dataset="python_source/sys_path", **where)
    before = open_store(data, "train")
    assert before.dataset == python_files.full_name("sys_path")
    here = [(name, file.read_bytes()) for name, file in python_files.here("sys_path")[0] if name != "bad.py"]
    assert {*before.tokens.tobytes().split(b"\xff")[:-1]} == {x for n, x in here if python_files.split_of(n) == "train"}
    write(lib, {"new.py": b"installed = 'since'\n"})
    python_files.here.cache_clear()
    assert open_store(data, "train").sha256 != before.sha256
    python_files.here.cache_clear()
    for changes in ({"full_name": before.dataset}, {"dataset": before.dataset}, {"dataset": before.dataset[:-6]}):
        again = dataclasses.replace(data, **changes)
        assert open_store(again, "train").path == before.path
        fresh = dataclasses.replace(again, cache_dir=str(tmp_path / "other"))  # tokenised anew, from the dataset
        assert open_store(fresh, "train").sha256 == before.sha256
    assert python_files.here.cache_info().misses == 0  # what lies here now is not even read
    elsewhere = dataclasses.replace(data, full_name=before.dataset, data_dir=str(tmp_path), cache_dir=str(tmp_path))
    line = refused(open_store, elsewhere, "train")
    assert all(part in line for part in (before.dataset, "data.data_dir", "data.dataset=python_source/sys_path"))
