"""The documents against the repository: what they link to, run and name is there."""

import configparser
import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import yaml

from spannorm_jax import config_file
from spannorm_jax.config import Config, flatten

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("experiments/*/README.md")])
KEYS = set(flatten(Config()))
GROUPS = {key.rpartition(".")[0] for key in KEYS} - {""}
LINK = re.compile(r"\]\(([^)\s]+)\)")
MODULE = re.compile(r"python -m ((?:spannorm_jax|experiments)[\w.]*\w)")
PRESET = re.compile(r"configs/\w+\.py(?::[\w.,=]+)?")
NAMED_KEY = re.compile(rf"`((?:{'|'.join(sorted(GROUPS))})\.[\w.]+?)[.*]*(?:=[^`]*)?`")
FLAG = re.compile(r'"(--\w+)"')


def place(path):
    return str(path.relative_to(ROOT))


all_documents = pytest.mark.parametrize("path", DOCUMENTS, ids=place)


def anchors(text):
    """Of each heading, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(text):
    """Argument lists of the indented `python -m` commands, with continued lines joined."""
    joined = re.sub(r"\\\n\s+", " ", text)
    lines = [line.strip() for line in joined.splitlines() if line.startswith("    ")]
    return [shlex.split(line, comments=True) for line in lines if line.startswith("python -m ")]


def test_the_documents_are_found():
    names = set(map(place, DOCUMENTS))
    assert {"README.md", "CONTRIBUTING.md", "docs/design.md", "experiments/results/README.md"} <= names
    assert sum(len(commands(path.read_text(encoding="utf-8"))) for path in DOCUMENTS) >= 30


def prose(path):
    """A document's lines without code, tables and comments."""
    text = re.sub(r"<!--.*?-->|^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return [line for line in text.splitlines() if not line.startswith(("    ", "|"))]


def test_the_readme_has_at_most_900_words():
    assert len(" ".join(prose(ROOT / "README.md")).split()) <= 900


@all_documents
def test_lines_of_a_document_have_at_most_120_columns(path):
    assert [line for line in prose(path) if len(line) > 120] == []


@all_documents
def test_what_a_document_links_to_exists(path):
    for target in LINK.findall(path.read_text(encoding="utf-8")):
        if re.match(r"https?:", target):
            continue
        name, _, anchor = target.partition("#")
        there = path.parent / name if name else path
        assert there.resolve().is_relative_to(ROOT) and there.exists(), target
        if anchor:
            assert anchor in anchors(there.read_text(encoding="utf-8")), target


@all_documents
def test_programs_that_a_document_names_exist(path):
    for name in MODULE.findall(path.read_text(encoding="utf-8")):
        spec = importlib.util.find_spec(name)
        assert spec, name
        if spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{name}.__main__")
            assert spec, f"{name} is no command"
        assert 'if __name__ == "__main__"' in Path(spec.origin).read_text(encoding="utf-8"), name


@all_documents
def test_configs_and_keys_that_a_document_names_are_valid(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = path.read_text(encoding="utf-8")
    for preset in PRESET.findall(text):
        config_file.load(preset)
    for key in re.findall(r"--config\.([\w.]*\w)", text):
        assert key in KEYS, key
    for key in NAMED_KEY.findall(text):
        if not key.endswith((".json", ".jsonl", ".py", ".md")):
            assert key in KEYS | GROUPS, key


@all_documents
def test_commands_of_a_document_have_flags_and_values_that_are_taken(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    sources = [*ROOT.glob("spannorm_jax/**/*.py"), *ROOT.glob("experiments/**/*.py")]
    flags = {flag for source in sources for flag in FLAG.findall(source.read_text(encoding="utf-8"))}
    for _, _, _, *arguments in commands(path.read_text(encoding="utf-8")):
        rest, overrides = config_file.split_overrides(arguments)
        assert {item for item in rest if item.startswith("--")} <= flags, arguments
        if "--config" in rest:
            spec = rest[rest.index("--config") + 1]
            config_file.load("configs/dense.py" if spec.endswith("/config.json") else spec, overrides)


def test_the_citation_and_the_package_agree():
    package = configparser.ConfigParser()
    package.read(ROOT / "setup.cfg", encoding="utf-8")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert [citation[key] for key in ("title", "version", "license")] == [
        package["metadata"][key] for key in ("name", "version", "license")
    ]
    [paper] = citation["references"]
    assert paper["url"] in (ROOT / "README.md").read_text(encoding="utf-8")
    assert "Apache License" in (ROOT / package["metadata"]["license_files"]).read_text(encoding="utf-8")
