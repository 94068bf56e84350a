"""Images: the model against plain NumPy, what is drawn for a row, its loss, and runs on digits that are continued."""

import json
import math

import jax
import numpy as np
import pytest
import reference
from small_model import standard_normal
from test_lanes import stopping

from spannorm_jax import evaluate as evaluating
from spannorm_jax import sample
from spannorm_jax.config import Config, ImageConfig, MeshConfig, replace
from spannorm_jax.config_file import load
from spannorm_jax.errors import UserError
from spannorm_jax.inference.evaluation import evaluate
from spannorm_jax.model.definition import flops_per_token
from spannorm_jax.model.vision import patches, sincos2d
from spannorm_jax.parallel.mesh import make_mesh
from spannorm_jax.parallel.rank import ProcessFlags
from spannorm_jax.report.folders import find_runs
from spannorm_jax.report.frames import levels
from spannorm_jax.report.study import study_of
from spannorm_jax.report.tables import table_cells
from spannorm_jax.resolution import resolve
from spannorm_jax.run.folder import read_config
from spannorm_jax.training import loop
from spannorm_jax.training.flags import Flags
from spannorm_jax.training.numbers import numbers_of
from spannorm_jax.training.step import make_program
from spannorm_jax.training.tasks import task_of
from spannorm_jax.training.tasks.image import augmented, loss_sums

SIDE, PATCH, COLOURS, CLASSES = 8, 4, 3, 5


def config_of(placement="span", **changes):
    config = replace(Config(), task="image", model__depth=4, model__width=16, model__placement=placement)
    config = replace(config, image__size=SIDE, image__patch=PATCH, image__channels=COLOURS, training__batch_size=8)
    return resolve(replace(config, **changes), vocab_size=CLASSES, platform="cpu", fingerprint="")


def drawn(model):
    rng = np.random.default_rng(1)

    def draw(spec):
        return (0.3 * standard_normal(rng, spec) + (spec.role == "norm")).astype(np.float32)

    return model.map_weights(draw)


def batch(n=8, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.integers(256, size=(n, SIDE, SIDE, COLOURS), dtype=np.uint8)
    return {"image": images, "label": rng.integers(CLASSES, size=n).astype(np.int32)}


# ---- the model ------------------------------------------------------------------------------------------


def cut(image):
    """Patches of one image, row by row, by loops."""
    found = [image[y : y + PATCH, x : x + PATCH].ravel() for y in range(0, SIDE, PATCH) for x in range(0, SIDE, PATCH)]
    return np.array(found) / 127.5 - 1


def positions(side, width):
    """MoCo v3's, by loops: a quarter of the width each for sine and cosine of the column, then of the row."""
    quarter = width // 4
    rows = []
    for y in range(side):
        for x in range(side):
            rates = [10000.0 ** (-i / (quarter - 1)) for i in range(quarter)]
            rows.append([f(p * r) for p in (x, y) for f in (math.sin, math.cos) for r in rates])
    return np.array(rows)


# Of every kind of stream and end; test_placement.py has all placements with a mask.
CASES = [(placement, {}) for placement in ("pre", "post", "span", "span_raw", "siamese", "hybrid", "layerscale")]
CASES += [("span", {"image__positions": "learned", "image__pool": "token"}), ("pre", {"model__norm": "layernorm"})]
CASES += [("span", {"model__num_kv_heads": 2, "model__qk_norm": True, "model__ffn": "gelu"})]


@pytest.mark.parametrize(("placement", "changes"), CASES)
def test_logits_are_those_of_plain_numpy(placement, changes):
    config = config_of(placement, **changes)
    model = task_of(config).define(config)
    params, images = drawn(model), batch(2)["image"]
    got = np.asarray(jax.jit(lambda params: model.bind(params)(images))(params))
    w = reference.to_float64(params)
    options = reference.Options(placement, norm=config.model.norm, ffn=config.model.ffn, causal=False)
    for logits, image in zip(got, images, strict=True):
        x = cut(image) @ w["embed"] + (w["positions"] if "positions" in w else positions(SIDE // PATCH, 16))
        if "token" in w:
            x = np.concatenate([w["token"], x])
        features = reference.features(w, x, options)
        want = (features[0] if "token" in w else features.mean(axis=0)) @ w["head"]
        # float32 against float64: largest error seen 2.1e-6 of the largest logit.
        np.testing.assert_allclose(logits, want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_patches_and_positions_are_those_of_loops():
    image = batch(1)["image"]
    np.testing.assert_allclose(patches(image, PATCH)[0], cut(image[0]), atol=1e-6)
    np.testing.assert_allclose(sincos2d(3, 16), positions(3, 16), atol=1e-6)


def test_a_model_starts_at_even_chances_and_counts_what_it_multiplies():
    config = config_of()
    model = task_of(config).define(config)
    params = jax.jit(model.init)(jax.random.key(0))
    np.testing.assert_array_equal(model.bind(params)(batch()["image"]), np.zeros((8, CLASSES)))
    T, D, F, L = 4, 16, config.model.ffn_dim, 4
    assert config.data.seq_len == T
    assert flops_per_token(model, T) == 6 * (L * (4 * D * D + 3 * D * F) + D * CLASSES) + 12 * L * D * T


# ---- augmentation and loss --------------------------------------------------------------------------------


def test_an_image_is_cut_out_of_its_padding_and_flipped_by_its_own_draw():
    image = ImageConfig(size=SIDE, pad=1, flip=True)
    images, draws = batch(64)["image"], np.arange(64, dtype=np.uint32)
    got = np.asarray(augmented(images, draws, image))
    seen = set()
    for one, x in zip(got, images, strict=True):
        padded = np.pad(x, ((1, 1), (1, 1), (0, 0)))
        could = {
            (i, j, flip): padded[i : i + SIDE, j : j + SIDE][:, :: -1 if flip else 1]
            for i in range(3)
            for j in range(3)
            for flip in (False, True)
        }
        found = [key for key, value in could.items() if np.array_equal(value, one)]
        assert len(found) == 1
        seen |= set(found)
    assert len(seen) > 12  # of 18; 64 draws leave out six with a chance of 1e-7
    np.testing.assert_array_equal(augmented(images[::-1], draws[::-1], image), got[::-1])
    np.testing.assert_array_equal(augmented(images, draws, ImageConfig(size=SIDE)), images)


def test_the_objective_is_smoothed_and_what_is_reported_is_not():
    config = config_of(image__label_smoothing=0.2)
    model = task_of(config).define(config)
    params, data = drawn(model), batch(6)
    weights = np.array([1, 1, 1, 1, 0, 0], np.float32)
    sums = loss_sums(model.bind(params), data | {"weights": weights}, 0.1)
    logits = np.asarray(model.bind(params)(data["image"]), np.float64)[:4]
    labels = data["label"][:4]
    log_z = np.log(np.exp(logits).sum(axis=1))
    target = 0.8 * np.eye(CLASSES)[labels] + 0.2 / CLASSES
    objective = np.sum(log_z - np.sum(target * logits, axis=1)) + 0.1 * np.sum(log_z**2)
    np.testing.assert_allclose(sums["objective"], objective, rtol=1e-5)
    np.testing.assert_allclose(sums["nll"], np.sum(log_z - logits[np.arange(4), labels]), rtol=1e-5)
    assert (sums["count"], sums["correct"]) == (4, np.sum(logits.argmax(axis=1) == labels))


# ---- runs -------------------------------------------------------------------------------------------------

DIGITS = replace(load("configs/vision.py:tiny"), model__depth=2, model__width=32, model__num_heads=2)
DIGITS = replace(DIGITS, training__steps=60, training__batch_size=32, optim__lr=5e-3, eval__every_steps=30)
DIGITS = replace(DIGITS, image__patch=2, metrics__tensorboard=False, checkpoint__every_steps=20, image__pad=0)


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def train(config, run):
    assert loop.train(config, run, Flags([]), ProcessFlags()) == 0


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    run = tmp_path_factory.mktemp("digits") / "run"
    train(DIGITS, run)
    return run


def test_digits_are_learnt_and_each_held_out_one_is_judged_once(digits):
    last = lines(digits)[-1]
    assert last["held_out_accuracy"] > 0.25  # chance: 0.1
    result = evaluate(read_config(digits), digits, None, ProcessFlags(), digits / "eval.jsonl")
    assert result["images"] == 360
    assert result["accuracy"] == pytest.approx(last["held_out_accuracy"])
    assert result["accuracy"] * 360 == pytest.approx(round(result["accuracy"] * 360), abs=1e-6)
    assert result["floors"] == {"chance": math.log(10), "linear": pytest.approx(0.336, abs=0.01)} | {
        "linear_accuracy": pytest.approx(0.9, abs=0.01)
    }
    (folder,) = find_runs(digits.parent)
    assert folder.reached["over_linear"] == pytest.approx(result["accuracy"] - result["floors"]["linear_accuracy"])
    study = study_of([folder])
    columns = [name for name, _ in table_cells(study)[0]]
    assert "over linear" in columns and "over 4-gram" not in columns
    assert [line.split()[0] for line in levels(study)["name"]] == ["chance", "linear"]
    assert lines(digits)[0]["loss"] == pytest.approx(math.log(10), abs=1e-6)


def test_a_run_that_was_stopped_goes_on_with_the_same_numbers(digits, tmp_path, monkeypatch):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        stopping(patch, loop, at=17)
        assert loop.train(DIGITS, run, Flags([], stop_code=75), ProcessFlags()) == 75
    train(DIGITS, run)
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in lines(run)] == [line[key] for line in lines(digits)]


@pytest.mark.parametrize("layout", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_eight_devices_train_as_one(layout):
    config = config_of(model__num_heads=4, image__pad=1, image__flip=True, image__pool="token")
    config = replace(config, model__vocab_size=8)
    data = batch() | {"draw": np.arange(8, dtype=np.uint32)}
    losses = []
    for sizes, n in (({"data": 1}, 1), (layout, 8)):
        mesh = make_mesh(MeshConfig(**sizes), jax.devices()[:n])
        with jax.set_mesh(mesh):
            model = task_of(config).define(config)
            program = make_program(config, model, mesh)
            state = program.init(0)
            for _ in range(3):
                state, metrics = program.train(state, program.put(data), numbers_of(config))
            losses.append(float(metrics["scalars"]["loss"]))
    assert losses[1] == pytest.approx(losses[0], rel=5e-6)


# ---- what users get wrong -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "says"),
    [
        (("image.patch", "3"), "image.patch=3 does not divide image.size=8; write for example 2"),
        (("image.channels", "2"), "image.channels=2 must be 1"),
        (("image.pad", "8"), "image.pad=8 moves images of 8 pixels out"),
        (("model.tied_head", "true"), "model.tied_head=True is of task=text"),
        (("data.tokenizer", "bpe"), "data.tokenizer='bpe' is of task=text, and nothing reads it here"),
        (("training.tokens", "9"), "training.tokens=9 is of task=text"),
        (("data.seq_len", "32"), "data.seq_len=32 is filled in.*4 patches"),
        (("task", "text"), "image is of task=image"),
        (("model.vocab_size", "4"), "below the 10 classes of digits"),
        (("data.eval_split", "validation"), "data.eval_split='validation' is no split of digits"),
        (("data.eval_split", "test[:0]"), "has no images"),
        (("data.dataset", "cifar10"), "cifar10.*not prepared.*tensorflow_datasets.image_classification"),
        (("data.dataset", "cifar"), "did you mean"),
    ],
)
def test_a_config_that_cannot_be_is_one_line(override, says, tmp_path):
    data_dir = ("data.data_dir", str(tmp_path))
    with pytest.raises(UserError, match=says):
        config = load("configs/vision.py:tiny", [data_dir, override])
        task_of(config).open(config)


def test_held_out_images_that_are_trained_on_are_said(capsys):
    config = load("configs/vision.py:tiny", [("data.eval_split", "train[:10]")])
    task = task_of(config)
    task.warn(config, task.open(config)[0])
    assert "shares 10 images with data.train_split='train'" in capsys.readouterr().err
    usual = load("configs/vision.py:tiny")
    task.warn(usual, task.open(usual)[0])
    assert capsys.readouterr().err == ""


def test_commands_of_text_refuse_a_model_of_images(digits):
    with pytest.raises(UserError, match="sampling is of task=text, and this is a model of task=image"):
        sample.main([f"--workdir={digits}"])
    with pytest.raises(UserError, match="--tasks is of task=text, and this is a model of task=image"):
        evaluating.main([f"--workdir={digits}", "--tasks=hellaswag"])


def test_a_patch_counts_as_no_token(digits):
    """Lines, starts and reports count images: of each, the FLOPs of its 16 patches."""
    last, start = lines(digits)[-1], json.loads((digits / "starts.jsonl").read_text(encoding="utf-8"))
    assert last["images"] == 60 * 32 and last["images_per_s"] == pytest.approx(32 / last["step_time_s"])
    assert not any("token" in key for key in {**last, **start})
    config = read_config(digits)
    each = 16 * flops_per_token(task_of(config).define(config), 16)
    assert start["flops_per_image"] == each
    (run,) = find_runs(digits.parent)
    assert run.reached["tokens"] == 60 * 32 and run.reached["flops"] == 60 * 32 * each
    names = [name for name, _ in table_cells(study_of([run]))[0]]
    assert "images/s" in names and "tokens/s" not in names and run.reached["tokens_per_s"] > 0
