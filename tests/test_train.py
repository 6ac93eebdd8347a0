"""The stage train, on drawn images."""

import contextlib
import json
import math
import shutil
from pathlib import Path

import keras
import numpy as np
import pandas as pd
import pytest
from factories import make_prepared
from PIL import Image
from test_structure import MODULES, results_depend_on

from stages import train as stage
from stages.data.arrays import ImageSpec, read_split
from stages.display import training
from stages.model import checkpoint as checkpoints
from stages.model import device, inference, model_file
from stages.model.features import extract_features
from stages.model.network import FusedBatchNormalization, build, flatten_layers
from stages.model.parameters import Train
from stages.model.phases import make_phases
from stages.model.replicas import Replicas
from stages.report.outputs import feature_network, has_backbone, predict_both
from stages.run.cli import UserError
from stages.train import train

SMALL = {
    "epochs": 2, "batch_size": 16, "filters": [4], "convs_per_block": 1, "dense_units": 0,
    "dropout": 0.1,
}  # fmt: skip
UNCHANGED = {"translation": 0, "rotation": 0, "zoom": 0, "contrast": 0}


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


def run_killed_after(count, **changes):
    """Let a training end abruptly once it has saved so many epochs, or to its end; return them."""
    save = checkpoints.Checkpoint.save
    saved = []

    def saving(self, arrays, state):
        save(self, arrays, state)
        saved.append(len(state["history"]))
        if len(saved) == count:
            raise Killed

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr(checkpoints.Checkpoint, "save", saving)
        run(**changes)
    return saved


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A training: its folder, its result, and its phases."""
    folder = tmp_path_factory.mktemp("trained")
    make_prepared(folder, ["a", "b", "c"], {"train": 90, "val": 60})
    phases = []
    fit = stage.fit

    def fit_and_keep(given, *rest):
        phases.extend(given)
        return fit(given, *rest)

    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.delenv("DVC_ROOT", raising=False)
        patch.setattr(stage, "fit", fit_and_keep)
        result = run(epochs=6, seed=2, learning_rate=0.03, augment={"rotation": 20})
    return folder, result, phases


def test_train_writes_what_it_returns(trained, monkeypatch):
    folder, result, _ = trained
    monkeypatch.chdir(folder)
    assert json.loads(Path("metrics/train.json").read_text()) == result
    table = history()
    best = table.loc[result["epoch"] - 1]
    assert list(table["epoch"]) == [*range(1, 7)] and result["epochs"] == 6
    assert best["val_loss"] == table["val_loss"].min()
    for name in ("train_loss", "train_accuracy", "val_loss", "val_accuracy"):
        assert result[name] == pytest.approx(best[name.removeprefix("train_")], abs=1e-5)
    assert table["loss"].iloc[-1] < table["loss"].iloc[0] - 0.1
    assert Path("metrics/plots/augmented.png").exists()
    assert not list(Path(".dvc/tmp/scratch/checkpoints").glob("*.npz*"))


def test_the_model_file_holds_the_kept_weights_calibrated(trained, monkeypatch):
    folder, result, _ = trained
    monkeypatch.chdir(folder)
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


def test_training_uses_the_faster_batch_normalization_and_the_model_file_keras_own(trained):
    folder, _, [phase] = trained
    models = phase.train_model, keras.models.load_model(folder / "data/model.keras")
    used, saved = ({type(layer) for layer in flatten_layers(model)} for model in models)
    assert FusedBatchNormalization in used and keras.layers.BatchNormalization not in used
    assert keras.layers.BatchNormalization in saved


def test_the_table_of_parameters_has_each_with_its_default(trained):
    path = trained[0] / "metrics/parameters.csv"
    table = pd.read_csv(path, dtype=str).set_index("name")
    assert table.loc["train.augment.rotation"].tolist() == ["20.0", "8.0"]
    changed = table.index[table["value"] != table["default"]]
    keys = {*SMALL, "seed", "learning_rate", "augment.rotation"}
    assert set(changed) == {f"train.{key}" for key in keys}


FROM_SCRATCH = {"epochs": 3, "precision": "mixed_float16"}  # whose loss scale is kept, too
FINE_TUNED = {
    "backbone": "small.keras", "fine_tune_fraction": 0.7, "fine_tune_epochs": 2,
    "fine_tune_learning_rate": 0.01,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "killed_after"),
    [(FROM_SCRATCH, [1, 3]), (FINE_TUNED, [2, 3])],
)
def test_an_interrupted_training_ends_with_the_bytes_of_an_uninterrupted_one(
    folder, backbone, changes, killed_after
):
    """Killed between the epochs of a phase, at its end, and before the model is written.

    For single precision, see test_reproducible.py.
    """
    epochs = run(**changes)["epochs"]
    expected = written()
    shutil.rmtree("metrics")
    done = 0
    for end in killed_after:
        assert run_killed_after(end - done, **changes) == [*range(done + 1, end + 1)]
        done = end
    assert run_killed_after(math.inf, **changes) == [*range(done + 1, epochs + 1)]
    assert written() == expected


def test_a_training_with_other_parameters_data_or_code_does_not_resume(folder, monkeypatch):
    assert run_killed_after(1) == [1]
    assert run_killed_after(1, learning_rate=0.02) == [1]
    code = folder / "code.py"
    code.write_text("x = 1")
    with monkeypatch.context() as patch:
        patch.setattr(stage, "CODE", [*stage.CODE, code])
        assert run_killed_after(1) == [1]
    shutil.copytree("data", "before")
    make_prepared(folder, ["a", "b", "c"], {"train": 90, "val": 60}, seed=1)
    assert run_killed_after(1) == [1]
    shutil.rmtree("data")
    Path("before").rename("data")
    assert run_killed_after(1) == [2]


def test_a_training_that_is_refused_at_its_end_is_not_lost(folder):
    def refuse():
        raise UserError("params.yaml: changed")

    with pytest.raises(UserError, match="changed"):
        train(Train(**SMALL), check=refuse)
    expected = written()
    assert run_killed_after(math.inf) == []  # no epoch is trained again
    assert written() == expected


def test_the_code_that_a_checkpoint_depends_on_is_what_results_depend_on():
    assert {*stage.CODE} == {
        MODULES["stages.train"],
        MODULES["stages.data.arrays"],
        *(path for name, path in MODULES.items() if name.startswith("stages.model.")),
    }
    assert {*stage.CODE} >= {MODULES[name] for name in results_depend_on("train")}


def test_everything_random_follows_from_the_seed(folder):
    results = []
    for seed in (1, 1, 2):
        run(seed=seed, augment={"translation": 0.2}, dropout=0.5)
        results.append(written())
    assert results[0] == results[1]
    assert results[0][Path("data/model.keras")] != results[2][Path("data/model.keras")]


def test_an_indeterministic_training_says_so_and_small_rates_are_not_rounded_to_zero(folder):
    run(epochs=1, deterministic=False, learning_rate=2e-8)
    assert not json.loads(Path("metrics/environment.json").read_text())["deterministic"]
    assert (history()["learning_rate"] > 0).all()


def test_the_best_epoch_is_the_best_of_all_phases(folder, backbone):
    head = {"backbone": backbone, "epochs": 3, "dropout": 0.0, "learning_rate": 0.05}
    result = run(**head, fine_tune_fraction=0.7, fine_tune_epochs=1, fine_tune_learning_rate=5.0)
    losses = history()["val_loss"]
    assert list(history()["phase"]) == ["head"] * 3 + ["fine_tune"]
    assert result["epoch"] == losses.argmin() + 1 <= 3
    assert result["val_loss"] == pytest.approx(losses.min(), abs=1e-5)


def test_a_diverging_training_stops_with_advice(folder):
    with pytest.raises(UserError, match="(?s)diverged: loss is .* in epoch 1.*learning rate"):
        run(learning_rate=10.0, weight_decay=1e30)
    assert not Path("data/model.keras").exists()


def test_features_are_computed_once_and_never_trusted_when_damaged(folder, backbone, monkeypatch):
    computed = []
    original = inference.make_predict_fn
    monkeypatch.setattr(
        "stages.model.features.make_predict_fn",
        lambda model: computed.append(model) or original(model),
    )
    run(epochs=1, backbone=backbone)
    expected = written()
    assert len(computed) == 2
    run_killed_after(1, backbone=backbone, dense_units=3, precision="mixed_bfloat16")
    assert len(computed) == 2
    for path in Path(".dvc/tmp/scratch/features").glob("*.npy"):
        content = bytearray(path.read_bytes())
        content[200] ^= 1
        path.write_bytes(content)
    run(epochs=1, backbone=backbone)
    assert len(computed) == 4
    assert written() == expected
    other = keras.models.load_model(f"data/backbones/{backbone}")
    other.set_weights([2 * weights for weights in other.get_weights()])
    other.save(f"data/backbones/{backbone}")
    run_killed_after(1, backbone=backbone)
    assert len(computed) == 6


@pytest.mark.parametrize("dense_units", [0, 5])
def test_the_model_file_finds_the_features_of_training_and_they_change_no_bit(
    folder, backbone, monkeypatch, dense_units
):
    run(epochs=1, backbone=backbone, dense_units=dense_units)
    model, _ = model_file.load("data/model.keras")
    val = read_split("data/prepared/val")
    expected = predict_both(model, val.batches())
    monkeypatch.setattr("stages.model.features.make_predict_fn", None)  # not computed again
    network, environment = feature_network(model), device.setup()
    features = extract_features(network, val, Path("data/prepared/val"), environment)
    found = predict_both(model, features.batches(), from_features=True)
    assert [one.tobytes() for one in found] == [one.tobytes() for one in expected]
    run(epochs=1)  # from scratch
    assert not has_backbone(model_file.load("data/model.keras")[0])


def test_fine_tuning_changes_the_last_layers_and_no_batch_normalization(folder, backbone):
    before = keras.models.load_model(f"data/backbones/{backbone}")
    changes = {"fine_tune_fraction": 0.3, "fine_tune_epochs": 3, "fine_tune_learning_rate": 0.05}
    run(epochs=1, backbone=backbone, **changes)
    model = keras.models.load_model("data/model.keras")
    after = {layer.name: layer for layer in flatten_layers(model)}

    def same(name):
        pairs = zip(before.get_layer(name).weights, after[name].weights, strict=True)
        return all(np.array_equal(one, two) for one, two in pairs)

    assert same("first") and same("normalization") and not same("second")


def test_a_missing_backbone_is_one_line(folder, backbone):
    with pytest.raises(
        UserError, match=r"backbone: no such file: .*large.keras \(available: small.keras"
    ):
        run(backbone="large.keras")


# What is printed and drawn


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "train\n  dataset  data/a\n  images   90 for training, 60 for validation"),
        ({}, "359 weights\n  device   CPU, 1 thread, float32\n\n"),
        ({"batch_size": 1000}, "batch size  9, not 1000: for more steps per epoch"),
        ({"batch_size": 9, "replicas": 2}, "batch size  8, not 9: for equal shares"),
        ({"fine_tune_fraction": 0.5}, "no effect  train.fine_tune_fraction\n"),
        (
            {"backbone": "small.keras", "filters": [4], "augment": {"flip": "both"}},
            "no effect  train.filters, train.augment\n",
        ),
    ],
)
def test_the_start_tells_what_is_trained_and_what_has_no_effect(folder, capsys, changes, words):
    spec = ImageSpec.read("data/prepared/image_spec.json")
    splits = {name: read_split(f"data/prepared/{name}") for name in ("train", "val")}
    network = build(spec.image_shape, 3, Train(**SMALL))
    parameters = Train(**{"batch_size": 9} | changes)
    environment = {"device": "CPU", "threads": 1}
    training.print_start(parameters, spec, splits, network, environment, "float32", "data/a")
    assert words in capsys.readouterr().out


def test_the_line_of_an_epoch_marks_the_best_so_far(capsys):
    rows = [
        {"epoch": number, "loss": 1, "accuracy": 0.5, "val_loss": loss, "val_accuracy": 0.5}
        for number, loss in enumerate([2.0, 1.5, 1.5], 1)
    ]
    for number in (1, 2, 3):
        training.print_epoch(rows[:number], 10, 3.21, 100, 0)
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("  epoch  1/10  loss 1.0000  accuracy 0.5000  val_loss 2.0000")
    assert [line.partition("  3.2 s, ")[2] for line in said] == [
        "2 min left  best", "2 min left  best", "2 min left",
    ]  # fmt: skip


def test_the_time_left_does_not_pretend_to_know_that_of_fine_tuning(capsys):
    row = {"loss": 1, "accuracy": 0.5, "val_loss": 1, "val_accuracy": 0.5}
    training.print_epoch([row | {"epoch": 9}], 10, 1, 1, 6)
    training.print_epoch([row | {"epoch": 10}], 10, 1, 0, 1)
    training.print_epoch([row | {"epoch": 11}], 11, 1, 0, 0)
    said = capsys.readouterr().out.splitlines()
    assert [line.partition("  1.0 s, ")[2] for line in said] == [
        "1 s left, then 6 epochs of fine-tuning  best", "then 1 epoch of fine-tuning  best",
        "0 s left  best",
    ]  # fmt: skip


FALLING = [2.0, 1.5, 1.2, 1.0, 0.9, 0.8, 0.7, 0.6]
FLAT = [2.0, 1.2, 0.9, 0.7, 0.61, 0.605, 0.602, 0.6]
RISING = [2.0, 1.0, 0.6, 0.5, 0.6, 0.7, 0.8, 0.9]
NOISY = [2.0, 0.9, 0.64, 0.5, 0.58, 0.51, 0.55, 0.53]
TINY = [0.5, 0.04, 0.01, 0.005, 0.02, 0.001, 0.02, 0.02]  # as of the digits: one image decides
TUNED = {"backbone": "a.keras", "fine_tune_fraction": 0.5, "fine_tune_epochs": 4}


@pytest.mark.parametrize(
    ("val_losses", "changes", "words"),
    [
        (FALLING, {}, "still improving: train.epochs=16"),
        (FALLING, TUNED, "still improving: train.fine_tune_epochs=8"),
        (FALLING[:2], {"epochs": 2}, "still improving: train.epochs=4"),
        (FALLING[:1], {"epochs": 1}, ""),
        (FLAT, {}, ""),
        (RISING, {}, "overfits: train.epochs=4"),
        (RISING, TUNED, "overfits: train.fine_tune_learning_rate=3e-05"),
        (NOISY, {}, ""),
        (TINY, {}, ""),
        ([*FLAT[:6], 0.7, 0.8], {}, "overfits: train.epochs=6"),
    ],
)
def test_the_end_gives_advice_by_the_curves(val_losses, changes, words):
    parameters = Train(**{"epochs": 8 - 4 * (changes is TUNED)} | changes)
    head = parameters.epochs if changes is TUNED else 8
    history = [
        {"phase": "head" if n < head else "fine_tune", "loss": 2 * 0.7**n, "val_loss": loss}
        for n, loss in enumerate(val_losses)
    ]
    assert advised(history, parameters, right(300)) == ([words] if words else [])
    if words.startswith("overfits"):  # not if the loss in training doesn't fall
        assert advised([row | {"loss": 1} for row in history], parameters, right(300)) == []


def right(count):
    labels = np.arange(count) % 3
    return np.eye(3)[labels], labels


def advised(history, parameters, predicted):
    """Return each finding with the key and value that its command sets."""
    found = training.advise(history, parameters, *predicted, ["a", "b", "c"])
    return [f"{name}: {line.partition('-S ')[2].rstrip('`')}" for name, line in found.items()]


def test_the_end_tells_of_classes_that_are_never_predicted_and_of_a_net_that_has_learned_nothing():
    history = [{"phase": "train", "loss": 1 / n, "val_loss": 1} for n in range(1, 9)]
    probabilities, labels = right(30)
    probabilities[labels == 2] = [0, 1, 0]
    assert advised(history, Train(), (probabilities, labels)) == [
        "never predicted: train.class_weight=balanced"
    ]
    weighted = training.advise(
        history, Train(class_weight="balanced"), probabilities, labels, ["a", "b", "c"]
    )
    assert weighted == {"never predicted": "'c', on validation: add such images"}
    constant = np.tile([0.0, 1.0, 0.0], (30, 1))
    assert advised(history, Train(), (constant, labels)) == [
        "learned nothing: train.learning_rate=0.003",
        "never predicted: train.class_weight=balanced",
    ]
    few = np.append(np.arange(30) % 2, [2, 2])  # too few of c to say so
    assert advised(history, Train(), (np.eye(3)[few % 2], few)) == []


@pytest.mark.parametrize(
    ("temperature", "words"),
    [(1.0, "not calibrated"), (1.3, "after calibration\n"), (5.0, "at its limit, 5.0: don't rely")],
)
def test_the_end_tells_what_calibration_did(capsys, temperature, words):
    result = {"epoch": 1, "epochs": 1, "train_accuracy": 1, "val_accuracy": 1, "val_loss": 1}
    result |= {"val_loss_calibrated": 1, "temperature": temperature}
    training.print_result(result, {}, Path("data/model.keras"), Path("metrics"))
    assert words in capsys.readouterr().out


def test_the_figure_has_an_image_and_five_augmented_ones_in_a_row(folder, monkeypatch):
    drawn = {}
    monkeypatch.setattr(training.figures, "image_grid", lambda images, *_, columns: (
        drawn.update(images=np.reshape(images, (3, sum(columns), -1)))
    ))  # fmt: skip
    split = read_split("data/prepared/train")
    for name, changes in (("none", UNCHANGED), ("some", {})):
        parameters = Train(augment=changes)
        network = build(split.image_shape, 3, Train(**SMALL))
        splits = {"train": split, "val": split}
        [phase] = make_phases(parameters, network, network, splits, {}, Replicas())
        training.draw_augmented(split, ["a", "b", "c"], phase.augment, Path("augmented.png"))
        drawn[name] = drawn.pop("images")
    assert (drawn["none"] == drawn["none"][:, :1]).all()
    assert (drawn["some"][:, 0] == drawn["none"][:, 0]).all()
    assert len(np.unique(drawn["some"].reshape(18, -1), axis=0)) == 18


def test_the_figure_of_a_frozen_backbone_has_images_only(folder):
    split = read_split("data/prepared/train")
    training.draw_augmented(split, ["a", "b", "c"], None, Path("augmented.png"))
    with Image.open("augmented.png") as one:
        assert one.size[0] > 3 * 64
