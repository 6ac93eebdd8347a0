"""The result in words."""

import numpy as np
import pandas as pd
import pytest
from conftest import Project

from stages.display.evaluation import print_result
from stages.model.parameters import Train
from stages.report.binomial import clopper_pearson
from stages.report.metrics import accuracy_by_coverage, confusion_matrix
from stages.report.tables import class_table
from stages.report.verdict import next_step, verdict

CLASSES = ["cat", "dog", "owl"]
CHECKED = " checks the least confident 12 of 100 images, 90 % of the rest are right"
FINE_TUNED = {"backbone": "b.keras", "fine_tune_fraction": 0.5}


def result_of(labels, predicted, confidence=None, **more):
    """What `verdict` takes, of a model that predicts these labels with this confidence."""
    labels, predicted = np.array(labels), np.array(predicted)
    confidence = np.full(len(labels), 0.9) if confidence is None else np.array(confidence)
    probabilities = np.repeat((1 - confidence)[:, None] / 2, 3, axis=1)
    probabilities[np.arange(len(labels)), predicted] = confidence
    right = int((labels == predicted).sum())
    low, high = clopper_pearson(right, len(labels))
    values = {"split": "test", "images": len(labels), "accuracy": right / len(labels)}
    values |= {"accuracy_low": float(low), "accuracy_high": float(high)} | more
    matrix = confusion_matrix(labels, predicted, 3)
    scores = class_table(matrix, probabilities, labels, CLASSES)
    return values, scores, accuracy_by_coverage(probabilities, labels)


def index_of(train=(60, 60, 60), conflicts=0):
    rows = [
        {"class": c, "split": "train", "digest": ""}
        for c, n in zip(CLASSES, train, strict=True)
        for _ in range(n)
    ]
    rows += [{"class": "cat", "split": "test", "digest": ""}] * 100
    index = pd.DataFrame(rows).assign(array_index=0, exclusion_reason="")
    pair = {"class": "cat", "split": "", "digest": "d", "exclusion_reason": "label conflict"}
    twice = pd.DataFrame([{**pair, "digest": str(n)} for n in range(conflicts)] * 2)
    return pd.concat([index, twice], ignore_index=True)


def test_a_weak_class_is_named_only_if_it_is_surely_worse():
    labels = [0] * 60 + [1] * 30 + [2] * 10
    weak = [0] * 60 + [1] * 12 + [0] * 18 + [2] * 10
    values, scores, coverage = result_of(labels, weak)
    sentences = verdict(values, scores, coverage, index_of(), 3)
    assert sentences["result"] == (
        "82.0 % right (95 % interval: 73.1 to 89.0 %) of 100 test images;"
        " 'cat' for every image would be 60.0 %"
    )
    assert sentences["weak"] == "'dog', 40 % of 30 recognized (most often taken for 'cat')"
    assert sentences["labels"].startswith("this model doubts 3 of 100 held-out labels")
    one_wrong = [*labels[:-1], 0]
    values, scores, coverage = result_of(labels, one_wrong)
    sentence = verdict(values, scores, coverage, index_of(conflicts=2), 0)
    assert sentence["weak"].startswith("no class for certain; the lowest is 'owl', 90 % of 10")
    assert "2 pictures with two labels" in sentence["labels"]
    assert "by hand" not in sentence  # 99 % are right


def test_validation_images_that_chose_the_epoch_are_called_optimistic():
    values, scores, coverage = result_of([0, 1, 2], [0, 1, 2], split="val", in_sample=True)
    sentence = verdict(values, scores.drop(columns="recall_high"), coverage, index_of(), None)
    assert "3 validation images; optimistic" in sentence["result"]
    assert "interval" not in sentence["result"]
    assert sentence["labels"].startswith("not judged")


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (1000, f"{CHECKED}; of 16, 95 %; of 20, 99 %"),
        (100, f"{CHECKED}; of 17, 95 %"),
        (20, ""),
    ],
)  # fmt: skip
def test_how_many_images_a_person_would_check(images, expected):
    """The least confident fifth is wrong, all others are right; few images show no high share."""
    wrong = images // 5
    predicted = np.r_[np.zeros(images - wrong, int), np.ones(wrong, int)]
    confidence = np.linspace(0.99, 0.5, images)
    values, scores, coverage = result_of(np.zeros(images, int), predicted, confidence)
    found = verdict(values, scores, coverage, index_of(), 0).get("by hand", "")
    assert found.removeprefix("if a person") == expected


@pytest.mark.parametrize(
    ("errors", "train", "side", "counts", "conflicts", "expected"),
    [
        (None, {}, 32, (60, 60, 60), 0, "nothing: try what `train: done` advises, or look"),
        (3, {}, 32, (60, 60, 60), 0, "advises, or search"),  # few of the mistakes
        (20, {}, 32, (60, 60, 60), 0, "labels: `python -m stages audit`"),
        (0, {}, 32, (60, 60, 60), 1, "stages audit`"),
        (0, {}, 128, (60, 60, 60), 0, "backbone: `python -m stages backbone`"),
        (0, {"backbone": "b.keras"}, 224, (60, 60, 60), 0, "use data/x --quality best`, commit"),
        (0, FINE_TUNED, 224, (60, 9, 60), 0, "'dog': it has 9"),
        (2, {}, 32, (60, 60, 60), 0, "try what `train: done` advises, or search"),
    ],
)  # fmt: skip
def test_the_next_step_is_what_would_help_most(errors, train, side, counts, conflicts, expected):
    values, scores, _ = result_of([0, 1, 1, 2], [0, 1, 0, 2])
    index = index_of(counts, conflicts)
    assert expected in next_step(values, scores, index, errors, Train(**train), side, "data/x")


def test_what_changed_in_the_data_since_its_commit_is_named(tmp_path, monkeypatch, capsys):
    project = Project(tmp_path)
    project.git("init", "--quiet")
    dataset = "data/blüten 1"
    (tmp_path / "data").mkdir()
    files = [tmp_path / f"{dataset}.dvc", tmp_path / "data/corrections.csv"]
    for path in files:
        path.write_text("one")
    project.commit()
    monkeypatch.chdir(tmp_path)

    def told():
        print_result({"result": "good"}, {}, index_of(), dataset, tmp_path)
        return capsys.readouterr().out.partition("  data    ")[2].splitlines()[0].partition(", of ")

    name, _, date = told()
    assert name == dataset and len(date) == len("2026-01-01")
    (tmp_path / "params.yaml").write_text("other: no data")
    assert told()[2] == date
    for path in files:
        path.write_text("two")
    project.git("add", files[1])  # staged or not
    assert told()[2] == f"{date}, and changed since: data/blüten 1.dvc, data/corrections.csv"
