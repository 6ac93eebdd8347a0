"""Evaluate: its metrics against scikit-learn, its files, and what must not change them."""

import csv
import hashlib
import json
import os
import shutil
import unicodedata

import numpy as np
import pandas as pd
import pytest
from factories import class_names, make_model, make_prepared
from PIL import Image
from sklearn import metrics as sklearn

from stages.data.arrays import read_index, read_split
from stages.evaluate import evaluate, evaluate_folder
from stages.model.calibration import apply_temperature
from stages.report import metrics
from stages.report.binomial import clopper_pearson
from stages.report.parameters import Evaluate
from stages.run import cli
from stages.run.cli import UserError
from stages.run.files import write_csv

NAMES = class_names(10)
COUNTS = {"train": 20, "val": 300, "test": 500}
IN_GIT = (
    "evaluate.json", "evaluate_details.json", "verdict.csv", "summary.csv", "confusion_matrix.csv",
    "per_class.csv", "precision_recall.csv", "reliability.csv", "coverage.csv",
    "plots/confusion.png",
    "plots/samples.png", "plots/mistakes.csv", "plots/label_errors.csv",
)  # fmt: skip


def run(root, metrics=None, **parameters):
    metrics = metrics or root / "metrics"
    return evaluate(
        Evaluate(**parameters), root / "data/prepared", root / "data/model.keras", metrics
    )


def read(path):
    return pd.read_csv(path, keep_default_na=False, lineterminator="\n")


def digests(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): hashlib.md5(path.read_bytes()).hexdigest()
        for path in files
    }


def read_numbers(folder, names=("evaluate", "evaluate_details")):
    """All metrics, in the order of the files; no two have one name."""
    files = [json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in names]
    values = {key: value for file in files for key, value in file.items()}
    assert len(values) == sum(map(len, files))
    return values


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Ten classes with awkward names, evaluated; 3 % of the labels in val and test are wrong."""
    root = tmp_path_factory.mktemp("evaluated")
    planted = make_prepared(root, NAMES, COUNTS, wrong_labels=0.03)
    make_model(root, NAMES)
    np.savez(root / "planted.npz", **planted)
    run(root)
    return root


@pytest.fixture(scope="module")
def predictions(root):
    return read(root / "metrics/predictions.csv")


@pytest.fixture(scope="module")
def numbers(root):
    return read_numbers(root / "metrics")


def test_the_numbers_are_those_of_scikit_learn(predictions, numbers):
    true, predicted = predictions["class"], predictions["predicted"]
    output = predictions[[f"p:{name}" for name in NAMES]].to_numpy()
    labels = np.array([NAMES.index(name) for name in true])
    expected = {
        "images": len(predictions),
        "accuracy": sklearn.accuracy_score(true, predicted),
        "balanced_accuracy": sklearn.balanced_accuracy_score(true, predicted),
        "log_loss": sklearn.log_loss(labels, output / output.sum(1, keepdims=True)),
        "brier_score": sklearn.brier_score_loss(
            labels, output / output.sum(1, keepdims=True), labels=range(10), scale_by_half=False
        ),
        "top_5_accuracy": sklearn.top_k_accuracy_score(labels, output, k=5),
        "ece": metrics.ece(output, labels),
        "log_loss_uncalibrated": sklearn.log_loss(labels, apply_temperature(output, 1 / 1.5)),
    }
    for kind in ("macro", "weighted"):
        scores = sklearn.precision_recall_fscore_support(true, predicted, average=kind)
        names = ("precision", "recall", "f1")
        expected |= {f"{name}_{kind}": v for name, v in zip(names, scores, strict=False)}
    assert {name: numbers[name] for name in expected} == pytest.approx(expected, abs=6e-5)
    low, high = clopper_pearson(round(expected["accuracy"] * 500), 500)
    assert (numbers["accuracy_low"], numbers["accuracy_high"]) == pytest.approx(
        (low, high), abs=6e-5
    )


def test_names_and_order_of_the_numbers_are_stable(root, numbers):
    compared = [
        "accuracy", "accuracy_low", "accuracy_high", "balanced_accuracy", "f1_macro", "log_loss",
    ]  # fmt: skip
    assert list(read_numbers(root / "metrics", ["evaluate"])) == compared
    assert list(numbers) == [
        *compared, "split", "images", "precision_macro", "recall_macro", "precision_weighted",
        "recall_weighted", "f1_weighted", "top_5_accuracy", "log_loss_uncalibrated", "brier_score",
        "ece", "ece_uncalibrated", "accuracy_at_90_coverage", "threshold", "coverage",
        "accepted", "accepted_accuracy",
    ]  # fmt: skip
    assert numbers["split"] == "test"
    assert all(round(v, 4) == v for v in numbers.values() if isinstance(v, float))


def test_predictions_of_low_confidence_are_rejected_by_a_threshold(
    root, numbers, predictions, tmp_path
):
    right = predictions["class"] == predictions["predicted"]
    accepted = predictions["confidence"] >= numbers["threshold"]
    assert 0 < numbers["threshold"] < 1
    assert numbers["coverage"] == pytest.approx(accepted.mean(), abs=6e-5)
    assert numbers["accepted"] == accepted.sum()
    assert numbers["accepted_accuracy"] == pytest.approx(right[accepted].mean(), abs=6e-5)
    confident = right[predictions["confidence"].rank(ascending=False, method="first") <= 450]
    assert numbers["accuracy_at_90_coverage"] == pytest.approx(confident.mean(), abs=6e-5)
    # It is chosen on validation: other labels of the test images don't change it.
    copy = shutil.copytree(root, tmp_path / "copy")
    labels = np.load(copy / "data/prepared/test/labels.npy")
    np.save(copy / "data/prepared/test/labels.npy", (labels + 1) % 10)
    run(copy)
    assert read_numbers(copy / "metrics")["threshold"] == numbers["threshold"]


def test_tables(root, predictions):
    true, predicted = predictions["class"], predictions["predicted"]
    square = read(root / "metrics/confusion_matrix.csv").set_index("true class")
    assert square.columns.tolist() == square.index.astype(str).tolist() == NAMES
    assert (square.to_numpy() == sklearn.confusion_matrix(true, predicted, labels=NAMES)).all()

    table = read(root / "metrics/per_class.csv").astype({"class": str}).set_index("class")
    report = sklearn.classification_report(true, predicted, output_dict=True)
    for name in NAMES:
        row, expected = table.loc[name], report[name]
        assert row[["precision", "recall", "f1", "support"]].tolist() == pytest.approx(
            [expected["precision"], expected["recall"], expected["f1-score"], expected["support"]],
            abs=6e-5,
        )
        average = sklearn.average_precision_score(true == name, predictions[f"p:{name}"])
        assert row["average_precision"] == pytest.approx(average, abs=6e-5)
        others = predicted[(true == name) & (predicted != name)].value_counts()
        assert row["top_confusion_count"] == (others.max() if len(others) else 0)
        if len(others):
            assert others[row["top_confusion"]] == others.max()

    curves = read(root / "metrics/precision_recall.csv")
    assert curves["class"].nunique() == curves["rank"].max() == 9
    assert curves["class"].iloc[0] == table["average_precision"].idxmin()


def test_predictions_name_each_evaluated_image(root, predictions):
    index = read_index(root / "data/prepared/index.csv")
    test = index[index["split"] == "test"]
    assert predictions["path"].tolist() == sorted(test["path"])
    assert predictions["class"].tolist() == test.sort_values("path")["class"].tolist()
    columns = [f"p:{name}" for name in NAMES]
    assert predictions.columns[4:].tolist() == columns
    assert np.allclose(predictions[columns].sum(axis=1), 1)
    assert np.allclose(predictions[columns].max(axis=1), predictions["confidence"])


def test_label_errors_name_the_planted_labels(root):
    errors = read(root / "metrics/label_errors.csv").astype({"class": str, "suggestion": str})
    assert errors.columns.tolist() == ["path", "split", "class", "suggestion", "score"]
    assert errors["score"].is_monotonic_decreasing and errors["score"].min() >= 20
    assert set(errors["split"]) == {"val", "test"}
    index = read_index(root / "data/prepared/index.csv").set_index("path")
    planted = np.load(root / "planted.npz")
    rows = index.loc[errors["path"]]
    positions = zip(rows["split"], rows["array_index"], strict=True)
    correct = np.array([planted[split][row] for split, row in positions])
    assert correct.mean() > 0.6 and correct.sum() > 0.5 * (
        planted["val"].sum() + planted["test"].sum()
    )
    assert (rows["class"].to_numpy() == errors["class"]).all()
    given = np.array([NAMES.index(name) for name in errors["class"]])
    true = np.array(NAMES, object)[(given - 1) % 10]  # planted labels are the next class
    assert (errors["suggestion"] == true)[correct].mean() > 0.9


def test_of_a_model_near_chance_no_label_error_is_listed(root, tmp_path, capsys):
    copy = shutil.copytree(root, tmp_path / "copy")
    for split in ("val", "test"):
        path = copy / "data/prepared" / split / "labels.npy"
        np.save(path, np.random.default_rng(0).permutation(np.load(path)))
    run(copy)
    assert read(copy / "metrics/label_errors.csv").empty
    assert "not judged: this model may be no better" in capsys.readouterr().out


def test_a_second_run_gives_the_same_bytes(root, tmp_path):
    run(root, tmp_path)
    assert digests(tmp_path) == digests(root / "metrics")


def test_a_renamed_file_changes_only_what_shows_its_name(root, tmp_path):
    shutil.copytree(root / "data", tmp_path / "data")
    index = read_index(tmp_path / "data/prepared/index.csv")
    index["path"] = [f"{number:04} renamed.png" for number in range(len(index), 0, -1)]
    write_csv(tmp_path / "data/prepared/index.csv", index.sort_values("path"))
    run(tmp_path)
    old, new = digests(root / "metrics"), digests(tmp_path / "metrics")
    changed = {name for name in old if old[name] != new[name]}
    assert changed == {
        "predictions.csv", "mistakes.csv", "label_errors.csv", "plots/mistakes.csv",
        "plots/label_errors.csv",
    }  # fmt: skip
    assert set(IN_GIT) < old.keys()
    table = read(tmp_path / "metrics/predictions.csv").set_index("path")
    assert (table["class"] == index.set_index("path")["class"].loc[table.index]).all()


def test_without_a_test_split_the_numbers_say_so(tmp_path, capsys):
    names = class_names(3)
    make_prepared(tmp_path, names, {"train": 5, "val": 80})
    make_model(tmp_path, names)
    numbers = run(tmp_path, grid_images=3)
    assert (numbers["split"], numbers["in_sample"], numbers["images"]) == ("val", True, 80)
    assert read_numbers(tmp_path / "metrics", ["evaluate"])["in_sample"] is True
    assert "used to choose the epoch" in summary_of(tmp_path / "metrics")["95 % interval"]
    assert not {"accuracy_low", "accuracy_high", "top_5_accuracy"} & numbers.keys()
    assert "recall_low" not in read(tmp_path / "metrics/per_class.csv")
    assert "low" not in read(tmp_path / "metrics/reliability.csv")
    assert "optimistic" in capsys.readouterr().out


def test_with_corrected_labels_the_accuracy_with_the_old_ones_is_told(root, tmp_path, capsys):
    shutil.copytree(root / "data", tmp_path / "data")
    index = read_index(root / "data/prepared/index.csv")
    predictions = read(root / "metrics/predictions.csv")
    wrong = predictions[predictions["class"] != predictions["predicted"]].head(4)
    # As if the model had been asked: four labels were corrected to what it says.
    for split in ("val", "test"):
        labels = np.load(tmp_path / f"data/prepared/{split}/labels.npy")
        rows = index["path"].isin(wrong["path"]) & (index["split"] == split)
        said = wrong.set_index("path")["predicted"].loc[index["path"][rows]]
        labels[index["array_index"][rows].astype(int)] = [NAMES.index(name) for name in said]
        index.loc[rows, "was"], index.loc[rows, "class"] = index["class"][rows], said.to_numpy()
        np.save(tmp_path / f"data/prepared/{split}/labels.npy", labels)
    dropped = (
        index[index["split"] == "test"]
        .head(1)
        .assign(path="x.png", split="", exclusion_reason="dropped from test", array_index=pd.NA)
    )
    index = pd.concat([index, dropped])
    write_csv(tmp_path / "data/prepared/index.csv", index)
    before = read_numbers(root / "metrics", ["evaluate"])
    values = run(tmp_path)
    assert values["accuracy_old_labels"] == before["accuracy"] < values["accuracy"]
    assert (values["relabeled_images"], values["dropped_images"]) == (4, 1)
    assert "accuracy_old_labels" not in before
    text = capsys.readouterr().out
    expected = "right before corrections, which relabeled 4 of these images and dropped 1:"
    assert f"{100 * before['accuracy']:.1f} % {expected}" in text
    assert "before corrections" in summary_of(tmp_path / "metrics")["with old labels"]


def test_what_is_printed_is_the_verdict_and_where_the_rest_is(root, tmp_path, numbers, capsys):
    run(root, tmp_path)
    text = capsys.readouterr().out
    verdict = read(tmp_path / "verdict.csv").set_index("name")["value"]
    assert list(verdict.index) == ["result", "weak", "labels", "by hand"]  # no parameters: no next
    for name, sentence in verdict.items():
        assert f"  {name:<7}  {cli.printable(sentence)}\n" in text
    low, high = numbers["accuracy_low"], numbers["accuracy_high"]
    for share in (numbers["accuracy"], high):
        assert f"{100 * share:.1f} %" in verdict["result"]
    assert f"95 % interval: {100 * low:.1f} to" in verdict["result"]
    assert str(tmp_path) in text  # not the default folder


def summary_of(folder):
    return read(folder / "summary.csv").set_index("name")["value"]


def test_the_summary_file_states_data_and_result(root, tmp_path, numbers):
    summary = summary_of(root / "metrics")
    assert summary["accuracy"] == f"{100 * numbers['accuracy']:.2f} %"
    low, high = numbers["accuracy_low"], numbers["accuracy_high"]
    assert summary["95 % interval"] == f"{100 * low:.2f} to {100 * high:.2f} %"
    wrong = len(read(root / "metrics/mistakes.csv"))
    assert summary["mistakes"] == f"{wrong} of 500 test images"
    assert summary["images"] == "20 train, 300 val, 500 test"
    assert "dataset" not in summary  # no name was given
    shutil.copytree(root / "data", tmp_path / "data")
    index = read_index(tmp_path / "data/prepared/index.csv")
    index.loc[0, "digest"] = "0" * 64
    write_csv(tmp_path / "data/prepared/index.csv", index)
    run(tmp_path)
    changed = summary_of(tmp_path / "metrics")
    assert changed[changed != summary].index.tolist() == ["dataset version"]


def test_all_mistakes_are_listed_the_worst_first(root, predictions):
    mistakes = read(root / "metrics/mistakes.csv")
    assert mistakes["label_probability"].is_monotonic_increasing
    wrong = predictions[predictions["class"] != predictions["predicted"]].set_index("path")
    assert set(mistakes["path"]) == set(wrong.index) and len(mistakes) == len(wrong)
    listed = mistakes.set_index("path").loc[wrong.index]
    assert (listed[["class", "predicted"]] == wrong[["class", "predicted"]]).all(axis=None)
    given = [wrong.loc[path, f"p:{row['class']}"] for path, row in listed.iterrows()]
    assert np.allclose(listed["label_probability"], given, rtol=1e-2)


def test_parameters_matter(root, tmp_path):
    assert "top_2_accuracy" in run(root, tmp_path, top_k=2, grid_images=3)
    assert digests(tmp_path)["plots/samples.png"] != digests(root / "metrics")["plots/samples.png"]


def test_errors_of_the_user_get_one_line(root, tmp_path):
    with pytest.raises(UserError, match="image_spec.json: no prepared data here yet; `dvc repro`"):
        run(tmp_path)
    shutil.copytree(root / "data/prepared", tmp_path / "data/prepared")
    with pytest.raises(UserError, match=r"model.keras: no such model file"):
        run(tmp_path)
    make_model(tmp_path, NAMES[:4])
    with pytest.raises(
        UserError, match=r"trained for 4 classes, not for the 10 of .*image_spec.json"
    ) as caught:
        run(tmp_path)
    assert r"line\nbreak" in str(caught.value) and "gone: none" in str(caught.value)
    make_model(tmp_path, NAMES, size=(6, 8, 1))
    with pytest.raises(
        UserError, match=r"trained for image_shape \(6, 8, 1\), not for \(8, 8, 1\)"
    ):
        run(tmp_path)
    assert not (tmp_path / "metrics").exists()


@pytest.fixture
def labeled(root, tmp_path, monkeypatch):
    """The images of the test split as a folder of files, a sub-folder per class."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "scratch"))
    split = read_split(root / "data/prepared/test")
    for row, (image, label) in enumerate(zip(next(split.batches(500)), split.labels, strict=True)):
        folder = tmp_path / "set" / NAMES[label] / f"{row % 2}"  # images may be deeper
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[..., 0]).save(folder / f"{row}.png")
    return tmp_path / "set"


def run_on(root, folder, output):
    model = root / "data/model.keras"
    return evaluate_folder(Evaluate(), folder, output, root / "data/prepared", model)


def test_a_folder_gives_the_numbers_of_the_split_with_its_images(root, labeled, tmp_path, capsys):
    run_on(root, labeled, tmp_path / "out")
    assert "images of" not in capsys.readouterr().out  # nothing to remark
    old, new = digests(root / "metrics"), digests(tmp_path / "out")
    same = {*IN_GIT[:-4], "plots/confusion.png"} - {
        "summary.csv",
        "evaluate_details.json",
        "verdict.csv",
    }
    assert {name: new[name] for name in same} == {name: old[name] for name in same}
    numbers = read_numbers(root / "metrics")
    without_validation = {"threshold", "coverage", "accepted_accuracy", "accepted"}
    assert read_numbers(tmp_path / "out") == {
        name: value for name, value in numbers.items() if name not in without_validation
    }
    assert new.keys() == old.keys()
    assert summary_of(tmp_path / "out")["dataset"] == str(labeled)
    assert not list((tmp_path / "scratch/.dvc/tmp/scratch/evaluate").iterdir())
    assert digests(root / "metrics") == old


def test_a_table_of_labels_gives_the_numbers_of_folders(root, labeled, tmp_path, capsys):
    run_on(root, labeled, tmp_path / "folders")
    paths = sorted(path.relative_to(labeled) for path in labeled.rglob("*.png"))
    table = pd.DataFrame({"path": paths, "label": [path.parts[0] for path in paths]})
    moved = labeled.rename(tmp_path / "flat")
    for path in paths:
        (moved / path).rename(moved / path.name)
    table["path"] = [path.name for path in paths]
    table.to_csv(moved / "labels.csv", index=False, quoting=csv.QUOTE_ALL)  # a class has a \r
    (moved / "other.png").write_bytes((moved / paths[0].name).read_bytes())
    run_on(root, moved, tmp_path / "table")
    numbers = read_numbers(tmp_path / "folders")
    assert read_numbers(tmp_path / "table") == numbers
    said = capsys.readouterr().out
    assert "from labels.csv" in said and "does not name passed over: other.png" in said
    table.assign(split="test").to_csv(moved / "labels.csv", index=False, quoting=csv.QUOTE_ALL)
    with pytest.raises(UserError, match=r"labels.csv: a column split; expected only what to eval"):
        run_on(root, moved, tmp_path / "no")
    table.assign(label="y").to_csv(moved / "labels.csv", index=False, quoting=csv.QUOTE_ALL)
    with pytest.raises(UserError, match=r"the model \(or labeled like one in labels.csv\); it hol"):
        run_on(root, moved, tmp_path / "no")
    table.assign(path="x.png").to_csv(moved / "labels.csv", index=False, quoting=csv.QUOTE_ALL)
    with pytest.raises(UserError, match=r"labels.csv: \d+ paths of no file: x.png"):
        run_on(root, moved, tmp_path / "no")


def test_what_is_wrong_with_a_folder_is_told(root, labeled, tmp_path, capsys):
    """A class is missing, one is unknown, one is written as macOS does; some files are bad."""
    shutil.rmtree(labeled / "007")
    unknown = len(list((labeled / "NA").rglob("*.png")))
    count = len(list(labeled.rglob("*.png"))) - unknown
    support = len(list((labeled / "café noir").rglob("*.png")))
    image = min((labeled / "co$t_x^2").rglob("*.png"))
    (labeled / "NA").rename(labeled / "Na")
    (labeled / "café noir").rename(labeled / unicodedata.normalize("NFD", "café noir"))
    (labeled / "co$t_x^2" / "bad.png").write_text("no image")
    (labeled / "co$t_x^2" / "note.txt").write_text("ignored")
    Image.open(image).point(lambda level: 40 * level, "I").convert("I;16").save(image)
    shutil.copy(image, labeled / "loose.png")
    (labeled / "co$t_x^2" / "linked").symlink_to(tmp_path)
    index = read_index(root / "data/prepared/index.csv")
    shutil.copytree(root / "data", tmp_path / "data")
    known = hashlib.blake2b((labeled / "loose.png").read_bytes(), digest_size=16).hexdigest()
    index.loc[index["split"] == "train", "digest"] = known
    write_csv(tmp_path / "data/prepared/index.csv", index)
    values = run_on(tmp_path, labeled, tmp_path / "out")
    assert values["images"] == count
    said = " ".join(capsys.readouterr().out.split())
    for words in (
        "missing no images of 2 of 10 classes: 007, NA",
        f"left out {unknown + 1} outside of the model's classes: Na, loose.png",
        "unreadable 2, left out: co$t_x^2/bad.png (not an image but a text",
        "co$t_x^2/linked (a link to a folder, which is not followed)",
        "WARNING: almost black 1 image of more than 8 bits per channel with no value",
        f"WARNING 1 of {count} were seen in training or validation",
    ):
        assert words in said
    table = read(tmp_path / "out/per_class.csv").set_index("class")
    assert table["support"]["café noir"] == support and table["support"]["NA"] == 0
    assert summary_of(tmp_path / "out")["images"] == f"{count} test, {unknown + 3} excluded"


def test_a_picture_counts_once(root, labeled, tmp_path, capsys):
    """Copies, and the same picture in another format, make no interval narrower."""
    once = run_on(root, labeled, tmp_path / "once")
    capsys.readouterr()
    for number, path in enumerate(sorted(labeled.rglob("*.png"))):
        if number % 2:
            shutil.copy(path, path.with_name(f"{path.stem} copy.png"))
        elif number % 4:
            Image.open(path).save(path.with_name(f"{path.stem}.jpg"), quality=95)
        else:
            Image.open(path).save(path.with_name(f"x {path.stem}.bmp"))
    assert len(list(labeled.rglob("*.*"))) == 1000
    twice = run_on(root, labeled, tmp_path / "twice")
    assert twice["images"] == pytest.approx(500, abs=3)  # a near duplicate may be missed
    for key in ("accuracy", "accuracy_low", "accuracy_high"):
        assert twice[key] == pytest.approx(once[key], abs=0.005)
    said = capsys.readouterr().out
    assert f"of {twice['images']} test images" in said
    assert f"{1000 - twice['images']} duplicates of these do not count" in said


def test_the_same_picture_in_two_classes_does_not_count(root, labeled, tmp_path, capsys):
    image = min((labeled / "007").rglob("*.png"))
    shutil.copy(image, labeled / "NA" / "same.png")
    assert run_on(root, labeled, tmp_path / "out")["images"] == 499
    said = capsys.readouterr().out
    assert "two labels" in said and "2 images, left out: identical to one of another class" in said


def test_images_that_look_black_to_the_model_are_warned_of(root, labeled, tmp_path, capsys):
    rng = np.random.default_rng(0)
    for number in range(3):
        dark = rng.integers(0, 4096, (8, 8), np.uint16)
        Image.fromarray(dark).save(labeled / "NA" / f"dark {number}.png")
    run_on(root, labeled, tmp_path / "out")
    said = capsys.readouterr().out
    assert "WARNING: almost black  3 images of more than 8 bits per channel with no value" in said


def test_what_is_no_image_of_a_class_is_passed_over_and_told(root, labeled, tmp_path, capsys):
    count = len(list(labeled.rglob("*.png")))
    for name in ("NA/@eaDir/x.jpg/THUMB.jpg", "#recycle/NA/x.png", "NA/deep/.thumbs/x.png"):
        (labeled / name).parent.mkdir(parents=True)
        (labeled / name).touch()
    for number in range(100):
        (labeled / "NA" / f"x{number}.dcm").touch()
    assert run_on(root, labeled, tmp_path / "out")["images"] == count
    said = capsys.readouterr().out
    assert "3 images in hidden folders or a system's" in said and "NA/@eaDir" in said
    assert "passed over for their extension: 100 of " in said and "in NA (100 .dcm)" in said
    image = min((labeled / "007").rglob("*.png"))
    shutil.copy(image, image.with_name(f"{image.stem}_mask.png"))
    with pytest.raises(UserError, match=r"masks or annotations beside images: 007/.*_mask.png;"):
        run_on(root, labeled, tmp_path / "out")


def test_a_folder_that_can_not_be_evaluated_gets_one_line(root, labeled, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="nothing: no such folder"):
        run_on(root, tmp_path / "nothing", tmp_path / "out")
    with pytest.raises(UserError, match=r"no images in a folder named like a class of the model"):
        run_on(root, tmp_path / "empty", tmp_path / "out")
    with pytest.raises(UserError, match="this folder is for the images themselves"):
        run_on(root, labeled, labeled / "out")
    with pytest.raises(UserError, match=r"metrics: this folder is for the pipeline's own results"):
        run_on(root, labeled, "metrics")
    (tmp_path / "flowers/rose").mkdir(parents=True)
    with pytest.raises(UserError, match=r"flowers: holds other files; expected a new folder"):
        run_on(root, labeled, tmp_path / "flowers")
    os.rename(labeled / "NA", os.fsencode(labeled) + b"/\xff")
    with pytest.raises(UserError, match=r"names that are not valid UTF-8: .*udcff"):
        run_on(root, labeled, tmp_path / "out")
    (tmp_path / "bad/NA").mkdir(parents=True)
    (tmp_path / "bad/NA/x.png").write_text("no image")
    with pytest.raises(UserError, match=r"bad: none of 1 images can be read: NA/x.png \(not an"):
        run_on(root, tmp_path / "bad", tmp_path / "out")
    assert not (tmp_path / "out").exists()
