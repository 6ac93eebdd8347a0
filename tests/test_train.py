"""The stage train, on drawn images."""

import json
import math
import shutil
import sys
import types
from pathlib import Path

import keras
import numpy as np
import pandas as pd
import pytest
from conftest import options
from factories import make_prepared
from PIL import Image
from tensorflow.python.framework import config as tf_config
from test_structure import MODULES, results_depend_on

from stages import train as training
from stages.data.arrays import Split
from stages.model import checkpoint as checkpoints
from stages.model import fit as fitting
from stages.model import inference
from stages.model.network import FusedBatchNormalization, flatten_layers
from stages.model.parameters import Augment, Train
from stages.run.cli import UserError
from stages.train import train

SMALL = {
    "epochs": 4, "batch_size": 16, "filters": [4, 8], "convs_per_block": 1, "dense_units": 8,
    "learning_rate": 0.01,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    make_prepared(tmp_path, ["a", "b", "c"], {"train": 90, "val": 60})
    return tmp_path


@pytest.fixture
def backbone(folder):
    images = keras.Input((None, None, 3))
    x = keras.layers.Conv2D(6, 3, strides=2, activation="relu", name="first")(images)
    x = keras.layers.BatchNormalization(name="normalization")(x)
    x = keras.layers.GaussianNoise(0.1)(x)
    x = keras.layers.Conv2D(6, 1, name="second")(x)
    path = folder / "data" / "backbones" / "small.keras"
    path.parent.mkdir()
    keras.Model(images, x).save(path)
    return path.name


def run(**changes):
    return train(Train(**SMALL | changes))


def written():
    return {
        path: path.read_bytes()
        for path in [Path("data/model.keras"), *sorted(Path("metrics").rglob("*.*"))]
    }


def history():
    return pd.read_csv("metrics/history.csv")


class Killed(BaseException):
    pass


def killing_after(epochs, monkeypatch):
    """Let the training end abruptly once so many epochs are in the checkpoint."""
    save = checkpoints.Checkpoint.save
    saved = []

    def saving(self, arrays, state):
        save(self, arrays, state)
        saved.append(state)
        if len(saved) == epochs:
            raise Killed

    monkeypatch.setattr(checkpoints.Checkpoint, "save", saving)
    return saved


def test_train_writes_what_it_returns(folder):
    result = run(epochs=10, learning_rate=0.02)
    table = history()
    best = table.loc[result["epoch"] - 1]
    assert list(table["epoch"]) == [*range(1, 11)] and result["epochs"] == 10
    assert best["val_loss"] == table["val_loss"].min()
    for name in ("train_loss", "train_accuracy", "val_loss", "val_accuracy"):
        assert result[name] == pytest.approx(best[name.removeprefix("train_")], abs=1e-5)
    assert table["loss"].iloc[-1] < table["loss"].iloc[0] - 0.1
    assert not list(Path(".dvc/tmp/scratch/checkpoints").glob("*.npz*"))


def test_the_model_file_holds_the_kept_weights_calibrated(folder):
    result = run(epochs=6, seed=2)
    model = keras.models.load_model("data/model.keras")
    images, labels = (
        np.load(f"data/prepared/val/{name}.npy") for name in ("images-0000", "labels")
    )
    probabilities = model.predict(images, verbose=0)
    assert np.mean(probabilities.argmax(1) == labels) == pytest.approx(
        result["val_accuracy"], abs=1e-4
    )
    loss = -np.log(probabilities[np.arange(len(labels)), labels]).mean()
    assert loss == pytest.approx(result["val_loss_calibrated"], abs=1e-4)
    assert result["val_loss_calibrated"] <= result["val_loss"] + 1e-5
    assert model.count_params() == result["parameters"]


def test_training_uses_the_faster_batch_normalization_and_the_model_file_keras_own(
    folder, monkeypatch
):
    seen = []
    fit = training.fit
    monkeypatch.setattr(
        training, "fit", lambda phases, *rest: seen.extend(phases) or fit(phases, *rest)
    )
    run(epochs=1)
    [phase] = seen
    models = phase.train_model, keras.models.load_model("data/model.keras")
    trained, saved = ({type(layer) for layer in flatten_layers(model)} for model in models)
    assert FusedBatchNormalization in trained and keras.layers.BatchNormalization not in trained
    assert keras.layers.BatchNormalization in saved


FROM_SCRATCH = {"epochs": 5}
HALF_PRECISION = {"epochs": 3, "precision": "mixed_float16"}
FROZEN = {"epochs": 3}
FINE_TUNED = {
    "epochs": 3, "fine_tune_fraction": 0.7, "fine_tune_epochs": 3, "fine_tune_learning_rate": 0.01,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "finished", "missing"),
    [(FROM_SCRATCH, 2, 3), (FROM_SCRATCH, 5, 0), (HALF_PRECISION, 1, 2), (FROZEN, 2, 1),
     (FINE_TUNED, 3, 3), (FINE_TUNED, 5, 1)],
)  # fmt: skip
def test_an_interrupted_training_ends_with_the_bytes_of_an_uninterrupted_one(
    folder, backbone, monkeypatch, changes, finished, missing
):
    if changes in (FROZEN, FINE_TUNED):
        changes = changes | {"backbone": backbone}
    run(**changes)
    expected = written()
    shutil.rmtree("metrics")
    with monkeypatch.context() as patch:
        killing_after(finished, patch)
        with pytest.raises(Killed):
            run(**changes)
    saved = killing_after(math.inf, monkeypatch)
    run(**changes)
    assert len(saved) == missing
    assert written() == expected


def test_a_training_with_other_parameters_or_data_does_not_resume(folder, monkeypatch):
    run(learning_rate=0.02)
    expected = written()
    with monkeypatch.context() as patch:
        killing_after(2, patch)
        with pytest.raises(Killed):
            run()
    run(learning_rate=0.02)
    assert written() == expected
    make_prepared(folder, ["a", "b", "c"], {"train": 90, "val": 60}, seed=1)
    saved = killing_after(math.inf, monkeypatch)
    run()
    assert len(saved) == 4


def test_a_training_resumes_whatever_else_is_imported(folder, monkeypatch):
    with monkeypatch.context() as patch:
        killing_after(2, patch)
        with pytest.raises(Killed):
            run()
    module = types.ModuleType("stages.other")
    module.__file__ = str(folder / "other.py")
    (folder / "other.py").write_text("x = 1")
    monkeypatch.setitem(sys.modules, "stages.other", module)
    saved = killing_after(math.inf, monkeypatch)
    run()
    assert len(saved) == 2


def test_a_training_with_other_code_does_not_resume(folder, monkeypatch):
    code = folder / "code.py"
    code.write_text("x = 1")
    monkeypatch.setattr(training, "CODE", [*training.CODE, code])
    with monkeypatch.context() as patch:
        killing_after(2, patch)
        with pytest.raises(Killed):
            run()
    code.write_text("x = 2")
    saved = killing_after(math.inf, monkeypatch)
    run()
    assert len(saved) == 4


def test_the_code_that_results_depend_on_is_what_training_imports():
    assert {*training.CODE} >= {MODULES[name] for name in results_depend_on("train")}


def test_everything_random_follows_from_the_seed(folder):
    results = []
    for seed in (1, 1, 2):
        run(seed=seed, augment={"translation": 0.2}, dropout=0.5)
        results.append(written())
    assert results[0] == results[1]
    assert results[0][Path("data/model.keras")] != results[2][Path("data/model.keras")]


def test_each_epoch_has_an_order_of_its_own(folder, monkeypatch):
    read = []
    gather = Split.gather
    monkeypatch.setattr(Split, "gather", lambda *given: read.append(given) or gather(*given))
    run(epochs=3, batch_size=9)
    rows = [rows for split, rows in read if len(split) == 90 and len(rows) == 9]
    orders = np.array(rows).reshape(3, 90)
    assert (np.sort(orders) == np.arange(90)).all()
    for one, other in ((orders[0], orders[1]), (orders[1], orders[2]), (orders[0], np.arange(90))):
        assert np.mean(one == other) < 0.1


@pytest.mark.parametrize("deterministic", [True, False])
def test_environment_json_says_whether_the_training_was_deterministic(folder, deterministic):
    run(epochs=1, deterministic=not deterministic)
    run(epochs=1, deterministic=deterministic)
    said = json.loads(Path("metrics/environment.json").read_text())["deterministic"]
    assert said == tf_config.is_op_determinism_enabled() == deterministic


def test_reported_losses_are_without_label_smoothing(folder):
    losses = []
    for smoothing in (0.0, 0.4):
        run(epochs=1, learning_rate=1e-9, label_smoothing=smoothing)
        losses.append(history().loc[0, ["loss", "val_loss"]].to_numpy(float))
    assert np.allclose(*losses, atol=1e-5)


def test_the_best_epoch_is_the_best_of_all_phases(folder, backbone):
    head = {"backbone": backbone, "epochs": 20, "dropout": 0.0, "learning_rate": 0.05}
    run(**head)
    best = history()["val_loss"].min()
    result = run(**head, fine_tune_fraction=0.7, fine_tune_epochs=2, fine_tune_learning_rate=5.0)
    assert history()["val_loss"][20:].min() > best
    assert result["epoch"] <= 20 and result["val_loss"] == pytest.approx(best, abs=1e-5)


def test_a_diverging_training_stops_with_advice(folder):
    with pytest.raises(UserError, match="(?s)diverged: loss is .* in epoch 1.*learning rate"):
        run(learning_rate=10.0, batch_normalization=False, filters=[64] * 3, weight_decay=1e30)
    assert not Path("data/model.keras").exists()


def test_small_learning_rates_are_not_rounded_to_zero(folder):
    run(epochs=2, learning_rate=2e-8)
    assert (history()["learning_rate"] > 0).all()


def test_patience_stops_after_epochs_without_a_better_loss(folder):
    result = run(epochs=30, patience=2, learning_rate=0.05)
    losses = history()["val_loss"]
    assert result["epochs"] < 30
    assert len(losses) - (losses.idxmin() + 1) == 2


def test_balanced_classes_have_equal_total_weights(folder, monkeypatch):
    seen = []
    original = fitting.fit
    monkeypatch.setattr(
        "stages.train.fit", lambda p, r, *rest: seen.append(r) or original(p, r, *rest)
    )
    labels = np.load("data/prepared/train/labels.npy")
    labels[labels == 2] = np.where(np.arange((labels == 2).sum()) % 5, 1, 2)
    np.save("data/prepared/train/labels.npy", labels)
    run(class_weight="balanced")
    counts = np.bincount(labels)
    assert np.allclose(seen[0].class_weights * counts, len(labels) / 3)


def test_few_images_are_trained_on_in_smaller_batches(folder, capsys):
    assert run(batch_size=1000)["epochs"] == 4
    assert "9, not 1000" in capsys.readouterr().out


def test_features_are_computed_once_and_never_trusted_when_damaged(folder, backbone, monkeypatch):
    counted = []
    original = inference.make_predict_fn
    monkeypatch.setattr(
        "stages.model.features.make_predict_fn",
        lambda model: counted.append(model) or original(model),
    )
    run(backbone=backbone)
    expected = written()
    assert len(counted) == 2
    run(backbone=backbone, dense_units=0, precision="mixed_bfloat16")
    assert len(counted) == 2
    for path in Path(".dvc/tmp/scratch/features").glob("*.npy"):
        content = bytearray(path.read_bytes())
        content[200] ^= 1
        path.write_bytes(content)
    run(backbone=backbone)
    assert len(counted) == 4
    assert written() == expected
    other = keras.models.load_model(f"data/backbones/{backbone}")
    other.set_weights([2 * weights for weights in other.get_weights()])
    other.save(f"data/backbones/{backbone}")
    run(backbone=backbone)
    assert len(counted) == 6


def test_fine_tuning_changes_the_last_layers_and_no_batch_normalization(folder, backbone):
    before = keras.models.load_model(f"data/backbones/{backbone}")
    run(backbone=backbone, fine_tune_fraction=0.3, fine_tune_epochs=6, fine_tune_learning_rate=0.02)
    model = keras.models.load_model("data/model.keras")
    after = {layer.name: layer for layer in flatten_layers(model)}

    def same(name):
        pairs = zip(before.get_layer(name).weights, after[name].weights, strict=True)
        return all(np.array_equal(one, two) for one, two in pairs)

    assert same("first") and same("normalization") and not same("second")


def test_parameters_without_effect_are_named(folder, backbone, capsys):
    run(fine_tune_fraction=0.5, epochs=1)
    assert "train.fine_tune_fraction" in capsys.readouterr().out
    run(backbone=backbone, augment={"flip": "both"}, epochs=1)
    said = capsys.readouterr().out
    assert "train.filters" in said and "train.augment" in said


def test_a_missing_backbone_is_one_line(folder, backbone):
    with pytest.raises(
        UserError, match=r"backbone: no such file: .*large.keras; .* has small.keras"
    ):
        run(backbone="large.keras")


@pytest.mark.parametrize(
    ("temperature", "told"),
    [(1.0, "not calibrated"), (1.3, "after calibration\n"), (5.0, "at its limit, 5.0: don't rely")],
)
def test_the_summary_tells_what_calibration_did(folder, monkeypatch, capsys, temperature, told):
    result = {"epoch": 1, "epochs": 1, "train_accuracy": 1, "val_accuracy": 1, "val_loss": 1}
    result |= {"val_loss_calibrated": 1, "temperature": temperature}
    monkeypatch.setattr(training, "train", lambda _: result)
    (folder / "params.yaml").write_text("train: {}")
    training.main(options("train"))
    assert told in capsys.readouterr().out


def test_the_figure_of_augmented_images_has_an_image_and_five_variants_in_a_row(folder):
    tiles = {}
    for name, changes in (("none", dict.fromkeys(Train().augment.model_dump(), 0)), ("some", {})):
        changes = changes | {"flip": "none"}
        run(epochs=1, augment=Augment(**changes))
        with Image.open("metrics/plots/augmented.png") as picture:
            tiles[name] = np.asarray(picture)
    side = 96 + 12  # each pixel of the 8 x 8 images is enlarged to 12 x 12, a gap is one pixel
    assert tiles["none"].shape == tiles["some"].shape == (3 * side + 12, 6 * side + 12, 3)
    assert all((picture[:, ::side] == 208).all() for picture in tiles.values())  # between images
    columns = {name: np.split(picture[:, 12:], 6, axis=1) for name, picture in tiles.items()}
    assert all((columns["none"][0] == column).all() for column in columns["none"])
    assert (columns["some"][0] == columns["none"][0]).all()
    assert len({column.tobytes() for column in columns["some"]}) == 6


def test_a_frozen_backbone_has_no_augmented_variants(folder, backbone):
    run(epochs=1, backbone=backbone)
    with Image.open("metrics/plots/augmented.png") as picture:
        assert picture.size == (12 + 108, 12 + 3 * 108)


def test_the_table_of_parameters_has_each_with_its_default(folder):
    run(dropout=0.1, augment=Augment(rotation=20))
    table = pd.read_csv("metrics/parameters.csv", dtype=str).set_index("name")
    assert table.loc["train.augment.rotation"].tolist() == ["20.0", "8.0"]
    changed = table.index[table["value"] != table["default"]]
    keys = {f"train.{key}" for key in SMALL} | {"train.dropout", "train.augment.rotation"}
    assert set(changed) == keys - {"train.learning_rate"}
