"""Differences between two versions of a dataset and of predictions."""

import pandas as pd
import pytest

from stages.display import differences


def index(rows):
    columns = ["path", "class", "split", "digest"]
    table = pd.DataFrame(rows, columns=columns).assign(was="", exclusion_reason="", array_index=0)
    return table.astype({"array_index": "Int64"})


def test_each_kind_of_data_change_is_recognized():
    before = index(
        [
            ("a/1", "a", "train", "d1"),
            ("a/2", "a", "test", "d2"),
            ("a/3", "a", "val", "d3"),
            ("a/4", "a", "train", "d4"),
            ("a/5", "a", "train", "d5"),
            ("a/5 copy", "a", "", "d5"),
            ("b/6", "b", "", "d6"),
            ("b/7", "b", "val", "d7"),
        ]
    )
    after = index(
        [
            ("a/1 renamed", "a", "train", "d1"),
            ("b/2", "b", "test", "d2"),
            ("a/3", "a", "train", "d3"),
            ("a/4", "a", "", "d4"),
            ("a/5 copy", "a", "train", "d5"),
            ("b/6", "b", "train", "d6"),
            ("b/8", "b", "test", "d8"),
        ]
    )
    changes = differences.data_changes(before, after)
    assert changes.loc[changes["copy"], "path"].tolist() == ["a/5"]
    assert changes.drop(columns=["copy", "correction"]).to_numpy().tolist() == [
        ["added", "b/8", "", "b", "", "test"],
        ["removed", "a/5", "a", "", "train", ""],
        ["removed", "b/7", "b", "", "val", ""],
        ["relabeled", "b/2", "a", "b", "test", "test"],
        ["moved", "a/3", "a", "a", "val", "train"],
        ["excluded", "a/4", "a", "a", "train", ""],
        ["included", "b/6", "b", "b", "", "train"],
    ]
    counts = differences.count_by_class(changes)
    assert counts.loc["a"].to_dict() == {
        "added": 0, "removed": 1, "relabeled": 1, "moved": 1, "excluded": 1, "included": 0,
    }  # fmt: skip
    assert differences.data_changes(before, before).empty


def test_what_corrections_changed_is_told_apart():
    rows = [(f"a/{n}", "a", "train", f"d{n}") for n in range(6)]
    before, after = index(rows), index(rows)
    after.loc[0, ["class", "was"]] = "b", "a"
    after.loc[1, ["split", "exclusion_reason"]] = "", "dropped from train"
    after.loc[2, "class"] = "b"  # moved to another folder
    after.loc[3, ["split", "exclusion_reason"]] = "", "near duplicate"
    for old, new in ((before, after), (after, before)):
        changes = differences.data_changes(old, new)
        assert len(changes) == 4
        assert set(changes["path"][changes["correction"]]) == {"a/0", "a/1"}


def test_files_are_counted_with_their_copies():
    """Four files are added: a copy of an old one, one in another class, and a new one twice."""
    before = index([("a/1", "a", "train", "d1"), ("a/2", "a", "", "")])
    more = [("a/1 again", "a", "", "d1"), ("b/1", "b", "", "d1"), ("b/3", "b", "val", "d3")]
    after = index([("a/1", "a", "train", "d1"), *more, ("b/3 again", "b", "", "d3")])
    added = differences.data_changes(before, after)
    assert set(added["change"]) == {"added"}
    assert dict(zip(added["path"], added["copy"], strict=True)) == {
        "a/1 again": True, "b/1": True, "b/3": False, "b/3 again": True,
    }  # fmt: skip
    removed = differences.data_changes(after, before)
    assert (
        set(removed["change"]) == {"removed"} and removed["copy"].tolist() == added["copy"].tolist()
    )


def test_predictions_are_joined_by_content_and_class():
    before = pd.DataFrame(
        {
            "path": ["1", "2", "3", "4", "5"],
            "digest": ["d1", "d2", "d3", "d4", "d5"],
            "class": ["a", "a", "a", "b", "b"],
            "predicted": ["a", "b", "b", "b", "b"],
            "confidence": [0.9, 0.8, 0.7, 0.9, 0.9],
        }
    )
    after = before.iloc[:4].assign(predicted=["b", "a", "b", "b"], path=["x", "y", "z", "w"])
    after.loc[3, "class"] = "a"  # relabeled: its label, not the prediction, has changed
    images = differences.prediction_changes(before, after).set_index("path")
    assert images["change"].to_dict() == {"x": "broke", "y": "fixed", "z": ""}


def test_the_most_confident_mistakes_come_first():
    """Broken images by the confidence of the later version, fixed ones by that of the earlier."""
    names = [f"{kind}{n}" for kind in ("broke", "fixed") for n in range(3)]
    table = pd.DataFrame({"path": names, "digest": names, "class": "a"})
    predicted = ["a"] * 3 + ["b"] * 3
    images = differences.prediction_changes(
        table.assign(predicted=predicted, confidence=[0.9, 0.8, 0.7, 0.6, 0.99, 0.7]),
        table.assign(predicted=predicted[::-1], confidence=[0.6, 0.95, 0.7, 0.9, 0.5, 0.8]),
    )
    order = images.groupby("change", sort=False)["path"].agg(list)
    assert order["broke"] == ["broke1", "broke2", "broke0"]
    assert order["fixed"] == ["fixed1", "fixed2", "fixed0"]


@pytest.mark.parametrize(
    ("fixed", "broke", "words"),
    [
        (0, 0, "same images"),
        (30, 5, "is better. Two equally good models would differ at least this much in fewer than"),
        (5, 30, "is worse"),
        (20, 6, "at least this much in 9 of 1,000 comparisons."),
        (60, 34, "at least this much in 1 of 100 comparisons."),
        (9, 4, "may be chance: two equally good models would differ at least this much in 27 of"),
        (3, 3, "may be chance: two equally good models would differ at least this much always."),
        (5, 4, "this much always."),
        (500_001, 500_008, "this much nearly always."),
    ],
)
def test_the_verdict_says_which_version_is_better(fixed, broke, words):
    assert words in differences.verdict(fixed, broke)[1]
