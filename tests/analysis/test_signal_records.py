"""The tables of docs/theory.md, from records made by hand; and that every one of them has its place in the page."""

import re

import pytest

from experiments import signal_records
from spannorm_jax.errors import UserError


def record(placement, depth=2, seed=0, **lists):
    model = {"placement": placement, "init": "plain", "ffn": "swiglu", "depth": depth, "width": 16}
    return {"settings": {"tokens": 4}, "step": 5, "loss": 3.0, "config": {"model": model, "seed": seed}, **lists}


def predicted(placement, depth=2, **lists):
    return {"placement": placement, "init": "plain", "depth": depth, **lists}


@pytest.mark.parametrize(
    ("placement", "energy"),
    [("post", (1.5 / 2) * (3 / 1.25)), ("span", (1 + 2 * (1.5 / 2)) / 1.25)],
)
def test_the_formula_is_the_product_over_all_blocks_but_the_last(placement, energy):
    """(1 + b) / (1 + f) of both sub-layers; in a span block attention's share passes through the feed-forward."""
    lists = {
        "attn_forward_variance": [1.0, 7.0],
        "attn_backward_gain": [0.5, 7.0],
        "ffn_forward_variance": [0.25, 7.0],
        "ffn_backward_gain": [2.0, 7.0],
        "token_correlation": [0.1, 0.2],
        "stream_variance": [1.0, 1.0],
        "stream_loss_grad_norm": [4.0, 1.0],
    }
    line = signal_records.trained_table([record(placement, **lists)]).splitlines()[2]
    assert [cell.strip() for cell in line.strip("|").split("|")] == [
        *(f"`{placement}`", "`plain`", "5", "3", "7", "7", "0.2", f"{energy**0.5:.2g}", "4"),
    ]


def test_a_cell_is_predicted_over_the_mean_of_the_seeds():
    records = [
        predicted("pre", stream_grad_norm=[9.0, 1.0]),
        record("pre", stream_grad_norm=[8.0, 1.0]),
        record("pre", seed=1, stream_grad_norm=[10.0, 1.0]),
        predicted("pre", depth=4, stream_grad_norm=[12.0, 1.0]),
    ]
    assert signal_records.initial_table(records, "stream_grad_norm", 0, ".1f").splitlines() == [
        "| placement | init | 2 blocks | 4 blocks |",
        "| --- | --- | --- | --- |",
        "| `pre` | `plain` | 9.0 / 9.0 | 12.0 / – |",
    ]


def test_the_page_has_a_place_for_every_table():
    page = signal_records.PAGE.read_text(encoding="utf-8")
    for mark in ("gradient", "correlation", "variance", "trained"):
        assert len(re.findall(rf"<!-- {mark}: made by [^>]*-->\n.*?<!-- end -->", page, re.DOTALL)) == 1


def test_a_page_without_a_place_is_one_line(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text("no marks")
    monkeypatch.setattr(signal_records, "PAGE", page)
    monkeypatch.setattr(signal_records, "_sections", lambda: iter([("gradient", "| |")]))
    with pytest.raises(UserError, match="has 0 places for 'gradient'"):
        signal_records.write_page()
    assert page.read_text() == "no marks"
