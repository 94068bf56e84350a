"""The numbers of documents against the records that they name.

A paragraph names a record if it links to a file or folder below experiments/results; a table does if the paragraph
before it does and ends in a colon. Such a block, and any other that wants to be compared, ends in a comment

    <!-- numbers: cpu.config.model.depth, cpu.peak_flops_per_s / 1e9 -->

that says in Python, number by number, what the record has; a template writes {# numbers: ... #}. A record has the name
of its file: an object or a list of them from JSON, or of NAME-runs.csv `Results` of the archives beside it. A string
stands for the numbers in it.
The document's digits are those of the rounded value. Numbers in words and in `code` are not looked at.
"""

import functools
import itertools
import json
import re
import statistics
import tempfile
from pathlib import Path

import polars as pl
import pytest
from polars.testing import assert_frame_equal
from test_documents import DOCUMENTS, ROOT, place

from experiments import claims, results_page, signal_records, stability_records, sweep_records
from experiments.results_page import Results

RECORDS, PAGE, CLAIMS = ROOT / "experiments/results", ROOT / "docs/results.md", ROOT / "docs/claims.md"
STABILITY = ROOT / "docs/stability.md"
SWEEPS = ROOT / sweep_records.RECORDS
COMMENT = re.compile(r"(?:<!--|\{#) numbers: (.*?)(?:-->|#\})", re.DOTALL)
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
MADE = re.compile(r"<!-- \w+: made by .*?<!-- end -->|\{\{.*?\}\}|\{%.*?%\}", re.DOTALL)
UNREAD = re.compile(r"`[^`]*`|\]\([^)]*\)")
NUMBER = re.compile(r"(?<![\w.])(?<![A-Za-z]-)[+−-]?\d+(?:,\d{3})*(?:\.\d+)?(?:e[+-]?\d+)?(?!\w*\d)")


class Record(dict):
    """A JSON object whose keys are attributes too."""

    __getattr__ = dict.__getitem__


@functools.cache
def scratch():
    return tempfile.TemporaryDirectory(prefix="records-")  # of this process, which removes it at its end


@functools.cache
def record(path):
    if path.suffix == ".json":
        return json.loads(path.read_text(encoding="utf-8"), object_hook=Record)
    if path.suffix == ".jsonl":
        return [json.loads(line, object_hook=Record) for line in path.read_text(encoding="utf-8").splitlines()]
    folder = sweep_records.unpack_sweep(name_of(path), Path(scratch().name), SWEEPS)
    return Results(name_of(path), results_page.read(folder), folder, "")


def name_of(path):
    return re.sub(r"\W", "_", path.name.partition(".")[0].removesuffix("-runs"))


def pick(records, **wanted):
    """Those with these values, of their own or of their config."""

    def of(record):
        config = record.get("config", {})
        return record | config | config.get("model", {})

    return [record for record in records if wanted.items() <= of(record).items()]


SCOPE = vars(statistics) | {
    "pick": pick,
    "Values": signal_records.Values,
    "Case": signal_records.Case,
    "formed": signal_records.formed,
}


def blocks(text, folder):
    """(block, its comment or None, records named so far: name -> path) of each that has a comment or needs one."""
    known, introduced = {}, False
    for block in re.split(r"\n\s*\n", MADE.sub("", text)):
        if block.startswith("    "):  # a command, which may stand between a paragraph and its table
            continue
        comment, block = COMMENT.search(block), COMMENT.sub("", block).strip()
        paths = [(folder / link).resolve() for link in LINK.findall(block)]
        own = [path for path in paths if path.is_relative_to(RECORDS) and path.suffix not in (".md", ".png")]
        known |= {name_of(path): path for path in own if path.exists()}
        needs = introduced if block.startswith("|") else bool(own)
        introduced = needs and block.endswith(":")
        if comment or (needs and numbers(block)):
            yield block, comment and comment[1], known


def numbers(text):
    return [number.replace(",", "").replace("−", "-") for number in NUMBER.findall(UNREAD.sub("", text))]


def values(found):
    if isinstance(found, str):
        return [float(number) for number in numbers(found)]
    return [found] if isinstance(found, int | float) else list(itertools.chain.from_iterable(map(values, found)))


def agree(shown, value):
    """Whether the value, rounded to the digits that are shown, is what is shown."""
    digits = len(shown.partition("e")[0].partition(".")[2])
    return float(shown) == float(format(value, f".{digits}{'e' if 'e' in shown else 'f'}"))


def wrong(text, folder):
    """(first line of the block, number in the document, value in the record) of what disagrees or is without a peer."""
    for block, comment, known in blocks(text, folder):
        scope = {name: record(path) for name, path in known.items() if re.search(rf"\b{name}\b", comment or "")}
        found = values(eval(f"[{comment}]", SCOPE | scope)) if comment else []
        for shown, value in itertools.zip_longest(numbers(block), found):
            if shown is None or value is None or not agree(shown, value):
                yield block.splitlines()[0], shown, value


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if path not in (PAGE, CLAIMS, STABILITY)], ids=place)
def test_the_numbers_beside_a_record_are_the_records(path):
    assert list(wrong(path.read_text(encoding="utf-8"), path.parent)) == []


LINKED = "[record](../experiments/results/throughput/cpu.json)"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Of 12 blocks.", []),
        (f"Of 12 blocks ({LINKED}).", [("12", None)]),
        (f"Of 12 blocks ({LINKED}).\n<!-- numbers: cpu.config.model.depth -->", []),
        (f"Of 13 blocks ({LINKED}).\n<!-- numbers: cpu.config.model.depth -->", [("13", 12)]),
        (f"Of 12 blocks and 3 ({LINKED}).\n<!-- numbers: cpu.config.model.depth -->", [("3", None)]),
        (f"Of blocks ({LINKED}).\n<!-- numbers: cpu.config.model.depth -->", [(None, 12)]),
        (f"So ({LINKED}):\n\n    command 3\n\n| `4` | 12 |", [("12", None)]),
        (f"So ({LINKED}).\n\n| 12 |", []),
        ("| 1,024 | −3.0e-3 | 2.50 |\n<!-- numbers: 1024.4, '-0.003', [2.497] -->", []),
        ("| 1,024 | 3e-3 | 2.50 |\n<!-- numbers: 1024.6, 0.0036, 2.506 -->", [("1024", 1024.6), ("3e-3", 0.0036),
            ("2.50", 2.506)]),
    ],
)  # fmt: skip
def test_a_number_that_is_wrong_or_not_compared_is_told(text, found):
    assert [pair[1:] for pair in wrong(text, ROOT / "docs")] == found


@pytest.mark.process  # every archive is read
def test_the_pages_of_results_and_claims_are_what_their_templates_make_of_the_records(tmp_path, monkeypatch):
    def figure(self, name, alternative, view=""):  # is not drawn: its bytes are those of fonts
        return f"![{alternative}]({self.beside}/{self.name}-{name}.png)"

    for template in (results_page.TEMPLATE, stability_records.TEMPLATE):
        assert list(wrong((ROOT / template).read_text(encoding="utf-8"), ROOT / "docs")) == []
    for path in SWEEPS.glob("*-runs.csv"):
        record(path)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(Results, "figure", figure)
    runs = Path(scratch().name)
    of_stability = {"template": stability_records.TEMPLATE, "lab": stability_records.read(runs)}
    for page, more in ((PAGE, {}), (STABILITY, of_stability)):
        made = results_page.write_page(runs, tmp_path / page.name, Path("experiments/results/sweeps"), **more)
        text = re.sub(r"\]\((?:\.\./)+experiments", "](../experiments", made.read_text(encoding="utf-8"))
        assert text == page.read_text(encoding="utf-8")
    (tmp_path / "README.md").write_bytes((ROOT / "README.md").read_bytes())
    made = claims.write_page(Path(scratch().name), tmp_path / "claims.md", tmp_path / "README.md")
    assert made.read_text(encoding="utf-8") == CLAIMS.read_text(encoding="utf-8")
    assert (tmp_path / "README.md").read_bytes() == (ROOT / "README.md").read_bytes()


@pytest.mark.process
@pytest.mark.parametrize("name", sorted(sweep_records.archives(SWEEPS)))
def test_the_table_of_a_sweeps_runs_is_that_of_its_archives(name):
    of_archives = sweep_records.table(record(SWEEPS / f"{name}-runs.csv").figures)
    kept = pl.read_csv(SWEEPS / f"{name}-runs.csv", schema=of_archives.schema)
    assert_frame_equal(kept, of_archives, rel_tol=1e-9)  # sums of another processor
