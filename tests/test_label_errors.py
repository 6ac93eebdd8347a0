"""Label errors and outliers: planted ones are found, copies confirm none."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.report.label_errors import (
    cross_validate,
    find_label_errors,
    find_neighbors,
    find_outliers,
    is_near_chance,
)


def make(seed, images, classes, features=12, wrong=0.0, spread=0.25):
    """Return features around a center for each class, true labels, and labels of which a share is
    wrong."""
    rng = np.random.default_rng(seed)
    true = rng.permutation(np.arange(images) % classes)
    centers = rng.normal(0, 1, (classes, features))
    vectors = (centers[true] + rng.normal(0, spread, (images, features))).astype(np.float32)
    labels = true.copy()
    rows = rng.choice(images, round(wrong * images), replace=False)
    labels[rows] = (labels[rows] + rng.integers(1, classes, len(rows))) % classes
    return vectors, true, labels


def find(vectors, labels, units, classes):
    probabilities = cross_validate(vectors, labels, units, classes)
    assert np.isfinite(probabilities).all()
    assert probabilities.sum(1) == pytest.approx(1, abs=1e-4)
    return find_label_errors(probabilities, find_neighbors(vectors, units), labels)


@pytest.mark.parametrize(("images", "classes"), [(400, 2), (600, 10), (3_000, 100)])
def test_planted_errors_are_found_and_their_classes_suggested(images, classes):
    vectors, true, labels = make(0, images, classes, features=20, wrong=0.05)
    errors = find(vectors, labels, np.arange(images), classes)
    rows = errors["row"].to_numpy()
    is_wrong = labels != true
    assert is_wrong[rows].mean() > 0.95 and is_wrong[rows].sum() > 0.9 * is_wrong.sum()
    hits = errors[is_wrong[rows]]
    assert (hits["suggestion"] == true[hits["row"]]).mean() > 0.95
    assert errors["score"].is_monotonic_decreasing and errors["score"].min() > 20


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.randoms(use_true_random=False))
def test_the_order_of_the_images_does_not_matter(seed, shuffle):
    vectors, _, labels = make(seed, 60, 3, wrong=0.1)
    units = np.random.default_rng(seed).integers(0, 50, 60)
    order = np.array(shuffle.sample(range(60), 60))
    errors = find(vectors, labels, units, 3).set_index("row")
    shuffled = find(vectors[order], labels[order], units[order], 3)
    again = shuffled.set_index(order[shuffled["row"]])
    sure = errors[errors["score"] > 21]  # the last digits decide about 20
    assert (again["suggestion"].reindex(sure.index) == sure["suggestion"]).all()
    assert again["score"].reindex(sure.index).to_numpy() == pytest.approx(sure["score"], rel=0.05)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 12))
def test_copies_do_not_confirm_a_wrong_label(seed, copies):
    vectors, true, labels = make(seed, 200, 4, features=20, spread=0.2)
    labels[:1] = (labels[:1] + 1) % 4
    copied = np.r_[np.zeros(copies, int), np.arange(200)]
    units = copied  # the copies are of one unit
    errors = find(vectors[copied], labels[copied], units, 4)
    assert set(range(copies + 1)) <= set(errors["row"])
    assert (errors["suggestion"][errors["row"] <= copies] == true[0]).all()


@pytest.mark.parametrize("images", [1, 2, 5, 20])
@pytest.mark.parametrize("classes", [1, 2, 20, 1_000])
@pytest.mark.parametrize("kind", ["noise", "constant", "one unit"])
def test_of_little_data_nothing_is_said_without_a_warning(images, classes, kind):
    rng = np.random.default_rng(images)
    vectors = np.ones((images, 3)) if kind == "constant" else rng.normal(0, 1, (images, 3))
    units = np.zeros(images, int) if kind == "one unit" else np.arange(images)
    labels = rng.integers(0, classes, images)
    with warnings.catch_warnings(action="error"):
        errors = find(vectors, labels, units, classes)
    assert list(errors) == ["row", "score", "suggestion"] and errors.empty


def test_a_class_that_a_fold_has_for_itself_is_not_judged():
    vectors, _, labels = make(0, 300, 3, spread=0.1)
    labels[0] = 3  # a class of one image
    labels[1:3] = 4  # and of two, which are of one unit
    units = np.arange(300)
    units[2] = units[1]
    errors = find(vectors, labels, units, 5)
    assert not set(errors["row"]) & {0, 1, 2}


@pytest.mark.parametrize("share", [0.5, 0.9, 0.97])
def test_nothing_is_said_of_a_model_near_chance(share):
    rng = np.random.default_rng(0)
    vectors, labels = rng.normal(0, 1, (1_000, 8)), (rng.random(1_000) > share).astype(int)
    probabilities = cross_validate(vectors, labels, np.arange(1_000), 2)
    assert is_near_chance(probabilities, labels)
    assert find_label_errors(probabilities, find_neighbors(vectors), labels).empty


@pytest.mark.parametrize("count", [1, 5, 20])
def test_images_far_from_every_class_are_outliers_also_if_they_are_alike(count):
    vectors, _, labels = make(0, 1_000, 5, features=30)
    center = np.random.default_rng(1).normal(0, 1, 30)
    planted = center + np.random.default_rng(2).normal(0, 0.1, (count, 30))
    other = np.r_[vectors, planted].astype(np.float32)
    outliers = find_outliers(find_neighbors(other), np.r_[labels, np.arange(count) % 5])
    assert set(outliers["row"]) >= {*range(1_000, 1_000 + count)}
    assert len(outliers) < count + 10 and outliers["score"].is_monotonic_decreasing


def test_a_rare_class_is_no_outlier():
    vectors, _, labels = make(0, 1_000, 5, features=30)
    chosen = (labels > 0) | (np.arange(1_000) < 60)
    labels = labels[chosen]
    outliers = find_outliers(find_neighbors(vectors[chosen]), labels)
    assert not (labels[outliers["row"]] == 0).any()


@pytest.mark.parametrize("images", [1, 3, 40])
def test_outliers_of_little_or_constant_data(images):
    labels = np.zeros(images, int)
    assert find_outliers(find_neighbors(np.ones((images, 4))), labels).empty
