"""The reader of params.yaml, and each of its keys.

`ANOTHER` gives each key another valid value. DVC must then report exactly the key's stage as
changed, and what that stage writes must change, or what it makes of the key.
"""

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import dvc.api
import keras
import numpy as np
import pytest
import yaml
from conftest import ROOT, SMALL, Project, draw, draw_dataset
from dvc.repo import Repo
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from stages.data.parameters import Prepare
from stages.evaluate import evaluate
from stages.model import device
from stages.model.checkpoint import Checkpoint
from stages.model.features import Features
from stages.model.fit import fit
from stages.model.network import build
from stages.model.parameters import Train
from stages.model.phases import Phase, make_phases
from stages.model.replicas import Replicas
from stages.prepare import prepare
from stages.report.parameters import Evaluate
from stages.run.cli import UserError
from stages.run.params import Parameters, read_dataset, read_section, watch_inputs
from stages.train import train

# The reader


class Shape(Parameters):
    translation: Annotated[float, Field(ge=0, le=1)] = 0.0


class Example(Parameters):
    epochs: Annotated[int, Field(gt=0)] = 3
    rate: float = 0.5
    size: list[Annotated[int, Field(gt=0)]] = Field([8, 8], min_length=2)
    mode: Literal["auto", "rgb"] = "auto"
    pattern: str | None = None
    shape: Shape = Shape()


def read(folder: Path, text: str) -> Example:
    path = folder / "params.yaml"
    path.write_text(text, encoding="utf-8")
    return read_section(Example, "example", path)


def edit(path: str, text: str) -> Callable[[], object]:
    return lambda: Path(path).write_text(text)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (edit("params.yaml", "train: {epochs: 9}\nevaluate: {}\n"), "train in params.yaml"),
        (edit("params.yaml", "evaluate: {}\n"), "train in params.yaml"),
        (edit("stages/train.py", "other"), "stages/train.py"),
        (edit("stages/model/a/layer.py", "other"), "stages/model/a/layer.py"),
        (edit("stages/model/new.py", "x"), "stages/model/new.py"),
        (lambda: Path("stages/model/a/layer.py").unlink(), "stages/model/a/layer.py"),
        (edit("dvc.yaml", "not: [yaml"), "dvc.yaml, line 1: not valid YAML"),
        (edit("params.yaml", "train: {epochs: 2} # why\nevaluate: {top_k: 3}\n"), None),
        (edit("stages/train.py", "x"), None),  # the same again
        (edit("stages/evaluate.py", "other"), None),
        (lambda: Path("stages/model/.#net.py").symlink_to("me@host.1:2"), None),  # a lock of Emacs
        (edit("stages/model/net.py~", "x"), None),
    ],
)  # fmt: skip
def test_an_edit_while_a_stage_runs_is_refused_since_dvc_would_record_it(
    tmp_path, monkeypatch, change, named
):
    monkeypatch.chdir(tmp_path)
    stages = {"train": {"deps": ["a", "stages/train.py", "stages/model"], "params": ["train"]}}
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
    edit("params.yaml", "train: {epochs: 2}\nevaluate: {}\n")()
    (tmp_path / "stages/model/a").mkdir(parents=True)
    for name in ("train", "evaluate", "model/a/layer"):
        edit(f"stages/{name}.py", "x")()
    by_hand = watch_inputs("train")
    monkeypatch.setenv("DVC_STAGE", "train")
    check = watch_inputs("train")
    check()
    change()
    if named:
        with pytest.raises(UserError, match=re.escape(named)):
            check()
    else:
        check()
    monkeypatch.delenv("DVC_STAGE")
    by_hand()


@pytest.mark.parametrize(
    ("path", "is_ignored"),
    [
        ("stages/model/.#network.py", True),  # of Emacs: a link to nothing, over which DVC fails
        ("stages/model/._network.py", True),  # of macOS on other drives
        ("stages/model/.ipynb_checkpoints/network-checkpoint.py", True),  # of Jupyter
        ("stages/model/network.py~", True),
        ("stages/model/network.py", False),
        ("stages/report/page.html", False),
        ("data/flowers/rose/._1.jpg", True),
        ("data/flowers/rose/.ipynb_checkpoints/1-checkpoint.jpg", True),
        ("data/flowers/rose/1.jpg", False),
    ],
)
def test_what_editors_and_systems_leave_changes_no_dependency(path, is_ignored):
    with Repo(str(ROOT)) as repository:
        assert repository.dvcignore.is_ignored(repository.fs, str(ROOT / path)) == is_ignored


def test_a_section_is_read_and_completed_with_defaults(tmp_path):
    section = read(tmp_path, "example: {epochs: 7, size: [4, 5], shape: {translation: 0.25}}")
    assert section == Example(epochs=7, size=[4, 5], shape=Shape(translation=0.25))
    assert read(tmp_path, "example:") == read(tmp_path, "example: {}") == Example()


class Anything(Parameters):
    values: list[Any]


SCALARS = [
    "007", "08", "00", "0_1", "0b11", "0o17", "0x1F", "1e-3", "1E5", "0.1_0", ".5", "-0", "+3",
    "2024-01-01", "off", "yes", "true", "~", "null", ".inf", "12_000", "1:30", "'x'", '"007"',
    "[007]", "1.2.3", "1_", "_1", "0x", "1e", "08.5",
]  # fmt: skip


def test_scalars_are_read_as_dvc_reads_them(tmp_path):
    project = Project(tmp_path)
    project.dvc("init", "--no-scm", "--quiet")
    lines = "".join(f"  - {scalar}\n" for scalar in SCALARS)
    (tmp_path / "params.yaml").write_text(f"section:\n  values:\n{lines}")
    values = read_section(Anything, "section", tmp_path / "params.yaml").values
    expected = dvc.api.params_show("params.yaml", repo=str(tmp_path))["section"]["values"]
    assert [repr(value) for value in values] == [repr(value) for value in expected]
    assert values[:5] == [7, 8, 0, 1, 3]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("example: {epoch: 1}", ["example.epoch", "unknown key", "`epochs`"]),
        ("example: {zzz: 1}", ["example.zzz", "known keys", "epochs, rate"]),
        ("example: {shape: {translatoin: 1}}", ["example.shape.translatoin", "`translation`"]),
        ("example: {1: 1}", ["example[1]", "unknown key"]),
        ("example: {epochs: many}", ["example.epochs", "integer", "'many'"]),
        ("example: {epochs: 2.5}", ["example.epochs", "integer", "2.5"]),
        ("example: {epochs: true}", ["example.epochs", "integer", "True"]),
        ("example: {epochs: 0}", ["example.epochs", "greater than 0", "found 0"]),
        ("example: {epochs: null}", ["example.epochs", "integer", "None"]),
        ("example: {size: [8, -1]}", ["example.size[1]", "greater than 0", "-1"]),
        ("example: {mode: cmyk}", ["example.mode", "'auto' or 'rgb'", "'cmyk'"]),
        ("example: {shape: {translation: -0.1}}", ["example.shape.translation", "-0.1"]),
        ("example: [1, 2]", ["example", "section of keys", "[1, 2]"]),
        ("other: {}", ["no section `example:`"]),
        ("- 1", ["key: value", "[1]"]),
        ("", ["key: value", "None"]),
        ("example: {epochs: 1", ["line 1", "not valid YAML"]),
        ("example:\n  epochs: 1\n  epochs: 2", ["line 3", "not valid YAML", "duplicate key"]),
        ("example: {epochs: 2024-99-99}", ["not valid YAML", "month"]),
        (
            "example: {size: [8]}",
            ["example.size", "list should have at least 2 items, not 1", "[8]"],
        ),
        ("example: {size: 8}", ["example.size", "expected a valid list", "found 8"]),
    ],
)
def test_mistakes_are_explained(tmp_path, text, words):
    with pytest.raises(UserError) as caught:
        read(tmp_path, text)
    message = str(caught.value)
    assert message.startswith(str(tmp_path / "params.yaml"))
    assert "\n" not in message
    for word in words:
        assert word in message


def test_each_mistake_has_its_line(tmp_path):
    with pytest.raises(UserError) as caught:
        read(tmp_path, "example: {epochs: 0, rate: fast, sise: 1}")
    assert [line.split(": ")[1] for line in str(caught.value).splitlines()] == [
        "example.epochs", "example.rate", "example.sise",
    ]  # fmt: skip


@given(st.text(max_size=30))
def test_any_text_is_refused_with_one_clear_error(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    with pytest.raises(UserError):
        read_section(Example, "no section has this name", path)


def test_no_file(tmp_path):
    with pytest.raises(UserError, match=r"params.yaml.*dvc\.yaml"):
        read_section(Example, "example", tmp_path / "params.yaml")


@pytest.mark.parametrize("text", ["example: {}", "dataset: 7", "dataset: ''", "dataset: [a]"])
def test_dataset_is_named(tmp_path, text):
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(UserError, match="dataset: expected the path"):
        read_dataset(tmp_path / "params.yaml")


def test_a_home_folder_is_refused_as_dvc_would_not_find_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    (tmp_path / "params.yaml").write_text("dataset: ~/pictures")
    with pytest.raises(UserError, match="DVC does not replace ~: write '/home/me/pictures'"):
        read_dataset(tmp_path / "params.yaml")


# The keys of params.yaml

SECTIONS = {"prepare": Prepare, "train": Train, "evaluate": Evaluate}

ANOTHER = {
    "prepare.layout": "classes",
    "prepare.image_size": [12, 16],
    "prepare.color_mode": "grayscale",
    "prepare.resize": "pad",
    "prepare.white_level": 4095,
    "prepare.val_fraction": 0.4,
    "prepare.test_fraction": 0.4,
    "prepare.seed": 2,
    "prepare.drop_near_duplicates": False,
    "prepare.group_by": r"\d+",
    "prepare.max_unreadable_fraction": 0.9,
    "train.seed": 2,
    "train.epochs": 2,
    "train.patience": 1,
    "train.batch_size": 5,
    "train.replicas": 2,
    "train.learning_rate": 0.003,
    "train.warmup_fraction": 0.5,
    "train.weight_decay": 0.5,
    "train.label_smoothing": 0.3,
    "train.class_weight": "balanced",
    "train.precision": "mixed_float16",
    "train.deterministic": False,
    "train.filters": [5],
    "train.convs_per_block": 3,
    "train.batch_normalization": False,
    "train.dense_units": 7,
    "train.dropout": 0.6,
    "train.augment.flip": "both",
    "train.augment.translation": 0.3,
    "train.augment.rotation": 40,
    "train.augment.zoom": 0.5,
    "train.augment.contrast": 0.5,
    "train.backbone": "tiny.keras",
    "train.fine_tune_fraction": 1.0,
    "train.fine_tune_epochs": 2,
    "train.fine_tune_learning_rate": 0.05,
    "evaluate.top_k": 2,
    "evaluate.grid_images": 3,
}

# Keys that do nothing by themselves: what else must be set to see them.
TOGETHER = {
    "train.fine_tune_fraction": {"train.backbone": "tiny.keras", "train.fine_tune_epochs": 1},
    "train.fine_tune_epochs": {"train.backbone": "tiny.keras", "train.fine_tune_fraction": 1.0,
                               "train.fine_tune_epochs": 1},
    "train.fine_tune_learning_rate": {"train.backbone": "tiny.keras",
                                      "train.fine_tune_fraction": 1.0,
                                      "train.fine_tune_epochs": 1},
}  # fmt: skip

WITHOUT_EFFECT = {
    "prepare.layout": "the folders of this dataset are classes in any case",
    "prepare.max_unreadable_fraction": "it only decides whether prepare stops, not what it writes",
}


def leaves(values: dict, above: str = "") -> dict[str, object]:
    """Name every leaf of nested sections with dots."""
    found: dict[str, object] = {}
    for key, value in values.items():
        name = f"{above}{key}"
        found |= leaves(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return found


def nested(changes: dict[str, object], stage: str) -> dict:
    """Turn dotted names of one stage into nested sections."""
    values: dict = {}
    for name, value in changes.items():
        first, *sections, key = name.split(".")
        if first == stage:
            place = values
            for section in sections:
                place = place.setdefault(section, {})
            place[key] = value
    return values


COMMITTED = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))


def test_every_key_is_tried():
    assert list(leaves(COMMITTED)) == ["dataset", *ANOTHER]
    assert [key for key, value in leaves(COMMITTED).items() if ANOTHER.get(key) == value] == []


@pytest.mark.parametrize("stage", SECTIONS)
def test_a_key_left_out_has_the_value_that_params_yaml_shows(stage):
    assert read_section(SECTIONS[stage], stage, ROOT / "params.yaml") == SECTIONS[stage]()


def test_lists_are_given_as_lists_from_python():
    assert Train(filters=[8, 8]).filters == [8, 8]
    assert Prepare(image_size=[32, 48]).image_size == [32, 48]


@pytest.mark.parametrize("stage", SECTIONS)
def test_every_key_of_a_class_is_in_params_yaml(stage):
    known = leaves(SECTIONS[stage]().model_dump(), f"{stage}.")
    assert list(known) == [key for key in ANOTHER if key.startswith(f"{stage}.")]


def test_a_key_changes_exactly_its_stage(project):
    """Asked of one key of each kind, since dvc.yaml names whole sections (see test_structure)."""
    assert project.changed() == {}
    text = (project / "params.yaml").read_text(encoding="utf-8")
    wrong = {}
    draw_dataset(project / "data/other", {"a": 2})
    (project / "data/backbones/tiny.keras").touch()
    keys = ("prepare.seed", "train.seed", "train.augment.zoom", "train.backbone", "evaluate.top_k")
    for key, value in {"dataset": "data/other", **{key: ANOTHER[key] for key in keys}}.items():
        project.configure({key: value})
        changed = set(project.changed())
        expected = {"prepare", "evaluate"} if key == "dataset" else {key.split(".")[0]}
        if changed != expected:
            wrong[key] = changed
        (project / "params.yaml").write_text(text, encoding="utf-8")
    assert wrong == {}


# What a key does, on a handful of images


@functools.cache
def workshop(base: Path) -> Path:
    """A dataset with a near copy in it, a backbone, and what the stages make of them by default."""
    place = base / "workshop"
    dataset = draw_dataset(place / "formes", {"a é": 14, "b": 9, "c": 6})
    for number in range(20, 30):
        image = draw(number, 0)
        image.save(dataset / "a é" / f"dessin {number}.png")
        image.save(dataset / "a é" / f"copie {number}.jpg", quality=80)
    device.setup()  # before TensorFlow does anything else in this process
    pixels = keras.Input((None, None, 3))
    features = keras.layers.Conv2D(4, 3)(keras.layers.Rescaling(1 / 255)(pixels))
    (place / "backbones").mkdir()
    keras.utils.set_random_seed(1)
    keras.Model(pixels, features).save(place / "backbones/tiny.keras")
    for stage in SECTIONS:
        run(stage, {}, place / stage, place)
    return place


BASE = {
    **{key: value for key, value in SMALL.items() if "." in key},
    "train.epochs": 1,
    "train.filters": [4],
    "train.dense_units": 5,
    "evaluate.grid_images": 2,
}


def section(stage: str, changes: dict[str, object]) -> Any:
    return SECTIONS[stage].model_validate(nested(BASE | changes, stage))


def run(stage: str, changes: dict[str, object], output: Path, place: Path) -> None:
    """Run a stage's function."""
    parameters, metrics = section(stage, changes), output / "metrics"
    if stage == "prepare":
        prepare(
            parameters=parameters,
            dataset=place / "formes",
            output=output / "prepared",
            metrics=metrics,
        )
    elif stage == "train":
        train(parameters, place / "prepare/prepared", output / "model.keras", metrics)
    else:
        evaluate(parameters, place / "prepare/prepared", place / "train/model.keras", metrics)


def written(output: Path) -> dict[str, bytes]:
    """Return the files that a stage wrote, but not those that show any parameter."""
    return {
        path.relative_to(output).as_posix(): path.read_bytes()
        for path in sorted(output.rglob("*"))
        if path.is_file() and path.name not in ("parameters.csv", "augmented.png")
    }


@pytest.fixture
def place(tmp_path_factory, monkeypatch) -> Path:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path_factory.mktemp("scratch")))
    return workshop(tmp_path_factory.getbasetemp())


# Of train, one key for each function that is asked about the others below.
@pytest.mark.parametrize(
    "key",
    [
        *(key for key in ANOTHER if not key.startswith("train.")),
        *("train.dropout", "train.augment.zoom", "train.label_smoothing"),
    ],
)
def test_a_key_changes_what_its_stage_writes(key, place, tmp_path):
    stage = key.split(".")[0]
    run(stage, {key: ANOTHER[key]}, tmp_path, place)
    assert (written(tmp_path) == written(place / stage)) == (key in WITHOUT_EFFECT)


@pytest.mark.parametrize("stage", ["prepare", "evaluate"])
def test_the_same_values_write_the_same_bytes(stage, place, tmp_path):
    """For train, see test_train.py."""
    run(stage, {}, tmp_path, place)
    assert written(tmp_path) == written(place / stage)


def built(parameters: Train, place: Path) -> list[object]:
    """Return what train makes of its parameters: environment, networks, phases."""
    environment = device.setup(parameters.deterministic, parameters.seed)
    backbone = None if parameters.backbone == "none" else place / "backbones" / parameters.backbone
    precision = device.precision(parameters.precision, backbone=backbone is not None)
    networks = [
        build((12, 12, 1), 3, parameters, backbone, precision, for_training=True),
        build((12, 12, 1), 3, parameters, backbone),
    ]
    splits = dict.fromkeys(["train", "val"])
    phases = make_phases(parameters, *networks, splits, splits if backbone else {}, Replicas())
    return [
        environment,
        *(network.classifier.to_json() for network in networks),
        *((phase.name, phase.epochs, phase.learning_rate) for phase in phases),
        *(len(phase.train_model.trainable_weights) for phase in phases),
        *(phase.augment.keywords for phase in phases if phase.augment),
    ]


def fitted(parameters: Train, _: Path) -> list[object]:
    """Return the history of a fit of vectors, whose validation loss soon gets worse."""
    device.setup(seed=1)
    random = np.random.default_rng(0)
    train, val = (
        Features(random.normal(size=(80, 5)).astype(np.float32), random.integers(0, 3, 80))
        for _ in range(2)
    )
    inputs = keras.Input((5,))
    logits = keras.Model(inputs, keras.layers.Dense(3)(inputs))
    classifier = keras.Sequential([inputs, keras.layers.Dense(3, activation="softmax")])
    phase = Phase("train", logits, classifier, train, val, 6, 1.0)
    checkpoint = Checkpoint("vectors")
    history, _ = fit([phase], parameters, checkpoint, Replicas(), print, lambda *_: None)
    checkpoint.delete()
    return history


OF_FIT = {
    f"train.{name}"
    for name in (
        "seed", "patience", "batch_size", "warmup_fraction", "weight_decay", "label_smoothing",
        "class_weight",
    )
}  # fmt: skip


@functools.cache
def before(look: Callable[[Train, Path], list[object]], key: str, place: Path) -> list[object]:
    """Return what a look sees before a key is changed; the key is one of `TOGETHER` or none."""
    return look(section("train", TOGETHER.get(key, {})), place)


@pytest.mark.parametrize(
    "key", [key for key in ANOTHER if key.startswith("train.") and key != "train.replicas"]
)
def test_each_key_of_train_changes_what_is_built_or_how_it_is_fitted(key, place):
    """Except for replicas, which are processes: see test_replicas.py."""
    look = fitted if key in OF_FIT else built
    after = look(section("train", TOGETHER.get(key, {}) | {key: ANOTHER[key]}), place)
    assert after != before(look, key if key in TOGETHER else "", place)


@pytest.mark.parametrize("look", [built, fitted])
def test_the_same_values_build_and_fit_the_same(look, place):
    assert look(section("train", {}), place) == before(look, "", place)


# Mistakes

MISTAKES: list[tuple[str, object, str]] = [
    ("prepare.image_size", [0, 32], "greater than or equal to 1"),
    ("prepare.image_size", [32, 100_000], "less than or equal to"),
    ("prepare.layout", "split", "'auto' or 'classes'"),
    ("prepare.image_size", 32, "expected [height, width], for instance [128, 128], found 32"),
    ("prepare.image_size", [32], "expected [height, width], for instance [128, 128], found [32]"),
    ("prepare.image_size", [32, 32, 3], "image_size: expected [height, width], for instance"),
    ("prepare.image_size", "32x32", "image_size: expected [height, width], for instance"),
    ("prepare.color_mode", "cmyk", "'auto', 'rgb' or 'grayscale'"),
    ("prepare.resize", "squeeze", "found 'squeeze'"),
    ("prepare.val_fraction", 0, "greater than 0"),
    ("prepare.val_fraction", 1.0, "less than 1"),
    ("prepare.val_fraction", 0.9, "test_fraction"),  # with the test share nothing is left
    ("prepare.test_fraction", -0.1, "found -0.1"),
    ("prepare.seed", 1.5, "integer"),
    ("prepare.drop_near_duplicates", "maybe", "boolean"),
    ("prepare.group_by", "(", "regular expression"),
    ("prepare.max_unreadable_fraction", 2, "less than or equal to 1"),
    ("train.seed", 2**32, "less than 4294967296"),
    ("train.epochs", 0, "greater than or equal to 1"),
    ("train.dropout", -0.5, "greater than or equal to 0"),
    ("train.dropout", 1, "less than 1"),
    ("train.filters", [], "train.filters"),
    ("train.filters", [0], "train.filters[0]"),
    ("train.filters", [16, "x"], "train.filters[1]"),
    ("train.learning_rate", float("inf"), "train.learning_rate"),
    ("train.learning_rate", float("nan"), "train.learning_rate"),
    ("train.weight_decay", float("nan"), "train.weight_decay"),
    ("train.learning_rate", "fast", "number"),
    ("train.label_smoothing", 0.7, "less than or equal to 0.5"),
    ("train.precision", "float16", "'mixed_float16'"),
    ("train.augment.translate", 0.1, "did you mean `translation`?"),
    ("train.augment.zoom", 1, "less than 1"),
    ("train.backbone", None, "string"),
    ("train.bacth_size", 3, "did you mean `batch_size`?"),
    ("evaluate.top_k", 1, "greater than or equal to 2"),
    ("evaluate.grid_images", 0, "greater than or equal to 1"),
    ("evaluate.threshold", 0, "known keys: top_k, grid_images"),
]


@pytest.mark.parametrize(("key", "value", "words"), MISTAKES)
def test_a_wrong_value_is_one_clear_line(tmp_path, key, value, words):
    stage = key.split(".")[0]
    path = tmp_path / "params.yaml"
    values = {**COMMITTED, stage: merged(COMMITTED[stage], nested({key: value}, stage))}
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        read_section(SECTIONS[stage], stage, path)
    message = str(caught.value)
    assert "\n" not in message
    assert words in message


def merged(old: dict, new: dict) -> dict:
    return old | {
        key: merged(old[key], value) if isinstance(value, dict) else value
        for key, value in new.items()
    }


MISTAKEN = {
    "in pixels\n  - 32\n": "in pixels\n  - 0\n",
    "dropout:": "drop_out:",
    "top_k: 5": "top_k: 0",
    "dataset: data/digits": "dataset:",
    "train:\n": "epochs: 3\ntrain:\n",
}


@pytest.mark.parametrize("stage", SECTIONS)
def test_each_stage_tells_all_mistakes_of_all_sections_first(tmp_path, monkeypatch, stage):
    text = (ROOT / "params.yaml").read_text(encoding="utf-8")
    for old, new in MISTAKEN.items():
        assert text.count(old) == 1
        text = text.replace(old, new)
    (tmp_path / "params.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        Project(tmp_path).stage(stage)
    names = [line.split(": ")[1] for line in str(caught.value).splitlines()]
    expected = ["epochs", "dataset", "prepare.image_size[0]", "train.drop_out", "evaluate.top_k"]
    assert names == expected
    assert [path.name for path in tmp_path.rglob("*")] == ["params.yaml"]


def test_a_missing_backbone_is_told_before_prepare_works(tmp_path):
    text = (ROOT / "params.yaml").read_text(encoding="utf-8")
    (tmp_path / "params.yaml").write_text(text.replace("backbone: none", "backbone: a.keras"))
    with pytest.raises(UserError, match=r"train\.backbone: no such file: data/backbones/a\.keras"):
        Project(tmp_path).stage("prepare")


def test_what_dvc_deleted_before_a_mistake_was_found_comes_back_with_dvc_repro(project):
    """DVC has no hook before it deletes a stage's outputs (3.67)."""
    said = project.dvc("exp", "run", "--set-param", "train.dropout=7", status=255)
    assert "train.dropout: expected less than 1, found 7\nNothing is lost: correct params." in said
    assert not (project / "data/model.keras").exists()
    project.git("checkout", "--quiet", "params.yaml")
    assert "Running stage" not in project.dvc("repro")
    assert project.changed() == {} and project.git("status", "--short") == ""
