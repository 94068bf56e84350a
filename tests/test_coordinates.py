"""The coordinate check: slopes of known power laws, its command on models that take a moment, and what it refuses."""

import json

import numpy as np
import pytest

from experiments import coordinate_check as check
from spannorm_jax.errors import UserError

SMALL = ["--config=configs/dense.py:tiny,placement=pre", "--config.data.seq_len=8", "--config.training.batch_size=2"]


def power_law(exponents, seeds=2, steps=1):
    """Sizes at widths 64 and 256 that go as width^exponent, each seed with its own constant."""

    def sizes(width, seed):
        return {name: [(1 + seed) * width**e] * (steps + 1) for name, e in exponents.items()}

    return [[sizes(width, seed) for seed in range(seeds)] for width in (64, 256)]


@pytest.mark.parametrize(
    ("exponents", "promised", "failed"),
    [
        ({"attn": 0.0, "change of features": 0.1, "change of logits": -0.5}, True, 0),
        ({"attn": 0.0, "change of features": 0.5}, True, 1),
        ({"attn": -0.5, "change of features": -0.1}, True, 1),  # what vanishes is lost too
        ({"attn": 1.0, "change of logits": 1.0}, False, 0),  # of standard nothing is asked
        ({"logits": 0.5, "change of logits": 0.5}, True, 2),
    ],
)
def test_slopes_beyond_the_bound_are_counted_where_they_are_promised(exponents, promised, failed):
    found = power_law(exponents)
    slopes = {name: [check.slopes((64, 256), found, name, t) for t in range(2)] for name in exponents}
    for name, exponent in exponents.items():
        np.testing.assert_allclose(slopes[name], exponent, atol=1e-12)
    result = {"axis": "width", "parametrisation": "mup", "promised": promised, "slopes": slopes}
    lines, count = check.table([result], bound=0.2)
    assert count == failed == sum("broken" in line for line in lines)
    assert len(lines) == 2 + len(exponents)


def test_the_command_leaves_record_table_and_figure_and_judges_them_again(tmp_path, capsys, own_caches):
    out, again = tmp_path / "out", tmp_path / "again"
    sizes = ["--widths=16,32", "--depths=", "--at_depth=1", "--steps=1", "--seeds=1", "--parametrisations=mup"]
    assert check.main([*SMALL, *sizes, "--bound=9", "--out", str(out)]) == 0
    record = json.loads((out / "record.json").read_text())
    assert record["command"].startswith("python -m experiments.coordinate_check --config=configs/dense.py")
    [result] = record["results"]
    assert (result["axis"], result["parametrisation"], result["sizes"]) == ("width", "mup", [16, 32])
    for of_size in result["found"]:
        [sizes_of_seed] = of_size
        assert set(sizes_of_seed) == {name for site in check.SITES for name in (site, f"change of {site}")}
        for site in check.SITES:
            assert sizes_of_seed[f"change of {site}"][0] == 0 < sizes_of_seed[f"change of {site}"][1]
            assert sizes_of_seed[site][0] > 0
    assert (out / "figure.svg").read_text().startswith("<svg") and (out / "figure.png").stat().st_size > 1000
    assert check.main(["--judge", str(out / "record.json"), "--bound=1e-9", "--out", str(again)]) == 1
    assert "broken" in (again / "table.md").read_text() and "promises are broken" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([*SMALL, "--widths=64"], "two sizes"),
        ([*SMALL, "--parametrisations=mpu"], "'mup'"),
        ([*SMALL, "--seeds=0"], "1 or more"),
        ([*SMALL, "--judge=x"], "one of them"),
        (["--judge=/nowhere/record.json"], "no record"),
    ],
)
def test_what_it_refuses(argv, says, tmp_path):
    with pytest.raises(UserError) as refused:
        check.main([*argv, "--out", str(tmp_path / "out")])
    assert says in str(refused.value) and not (tmp_path / "out").exists()
