"""The commands predict and backbone."""

import json
import sys
import warnings

import keras
import numpy as np
import pandas as pd
import pytest
from factories import make_model
from PIL import Image

from stages import backbone as backbones
from stages import predict as command
from stages.backbone import backbone
from stages.predict import predict
from stages.utils.cli import UserError

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


def said(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["predict", *words])
    status = command.main()
    return capsys.readouterr().out, status


def test_predictions_are_a_table_of_probabilities(folder):
    table = predict("new")
    assert list(table["path"]) == ["new/a.png", "new/deeper/b, c.PNG", "new/ü.png"]
    shares = table[[f"p:{name}" for name in CLASSES]].to_numpy()
    assert np.allclose(shares.sum(1), 1, atol=1e-5)
    assert list(table["predicted"]) == [CLASSES[n] for n in shares.argmax(1)]
    assert np.allclose(table["confidence"], shares.max(1))
    assert (table["error"] == "").all()


def test_one_bad_image_is_said_and_the_others_are_answered(folder, monkeypatch, capsys):
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
        out, status = said(monkeypatch, capsys, "new", "--format", form)
        assert status == 1 and "not an image" in out and "ü.png" in out


def test_the_table_shows_the_best_classes_first(folder, monkeypatch, capsys):
    out, status = said(monkeypatch, capsys, "new/a.png", "--top", "2")
    best = predict("new/a.png").filter(regex="^p:").iloc[0].sort_values(ascending=False)
    assert status == 0
    assert [out.index(name.removeprefix("p:")) for name in best.index[:2]] == sorted(
        out.index(name.removeprefix("p:")) for name in best.index[:2]
    )
    assert f"{best.iloc[0]:.1%}" in out and out.count("%") == 2


def test_a_line_of_the_table_is_an_image(capsys):
    table = pd.DataFrame({"path": ["a.png"], "error": [""], "p:two\nlines": [0.9], "p:b": [0.1]})
    command._print_table(table, None)
    assert capsys.readouterr().out == "a.png   two lines  90.0%   b          10.0%\n"


def test_csv_and_json_are_for_programs(folder, monkeypatch, capsys):
    expected = predict("new")
    (folder / "out.csv").write_text(said(monkeypatch, capsys, "new", "--format", "csv")[0])
    read = pd.read_csv("out.csv", keep_default_na=False)
    pd.testing.assert_frame_equal(read, expected, atol=1e-6, check_dtype=False)
    entries = json.loads(said(monkeypatch, capsys, "new", "--format", "json")[0])
    for entry, (_, row) in zip(entries, expected.iterrows(), strict=True):
        assert entry["predicted"] == row["predicted"]
        assert entry["probabilities"].keys() == set(CLASSES)
        assert entry["confidence"] == pytest.approx(row["confidence"], abs=1e-6)
    (folder / "top.csv").write_text(
        said(monkeypatch, capsys, "new", "--format", "csv", "--top", "2")[0]
    )
    top = pd.read_csv("top.csv", keep_default_na=False, dtype={"class_1": str})
    assert list(top["class_1"]) == list(expected["predicted"])
    assert (top["probability_1"] >= top["probability_2"]).all()


@pytest.mark.parametrize(
    ("paths", "message"),
    [(["nowhere", "new", "gone.png"], "(?s)nowhere: no such.*gone.png: no such"),
     (["empty"], "empty: no images")],
)  # fmt: skip
def test_paths_that_hold_nothing_are_all_named(folder, paths, message):
    (folder / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        predict(paths)


def test_the_callers_warnings_stay_as_they_are(folder):
    before = list(warnings.filters)
    predict("new")
    assert warnings.filters == before


def test_a_model_that_is_not_there_is_said_in_one_line(folder):
    with pytest.raises(UserError, match="other.keras: no such model file; `dvc repro`"):
        predict("new", "other.keras")


def test_help_and_a_mistyped_path_do_not_wait_for_tensorflow(folder):
    import subprocess

    code = (
        "import sys\nfrom stages.predict import predict\n"
        "try: predict('nowhere')\nexcept Exception: print('tensorflow' in sys.modules)"
    )
    root = str(backbones.__file__).rsplit("/stages/", 1)[0]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False"]


# Backbones


@pytest.mark.parametrize("name", ["MobileNetV2", "ResNet50", "MobileNetV3Small"])
def test_a_backbone_takes_raw_pixels(tmp_path, name):
    path = backbone(name, tmp_path, weights=None)
    model = keras.models.load_model(path)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3)).astype(np.float32)
    module = sys.modules[getattr(keras.applications, name).__module__]
    if name == "MobileNetV3Small":  # it scales by itself
        assert "scaling" not in [layer.name for layer in model.layers]
        assert np.array_equal(module.preprocess_input(pixels.copy()), pixels)
    else:
        scaling = keras.Model(model.input, model.get_layer("scaling").output)
        expected = np.asarray(module.preprocess_input(pixels.copy()))
        assert np.allclose(scaling(pixels), expected, rtol=1e-5, atol=1e-4)
    assert model(pixels).shape[:3] == (2, 2, 2)


def test_an_unknown_backbone_names_near_ones(tmp_path):
    with pytest.raises(UserError, match="MobilNetV2: no network .*MobileNetV2"):
        backbone("MobilNetV2", tmp_path)


def test_without_a_network_it_says_so_in_one_line(tmp_path, monkeypatch):
    def refused(*_, **__):
        raise OSError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", refused)
    with pytest.raises(UserError, match="MobileNetV2: its ImageNet weights can't be had") as caught:
        backbone("MobileNetV2", tmp_path)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())
