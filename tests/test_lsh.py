"""Locality-sensitive hashing: similar descriptors meet, up to six uncertain signs in a band."""

import numpy as np
import pytest

from stages.data import lsh


def random_descriptors(count: int, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).normal(size=(count, 40))
    return np.rint(127 * values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.int8)


@pytest.mark.parametrize(("flipped", "met"), [(6, True), (7, False)])
def test_uncertain_signs_may_differ(flipped, met):
    """Six signs of a band may differ, those of the values nearest to zero."""
    one = np.r_[np.full(14, 34), np.full(6, 1), np.full(20, 3)].astype(np.int8)
    other = one.copy()
    other[20 - flipped :] *= -1  # too many for all bands but that of the first twenty
    many = np.tile(other, (2**17, 1))  # from which on no two keys share a bucket
    queries, _ = lsh.candidates(lsh.build_index(many), one[None])
    assert (len(queries) > 0) == met


def test_candidates_are_similar_and_the_most_similar_come_first():
    targets = random_descriptors(3000)
    queries = np.clip(targets[:200] + random_descriptors(200, 1) // 3, -127, 127).astype(np.int8)
    query, row = lsh.candidates(lsh.build_index(targets), queries)
    cosine = (queries[query].astype(int) * targets[row]).sum(axis=1)
    assert (cosine >= lsh.MIN_COSINE * 127**2).all()
    assert (row[query == np.arange(len(query))] == query[query == np.arange(len(query))]).all()
    assert len(set(query.tolist())) > 180 and len(set(zip(query, row, strict=True))) == len(query)
    for one in set(query.tolist()):
        assert (np.diff(cosine[query == one]) <= 0).all()


def test_descriptors_of_zeros_are_left_out():
    targets = np.zeros((5, 40), np.int8)
    assert not len(lsh.candidates(lsh.build_index(targets), targets)[0])


def test_a_query_has_a_bounded_number_of_candidates():
    same = np.tile(random_descriptors(1), (1000, 1))
    query, _ = lsh.candidates(lsh.build_index(same), same[:3])
    assert np.bincount(query).tolist() == [lsh.MAX_CANDIDATES] * 3
