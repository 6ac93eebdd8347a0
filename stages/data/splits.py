"""Split assignment: an image's split depends only on its content (or group) and the seed.

The rule: a hash of the seed and the image's content (or the name of its group) gives a number from
0 to 1, here called its rank. Below ``test_fraction`` the image belongs to test, at or above
``1 - val_fraction`` to val, otherwise to train. So an image stays in its split as the dataset
grows, and of n images of a class, ``n * fraction`` are expected in a split, with a standard
deviation of ``sqrt(n * fraction * (1 - fraction))``.

Pure functions: a table in, a table out, whatever the order of the images.
"""

import hashlib
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from stages.data.arrays import SPLITS
from stages.data.corrections import DROPPED
from stages.data.duplicates import NO_MATCHES, Matches, find_across_splits
from stages.data.labels import TABLE
from stages.run.cli import UserError, list_names

if TYPE_CHECKING:
    from stages.run.cluster import Cluster

TRAIN, VAL, TEST = 0, 1, 2  # positions in SPLITS; a "later" split has a greater one
EXCLUDED = -1
# Why an image is excluded, if not because it can't be read.
DUPLICATE, NEAR_DUPLICATE, LABEL_CONFLICT = "duplicate", "near duplicate", "label conflict"


def add_groups(images: pd.DataFrame, group_by: str | None) -> pd.DataFrame:
    """Add the column ``group``: the match of a regular expression in the path, or missing.

    If the expression ignores case, so do groups: ``(?i)p\\d+`` finds one group in P01 and p01.
    Groups that the dataset names itself are kept.

    Raises
    ------
    UserError
        If no path matches, or the dataset names groups itself.
    """
    if "group" in images:
        if group_by is not None:
            raise UserError(
                f"prepare.group_by: {group_by}: the groups are in the column group of {TABLE}"
                " already; set prepare.group_by: null, or remove that column"
            )
        return images
    if group_by is None:
        return images.assign(group=None)

    def matches(flags: int = 0) -> list[str | None]:
        pattern = re.compile(group_by, flags)
        found = map(pattern.search, images["path"])
        return [match and match.group(1 if pattern.groups else 0) for match in found]

    groups = matches()
    if all(group is None for group in groups):
        ignoring_case = any(group is not None for group in matches(re.IGNORECASE))
        hint = "; it matches if case is ignored: put (?i) at its start" if ignoring_case else ""
        raise UserError(
            f"prepare.group_by: {group_by} matches none of the {len(images):,} paths within the"
            f" dataset, for instance {list_names(images['path'][:3])}{hint}"
        )
    if re.compile(group_by).flags & re.IGNORECASE:
        groups = [group and group.casefold() for group in groups]
    return images.assign(group=pd.Series(groups, dtype=object))


def rank_names(names: Iterable[bytes], seed: int) -> np.ndarray:
    """Return the rank of each name, float64 from 0 to 1: a hash of seed and name (BLAKE2b)."""
    key = str(seed).encode()
    values = bytearray()
    for name in names:
        values += hashlib.blake2b(name, digest_size=8, key=key).digest()
    return np.frombuffer(values, ">u8").astype(np.float64) / 2.0**64


def split_by_rank(ranks: np.ndarray, val_fraction: float, test_fraction: float) -> np.ndarray:
    """Return the split (int8) of each rank."""
    splits = np.full(len(ranks), TRAIN, np.int8)
    splits[ranks >= 1 - val_fraction] = VAL
    splits[ranks < test_fraction] = TEST
    return splits


def splits_to_make(images: pd.DataFrame, val_fraction: float, test_fraction: float) -> list[int]:
    """Return the splits that the dataset itself lacks, so that they are split off here."""
    own = set(images["own_split"].cat.codes)
    fractions = {VAL: val_fraction, TEST: test_fraction}
    return [split for split, fraction in fractions.items() if fraction > 0 and split not in own]


def assign(
    images: pd.DataFrame,
    to_make: list[int],
    val_fraction: float,
    test_fraction: float,
    seed: int,
    thumbnails: np.ndarray | None = None,
    cluster: "Cluster | None" = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Assign each image to a split, or exclude it.

    1. The dataset's own splits are kept as they are; missing ones are split off from train.
    2. The rank of an image decides in which of the splits that are made here it is.
    3. Of these images, one of several identical ones in a class is kept; identical images in two
       classes are excluded from train and val; and an image with a duplicate in a later split is
       excluded, even if that duplicate is excluded itself.
    4. If a split would have no image of a class, images of that class are moved to it.
    5. If any was moved, step 3 is done again; a class may then still lack a split.

    Parameters
    ----------
    images : DataFrame
        As `stages.data.scan.scan` returns it, with the columns ``group`` and ``is_dropped``. A
        dropped image is excluded, and takes part in nothing else.
    to_make : list of int
        The splits to make here, as `splits_to_make` returns them.
    val_fraction, test_fraction : float
        From 0 to 1.
    seed : int
    thumbnails : uint8 array of shape (n, 24, 24), optional
        Without them, near duplicates are not looked for.
    cluster : Cluster, optional
        Where to look for them.

    Returns
    -------
    images : DataFrame
        With more columns: ``split`` (categorical; missing if the image is excluded),
        ``assigned_split`` (the same before exclusions; missing if the image can't be read),
        ``exclusion_reason`` (str; empty if it is not excluded), ``is_moved`` (moved to a split that
        its class would otherwise lack).
    duplicates : DataFrame
        Sorted, each image once for each kind at most. ``image`` and ``other`` are rows of `images`;
        ``distance`` is 0 for identical files, at most 0.02; ``kind`` is ``"exact"`` (identical
        files in a class), ``"near"`` (near duplicates), ``"conflict"`` (identical files in two
        classes) or ``"cross-split"`` (duplicates across the dataset's own splits, which are not
        excluded).
    """
    own, content = images["own_split"].cat.codes.to_numpy(), images["content"].to_numpy()
    unit, rank = _units(images, seed)
    is_dropped = images["is_dropped"].to_numpy() & (content >= 0)
    is_split_here = (content >= 0) & ((own < 0) | ((own == TRAIN) & bool(to_make)))
    shares = val_fraction * (VAL in to_make), test_fraction * (TEST in to_make)
    of_all = np.where(content >= 0, own, EXCLUDED).astype(np.int8)
    of_all[is_split_here] = split_by_rank(rank[is_split_here], *shares)
    content, is_split_here = np.where(is_dropped, -1, content), is_split_here & ~is_dropped
    before_moves = np.where(is_dropped, np.int8(EXCLUDED), of_all)
    table = pd.DataFrame(
        {
            "content": content,
            "label": images["class"].cat.codes.to_numpy(),
            "unit": unit,
            "rank": rank,
            "is_split_here": is_split_here,
            "split": before_moves,
        }
    )
    reasons, matches = _exclude(table, thumbnails, cluster)
    filled = _fill_empty_splits(table, reasons == "", [*to_make, TRAIN], *shares)
    if (filled != before_moves).any():
        table["split"] = filled
        reasons, matches = _exclude(table, thumbnails, cluster)
    codes = np.where(reasons == "", filled, EXCLUDED)
    dropped_from = pd.Series([f"{DROPPED} {SPLITS[split]}" for split in of_all], images.index)
    left = images["unreadable"].mask(is_dropped, dropped_from)
    assigned = images.assign(
        split=pd.Categorical.from_codes(codes, pd.Index(SPLITS)),
        assigned_split=pd.Categorical.from_codes(filled, pd.Index(SPLITS)),
        exclusion_reason=left.where(content < 0, reasons),
        is_moved=filled != before_moves,
    )
    across = NO_MATCHES
    if images["own_split"].nunique() > 1:
        own = np.where(codes == EXCLUDED, EXCLUDED, own)
        across = find_across_splits(content, own, thumbnails, cluster)
    return assigned, _list_duplicates(table, reasons, matches, across)


def _units(images: pd.DataFrame, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return what each image shares its split with, a number, and the rank of that.

    Images with the same group name belong together; without one, identical images do.
    """
    content = images["content"].to_numpy()
    first = images[content >= 0].drop_duplicates("content").sort_values("content")
    groups, names = pd.factorize(images["group"])
    ranks = rank_names([*first["digest"], *(b"group " + name.encode() for name in names)], seed)
    unit = np.where((groups >= 0) & (content >= 0), len(first) + groups, content)
    return unit, ranks[unit] if len(ranks) else np.zeros(len(unit))


def _label_conflicts(contents: np.ndarray, labels: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Return a mask of the images in `among` that are identical to one of another class."""
    low = np.full(contents.max(initial=-1) + 1, np.iinfo(np.int64).max)
    high = np.full(len(low), -1)
    np.minimum.at(low, contents[among], labels[among])
    np.maximum.at(high, contents[among], labels[among])
    return among & (low != high)[contents]


def _exclude(
    table: pd.DataFrame, thumbnails: np.ndarray | None, cluster: "Cluster | None"
) -> tuple[np.ndarray, Matches]:
    """Return why images are excluded from the splits made here, and their matches in later splits.

    A later reason replaces an earlier one: near duplicate (of any image in a later split; within a
    split all stay), duplicate, label conflict. Every identical file gets one of the last two.
    """
    content, label, split = (table[name].to_numpy() for name in ("content", "label", "split"))
    is_split_here = table["is_split_here"].to_numpy()
    reasons = np.full(len(table), "", object)
    compared = np.where(is_split_here, split, np.int8(EXCLUDED))
    matches = find_across_splits(content, compared, thumbnails, cluster)
    reasons[matches.queries] = NEAR_DUPLICATE
    # Of identical images of a class, keep the one in the latest split, then that of lowest rank.
    rows = np.flatnonzero(is_split_here)
    rank = table["rank"].to_numpy()[rows]
    order = rows[np.lexsort((rows, rank, -split[rows], label[rows], content[rows]))]
    repeats = (np.diff(content[order]) == 0) & (np.diff(label[order]) == 0)
    reasons[order[1:][repeats]] = DUPLICATE
    reasons[_label_conflicts(content, label, is_split_here) & (split != TEST)] = LABEL_CONFLICT
    return reasons, matches


def _fill_empty_splits(
    table: pd.DataFrame,
    is_included: np.ndarray,
    required: list[int],
    val_fraction: float,
    test_fraction: float,
) -> np.ndarray:
    """Return the splits after each class has moved images to the required splits that it lacks.

    For each, one of its groups moves: to test that of lowest rank, to val that of highest, to train
    the nearest; and only if the class keeps another group where it was.
    """
    content, label, unit = (table[name].to_numpy() for name in ("content", "label", "unit"))
    is_split_here, split = table["is_split_here"].to_numpy(), table["split"].to_numpy().copy()
    is_usable = is_split_here & is_included & ~_label_conflicts(content, label, is_split_here)
    counts = np.zeros((label.max() + 1, len(SPLITS)), int)
    np.add.at(counts, (label[is_usable], split[is_usable]), 1)
    lacks_one = (counts[:, required] == 0).any(axis=1)
    groups = table[is_usable & lacks_one[label]].drop_duplicates(["label", "unit"])
    if not len(groups):
        return split
    groups = groups.sort_values(["rank", "unit"])
    to_train = np.maximum(test_fraction - groups["rank"], groups["rank"] - (1 - val_fraction))
    groups = groups.assign(to_train=to_train)
    split_of = groups.drop_duplicates("unit").set_index("unit")["split"].copy()
    moved: set[int] = set()
    for _, own in groups.groupby("label"):
        in_order = {
            TEST: own["unit"],
            VAL: own["unit"][::-1],
            TRAIN: own.sort_values("to_train", kind="stable")["unit"],
        }
        for target in required:
            own_splits = split_of[own["unit"]]
            if (own_splits == target).any():
                continue
            sizes = own_splits.value_counts()
            spare = [u for u in in_order[target] if u not in moved and sizes[split_of[u]] > 1]
            if spare:
                split_of[spare[0]] = target
                moved.add(spare[0])
                split[is_split_here & (unit == spare[0])] = target
    return split


def _list_duplicates(
    table: pd.DataFrame, reasons: np.ndarray, matches: Matches, across: Matches
) -> pd.DataFrame:
    """Return the table of duplicates: an image and one that it duplicates."""
    columns = ["image", "other", "distance"]
    near = pd.DataFrame(matches._asdict()).set_axis(columns, axis=1)
    near = near[reasons[near["image"]] == NEAR_DUPLICATE]
    cross_split = pd.DataFrame(across._asdict()).set_axis(columns, axis=1)

    # Of identical images in a class, the first is one that is kept.
    table = table[["content", "label"]].assign(
        image=np.arange(len(table)), is_repeat=reasons == DUPLICATE, distance=0.0
    )
    readable = table[table["content"] >= 0]
    firsts = readable.sort_values(["content", "label", "is_repeat"], kind="stable")
    firsts = firsts.drop_duplicates(["content", "label"])[["content", "label", "image"]]
    firsts = firsts.rename(columns={"image": "other"})
    exact = readable[readable["is_repeat"]].merge(firsts, on=["content", "label"])
    content, label = table["content"].to_numpy(), table["label"].to_numpy()
    conflict = table[_label_conflicts(content, label, content >= 0)].merge(firsts, on="content")
    conflict = conflict[conflict["label_x"] != conflict["label_y"]].drop_duplicates("image")
    kinds = {"near": near, "exact": exact, "conflict": conflict, "cross-split": cross_split}
    pairs = [found[columns].assign(kind=kind) for kind, found in kinds.items()]
    return pd.concat(pairs).sort_values([*columns, "kind"], ignore_index=True)
