import dataclasses
import sys
from pathlib import Path

import pytest
import tensorflow_datasets as tfds

from spannorm_jax.config import DataConfig
from spannorm_jax.data import stdlib_files, sys_path_files
from spannorm_jax.data.tokens import open_store
from spannorm_jax.errors import UserError


def write(root, files):
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def listed(*roots):
    return [(name, file.read_bytes()) for name, file in sys_path_files.list_files(sorted(roots))]


@pytest.fixture
def two_roots(tmp_path, monkeypatch):
    """A library with site-packages inside, as sys.path, and an empty record of what lies there."""
    lib = tmp_path / "lib"
    site = lib / "site-packages"
    write(lib, {"a.py": b"a = 1\n", "same.py": b"same\n", "both.py": b"library's\n", "bad.py": b"# \xe9\n"})
    write(lib, {"test/t.py": b"test\n", "dist-packages/elsewhere.py": b"not importable\n", "no.txt": b"x"})
    write(site, {"p/m.py": b"m = 1\n", "p/copy.py": b"same\n", "both.py": b"package's\n"})
    write(site, {"p/__pycache__/m.py": b"cache\n", "z.py": b"z\n"})
    sys_path_files.here.cache_clear()
    # For the listing only: imports go on as before.
    monkeypatch.setattr(sys_path_files, "sys", type(sys)("sys"))
    sys_path_files.sys.path = [str(site), str(lib), str(tmp_path / "absent"), str(lib)]
    sys_path_files.sys.modules = {"__main__": None}
    yield lib, site
    sys_path_files.here.cache_clear()


ALL = [
    ("a.py", b"a = 1\n"),
    ("bad.py", b"# \xe9\n"),
    ("both.py", b"library's\n"),
    ("both.py", b"package's\n"),
    ("p/copy.py", b"same\n"),
    ("p/m.py", b"m = 1\n"),
    ("test/t.py", b"test\n"),
    ("z.py", b"z\n"),
]


def test_each_content_once_in_an_order_of_its_own(two_roots):
    lib, site = two_roots
    found = sys_path_files.list_files([lib, site])
    assert [(name, file.read_bytes()) for name, file in found if name != "both.py"] == [
        entry for entry in ALL if entry[0] != "both.py"
    ]
    assert {file.read_bytes() for name, file in found if name == "both.py"} == {b"library's\n", b"package's\n"}
    assert found == sys_path_files.list_files([site, lib])


def test_where_the_roots_lie_is_no_property_of_the_data(two_roots, tmp_path):
    lib, site = two_roots
    here = sys_path_files.content_hash(sys_path_files.list_files([lib, site]))
    (tmp_path / "b").mkdir()
    site.rename(tmp_path / "b" / "site-packages")  # now sorted before, not within, the library
    lib.rename(tmp_path / "c")
    moved = sys_path_files.list_files([tmp_path / "b" / "site-packages", tmp_path / "c"])
    assert sys_path_files.content_hash(moved) == here
    (tmp_path / "c" / "a.py").write_bytes(b"a = 2\n")
    assert sys_path_files.content_hash(moved) != here


def test_the_working_folder_the_programs_and_the_checkout_are_no_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkout = Path(sys_path_files.__file__).parents[2]
    program = tmp_path / "scripts" / "run.py"
    write(tmp_path, {"scripts/run.py": b""})
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(program), raising=False)
    site = tmp_path / "venv" / "site-packages"
    other = tmp_path / "other"
    for folder in (site, other):
        folder.mkdir(parents=True)
    entries = [
        "",
        ".",
        str(tmp_path),
        str(checkout),
        str(checkout / "tests"),
        str(site),
        str(other),
        str(site),
        str(program.parent),
    ]
    roots = sys_path_files.roots([*entries, str(stdlib_files.stdlib_root()), str(tmp_path / "lib.zip")])
    assert roots == sorted([stdlib_files.stdlib_root().resolve(), site, other])


def test_it_is_a_dataset_by_name(two_roots, tmp_path):
    data = DataConfig(
        dataset="python_source/sys_path", data_dir=str(tmp_path / "tfds"), cache_dir=str(tmp_path / "cache")
    )
    store = open_store(data, "train")
    name = sys_path_files.full_name()
    assert store.dataset == name and name.startswith("python_source/sys_path_")
    parts = store.tokens.tobytes().split(b"\xff")[:-1]
    readable = [entry for entry in ALL if entry[0] != "bad.py"]
    assert sorted(parts) == sorted(text for path, text in readable if stdlib_files.split_of(path) == "train")
    # By its full name too, from the files that are now there.
    found = tfds.builder(name.rpartition("/")[0], data_dir=data.data_dir)
    assert found.info.full_name == name
    assert "path" in found.info.features


def test_its_full_name_is_what_lay_here_when_it_was_made(two_roots, tmp_path):
    lib, _ = two_roots
    data = DataConfig(
        dataset="python_source/sys_path", data_dir=str(tmp_path / "tfds"), cache_dir=str(tmp_path / "cache")
    )
    before = open_store(data, "train")
    write(lib, {"new.py": b"installed = 'since'\n"})
    sys_path_files.here.cache_clear()
    assert open_store(data, "train").sha256 != before.sha256
    sys_path_files.here.cache_clear()
    for changes in ({"full_name": before.dataset}, {"dataset": before.dataset}, {"dataset": before.dataset[:-6]}):
        again = dataclasses.replace(data, **changes)
        assert open_store(again, "train").path == before.path
        assert (
            open_store(dataclasses.replace(again, cache_dir=str(tmp_path / "other")), "train").sha256 == before.sha256
        )
    assert sys_path_files.here.cache_info().misses == 0  # what lies here now is not even read
    elsewhere = dataclasses.replace(data, full_name=before.dataset, data_dir=str(tmp_path), cache_dir=str(tmp_path))
    with pytest.raises(UserError, match=f"{before.dataset}.*data.data_dir.*data.dataset=python_source/sys_path"):
        open_store(elsewhere, "train")


def test_the_default_config_reads_nothing_of_it(source_data):
    sys_path_files.here.cache_clear()
    open_store(source_data, "train")
    assert tfds.builder("python_source", data_dir=source_data.data_dir).info.full_name == stdlib_files.full_name()
    assert sys_path_files.here.cache_info().misses == 0


def test_an_empty_path_is_the_users_to_mend():
    with pytest.raises(UserError, match=r"data\.dataset"):
        sys_path_files.content_hash([])
