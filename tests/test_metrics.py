"""Metrics, against scikit-learn, their definitions and planted errors."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as sklearn

from stages.report import binomial, metrics


def make(images=400, classes=7, seed=0, sharpness=2.0):
    """Return calibrated probabilities, and labels drawn from them."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(images, classes)) * sharpness
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = (probabilities.cumsum(1) > rng.random((images, 1))).argmax(1)
    return probabilities.astype(np.float32), labels.astype(np.int32)


@pytest.mark.parametrize("classes", [2, 7])
@pytest.mark.filterwarnings("ignore:y_pred contains classes")
def test_scores_are_those_of_scikit_learn(classes):
    probabilities, labels = make(classes=classes)
    predicted = probabilities.argmax(1)
    matrix = metrics.confusion_matrix(labels, predicted, classes)
    values = metrics.averages(matrix)

    assert (matrix == sklearn.confusion_matrix(labels, predicted)).all()
    assert values["balanced_accuracy"] == pytest.approx(
        sklearn.balanced_accuracy_score(labels, predicted)
    )
    for kind in ("macro", "weighted"):
        expected = sklearn.precision_recall_fscore_support(labels, predicted, average=kind)[:3]
        found = [values[f"{name}_{kind}"] for name in ("precision", "recall", "f1")]
        assert found == pytest.approx(expected)
    assert metrics.brier_score(probabilities, labels) == pytest.approx(
        sklearn.brier_score_loss(labels, probabilities, labels=range(classes), scale_by_half=False),
        rel=1e-5,
    )
    if classes > 3:
        assert metrics.top_k_accuracy(probabilities, labels, 3) == pytest.approx(
            sklearn.top_k_accuracy_score(labels, probabilities, k=3)
        )
        assert metrics.top_k_accuracy(probabilities, labels, 1) == (predicted == labels).mean()


def test_a_class_without_images_or_predictions_divides_by_nothing():
    labels, predicted = np.array([0, 0, 1, 1]), np.array([0, 0, 0, 3])
    matrix = metrics.confusion_matrix(labels, predicted, 5)
    values = metrics.averages(matrix)
    precision, recall, _ = metrics.class_scores(matrix)

    assert np.isnan(precision[[1, 2, 4]]).all() and np.isnan(recall[2:]).all()
    assert values["balanced_accuracy"] == pytest.approx(0.5)
    assert values["f1_macro"] == pytest.approx(
        sklearn.f1_score(labels, predicted, average="macro", zero_division=0)
    )


@given(st.integers(1, 400), st.floats(0.01, 0.99))
def test_the_interval_covers_at_least_95_percent(trials, share):
    correct = np.arange(trials + 1)
    low, high = binomial.clopper_pearson(correct, trials)
    log_probability = [
        math.lgamma(trials + 1) - math.lgamma(k + 1) - math.lgamma(trials - k + 1)
        + k * math.log(share) + (trials - k) * math.log1p(-share)
        for k in correct
    ]  # fmt: skip
    assert np.exp(log_probability)[(low <= share) & (share <= high)].sum() >= 0.95 - 1e-9
    assert (low <= correct / trials).all() and (correct / trials <= high).all()


def test_the_interval_is_the_exact_one_of_scipy():
    from scipy.stats import binomtest

    for correct, trials in ((0, 10), (10, 10), (93, 100), (1, 1)):
        expected = binomtest(correct, trials).proportion_ci(0.95, method="exact")
        assert binomial.clopper_pearson(correct, trials) == pytest.approx(
            (expected.low, expected.high)
        )
    assert binomial.clopper_pearson(0, 0) == (0.0, 1.0)


def test_ece_is_small_when_confidence_is_right_and_large_when_it_is_not():
    probabilities, labels = make(images=50_000)
    overconfident = probabilities**3 / (probabilities**3).sum(1, keepdims=True)
    assert metrics.ece(probabilities, labels) < 0.01
    assert metrics.ece(overconfident, labels) > 0.1


def test_ece_follows_its_definition():
    probabilities, labels = make()
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    expected = 0.0
    for number in range(metrics.BINS):
        inside = (confidence > number / metrics.BINS) & (confidence <= (number + 1) / metrics.BINS)
        if inside.any():
            expected += inside.mean() * abs(confidence[inside].mean() - right[inside].mean())
    assert metrics.ece(probabilities, labels) == pytest.approx(expected, rel=1e-5)
    table = metrics.reliability(probabilities, labels)
    assert table["images"].sum() == len(labels)
    assert (table["low"] <= table["accuracy"]).all() and (table["accuracy"] <= table["high"]).all()


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=300))
def test_precision_recall_is_that_of_scikit_learn(pairs):
    scores = np.array([score for score, _ in pairs]) / 5
    positive = np.array([flag for _, flag in pairs])
    positive[0] = True
    curve, average = metrics.precision_recall(scores, positive)
    assert average == pytest.approx(sklearn.average_precision_score(positive, scores))
    precision, recall, _ = sklearn.precision_recall_curve(positive, scores)
    points = set(zip(recall.round(9), precision.round(9), strict=True))
    assert set(zip(curve["recall"].round(9), curve["precision"].round(9), strict=True)) <= points
    assert curve["recall"].iloc[-1] == 1.0 and curve["recall"].is_monotonic_increasing


def test_a_precision_recall_curve_is_thinned():
    probabilities, labels = make(images=20_000, classes=2)
    curve, _ = metrics.precision_recall(probabilities[:, 1], labels == 1)
    assert 50 <= len(curve) <= 60


def test_confused_pairs_come_by_count_then_share():
    matrix = np.array([[90, 5, 5], [0, 10, 0], [5, 1, 4]])
    assert metrics.confused_pairs(matrix).tolist() == [[2, 0], [0, 1], [0, 2], [2, 1]]
    assert metrics.confused_pairs(np.diag([3, 4])).shape == (0, 2)


@given(st.integers(0, 300), st.integers(0, 300))
def test_mcnemar_is_the_binomial_test(broke, fixed):
    from scipy.stats import binomtest

    expected = binomtest(broke, broke + fixed).pvalue if broke + fixed else 1.0
    assert binomial.mcnemar(broke, fixed) == pytest.approx(expected)
    assert binomial.mcnemar(broke, fixed) == binomial.mcnemar(fixed, broke)


def drawn_predictions(seed, images=200, classes=4):
    rng = np.random.default_rng(seed)
    probabilities = rng.dirichlet(np.full(classes, 0.3), images)
    sampled = [rng.choice(classes, p=row) for row in probabilities]
    return probabilities, np.array(sampled)


@given(st.integers(0, 2**32 - 1), st.integers(1, 300))
def test_the_accuracy_coverage_curve_ends_at_the_accuracy(seed, images):
    probabilities, labels = drawn_predictions(seed, images)
    table = metrics.accuracy_by_coverage(probabilities, labels)
    right = probabilities.argmax(1) == labels
    assert table["coverage"].iloc[-1] == 1
    assert table["accuracy"].iloc[-1] == pytest.approx(right.mean())
    for row in table.itertuples():
        accepted = np.sort(probabilities.max(1))[::-1][: round(row.coverage * images)]
        assert accepted.min() == row.confidence


@given(st.integers(0, 2**32 - 1), st.floats(0.3, 1))
def test_the_threshold_is_the_lowest_that_keeps_the_accuracy(seed, accuracy):
    probabilities, labels = drawn_predictions(seed)
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    threshold = metrics.confidence_threshold(probabilities, labels, accuracy)
    accepted = confidence >= threshold
    if threshold < 1:
        assert right[accepted].mean() >= accuracy
    for lower in np.floor(confidence * 1e4) / 1e4:
        if lower < threshold:
            assert right[confidence >= lower].mean() < accuracy


def test_a_threshold_of_0_accepts_all_and_1_none():
    probabilities = np.array([[0.9, 0.1], [0.6, 0.4]])
    assert metrics.confidence_threshold(probabilities, np.array([0, 0])) == 0
    assert metrics.confidence_threshold(probabilities, np.array([1, 1])) == 1


def test_a_bin_of_the_reliability_diagram_ends_with_its_upper_limit():
    probabilities = np.array([[0.2] * 5, [0.25, *[0.1875] * 4]])
    table = metrics.reliability(probabilities, np.array([0, 1]))
    assert table["images"].tolist() == [1, 1] and table["accuracy"].tolist() == [1, 0]
