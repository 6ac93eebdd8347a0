"""Split assignment: what holds whatever the dataset is."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from stages.data import splits
from stages.data.splits import (
    DUPLICATE,
    EXCLUDED,
    INCLUDED,
    LABEL_CONFLICT,
    NEAR_DUPLICATE,
    TEST,
    TRAIN,
    VAL,
)

NAMES = [number.to_bytes(16, "big") for number in range(5000)]
NOISE = np.random.default_rng(0).integers(0, 256, (400, 24, 24), np.uint8)


def assign(
    contents, labels, groups=None, given=None, seed=1, val=0.15, test=0.15, near=(), ranks=None
):
    """Assign the images of a table; `near` holds pairs of contents that are near duplicates."""
    contents, labels = np.array(contents, np.int32), np.array(labels, np.int32)
    ranks = splits.rank_names(NAMES[: contents.max() + 1], seed) if ranks is None else ranks
    of_group = contents.copy()
    if groups is not None:
        groups = np.array(groups)
        of_group[groups >= 0] = len(ranks) + groups[groups >= 0]
        names = [b"group %d" % group for group in range(groups.max() + 1)]
        ranks = np.concatenate((ranks, splits.rank_names(names, seed)))
    given = np.full(len(contents), -1, np.int8) if given is None else np.array(given, np.int8)
    looks = np.arange(contents.max() + 1)
    for one, two in near:
        looks[looks == looks[one]] = looks[two]
    images = splits.Images(contents, labels, given, of_group, np.array(ranks))
    return splits.assign(images, val, test, NOISE[looks[contents] % len(NOISE)])


tables = st.lists(
    st.tuples(st.integers(0, 80), st.integers(0, 3), st.integers(-1, 8)), min_size=1, max_size=120
)


@hypothesis.given(tables, st.integers(0, 5), st.randoms())
def test_the_order_of_rows_does_not_matter(table, seed, random):
    before = assign(*zip(*table, strict=True), seed=seed)
    order = list(range(len(table)))
    random.shuffle(order)
    after = assign(*zip(*(table[row] for row in order), strict=True), seed=seed)

    def included(rows, found):
        """Which of several equal rows is kept follows from their order, that one is does not."""
        return sorted((*table[row][:2], found.splits[i]) for i, row in enumerate(rows))

    assert included(range(len(table)), before) == included(order, after)


@hypothesis.given(st.lists(st.integers(0, 2), min_size=1, max_size=150), st.integers(0, 5))
def test_each_class_of_three_is_in_each_split(labels, seed):
    found = assign(range(len(labels)), labels, seed=seed)
    for label in set(labels):
        mine = found.splits[np.array(labels) == label]
        if len(mine) >= 3:
            assert set(mine.tolist()) == {TRAIN, VAL, TEST}


@hypothesis.given(
    st.lists(st.integers(0, 2), min_size=1, max_size=150), st.integers(0, 5), st.data()
)
def test_an_image_stays_as_the_dataset_grows(labels, seed, data):
    few = data.draw(st.integers(1, len(labels)))
    before = assign(range(few), labels[:few], seed=seed)
    after = assign(range(len(labels)), labels, seed=seed)
    same = before.splits == after.splits[:few]
    assert (same | before.reassigned | after.reassigned[:few]).all()
    # Only a reassignment ever takes an image out of test.
    left = (before.splits == TEST) & ~same
    assert (before.reassigned | after.reassigned[:few])[left].all()


@hypothesis.given(
    st.lists(st.integers(0, 2), min_size=40, max_size=150),
    st.integers(0, 5),
    st.sampled_from([0.1, 0.2, 0.4]),
)
def test_the_test_fraction_does_not_touch_val(labels, seed, fraction):
    one = assign(range(len(labels)), labels, seed=seed)
    two = assign(range(len(labels)), labels, seed=seed, test=fraction)
    lent = one.reassigned | two.reassigned
    np.testing.assert_array_equal((one.splits == VAL)[~lent], (two.splits == VAL)[~lent])


@hypothesis.given(tables, st.integers(0, 5))
def test_groups_never_part(table, seed):
    contents, labels, groups = zip(*table, strict=True)
    found = assign(contents, labels, groups, seed=seed)
    for group in set(groups) - {-1}:
        sides = found.splits[(np.array(groups) == group) & (found.splits != EXCLUDED)]
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


@hypothesis.given(tables, st.integers(0, 5), st.data())
def test_no_duplicate_in_two_splits(table, seed, data):
    contents, labels, groups = zip(*table, strict=True)
    pair = st.tuples(st.sampled_from(contents), st.sampled_from(contents))
    near = [pair for pair in data.draw(st.lists(pair, max_size=10)) if pair[0] != pair[1]]
    found = assign(contents, labels, groups, seed=seed, near=near)
    contents = np.array(contents)
    for one, two in [*near, *((content, content) for content in set(contents.tolist()))]:
        kept = np.isin(contents, (one, two)) & (found.splits != EXCLUDED)
        assert len(set(found.splits[kept].tolist())) <= 1


def test_duplicates_within_a_class_count_once():
    found = assign([0, 1, 1, 1, *range(2, 30)], [0] * 32)
    assert found.reasons[1:4].tolist().count(DUPLICATE) == 2
    assert (found.reasons[4:] == INCLUDED).all()


def test_conflicts_stay_in_test_only():
    contents, labels = [*range(200), *range(200)], [0] * 200 + [1] * 200
    labels[100:200] = [1] * 100  # contents 100 to 199 are duplicates within a class
    found = assign([*contents, *range(200, 300)], [*labels, *([0, 1] * 50)])
    conflict = np.array(contents) < 100
    sides = found.tentative[:400][conflict]
    assert (found.splits[:400][conflict] == np.where(sides == TEST, TEST, EXCLUDED)).all()
    assert (
        found.reasons[:400][conflict] == np.where(sides == TEST, INCLUDED, LABEL_CONFLICT)
    ).all()


def test_the_image_nearer_to_training_is_left_out():
    sides = assign(range(60), [0] * 60).tentative
    train, val, test = (np.flatnonzero(sides == side)[0] for side in (TRAIN, VAL, TEST))
    found = assign(range(60), [0] * 60, near=[(train, val), (val, test)])
    # val is left out for test, and train for val all the same.
    assert found.reasons[[train, val, test]].tolist() == [NEAR_DUPLICATE, NEAR_DUPLICATE, INCLUDED]


def test_a_class_whose_val_is_all_duplicates_reassigns():
    sides = assign(range(12), [0] * 12, seed=3).tentative
    test = np.flatnonzero(sides == TEST)[0]
    near = [(row, test) for row in np.flatnonzero(sides == VAL)]
    found = assign(range(12), [0] * 12, seed=3, near=near)
    assert {TRAIN, VAL, TEST} <= set(found.splits.tolist())


def test_a_reassignment_does_not_empty_a_split_of_its_near_duplicates():
    found = assign(range(4), [0] * 4, near=[(0, 1)], ranks=[0.3, 0.4, 0.9, 0.95])
    assert found.splits.tolist() == [TRAIN, TRAIN, TEST, VAL]
    burst = [(one, two) for one in range(10) for two in range(one)]
    ranks = [*np.linspace(0.2, 0.8, 10), 0.9, 0.92, 0.94]
    found = assign(range(13), [0] * 13, near=burst, ranks=ranks)
    assert found.splits.tolist() == [TRAIN] * 10 + [TEST, VAL, VAL]


def test_a_reassignment_does_not_empty_another_class():
    """Class 1 has one training image, a near duplicate of what class 0 would move to test."""
    labels = [0, 0, 0, 0, 1, 1, 1]
    ranks = [0.3, 0.4, 0.9, 0.95, 0.5, 0.1, 0.9]
    found = assign(range(7), labels, near=[(0, 4)], ranks=ranks)
    assert found.splits.tolist() == [TRAIN, TEST, VAL, VAL, TRAIN, TEST, VAL]


def test_given_splits_are_kept():
    given = [TRAIN] * 50 + [VAL] * 5 + [TEST] * 5
    contents = [0] * 10 + list(range(40)) + [0, 1, 2, 3, 4, 0, 0, 2, 3, 4]
    found = assign(contents, [0, 1] * 30, given=given, near=[(7, 4)])
    assert found.splits.tolist() == given and found.cut == []


def test_a_missing_split_is_cut_from_train():
    found = assign(range(200), [0, 1] * 100, given=[TRAIN] * 150 + [TEST] * 50)
    assert (found.splits[150:] == TEST).all() and found.cut == [VAL]
    assert set(found.splits[:150].tolist()) == {TRAIN, VAL}
    assert assign(range(9), [0] * 9, given=[TRAIN] * 9, test=0).cut == [VAL]


def test_an_image_that_cannot_be_read_counts_nowhere():
    found = assign([-1, 0, 1, 2, -1], [0] * 5)
    assert found.splits[[0, 4]].tolist() == [EXCLUDED] * 2
    assert set(found.splits[1:4].tolist()) == {TRAIN, VAL, TEST}


@pytest.mark.parametrize("fractions", [(0.15, 0), (0, 0.15), (0, 0)])
def test_without_a_split(fractions):
    val, test = fractions
    found = assign(range(300), [0, 1] * 150, val=val, test=test)
    expected = {TRAIN, *([VAL] if val else []), *([TEST] if test else [])}
    assert set(found.splits.tolist()) == expected
