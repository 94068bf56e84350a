"""The tables of docs/theory.md, from records made by hand; and that every one of them has its place in the page."""

import re

import pytest

from experiments import signal_records
from spannorm_jax.errors import UserError


def record(placement, depth=12, seed=0, ffn="swiglu", width=256, **lists):
    model = {"placement": placement, "init": "plain", "ffn": ffn, "depth": depth, "width": width}
    return {"settings": {"tokens": 4}, "step": 5, "loss": 3.0, "config": {"model": model, "seed": seed}, **lists}


def predicted(placement, depth=12, ffn="swiglu", width=256, **lists):
    return {"placement": placement, "init": "plain", "ffn": ffn, "depth": depth, "width": width, **lists}


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
    """The geometric one of a gradient, which may differ from seed to seed by a factor; others may be negative."""
    records = [
        predicted("pre", stream_grad_norm=[9.0, 1.0], token_correlation=[0.1]),
        record("pre", stream_grad_norm=[4.0, 1.0], token_correlation=[-0.1]),
        record("pre", seed=1, stream_grad_norm=[16.0, 1.0], token_correlation=[0.3]),
        predicted("pre", depth=48, stream_grad_norm=[12.0, 1.0]),
        predicted("pre", depth=64, stream_grad_norm=[7.0, 1.0]),
        predicted("pre", ffn="relu", stream_grad_norm=[7.0, 1.0]),
        predicted("pre", width=128, stream_grad_norm=[7.0, 1.0]),
    ]
    assert signal_records.initial_table(records, "stream_grad_norm", 0, ".1f").splitlines() == [
        "| placement | init | 12 blocks | 48 blocks |",
        "| --- | --- | --- | --- |",
        "| `pre` | `plain` | 9.0 / 8.0 | 12.0 / – |",
    ]
    assert "| 0.1 / 0.1 |" in signal_records.initial_table(records[:3], "token_correlation", 0, ".1f")


def test_activations_stand_under_each_other_and_widths_beside():
    records = [
        predicted("post", 64, stream_grad_norm=[10.0, 1.0]),
        record("post", 64, stream_grad_norm=[5.0, 1.0]),
        record("post", 64, seed=1, stream_grad_norm=[20.0, 1.0]),
        predicted("span", 64, "relu", stream_grad_norm=[2.0, 1.0]),
    ]
    assert signal_records.activations_table(records, "stream_grad_norm", 0, ".1f").splitlines() == [
        "| ffn | blocks | init | `pre` | `post` | `span` | `b2t` |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| swiglu | 64 | `plain` |  | 10.0 / 10.0 |  |  |",
        "| relu | 64 | `plain` |  |  | 2.0 / – |  |",
    ]
    # 5 / 10 and 20 / 10, whose geometric mean is 1.
    assert "| `post` | swiglu | – | 1.00 (0.50 to 2.00, n = 2) | – |" in signal_records.widths_table(
        records, "stream_grad_norm", 0
    )


def test_every_case_is_measured_once_and_read_back(tmp_path, monkeypatch):
    """A record is found again by what it says, so that a command that is started again does nothing twice."""
    from spannorm_jax.analysis import measure, prediction

    def signal(config, workdir, step, settings, argv):
        return {"config": {"model": vars(config.model), "seed": config.seed}, "settings": vars(settings)}

    monkeypatch.setattr(measure, "signal", signal)
    monkeypatch.setattr(prediction, "predict", lambda cfg, tokens: None)
    monkeypatch.setattr(
        prediction, "as_dict", lambda cfg, *_: {key: getattr(cfg, key) for key in signal_records.Case._fields}
    )
    path = tmp_path / "initial.jsonl"
    some = [case for case in signal_records.cases() if case[0].depth == 64]
    signal_records.initial(path, iter(some))
    first = path.read_text()
    measured = [line for line in first.splitlines() if "settings" in line]
    assert len(measured) == len(set(measured)) == len(set(some)) + 9 * 5 - 3  # nine models at six seeds, three twice
    signal_records.initial(path, iter(some))
    assert path.read_text() == first


def test_the_page_has_every_table_as_the_records_make_it():
    page = signal_records.PAGE.read_text(encoding="utf-8")
    found = re.findall(r"<!-- (\w+): made by [^>]*-->\n\n(.*?)\n\n<!-- end -->", page, re.DOTALL)
    assert found == list(signal_records._sections())
    assert [mark for mark, _ in found] == (
        ["gradient", "skip", "correlation", "rank", "variance", "activations", "collapse", "widths", "trained"]
    )


def test_a_page_without_a_place_is_one_line(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text("no marks")
    monkeypatch.setattr(signal_records, "PAGE", page)
    monkeypatch.setattr(signal_records, "_sections", lambda: iter([("gradient", "| |")]))
    with pytest.raises(UserError, match="has 0 places for 'gradient'"):
        signal_records.write_page()
    assert page.read_text() == "no marks"
