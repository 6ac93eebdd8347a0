"""The command predict."""

import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, options
from factories import make_model, make_prepared
from PIL import Image

from stages import predict as command
from stages.data import reading
from stages.predict import predict
from stages.run.cli import UserError

CLASSES = ["007", "café", "NA", "owl"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_model(tmp_path, CLASSES)
    (tmp_path / "new" / "deeper").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ("a.png", "deeper/b, c.PNG", "ü.png"):
        pixels = rng.integers(0, 256, (11, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "new" / name, "PNG")
    (tmp_path / "new" / "notes.txt").write_text("no image")
    (tmp_path / "new" / ".hidden.png").write_text("no image")
    for name in (".thumbs", "__MACOSX"):
        (tmp_path / "new" / name).mkdir()
        (tmp_path / "new" / name / "a.png").write_text("no image")
    return tmp_path


def run(capsys, *words):
    """Run the command in this process; return what it prints and its exit status."""
    status = command.main(options("predict", *words))
    return capsys.readouterr().out, status


def test_predictions_are_a_table_of_probabilities(folder):
    table = predict("new")
    assert list(table["path"]) == ["new/a.png", "new/deeper/b, c.PNG", "new/ü.png"]
    shares = table[[f"p:{name}" for name in CLASSES]].to_numpy()
    assert np.allclose(shares.sum(1), 1, atol=1e-5)
    assert list(table["predicted"]) == [CLASSES[n] for n in shares.argmax(1)]
    assert np.allclose(table["confidence"], shares.max(1))
    assert (table["error"] == "").all()


def test_an_unreadable_image_is_reported_and_the_others_are_predicted(folder, monkeypatch, capsys):
    (folder / "new" / "empty.jpg").touch()
    (folder / "new" / "text.jpg").write_text("no image")
    table = predict("new").set_index("path")
    assert {path for path, error in table["error"].items() if error} == {
        "new/empty.jpg",
        "new/text.jpg",
    }
    assert table.loc["new/text.jpg", "predicted"] == ""
    assert table["confidence"].notna().sum() == 3
    for form in ("table", "csv", "json"):
        assert command.main(options("predict", "new", "--format", form)) == 1
        out, errors = capsys.readouterr()
        assert "not an image" in out and "ü.png" in out
        assert "2 of 5 files can't be read; the output says why\n" in errors


def test_a_home_folder_is_found(folder, monkeypatch, capsys):
    """A shell leaves it as it is in `--model=~/model.keras`, and between quotes."""
    monkeypatch.setenv("HOME", str(folder))
    out, status = run(capsys, "~/new/a.png", "--model=~/data/model.keras")
    assert status == 0 and f"{folder}/new/a.png" in out


def test_images_that_look_black_to_the_model_are_warned_of(folder, capsys):
    pixels = np.random.default_rng(0).integers(0, 4096, (9, 9), np.uint16)
    Image.fromarray(pixels).save("12 bits.png")
    assert list(predict(["new", "12 bits.png"])["error"]) == [""] * 4
    warning = capsys.readouterr().err
    assert (
        "WARNING: almost black" in warning
        and "1 image of more" in warning
        and "12 bits.png" in warning
    )
    Image.fromarray(pixels * 16).save("16 bits.png")
    predict(["new", "16 bits.png"])
    assert "WARNING" not in capsys.readouterr().err


def test_what_is_changed_on_the_way_to_the_network_is_told(folder, capsys):
    first, second = (Image.open(f"new/{name}.png") for name in "aü")
    first.save("new/pages.tif", save_all=True, append_images=[second, first])
    second.putalpha(first)
    second.save("new/cut out.png")
    predict("new")
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("passed over: 2 images in hidden folders or a system's")
    assert said[2:] == [
        "transparent: 1 image with transparent parts, which become white (new/cut out.png)",
        "only the first: 1 image with several pages, frames or groups of bands, of which only the"
        " first is read (new/pages.tif)",
    ]


def test_the_table_shows_the_best_classes_first(folder, monkeypatch, capsys):
    out, status = run(capsys, "new/a.png", "--top", "2")
    best = predict("new/a.png").filter(regex="^p:").iloc[0].sort_values(ascending=False)
    assert status == 0
    assert [out.index(name.removeprefix("p:")) for name in best.index[:2]] == sorted(
        out.index(name.removeprefix("p:")) for name in best.index[:2]
    )
    assert f"{best.iloc[0]:.1%}" in out and out.count("%") == 2


def test_each_image_is_one_line_of_the_table(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_model(tmp_path, ["b", "two\nlines"])
    Image.new("L", (9, 9)).save("a.png")
    out, _ = run(capsys, "a.png")
    assert out.count("\n") == 1 and "two lines" in out


def test_csv_lists_errors_last_even_if_the_first_image_has_one(folder, monkeypatch, capsys):
    (folder / "new" / "a.jpg").touch()
    out, status = run(capsys, "new", "--format", "csv", "--top", "1")
    assert status == 1 and out.startswith("path,class_1,probability_1,error\n")


def test_csv_and_json_are_for_programs(folder, monkeypatch, capsys):
    expected = predict("new")
    (folder / "out.csv").write_text(run(capsys, "new", "--format", "csv")[0])
    read = pd.read_csv("out.csv", keep_default_na=False)
    pd.testing.assert_frame_equal(read, expected, atol=1e-6, check_dtype=False)
    entries = json.loads(run(capsys, "new", "--format", "json")[0])
    for entry, (_, row) in zip(entries, expected.iterrows(), strict=True):
        assert entry["predicted"] == row["predicted"]
        assert entry["probabilities"].keys() == set(CLASSES)
        assert entry["confidence"] == pytest.approx(row["confidence"], abs=1e-6)
    (folder / "top.csv").write_text(run(capsys, "new", "--format", "csv", "--top", "2")[0])
    top = pd.read_csv("top.csv", keep_default_na=False, dtype={"class_1": str})
    assert list(top["class_1"]) == list(expected["predicted"])
    assert (top["probability_1"] >= top["probability_2"]).all()


@pytest.mark.parametrize(
    ("paths", "message"),
    [(["nowhere", "new", "gone.png"], "(?s)nowhere: no such.*gone.png: no such"),
     (["nwe"], r"^nwe: no such file or folder; did you mean new\?$"),
     ([f"gone/{n}" for n in range(2000)], "(?s)gone/4: no such.*\n.*1,995 more that are not"),
     (["empty"], "empty: no images")],
)  # fmt: skip
def test_all_wrong_paths_are_named(folder, paths, message):
    (folder / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        predict(paths)


def test_the_callers_warnings_stay_as_they_are(folder):
    before = list(warnings.filters)
    predict("new")
    assert warnings.filters == before


def test_a_missing_model_is_one_clear_line(folder):
    with pytest.raises(UserError, match="other.keras: no such model file; `dvc repro`"):
        predict("new", "other.keras")


def test_help_and_a_mistyped_path_do_not_wait_for_tensorflow(folder):
    code = (
        "import sys\nfrom stages.predict import predict\n"
        "try: predict('nowhere')\nexcept Exception: print('tensorflow' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False"]


@pytest.fixture
def exported(folder):
    """The model beside its export, as stages.export writes it."""
    pytest.importorskip("onnxruntime")
    from stages.export import export

    make_prepared(folder, CLASSES, {"val": 20})
    export()
    return folder


def test_an_exported_model_answers_the_same_without_tensorflow(exported):
    words = ["-m", "stages", "predict", "new", "--format", "json"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    outputs = []
    for model in ("data/model.keras", "data/export/model.onnx"):
        done = subprocess.run(
            [sys.executable, "-X", "importtime", *words, "--model", model],
            cwd=exported, env=environment, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert "onnxruntime" in done.stderr
        assert not re.search(r"\btensorflow$", done.stderr, re.MULTILINE)
        outputs.append(json.loads(done.stdout))
    assert outputs[0] == outputs[1]
    expected = predict("new", model_without_export(exported))
    for entry, (_, row) in zip(outputs[0], expected.iterrows(), strict=True):
        assert entry["predicted"] == row["predicted"]
        assert entry["confidence"] == pytest.approx(row["confidence"], abs=1e-5)


def model_without_export(folder):
    (folder / "alone").mkdir()
    return shutil.copy(folder / "data/model.keras", folder / "alone/model.keras")


def test_an_export_of_another_model_is_not_used_and_that_is_told(exported, capsys):
    before = predict("new")
    assert "not used" not in capsys.readouterr().err
    make_model(exported, CLASSES, temperature=3)
    after = predict("new")
    assert (before["confidence"] > after["confidence"] + 0.01).all()
    line = capsys.readouterr().err.splitlines()[-1]
    assert "model.onnx: not used, since it was made from another model" in line
    assert "`python -m stages export`" in line


def test_predictions_of_low_confidence_are_unsure(folder, monkeypatch, capsys):
    (folder / "new/text.jpg").write_text("no image")
    table = predict("new")
    confidences = table["confidence"].dropna()
    threshold = confidences.median() + 0.001
    out, _ = run(capsys, "new", "--threshold", str(threshold))
    assert out.count("unsure") == (confidences < threshold).sum() == 2
    out, _ = run(capsys, "new", "--format", "csv", "--threshold", str(threshold), "--top", "1")
    rows = list(csv.DictReader(out.splitlines()))
    assert [row["unsure"] for row in rows] == [str(c < threshold) for c in table["confidence"]]
    out, _ = run(capsys, "new", "--format", "json", "--threshold", str(threshold))
    assert [entry.get("unsure") for entry in json.loads(out)].count(True) == 2
    with pytest.raises(SystemExit):
        run(capsys, "new", "--threshold", "2")


def test_what_to_label_next_comes_first(folder, monkeypatch, capsys):
    (folder / "new/aa.jpg").write_text("no image")
    out, _ = run(capsys, "new", "--format", "json", "--sort", "uncertain")
    entries = json.loads(out)
    confidences = [entry["confidence"] for entry in entries[:-1]]
    assert confidences == sorted(confidences) and len(confidences) == 3
    assert entries[-1]["error"]


def test_what_is_not_looked_into_is_reported(folder, monkeypatch, capsys):
    (folder / "other").mkdir()
    (folder / "new/link").symlink_to(folder / "other")
    (folder / "new/broken.png").symlink_to("nowhere")
    table = predict("new").set_index("path")
    assert table.loc["new/link", "error"] == "a link to a folder, which is not followed"
    assert "broken link" in table.loc["new/broken.png", "error"]
    assert run(capsys, "new")[1] == 1


def test_what_is_passed_over_is_told(folder, capsys):
    for name in ("x.dcm", "y.dcm", "deeper/@eaDir/a.jpg/THUMB.jpg", "#recycle/a.png"):
        (folder / "new" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "new" / name).touch()
    out, status = run(capsys, "new", "--format", "csv")
    assert status == 0 and len(out.splitlines()) == 4
    predict("new")
    errors = capsys.readouterr().err
    assert "passed over: 4 images in hidden folders or a system's" in errors
    assert "new/#recycle" in errors and "new/deeper/@eaDir" in errors
    assert "WARNING: files: passed over for their extension: 3 of 6 in new (2 .dcm, 1 .t" in errors
    (folder / "scans").mkdir()
    for number in range(2):
        (folder / "scans" / f"{number}.dcm").touch()
    with pytest.raises(UserError, match=r"scans: no images in this folder\n.*\n.*2 of 2 in scans"):
        predict("scans")


def test_a_folder_without_permission_is_reported(folder, monkeypatch):
    (folder / "new/closed").mkdir()
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    errors = predict("new").set_index("path")["error"]
    assert errors["new/closed"] == "no permission to look into this folder"


@pytest.mark.parametrize(
    ("path", "message"),
    [("", "an empty path"), ("~nobody-of-that-name/a.png", "no such home folder")],
)
def test_paths_that_lead_nowhere(folder, path, message):
    with pytest.raises(UserError, match=message):
        predict(path)
    with pytest.raises(UserError, match=message):
        predict("new", path)


def test_names_that_are_not_utf8_or_hold_control_characters_break_no_output(folder, capsysbinary):
    """Programs get the bytes of a name; the table shows it on one line, with escapes."""
    names = [os.fsencode(folder / "new") + b"/\xff.png", f"{folder}/new/two\nlines\x1b.png"]
    for name in names:
        shutil.copy(folder / "new/a.png", name)
    outputs = {}
    for form in ("csv", "json", "table"):
        command.main(options("predict", *map(os.fsdecode, names), "--format", form))
        outputs[form] = capsysbinary.readouterr().out
    assert names[0] in outputs["csv"] and names[0] in outputs["json"]
    read = json.loads(outputs["json"].decode(errors="surrogateescape"))
    assert [os.fsencode(entry["path"]) for entry in read] == [*map(os.fsencode, names)]
    first, second = outputs["table"].decode().splitlines()
    assert r"\udcff.png   " in first and r"two\nlines\x1b.png   " in second


@pytest.mark.parametrize("form", ["csv", "json"])
def test_what_programs_read_is_utf8_whatever_the_locale_says(folder, monkeypatch, form):
    (folder / "new/a.png").rename(folder / "new/猫.png")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "cp1252"))
    command.main(options("predict", "new/猫.png", "--format", form))
    assert "new/猫.png" in sys.stdout.buffer.getvalue().decode()


def test_explain_writes_a_heatmap_of_each_image_that_can_be_read(folder, monkeypatch, capsys):
    """Names that occur twice, if only but for upper and lower case, get a number."""
    (folder / "new/text.jpg").write_text("no image")
    shutil.copy(folder / "new/ü.png", folder / "new/deeper/A.png")
    assert command.main(options("predict", "new", "--explain", "why")) == 1
    out, errors = capsys.readouterr()
    assert out.count("%") == 12 and "4 heatmaps in why\n" in errors
    names = {"a.png.png", "A.png 2.png", "b, c.PNG.png", "ü.png.png"}
    assert {path.name for path in (folder / "why").iterdir()} == names
    first = {name: (folder / "why" / name).read_bytes() for name in names}
    assert len(set(first.values())) == 4
    monkeypatch.setattr(reading, "_BATCH_SIZE", 3)  # does not change anything
    command.main(options("predict", "new", "--explain", "why"))
    assert {name: (folder / "why" / name).read_bytes() for name in names} == first
    assert capsys.readouterr().out == out


def test_long_names_have_heatmaps(folder, capsys):
    for name in ("a" * 251, "a" * 250 + "b", "猫" * 83, "é" * 100 + "猫" * 17):
        shutil.copy(folder / "new/a.png", folder / "new" / f"{name}.png")
    out, status = run(capsys, "new", "--explain", "why")
    assert status == 0 and out.count("a" * 200) == 2
    written = {path.name for path in (folder / "why").iterdir()}
    long = {"a" * 200 + ".png", "a" * 200 + " 2.png", "猫" * 66 + ".png", "é" * 100 + ".png"}
    assert written == {"a.png.png", "b, c.PNG.png", "ü.png.png"} | long


def test_predictions_are_printed_even_if_a_picture_fails(folder, monkeypatch, capsys):
    draw = command.explanation_figure

    def fail(image, heatmap, heading, path):
        if path.name == "a.png.png":
            raise OSError(5, "Input/output error")
        draw(image, heatmap, heading, path)

    monkeypatch.setattr(command, "explanation_figure", fail)
    with pytest.raises(UserError, match=r"1 heatmap failed: new/a.png \(Input/output error\)"):
        run(capsys, "new", "--explain", "why")
    out, errors = capsys.readouterr()
    assert out.count("%") == 9 and "2 heatmaps in why" in errors
    assert len(list((folder / "why").iterdir())) == 2


def test_an_image_that_is_gone_when_it_is_explained_shifts_no_other(folder, monkeypatch, capsys):
    run(capsys, "new", "--explain", "why")
    find = command._predict

    def remove(*words):
        table = find(*words)
        (folder / "new/a.png").unlink()
        return table

    monkeypatch.setattr(command, "_predict", remove)
    with pytest.raises(UserError, match=r"1 heatmap failed: new/a.png \(not a file"):
        run(capsys, "new", "--explain", "other")
    for path in (folder / "other").iterdir():
        assert path.read_bytes() == (folder / "why" / path.name).read_bytes()
    assert len(list((folder / "other").iterdir())) == 2


@pytest.mark.parametrize(
    ("explain", "message"),
    [("notes.txt", "notes.txt: can't write heatmaps there: File exists; --explain needs"),
     ("notes.txt/why", "can't write heatmaps there: Not a directory"),
     ("./new", "new: holds images to predict; choose another folder"),
     ("new/why", "why: holds images to predict; choose another folder")],
)  # fmt: skip
def test_a_folder_that_heatmaps_can_not_go_to(folder, monkeypatch, capsys, explain, message):
    (folder / "notes.txt").touch()
    with pytest.raises(UserError, match=message):
        run(capsys, "new", "--explain", explain)
    assert capsys.readouterr().out == ""
