"""The numbers of documents against the records that they name.

A paragraph names a record if it links to a file or folder below experiments/results, and a table if the paragraph before
it does and ends in a colon. Such a block, and any other that wants to be checked, ends in a comment

    <!-- numbers: cpu.config.model.depth, cpu.peak_flops_per_s / 1e9 -->

which says in Python, number by number, what the record has; a template writes {# numbers: ... #}. A record has the name
of its file: an object of JSON, a list of them, or the `Results` of run folders. A string stands for the numbers in it.
The document's digits are those of the rounded value. Numbers in `code` and in words are not looked at.
"""

import functools
import itertools
import json
import re
import statistics
import tempfile
from pathlib import Path

import pytest
from test_documents import DOCUMENTS, ROOT

from experiments import results_page, signal_records, sweep_records
from experiments.results_page import Results

TEMPLATE, MADE = ROOT / results_page.TEMPLATE, ROOT / "docs/results.md"
WRITTEN = [path for path in DOCUMENTS if path != MADE]
RECORDS = ROOT / "experiments/results"

COMMENT = re.compile(r"(?:<!--|\{#) numbers: (.*?)(?:-->|#\})", re.DOTALL)
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
FILLED_IN = re.compile(r"<!-- \w+: made by .*?<!-- end -->|\{\{.*?\}\}|\{%.*?%\}", re.DOTALL)
UNREAD = re.compile(r"`[^`]*`|\]\([^)]*\)")
NUMBER = re.compile(r"(?<![\w.])(?<![A-Za-z]-)[+−-]?\d+(?:,\d{3})*(?:\.\d+)?(?:e[+-]?\d+)?(?!\w*\d)")


class Record(dict):
    """A JSON object whose keys are attributes too."""

    __getattr__ = dict.__getitem__


@functools.cache
def unpacked(archive):
    folder = tempfile.TemporaryDirectory(prefix="records-")  # lives as long as the cache
    sweep_records.unpack(archive, Path(folder.name))
    return folder


@functools.cache
def record(path):
    if path.suffix == ".json":
        return json.loads(path.read_text(encoding="utf-8"), object_hook=Record)
    if path.suffix == ".jsonl":
        return [json.loads(line, object_hook=Record) for line in path.read_text(encoding="utf-8").splitlines()]
    folder = path if path.is_dir() else Path(unpacked(path).name)
    return Results(path.name, results_page.read(folder), folder, "")


def named(block, parent):
    """The records that a block links to, by name."""
    paths = [(parent / link).resolve() for link in LINK.findall(block)]
    found = [path for path in paths if path.is_relative_to(RECORDS) and path.suffix not in (".md", ".png")]
    return {re.sub(r"\W", "_", path.name.partition(".")[0]): path for path in found if path.exists()}


def checked(text, parent):
    """(block, comment or None, records named so far) of each block that has a comment or needs one."""
    known, introduced = {}, False
    for block in re.split(r"\n\s*\n", FILLED_IN.sub("", text)):
        if block.startswith("    "):  # a command, which may stand between a paragraph and its table
            continue
        comment = COMMENT.search(block)
        block = COMMENT.sub("", block).strip()
        links = named(block, parent)
        known |= links
        needs = introduced if block.startswith("|") else bool(links)
        introduced = needs and block.endswith(":")
        if comment or (needs and numbers(block)):
            yield block, comment and comment[1], known


def numbers(text):
    found = NUMBER.findall(UNREAD.sub("", text))
    return [number.replace(",", "").replace("−", "-") for number in found]


def values(found):
    """Flat."""
    if isinstance(found, str):
        return [float(number) for number in numbers(found)]
    return [found] if isinstance(found, int | float) else list(itertools.chain.from_iterable(map(values, found)))


def agree(shown, value):
    form = f".{len(shown.partition('e')[0].partition('.')[2])}{'e' if 'e' in shown else 'f'}"
    return float(shown) == float(format(value, form))


def wrong(text, parent=ROOT):
    """What is wrong with a document: (block, number, value)."""
    for block, comment, known in checked(text, parent):
        scope = {name: record(path) for name, path in known.items() if re.search(rf"\b{name}\b", comment or "")}
        found = values(eval(f"[{comment}]", SCOPE | scope)) if comment else []
        for shown, value in itertools.zip_longest(numbers(block), found):
            if shown is None or value is None or not agree(shown, value):
                yield block.splitlines()[0], shown, value


def pick(records, **wanted):
    """Those with these values, of their own or of their config."""

    def of(record):
        config = record.get("config", {})
        return record | config | config.get("model", {})

    return [record for record in records if wanted.items() <= of(record).items()]


SCOPE = vars(statistics) | {
    "pick": pick,
    **{name: getattr(signal_records, name) for name in ("Values", "Case", "formed")},
}


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_number_beside_a_record_is_the_records(path):
    assert list(wrong(path.read_text(encoding="utf-8"), path.parent)) == []
