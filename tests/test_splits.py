"""Split assignment: what holds whatever the dataset is."""

from typing import NamedTuple

import hypothesis
import numpy as np
import pandas as pd
import pytest
from hypothesis import strategies as st

from stages.data import splits
from stages.data.arrays import SPLITS
from stages.data.splits import (
    DUPLICATE,
    EXCLUDED,
    LABEL_CONFLICT,
    NEAR_DUPLICATE,
    TEST,
    TRAIN,
    VAL,
)

NAMES = np.array([number.to_bytes(16, "big") for number in range(5000)], object)
NOISE = np.random.default_rng(0).integers(0, 256, (400, 24, 24), np.uint8)


FEWER = hypothesis.settings(max_examples=40)  # of hundreds of images each


class Assigned(NamedTuple):
    """The columns that `splits.assign` adds, as arrays; splits as their positions in SPLITS."""

    split: np.ndarray
    assigned_split: np.ndarray
    reason: np.ndarray
    is_moved: np.ndarray


def table(contents, labels, groups=None, given=None):
    """Return a table of images; a content or group of -1 is none."""
    contents, labels = np.array(contents), np.array(labels)
    groups, given = (np.full(len(labels), -1) if x is None else x for x in (groups, given))
    numbers = np.searchsorted(np.unique(contents[contents >= 0]), contents)
    return pd.DataFrame(
        {
            "class": pd.Categorical.from_codes(labels, np.arange(labels.max() + 1).astype(str)),
            "own_split": pd.Categorical.from_codes(given, SPLITS),
            "group": pd.Series([None if g < 0 else str(g) for g in groups], dtype=object),
            "content": np.where(contents < 0, -1, numbers).astype(np.int32),
            "digest": NAMES[contents],
            "unreadable": np.where(contents < 0, "damaged", ""),
            "is_dropped": False,
        }
    )


def assign(
    contents, labels, groups=None, given=None, seed=1, val=0.15, test=0.15, near=(), ranks=None
):
    """Assign the images of a table; `near` holds pairs of contents that are near duplicates."""
    images, looks = table(contents, labels, groups, given), np.arange(max(contents) + 1)
    for one, two in near:
        looks[looks == looks[one]] = looks[two]
    thumbnails = NOISE[looks[np.array(contents)] % len(NOISE)] if near else None
    with pytest.MonkeyPatch.context() as patch:
        if ranks is not None:
            patch.setattr(splits, "rank_names", lambda names, seed: np.array(ranks))
        to_make = splits.splits_to_make(images, val, test)
        found, _ = splits.assign(images, to_make, val, test, seed, thumbnails)
    return Assigned(
        found["split"].cat.codes.to_numpy(),
        found["assigned_split"].cat.codes.to_numpy(),
        found["exclusion_reason"].to_numpy(),
        found["is_moved"].to_numpy(),
    )


rows_of_images = st.lists(
    st.tuples(st.integers(0, 80), st.integers(0, 3), st.integers(-1, 8)), min_size=1, max_size=120
)


@FEWER
@hypothesis.given(rows_of_images, st.integers(0, 5), st.randoms())
def test_the_order_of_rows_does_not_matter(table, seed, random):
    before = assign(*zip(*table, strict=True), seed=seed)
    order = list(range(len(table)))
    random.shuffle(order)
    after = assign(*zip(*(table[row] for row in order), strict=True), seed=seed)

    def included(rows, found):
        """Which of several equal rows is kept follows from their order, that one is does not."""
        return sorted((*table[row][:2], found.split[i]) for i, row in enumerate(rows))

    assert included(range(len(table)), before) == included(order, after)


@FEWER
@hypothesis.given(st.lists(st.integers(0, 2), min_size=1, max_size=150), st.integers(0, 5))
def test_each_class_of_three_is_in_each_split(labels, seed):
    found = assign(range(len(labels)), labels, seed=seed)
    for label in set(labels):
        mine = found.split[np.array(labels) == label]
        if len(mine) >= 3:
            assert set(mine.tolist()) == {TRAIN, VAL, TEST}


@FEWER
@hypothesis.given(
    st.lists(st.integers(0, 2), min_size=1, max_size=150), st.integers(0, 5), st.data()
)
def test_an_image_stays_as_the_dataset_grows(labels, seed, data):
    few = data.draw(st.integers(1, len(labels)))
    before = assign(range(few), labels[:few], seed=seed)
    after = assign(range(len(labels)), labels, seed=seed)
    same = before.split == after.split[:few]
    assert (same | before.is_moved | after.is_moved[:few]).all()
    # Only a reassignment ever takes an image out of test.
    left = (before.split == TEST) & ~same
    assert (before.is_moved | after.is_moved[:few])[left].all()


@FEWER
@hypothesis.given(
    st.lists(st.integers(0, 2), min_size=40, max_size=150),
    st.integers(0, 5),
    st.sampled_from([0.1, 0.2, 0.4]),
)
def test_the_test_fraction_does_not_touch_val(labels, seed, fraction):
    one = assign(range(len(labels)), labels, seed=seed)
    two = assign(range(len(labels)), labels, seed=seed, test=fraction)
    lent = one.is_moved | two.is_moved
    np.testing.assert_array_equal((one.split == VAL)[~lent], (two.split == VAL)[~lent])


@FEWER
@hypothesis.given(rows_of_images, st.integers(0, 5))
def test_groups_never_part(table, seed):
    contents, labels, groups = zip(*table, strict=True)
    found = assign(contents, labels, groups, seed=seed)
    for group in set(groups) - {-1}:
        sides = found.split[(np.array(groups) == group) & (found.split != EXCLUDED)]
        assert len(set(sides.tolist())) <= 1


def test_an_image_has_the_place_it_always_had():
    """Else every dataset would be shuffled, and no two numbers would compare."""
    found = splits.rank_names([bytes(16), b"group patient 7"], 1)
    assert found.tolist() == [0.9868295135485291, 0.01117315464045994]


@pytest.mark.parametrize("fraction", [0.05, 0.15, 0.5])
@pytest.mark.parametrize("n", [5, 22, 100, 1000])
def test_shares_are_near_what_was_asked_for(n, fraction):
    """In all but one case in ten thousand, as the README says."""
    ranks = splits.rank_names((number.to_bytes(16, "big") for number in range(200_000)), 1)
    sides = splits.split_by_rank(ranks[: len(ranks) // n * n], 0.15, fraction).reshape(-1, n)
    for split, share in ((TEST, fraction), (VAL, 0.15), (TRAIN, 0.85 - fraction)):
        bound = 4 * np.sqrt(n * share * (1 - share)) + 2
        counts = (sides == split).sum(axis=1)
        assert (abs(counts - n * share) > bound).mean() <= 2e-4
        assert abs(counts.mean() - n * share) < bound / 10


@FEWER
@hypothesis.given(rows_of_images, st.integers(0, 5), st.data())
def test_no_duplicate_in_two_splits(table, seed, data):
    contents, labels, groups = zip(*table, strict=True)
    pair = st.tuples(st.sampled_from(contents), st.sampled_from(contents))
    near = [pair for pair in data.draw(st.lists(pair, max_size=10)) if pair[0] != pair[1]]
    found = assign(contents, labels, groups, seed=seed, near=near)
    contents = np.array(contents)
    for one, two in [*near, *((content, content) for content in set(contents.tolist()))]:
        kept = np.isin(contents, (one, two)) & (found.split != EXCLUDED)
        assert len(set(found.split[kept].tolist())) <= 1


def test_duplicates_within_a_class_count_once():
    found = assign([0, 1, 1, 1, *range(2, 30)], [0] * 32)
    assert found.reason[1:4].tolist().count(DUPLICATE) == 2
    assert (found.reason[4:] == "").all()


def test_of_identical_images_the_one_in_the_latest_split_is_kept():
    """Two groups share a file; in one split, the first of the paths is kept."""
    ranks = [0.5, 0.2, 0.3, 0.05, 0.9, 0.5, 0.1]  # of five contents, and of two groups
    found = assign([0, 0, 1, 1, 2, 3, 4], [0] * 7, [0, 1, -1, -1, -1, -1, -1], ranks=ranks)
    assert found.split.tolist() == [EXCLUDED, TEST, TRAIN, EXCLUDED, TRAIN, TEST, VAL]
    assert found.reason.tolist() == [DUPLICATE, "", "", DUPLICATE, "", "", ""]


def test_conflicts_stay_in_test_only():
    contents, labels = [*range(200), *range(200)], [0] * 200 + [1] * 200
    labels[100:200] = [1] * 100  # contents 100 to 199 are duplicates within a class
    found = assign([*contents, *range(200, 300)], [*labels, *([0, 1] * 50)])
    conflict = np.array(contents) < 100
    sides = found.assigned_split[:400][conflict]
    assert (found.split[:400][conflict] == np.where(sides == TEST, TEST, EXCLUDED)).all()
    assert (found.reason[:400][conflict] == np.where(sides == TEST, "", LABEL_CONFLICT)).all()


def test_the_image_nearer_to_training_is_left_out():
    sides = assign(range(60), [0] * 60).assigned_split
    train, val, test = (np.flatnonzero(sides == side)[0] for side in (TRAIN, VAL, TEST))
    found = assign(range(60), [0] * 60, near=[(train, val), (val, test)])
    # val is left out for test, and train for val all the same.
    assert found.reason[[train, val, test]].tolist() == [NEAR_DUPLICATE, NEAR_DUPLICATE, ""]


def test_a_class_whose_val_is_all_duplicates_reassigns():
    sides = assign(range(12), [0] * 12, seed=3).assigned_split
    test = np.flatnonzero(sides == TEST)[0]
    near = [(row, test) for row in np.flatnonzero(sides == VAL)]
    found = assign(range(12), [0] * 12, seed=3, near=near)
    assert {TRAIN, VAL, TEST} <= set(found.split.tolist())


def test_a_move_leaves_the_other_splits_of_its_class_an_image():
    found = assign(range(3), [0] * 3, ranks=[0.05, 0.1, 0.12])
    assert found.split.tolist() == [TEST, TRAIN, VAL] and found.is_moved.sum() == 2
    found = assign(range(2), [0] * 2, ranks=[0.3, 0.4])  # too few, which prepare refuses
    assert len(set(found.split.tolist())) == 2


def test_a_group_of_two_classes_moves_once():
    """Both lack test and have its lowest rank in common."""
    ranks = [0.3, 0.4, 0.5, 0.6, 0.7, 0.9, 0.95]
    groups = [0, 0, 1, 2, 3, 4, 5]
    ranks = [*[0.0] * 7, 0.2, 0.4, 0.5, 0.6, 0.9, 0.95]
    found = assign(range(7), [0, 1, 0, 1, 0, 1, 0], groups, ranks=ranks)
    assert found.split[:2].tolist() == [TEST, TEST] and found.is_moved.sum() == 2


def test_given_splits_are_kept():
    given = [TRAIN] * 50 + [VAL] * 5 + [TEST] * 5
    contents = [0] * 10 + list(range(40)) + [0, 1, 2, 3, 4, 0, 0, 2, 3, 4]
    found = assign(contents, [0, 1] * 30, given=given, near=[(7, 4)])
    assert found.split.tolist() == given


def test_a_missing_split_is_split_off_from_train():
    given = [TRAIN] * 150 + [TEST] * 50
    found = assign(range(200), [0, 1] * 100, given=given)
    assert (found.split[150:] == TEST).all()
    assert set(found.split[:150].tolist()) == {TRAIN, VAL}
    assert splits.splits_to_make(table(range(200), [0, 1] * 100, given=given), 0.1, 0.1) == [VAL]
    assert splits.splits_to_make(table([0], [0], given=[TRAIN]), 0.1, 0) == [VAL]


def test_an_image_that_cannot_be_read_counts_nowhere():
    found = assign([-1, 0, 1, 2, -1], [0] * 5)
    assert found.split[[0, 4]].tolist() == [EXCLUDED] * 2
    assert set(found.split[1:4].tolist()) == {TRAIN, VAL, TEST}


@pytest.mark.parametrize("fractions", [(0.15, 0), (0, 0.15), (0, 0)])
def test_without_a_split(fractions):
    val, test = fractions
    found = assign(range(300), [0, 1] * 150, val=val, test=test)
    expected = {TRAIN, *([VAL] if val else []), *([TEST] if test else [])}
    assert set(found.split.tolist()) == expected


@pytest.mark.parametrize(
    "group_by, groups",
    [
        (r"P\d+", ["P01", None, "P02"]),
        (r"(?i)p\d+", ["p01", "p01", "p02"]),
        (r"(?i)_(p\d+)", ["p01", "p01", "p02"]),
        (r"(?i:p)\d+", ["P01", "p01", "P02"]),  # only a part of it ignores case
    ],
)
def test_groups_ignore_case_if_their_pattern_does(group_by, groups):
    images = pd.DataFrame({"path": ["a/x_P01.png", "a/y_p01.png", "b/z_P02.png"]})
    found = splits.add_groups(images, group_by)["group"]
    assert found.where(found.notna(), None).tolist() == groups
