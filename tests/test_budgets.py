"""How many lines the house may have: by folder, of .py and .html, but for blank ones, which the formatter sets."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUDGETS = {
    "spannorm_jax": 14_500,
    "spannorm_jax/model": 2_050,
    "spannorm_jax/report": 2_700,
    "spannorm_jax/analysis": 1_600,
    "spannorm_jax/training": 1_700,
    "spannorm_jax/sweep": 1_325,
    "spannorm_jax/data": 1_275,
    "spannorm_jax/run": 925,
    "spannorm_jax/parallel": 675,
    "spannorm_jax/inference": 325,
    "spannorm_jax/plan": 400,
    "tests": 12_000,
}
LONGEST_FILE = 400


def lines(path):
    return sum(1 for line in path.read_text(encoding="utf-8").splitlines() if line.strip())


def texts(folder):
    return [path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".html")]


@pytest.mark.parametrize(("folder", "budget"), BUDGETS.items())
def test_a_folder_keeps_to_its_lines(folder, budget):
    assert sum(map(lines, texts(folder))) <= budget


def test_every_package_has_a_budget_and_no_module_is_long():
    packages = {str(path.parent.relative_to(ROOT)) for path in ROOT.glob("spannorm_jax/**/__init__.py")}
    assert {name for name in packages if name.count("/") < 2} == {name for name in BUDGETS if name != "tests"}
    assert [path for path in texts("spannorm_jax") if lines(path) >= LONGEST_FILE] == []
