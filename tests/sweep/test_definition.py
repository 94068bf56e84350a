"""Sweeps compose as functions, over points that are an argument and overrides."""

import pytest

from spannorm_jax.sweep.definition import arguments, chain, fixed, options, product, seeds, where, zipped


def test_arguments_and_options_are_products_and_write_values_as_overrides_do():
    assert list(arguments(depth=(6, 12), placement=("pre",))) == [
        ("depth=6,placement=pre", {}),
        ("depth=12,placement=pre", {}),
    ]
    values = {"model.qk_norm": (True,), "model.init_targets": (("ffn_out",), ("attn_out", "ffn_out"))}
    assert list(options(values)) == [
        ("", {"model.qk_norm": "true", "model.init_targets": "ffn_out"}),
        ("", {"model.qk_norm": "true", "model.init_targets": "attn_out,ffn_out"}),
    ]


def test_a_product_has_each_with_each():
    got = product(fixed("tiny", {"training.steps": 9}), arguments(init=("plain", "scale")), seeds(2))
    assert got == [
        (f"tiny,init={init}", {"training.steps": "9", "seed": seed}) for init in ("plain", "scale") for seed in "01"
    ]


def test_a_product_joins_along_what_both_set():
    lr = product(options({"optim.lr": (1e-3, 1e-2)}), seeds(3))
    assert product(lr, seeds(2)) == [point for point in lr if point[1]["seed"] != "2"]
    assert product(fixed("tiny,depth=6"), arguments(depth=(6, 12))) == [("tiny,depth=6", {})]
    assert product(fixed("tiny"), fixed("124m")) == []


def test_zipped_goes_side_by_side_and_refuses_what_does_not_fit():
    rates = options({"optim.lr": (1e-3, 1e-2)})
    assert list(zipped(arguments(width=(32, 64)), rates)) == [
        ("width=32", {"optim.lr": "0.001"}),
        ("width=64", {"optim.lr": "0.01"}),
    ]
    with pytest.raises(ValueError, match="longer"):
        list(zipped(seeds(2), seeds(3), arguments(width=(1, 2))))
    with pytest.raises(ValueError, match="two values"):
        list(zipped(fixed("depth=1"), fixed("depth=2")))


def test_where_sees_arguments_and_overrides():
    points = product(fixed("tiny"), arguments(depth=(6, 12)), seeds(2))
    kept = where(lambda v: v["preset"] == "tiny" and (v["depth"] == "6" or v["seed"] == "1"), points)
    assert list(chain(kept, fixed("124m"))) == [*points[:2], points[3], ("124m", {})]
