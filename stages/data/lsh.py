"""Multi-probe locality-sensitive hashing: which descriptors are likely to be similar.

A descriptor is hashed once per band of 20 of its 40 values: the signs of these values are the key
of a bucket. A query probes the buckets of its own key and of the keys in which any of its six most
uncertain signs (those of the values nearest to zero) are flipped (Lv, Josephson, Wang, Charikar,
Li: Multi-Probe LSH: Efficient Indexing for High-Dimensional Similarity Search, VLDB 2007). Members
of these buckets whose cosine similarity with the query is high enough are its candidates.

Exhaustive search by matrix products finds a few pairs more (138 instead of 134 among 12,000 images
of CIFAR-10), but takes seven times as long with 10,000 targets, and its time grows with the square
of the number of images. The index of faiss for binary codes (IndexBinaryMultiHash) flips signs
whether they are uncertain or not, and misses 8 to 22 % of the pairs.
"""

from typing import NamedTuple

import numpy as np

from stages.run.cli import progress

MIN_COSINE = 0.8  # lowest similarity of a candidate
MAX_CANDIDATES = 16  # per query, the most similar first

_BANDS = (np.arange(0, 40, 2), np.arange(1, 40, 2), np.arange(20), np.arange(20, 40))
_KEY_BITS = 20
_FLIPPED_BITS = 6
_MAX_BUCKET = 64  # members of a bucket that a query is compared with
_MAX_PAIRS = 8_000  # compared at once, which bounds memory
_LOWER = np.tri(8, k=-1, dtype=np.uint8)  # which of the eight buckets of a group come before each


class Table(NamedTuple):
    """One hash table: its members sorted by bucket.

    Attributes
    ----------
    bucket_sizes : uint8 array of shape (number of buckets,)
    group_starts : int32 array of shape (number of buckets / 8,)
        Where the members of each group of eight buckets begin.
    members : int32 array
        Rows of the indexed descriptors.
    """

    bucket_sizes: np.ndarray
    group_starts: np.ndarray
    members: np.ndarray


class Index(NamedTuple):
    """Descriptors, int8 of shape (n, 40), and a hash table of them for each band.

    `views` successive descriptors are of one picture.
    """

    descriptors: np.ndarray
    tables: list[Table]
    bucket_bits: int
    views: int


def build_index(descriptors: np.ndarray, views: int = 1) -> Index:
    """Index descriptors, int8 of shape (n, 40); those of all zeros are left out."""
    rows = np.flatnonzero(descriptors.any(axis=1)).astype(np.int32)
    bucket_bits = min(len(rows).bit_length() + 3, _KEY_BITS)  # eight buckets or more per row
    tables = []
    for band in progress(_BANDS, total=len(_BANDS), unit="table", label="duplicates: index"):
        buckets = _buckets(_keys(descriptors[rows][:, band]), bucket_bits)
        order = np.argsort(buckets, kind="stable")
        taken, first, count = np.unique(buckets[order], return_index=True, return_counts=True)
        sizes = np.zeros(2**bucket_bits, np.uint8)
        sizes[taken] = np.minimum(count, _MAX_BUCKET)
        group_sizes = sizes.reshape(-1, 8).sum(axis=1, dtype=np.int32)
        starts = np.cumsum(group_sizes, dtype=np.int32) - group_sizes
        fits = np.arange(len(order)) - np.repeat(first, count) < _MAX_BUCKET
        tables.append(Table(sizes, starts, rows[order[fits]]))
    return Index(descriptors, tables, bucket_bits, views)


def candidates(index: Index, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the indexed descriptors that are likely to be similar to each query.

    Parameters
    ----------
    index : Index
    queries : int8 array of shape (m, 40)

    Returns
    -------
    query, row : int arrays of shape (number of pairs,)
        Rows of `queries` and of the indexed descriptors: first the most similar candidate of each
        query, then the second of each, and so on, up to 16.
    """
    parts = [
        _similar_members(index, table, queries, band)
        for table, band in zip(index.tables, _BANDS, strict=True)
    ]
    query, row, cosine = map(np.concatenate, zip(*parts, strict=True))
    # Two bands may lead to one row, and two views to one picture: its most similar one counts.
    picture = row // index.views
    order = np.lexsort((row, -cosine, picture, query))
    is_new = np.ones(len(order), bool)
    is_new[1:] = (np.diff(query[order]) != 0) | (np.diff(picture[order]) != 0)
    order = order[is_new]
    order = order[np.lexsort((row[order], -cosine[order], query[order]))]
    query, row = query[order], row[order]
    rank = np.arange(len(query)) - np.searchsorted(query, query)
    order = np.flatnonzero(rank < MAX_CANDIDATES)
    order = order[np.argsort(rank[order], kind="stable")]
    return query[order], row[order]


def _similar_members(
    index: Index, table: Table, queries: np.ndarray, band: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return query, row and similarity of the pairs that one hash table leads to."""
    probes = _buckets(_probed_keys(queries[:, band]), index.bucket_bits).ravel()
    hits = np.flatnonzero(table.bucket_sizes.take(probes))  # `take`: several times as fast as []
    query, buckets = hits >> _FLIPPED_BITS, probes[hits]
    groups, places = buckets >> 3, buckets & 7
    before = table.bucket_sizes.reshape(-1, 8).take(groups, axis=0) * _LOWER.take(places, axis=0)
    first = table.group_starts.take(groups) + before.sum(axis=1, dtype=np.int32)
    sizes = table.bucket_sizes.take(buckets).astype(int)
    cuts = 1 + np.flatnonzero(np.diff(np.cumsum(sizes) // _MAX_PAIRS))
    own = queries.astype(np.float32)
    found = []
    for part in np.split(np.arange(len(sizes)), cuts):
        offset = np.cumsum(sizes[part]) - sizes[part]
        each = np.repeat(query[part], sizes[part])
        row = table.members[np.repeat(first[part] - offset, sizes[part]) + np.arange(len(each))]
        others = index.descriptors.take(row, axis=0).astype(np.float32)
        product = np.einsum("ij,ij->i", own.take(each, axis=0), others)
        similar = product >= MIN_COSINE * 127**2
        found.append((each[similar], row[similar], product[similar]))
    each, row, product = map(np.concatenate, zip(*found, strict=True))
    return each, row, product


def _probed_keys(values: np.ndarray) -> np.ndarray:
    """Return the keys to probe, int32 of shape (m, 64), given the values of one band."""
    # Magnitudes, with positions in their last five bits; then the six smallest, unordered.
    ranked = np.abs(values.astype(np.int16)) * 32 + np.arange(_KEY_BITS, dtype=np.int16)
    uncertain = np.partition(ranked, _FLIPPED_BITS, axis=1)[:, :_FLIPPED_BITS] & 31
    keys = _keys(values)[:, None]
    for flip in np.split(np.int32(1) << uncertain, _FLIPPED_BITS, axis=1):
        keys = np.concatenate((keys, keys ^ flip), axis=1)
    return keys


def _keys(values: np.ndarray) -> np.ndarray:
    """Return the signs of 20 values, one bit each; int32 of shape (n,)."""
    signs = np.packbits(values > 0, axis=1, bitorder="little").astype(np.int32)
    return signs[:, 0] | signs[:, 1] << 8 | signs[:, 2] << 16


def _buckets(keys: np.ndarray, bits: int) -> np.ndarray:
    """Spread keys over ``2**bits`` buckets (multiplicative hashing: Knuth, TAOCP 6.4)."""
    return (keys * 0x9E379 & 2**_KEY_BITS - 1) >> (_KEY_BITS - bits)
