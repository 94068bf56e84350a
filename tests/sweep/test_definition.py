"""Sweeps compose as functions, over points that are an argument and overrides."""

from spannorm_jax.sweep.definition import arguments, chain, fixed, options, product, seeds


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


def test_a_chain_has_the_points_of_one_after_those_of_another():
    assert list(chain(seeds(1), fixed("124m"))) == [("", {"seed": "0"}), ("124m", {})]
