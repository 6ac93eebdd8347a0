"""Corrections of labels: read, applied by prepare, merged with those of another person."""

import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from stages.data import corrections
from stages.data.arrays import read_index, read_split
from stages.data.corrections import COLUMNS, FILE
from stages.data.parameters import Prepare
from stages.prepare import prepare
from stages.run.cli import UserError

CLASSES = ["cat", "dog", "owl"]


@pytest.fixture
def place(tmp_path):
    """A dataset of 60 pictures, prepared in `out` without corrections."""
    rng = np.random.default_rng(0)
    for number in range(60):
        path = tmp_path / "data" / CLASSES[number % 3] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (9, 8, 3), np.uint8)).save(path)
    run(tmp_path)
    return tmp_path


def run(place, rows=(), **values):
    """Run prepare with these corrections (digest, label, was, path); return index.csv."""
    write(place / "corrections.csv", rows)
    parameters = Prepare(image_size=[6, 6], val_fraction=0.2, test_fraction=0.2, **values)
    paths = place / "data", place / "out", place / "metrics", place / "cache"
    prepare(parameters, *paths, place / "corrections.csv")
    return read_index(place / "out/index.csv").set_index("path")


def write(path, rows):
    table = pd.DataFrame([(*row, "") for row in rows], columns=COLUMNS, dtype=str)
    table.to_csv(path, index=False)
    return path


def all_bytes(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def decide(index, path, label):
    was = index["was"][path] or index["class"][path]
    return index["digest"][path], label, was, path


def test_prepare_applies_them_and_no_split_moves(place, capsys):
    before, old_bytes = read_index(place / "out/index.csv").set_index("path"), all_bytes(place)
    paths = {split: before.index[before["split"] == split] for split in ("train", "val", "test")}
    changed, checked = paths["train"][0], paths["train"][1]
    dropped = [paths["test"][0], paths["train"][2]]
    other = next(name for name in CLASSES if name != before["class"][changed])
    rows = [
        decide(before, changed, other),
        decide(before, checked, before["class"][checked]),
        *(decide(before, path, "") for path in dropped),
        ("0" * 32, "cat", "dog", "gone.png"),
    ]
    index = run(place, rows)
    told = capsys.readouterr().out
    assert "1 relabeled, 2 dropped, 1 checked" in told and "without effect" in told
    assert "gone.png" in told

    assert index["class"][changed] == other and index["was"][changed] == before["class"][changed]
    assert (index["was"].drop(changed) == "").all()
    reasons = index["exclusion_reason"][dropped].tolist()
    assert reasons == ["dropped from test", "dropped from train"]
    assert (index["split"].drop(dropped) == before["split"].drop(dropped)).all()
    train = read_split(place / "out/train")
    assert CLASSES[train.labels[index["array_index"][changed]]] == other
    assert len(train) == len(paths["train"]) - 1
    counts = json.loads((place / "metrics/prepare.json").read_text())
    assert (counts["relabeled"], counts["dropped"], counts["excluded"]) == (1, 2, 2)

    run(place)
    assert all_bytes(place) == old_bytes | {
        place / "corrections.csv": (place / "corrections.csv").read_bytes(),
        place / "cache/images.sqlite": (place / "cache/images.sqlite").read_bytes(),
    }


def test_a_renamed_image_keeps_its_decision_and_so_does_one_that_was_moved(place):
    index = read_index(place / "out/index.csv").set_index("path")
    renamed, moved = "cat/00.png", "cat/03.png"
    rows = [decide(index, path, "dog") for path in (renamed, moved)]
    (place / "data/cat/00.png").rename(place / "data/cat/new.png")
    (place / "data/cat/03.png").rename(place / "data/dog/03.png")
    index = run(place, rows)
    assert index["class"]["cat/new.png"] == index["class"]["dog/03.png"] == "dog"
    assert index["was"]["cat/new.png"] == "cat" and index["was"]["dog/03.png"] == ""


def test_identical_files_in_two_classes_get_one_label_or_go(place):
    for name, to in (("cat/00.png", "dog/copy.png"), ("cat/03.png", "owl/copy.png")):
        (place / "data" / to).write_bytes((place / "data" / name).read_bytes())
    index = run(place)
    assert (index["exclusion_reason"] == "label conflict").sum() >= 2
    rows = [decide(index, "cat/00.png", "dog"), decide(index, "owl/copy.png", "")]
    index = run(place, rows)
    both = index.loc[["cat/00.png", "dog/copy.png"]]
    assert (both["class"] == "dog").all()
    assert sorted(both["exclusion_reason"]) == ["", "duplicate"]
    assert index["exclusion_reason"][["cat/03.png", "owl/copy.png"]].str.startswith("dropped").all()


def test_a_class_whose_test_images_are_all_dropped_lends_another(place):
    before = read_index(place / "out/index.csv").set_index("path")
    cats = before.index[(before["class"] == "cat") & (before["split"] == "test")]
    index = run(place, [decide(before, path, "") for path in cats])
    now = index[(index["class"] == "cat") & (index["split"] == "test")]
    assert len(cats) and len(now) == 1 and not set(now.index) & set(cats)


def test_without_its_dropped_image_a_dataset_is_gray(place):
    for number, path in enumerate(sorted((place / "data").rglob("*.png"))):
        Image.open(path).convert("L" if number else "RGB").save(path)
    index = run(place)
    assert json.loads((place / "metrics/prepare.json").read_text())["channels"] == 3
    run(place, [decide(index, "cat/00.png", "")])
    assert json.loads((place / "metrics/prepare.json").read_text())["channels"] == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda row: [(*row[:1], "cta", *row[2:])], "label 'cta' is no class .*cat, dog, owl"),
        (lambda row: [(*row[:2], "owl", *row[3:])], "was 'owl', but is 'cat' in the dataset now"),
        (lambda row: [row, (row[0], "owl", *row[2:])], r"differ: dog \(line 2\), owl \(line 3\)"),
        (lambda row: [row, (row[0], "", *row[2:])], r"differ: dog \(line 2\), drop it \(line 3\)"),
        (lambda row: [("12ab", *row[1:])], "line 2: '12ab' is no digest"),
    ],
)
def test_wrong_lines_are_named_and_nothing_is_written(place, change, words):
    index, before = read_index(place / "out/index.csv").set_index("path"), all_bytes(place / "out")
    rows = change(decide(index, "cat/00.png", "dog"))
    with pytest.raises(UserError, match=rf"corrections.csv: .*{words}"):
        run(place, rows)
    assert all_bytes(place / "out") == before


def test_every_wrong_line_is_named(place):
    index = read_index(place / "out/index.csv").set_index("path")
    rows = [(*decide(index, f"cat/{n:02d}.png", "")[:1], "x", "cat", "") for n in range(0, 9, 3)]
    with pytest.raises(UserError) as raised:
        run(place, rows)
    assert str(raised.value).count("label 'x' is no class") == len(rows) == 3


def test_the_decisions_of_two_people_merge(place):
    table = read_index(place / "out/index.csv")
    index, ours = table.set_index("path"), place / "ours.csv"
    rows = [decide(index, path, "dog") for path in ("owl/05.png", "cat/00.png", "cat/03.png")]
    write(ours, [])
    for part, added in ((rows[:2], 2), (rows[1:], 1)):
        new = corrections.read(write(place / "new.csv", part))
        assert len(corrections.merge(new, "new.csv", ours, table)) == added
    merged = pd.read_csv(ours, dtype=str)
    assert merged["path"].tolist() == ["cat/00.png", "cat/03.png", "owl/05.png"]
    before = ours.read_bytes()
    for bad, words in (
        [
            (decide(index, "cat/00.png", "owl")),
            "line 2: cat/00.png: owl, but .*ours.csv, line 2, says dog",
        ],
        [
            ("f" * 32, "cat", "dog", "x.png"),
            r"no image in .*index.csv has the content of x.png \(line 2\)",
        ],
        [(*decide(index, "dog/01.png", "bee"),), "label 'bee' is no class"],
    ):
        new = corrections.read(write(place / "new.csv", [bad]))
        with pytest.raises(UserError, match=words):
            corrections.merge(new, place / "new.csv", ours, table)
    assert ours.read_bytes() == before


def test_the_file_in_git_is_empty_and_prepare_depends_on_it():
    from conftest import ROOT

    assert (ROOT / FILE).read_text() == ",".join(COLUMNS) + "\n"
    assert f"- {FILE}" in (ROOT / "dvc.yaml").read_text()
