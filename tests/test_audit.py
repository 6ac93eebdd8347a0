"""The audit: what it finds among all images, and how decisions reach the next `dvc repro`."""

import contextlib
import json
import shutil
from functools import partial

import numpy as np
import pandas as pd
import pytest
from conftest import draw, draw_dataset, options
from test_audit_page import Tab
from test_audit_page import browser as browser  # a fixture
from test_plots_page import needs_browser

from stages import audit as command
from stages.audit import audit
from stages.auditing import features
from stages.data.arrays import read_index
from stages.data.corrections import COLUMNS
from stages.data.parameters import Prepare
from stages.model.parameters import Train
from stages.prepare import prepare
from stages.report import label_errors
from stages.run.cli import UserError
from stages.run.params import read_section

PREPARE = Prepare(image_size=[16, 16])
TRAIN = Train(
    epochs=3, batch_size=16, learning_rate=0.02, filters=[8, 8], convs_per_block=1, dense_units=8
)
WRONG = {"round": ["wrong 1.png", "wrong 2.png"], "square": ["wrong 3.png"]}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A project with planted errors: three wrong labels, copies, a blank image, a nearly black one.

    Its network is said to be as accurate as pixels are, so that these suffice.
    """
    data = draw_dataset(tmp_path / "data/shapes", {"round": 40, "square": 40})
    for kind, (name, files) in enumerate(WRONG.items()):
        for number, file in enumerate(files):
            draw(200 + number, 1 - kind).save(data / name / file)
    draw(300, 0).save(data / "round/first.png")
    shutil.copy(data / "round/first.png", data / "square/same.png")
    draw(301, 0).save(data / "round/one.png")
    draw(301, 0).resize((64, 60)).save(data / "round/one larger.jpg", quality=90)
    draw(302, 1).point(lambda value: 128).save(data / "square/blank.png")
    draw(303, 1).point(lambda value: value // 9).save(data / "square/dark.png")
    (tmp_path / "corrections.csv").write_text(",".join(COLUMNS) + "\n")
    monkeypatch.chdir(tmp_path)
    prepare(PREPARE, "data/shapes", "data/prepared", "metrics", "cache")
    (tmp_path / "metrics/train.json").write_text('{"val_accuracy": 0.9}')
    return tmp_path


def run(**changes):
    return audit("data/shapes", PREPARE, TRAIN, corrections_file="corrections.csv", **changes)


def test_what_is_wrong_is_found_among_all_images_and_not_asked_again(place, capsys):
    table = run()
    assert {*table["label"][table["kind"] == "shortcut"]} == {"round", "square"}  # by their color
    assert {*table["other"][table["kind"] == "shortcut"]} == {"color and brightness"}
    findings = table[table["path"] != ""]
    of = {kind: {*own["path"]} for kind, own in findings.groupby("kind")}
    planted = {f"{name}/{file}" for name, files in WRONG.items() for file in files}
    assert planted <= of["label error"] and len(of["label error"]) <= 5
    assert of["two labels"] == {"round/first.png", "square/same.png"}
    assert len(of["near duplicate"] & {"round/one.png", "round/one larger.jpg"}) == 1
    assert of["blank"] == {"square/blank.png"} and of["dark"] == {"square/dark.png"}
    pairs = findings.set_index("path")
    assert pairs["other"]["round/first.png"] == "square/same.png"
    assert pairs["suggestion"]["square/same.png"] == "round"
    index = read_index("data/prepared/index.csv").set_index("path")
    assert (findings["digest"] == index["digest"][findings["path"]].to_numpy()).all()
    table = pd.read_csv("metrics/audit.csv", keep_default_na=False)
    assert table["path"].tolist() == [*findings["path"], "", ""]
    assert (place / "metrics/audit.html").stat().st_size > 10_000
    told = capsys.readouterr().out
    assert "square/blank.png" in told and "--apply ~/Downloads/corrections.csv" in told

    decided = findings[findings["kind"].isin(["label error", "two labels"])]
    decided = decided.assign(was=decided["label"], comment="").drop_duplicates("digest")
    decided[[*COLUMNS]].to_csv("corrections.csv", index=False)
    again = run()
    assert not {*again["digest"]} & {*decided["digest"]}
    assert {*again["kind"]} >= {"blank", "dark", "near duplicate"}
    assert f"{len(decided)} images before" in capsys.readouterr().out
    before = (place / "metrics/audit.html").read_bytes()
    run()
    assert (place / "metrics/audit.html").read_bytes() == before


@pytest.mark.parametrize(
    "name", ["data/prepared/index.csv", "data/prepared/test", "metrics/train.json"]
)
def test_without_what_the_stages_write_it_says_what_to_run(place, name):
    (place / name).rename(place / "elsewhere")
    with pytest.raises(UserError, match=f"{name}: not there; run `dvc repro` first"):
        run()


def test_images_that_changed_since_they_were_prepared_are_named(place):
    (place / "data/shapes/round/first.png").unlink()
    with pytest.raises(UserError, match=r"1 file changed or gone .*round/first.png"):
        run()


def test_where_pixels_say_too_little_networks_judge_what_they_have_not_seen(
    place, monkeypatch, capsys
):
    (place / "metrics/train.json").write_text('{"val_accuracy": 2.0}')
    (place / "params.yaml").write_text(json.dumps({"train": TRAIN.model_dump()}))
    (place / "data/backbones").mkdir()
    seen = []

    def train_here(stage, folder, on_epoch):
        from stages.train import train

        parts = {name: read_part(folder, name) for name in ("train", "val", "test")}
        seen.append(parts)
        with contextlib.chdir(folder):
            train(read_section(Train, "train"))

    def read_part(folder, name):
        from stages.data.arrays import read_split

        split = read_split(folder / "data/prepared" / name)
        return {image.tobytes() for batch in split.batches() for image in batch}

    monkeypatch.setattr(features, "run_stage", train_here)
    for module in (features, label_errors):
        monkeypatch.setattr(module, "FOLDS", 3)
    findings = run()
    assert "a network is trained 3 times, for 3 epochs each" in capsys.readouterr().out
    assert len(seen) == 3
    held_out = [parts["test"] for parts in seen]
    images = read_index("data/prepared/index.csv")["array_index"].notna().sum()
    assert sum(map(len, held_out)) == len(set.union(*held_out)) == images
    assert not any(parts["test"] & (parts["train"] | parts["val"]) for parts in seen)
    again = run()  # finished trainings are kept
    assert len(seen) == 3 and again.equals(findings)


@needs_browser
def test_decisions_reach_the_next_run_and_can_be_taken_back(
    project,
    browser,
    monkeypatch,
    tmp_path,
    capsys,
):
    # So that there is enough to decide.
    low = partial(label_errors.find_label_errors, odds=1e-4)
    monkeypatch.setattr(command, "find_label_errors", low)
    monkeypatch.setattr(label_errors, "is_near_chance", lambda *_: False)
    monkeypatch.chdir(project.root)
    before = {p: p.read_bytes() for p in sorted((project / "data/prepared").rglob("*.*"))}
    (project / "metrics/train.json").write_text('{"val_accuracy": 0.1}')
    with monkeypatch.context() as patch:
        patch.setattr(command, "changed_since_run", lambda *_: [])
        command.main(options("audit"))
    tab = Tab(browser, project / "metrics/audit.html")
    tab.press("s", "Enter", "x", "s", "Enter")
    tab.page.reload()
    tab.wait()
    tab.press("x", "s", "x", "Enter", "s")
    saved = tab.save(tmp_path / "corrections.csv")
    assert len(saved) == 10
    command.main(options("audit", "--apply", str(tmp_path / "corrections.csv")))
    told = capsys.readouterr().out
    assert "10 decisions added" in told
    project.git("checkout", "metrics/train.json")

    project.dvc("repro", "prepare")
    index = read_index(project / "data/prepared/index.csv").set_index("path")
    for _, row in saved.iterrows():
        now = index.loc[row["path"]]
        if row["label"]:
            assert now["class"] == row["label"]
            assert now["was"] == ("" if row["label"] == row["was"] else row["was"])
        else:
            assert now["exclusion_reason"].startswith("dropped from")
    project.git("checkout", "data/corrections.csv")
    project.dvc("repro", "prepare")
    assert {p: p.read_bytes() for p in sorted((project / "data/prepared").rglob("*.*"))} == before
    assert not np.isin(["audit.csv", "audit.html"], project.git("status", "-s").split()).any()
