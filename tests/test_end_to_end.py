"""What a user does, with the real ``dvc`` in temporary clones."""

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import CLASSES, ROOT, Project, clone_working_tree, draw, draw_dataset, options

from stages import predict
from stages.display.status import changed_since_run

UP_TO_DATE = "Data and pipelines are up to date."


def content(project: Project) -> dict[str, bytes]:
    """Everything that Git or DVC versions, and dvc.lock with it."""
    names = [
        path
        for place in ("data", "metrics")
        for path in sorted((project / place).rglob("*"))
        if path.is_file()
    ]
    names += [project / "dvc.lock", project / "params.yaml"]
    return {str(path.relative_to(project.root)): path.read_bytes() for path in names}


def index(project: Project) -> dict[str, dict[str, str]]:
    with open(project / "data/prepared/index.csv", newline="", encoding="utf-8") as file:
        return {row["path"]: row for row in csv.DictReader(file)}


def some_image(project: Project, split: str) -> str:
    """The path, within the dataset, of an image of this split."""
    return next(path for path, row in index(project).items() if row["split"] == split)


def metrics(project: Project, stage: str) -> dict:
    return json.loads((project / f"metrics/{stage}.json").read_text(encoding="utf-8"))


# 1. First run


def test_a_first_run_says_what_came_out(finished, shared):
    said = (shared / "said.txt").read_text(encoding="utf-8")
    accuracy = metrics(finished, "evaluate")["accuracy"]
    assert accuracy > 0.5
    assert f"{accuracy:.4f}" in said
    for place in ("data/model.keras", "metrics/", "dvc plots show"):
        assert place in said
    assert "Traceback" not in said


def test_a_second_run_does_nothing(project):
    before = content(project)
    assert UP_TO_DATE in project.dvc("repro")
    assert content(project) == before


def test_a_run_leaves_nothing_that_git_does_not_expect(project, shared):
    """No new file but DVC's own lock, and no change but in what a run writes."""
    names = project.git("diff", "--name-only", "HEAD~1", "HEAD").splitlines()
    assert names and all(name == "dvc.lock" or name.startswith("metrics/") for name in names), names
    assert project.git("status", "--porcelain", "--untracked-files=all") == ""
    assert not list((shared / "temporary").iterdir())
    top = {path.name for path in project.root.iterdir()}
    assert top <= {
        ".git", ".dvc", ".dvcignore", ".gitattributes", ".gitignore", "dvc.yaml", "dvc.lock",
        "params.yaml", "requirements.txt", "README.md", "LICENSE", "pyproject.toml",
        ".pre-commit-config.yaml", "stages", "data", "metrics",
    }  # fmt: skip


def test_every_file_that_a_stage_writes_is_listed(finished):
    """What dvc.yaml does not list, the run cache does not bring back."""
    text = yaml.safe_load((finished / "dvc.yaml").read_text(encoding="utf-8"))
    listed = []
    for stage in text["stages"].values():
        for kind in ("outs", "metrics", "plots"):
            listed += [
                out if isinstance(out, str) else next(iter(out)) for out in stage.get(kind, [])
            ]
    assert len(listed) == len(set(listed))
    known = (*listed, "data/formes", "data/backbones", "data/README.md", "metrics/page")
    known += ("data/corrections.csv",)
    names = [path for place in ("data", "metrics") for path in (finished / place).rglob("*")]
    extra = {
        path.relative_to(finished.root).as_posix()
        for path in names
        if path.is_file() and path.name != ".gitignore"
    }
    extra = {name for name in extra if not name.startswith(known)}
    assert extra == set()


def test_no_two_metrics_have_one_name(finished):
    """`dvc metrics show` and `dvc exp show` have one column per name."""
    shown = json.loads(finished.dvc("metrics", "show", "--json"))[""]["data"]
    names = [name for file in shown.values() for name in file["data"]]
    assert len(names) == len(set(names)) and len(shown) == 3


def test_the_committed_numbers_are_those_of_the_committed_parameters():
    """On a bare clone `dvc metrics show` shows a run of just these parameters and this code."""
    assert changed_since_run(ROOT) == []
    committed = json.loads((ROOT / "metrics/evaluate.json").read_text(encoding="utf-8"))
    assert committed["accuracy_low"] > 0.95  # a mistake more or less in 254 images is chance


def test_metrics_show_on_a_bare_clone(tmp_path):
    project = clone_working_tree(tmp_path / "clone", digits=True)
    shown = json.loads(project.dvc("metrics", "show", "--json"))[""]["data"]
    assert shown["metrics/evaluate.json"]["data"]["accuracy"] > 0.9
    project.dvc("plots", "show")
    assert (project / "metrics/page/index.html").is_file()
    assert project.git("status", "--porcelain") == ""
    said = project.dvc("add", "data/digits", status=1)  # README versions another folder
    assert "already tracked by SCM" in said


# 2. Own images


@pytest.mark.parametrize("setting", ["core.autocrlf=true", "core.eol=crlf"])
def test_a_clone_has_the_same_bytes_whatever_git_would_convert(tmp_path, setting):
    """Else DVC takes the code, the digits and dvc.lock for changed, and runs everything again."""
    (tmp_path / "here").mkdir()
    project = clone_working_tree(tmp_path / "here", digits=True)
    (project / "table.csv").write_bytes(b"class\r\na\rb\n")
    project.commit()
    project.git("clone", "--quiet", "-c", setting, ".", tmp_path / "there")
    names = project.git("ls-files", "-z").split("\0")[:-1]
    assert "dvc.lock" in names and any(name.startswith("data/digits/") for name in names)
    for name in names:
        assert (tmp_path / "there" / name).read_bytes() == (project / name).read_bytes(), name
    assert Project(tmp_path / "there").git("status", "--porcelain") == ""


def test_class_count_and_channels_follow_from_the_data(finished):
    classes = json.loads((finished / "data/prepared/image_spec.json").read_text(encoding="utf-8"))
    assert classes["classes"] == sorted(CLASSES)
    assert classes["image_shape"] == [16, 16, 3]
    counts = metrics(finished, "prepare")
    assert counts["train"] + counts["val"] + counts["test"] == sum(CLASSES.values())
    assert counts["classes"] == 3
    assert metrics(finished, "evaluate")["accuracy"] > 0.5


def test_a_dataset_is_added_wherever_the_user_wants_it(project):
    for name in ("data/flowers", "data/my photos/jähr 1", "data/prepared2"):
        draw_dataset(project / name, {"a": 1})
        project.dvc("add", "--quiet", name)
    project.commit()
    assert "formes.dvc" in project.git("ls-files", "data")
    assert "jähr 1.dvc" in project.git("-c", "core.quotePath=false", "ls-files", "data")
    assert not [name for name in project.git("ls-files", "data").splitlines() if ".jpg" in name]


def test_given_splits_are_kept(project, tmp_path):
    given = draw_dataset(tmp_path / "given" / "train", {"a": 8, "b": 8})
    draw_dataset(given.parent / "validation", {"a": 3, "b": 3}, first=50)
    draw_dataset(given.parent / "test", {"a": 4, "b": 4}, first=70)
    project.configure({"dataset": str(given.parent)})  # an absolute path, on another disk perhaps
    project.dvc("repro", "--quiet", "prepare")
    assert {row["split"] for path, row in index(project).items() if path.startswith("val")} == {
        "val"
    }
    counts = metrics(project, "prepare")
    assert [counts[split] for split in ("train", "val", "test")] == [16, 6, 8]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("dataset: data/formes", "dataset: data/flowers"), "No such file or directory"),
        (("prepare:", "prepare: ["), "YAML file structure is corrupted"),
        (("evaluate:", "evaluat:"), "are missing from 'params.yaml'"),
        (("train:", "trian:"), "Could not find 'train.backbone'"),
    ],
)
def test_what_dvc_itself_refuses_is_in_the_readme(project, change, words):
    path = project / "params.yaml"
    path.write_text(path.read_text(encoding="utf-8").replace(*change), encoding="utf-8")
    assert words in project.dvc("repro", status=255)
    assert words in " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())  # lines wrap


# 3. Change something


# Stages that write what they wrote before, with other numbers: TensorFlow takes seconds to start.
PLAYED = """
import json, shutil
from pathlib import Path
import yaml

def main(options):
    outputs = yaml.safe_load(Path("dvc.yaml").read_text())["stages"][options.name]
    for kind in ("outs", "metrics", "plots"):
        for out in outputs.get(kind, []):
            name = out if isinstance(out, str) else next(iter(out))
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(Path(".dvc/tmp/before", name), name)
    path = Path("metrics", f"{options.name}.json")
    numbers = json.loads(path.read_text())
    path.write_text(json.dumps({name: value / 2 for name, value in numbers.items()}))
"""


def test_a_change_is_shown_by_dvc_kept_as_a_version_and_undone(project):
    """More images and another seed; back by a tag without any run, and by the run cache."""
    for place in ("data/model.keras", "metrics"):
        copy = shutil.copytree if (project / place).is_dir() else shutil.copy
        (project / ".dvc/tmp/before/data").mkdir(parents=True, exist_ok=True)
        copy(project / place, project / ".dvc/tmp/before" / place)
    with open(project / "stages/run/environment.py", "a") as file:
        file.write("\n\ndef load_tensorflow():\n    pass\n")
    for stage in ("train", "evaluate"):
        (project / f"stages/{stage}.py").write_text(PLAYED)
    project.dvc("commit", "--quiet", "--force")  # the versions differ by more than this code
    project.commit("Played")
    project.git("tag", "v1")
    first, before = content(project), metrics(project, "evaluate")
    draw_dataset(project / "data/formes", {"café noir": 6, "straße": 4}, first=100)
    project.dvc("add", "--quiet", "data/formes")
    said = project.dvc("exp", "run", "-S", "evaluate.top_k=2", "-S", "train.seed=2")
    assert said.count("Running stage") == 3
    assert "train.seed" in project.dvc("params", "diff")
    shown = json.loads(project.dvc("metrics", "diff", "--json"))
    loss = json.loads(project.git("show", "v1:metrics/train.json"))["val_loss"]
    assert shown["metrics/train.json"]["val_loss"]["old"] == loss
    count = shown["metrics/prepare.json"]["train"]
    assert count["new"] == metrics(project, "prepare")["train"] > count["old"]
    assert before != metrics(project, "evaluate")
    project.commit("More images")
    project.git("tag", "v2")
    second = content(project)

    project.git("checkout", "--quiet", "v1")
    project.dvc("checkout", "--quiet")
    assert content(project) == first
    assert UP_TO_DATE in project.dvc("repro")
    project.git("checkout", "--quiet", "v2")
    project.dvc("checkout", "--quiet")
    assert content(project) == second

    project.git("checkout", "--quiet", "v1", "--", "params.yaml", "data/formes.dvc")
    project.dvc("checkout", "--quiet", "data/formes.dvc")
    assert "Running stage" not in project.dvc("repro")
    assert content(project) == first


def test_the_cache_is_never_written_through_a_link(project):
    """With linked outputs, a change in place would be one of the cache."""
    project.dvc("config", "--local", "cache.type", "hardlink")
    project.dvc("checkout", "--relink", "--quiet")
    project.configure({"prepare.val_fraction": 0.25, "evaluate.grid_images": 3})
    project.stage("prepare")
    project.stage("evaluate")
    project.git("checkout", "--quiet", ".")
    project.dvc("checkout", "--force", "--quiet")
    assert UP_TO_DATE in project.dvc("repro")
    assert not project.changed()


def images_of_each_split(project: Project) -> dict[str, dict[str, bytes]]:
    return {
        split: {
            path.name: path.read_bytes() for path in (project / "data/prepared" / split).iterdir()
        }
        for split in ("train", "val", "test")
    }


def prepare_again(project: Project) -> set[str]:
    """Run prepare by itself; return the other stages that DVC would then run."""
    project.stage("prepare")
    return set(project.changed()) - {"prepare"}


def test_a_renamed_image_retrains_nothing(project):
    before = images_of_each_split(project)
    name = some_image(project, "train")
    (project / "data/formes" / name).rename(project / "data/formes" / name.replace("dessin", "é, "))
    assert prepare_again(project) == {"evaluate"}
    assert images_of_each_split(project) == before
    numbers = metrics(project, "evaluate")
    project.stage("evaluate")
    assert metrics(project, "evaluate") == numbers


def test_an_image_added_to_test_is_evaluated_and_not_learned_from(project):
    before = images_of_each_split(project)
    for number in range(500, 540):
        path = project / "data/formes/deux mots" / f"{number}.png"
        draw(number, 1).save(path)
        stages = prepare_again(project)
        split = index(project)[f"deux mots/{number}.png"]["split"]
        assert stages == {"test": {"evaluate"}, "val": {"train", "evaluate"}}.get(
            split, {"train", "evaluate"}
        )
        if split == "test":
            break
        path.unlink()
    after = images_of_each_split(project)
    assert after["test"] != before["test"]
    assert (after["train"], after["val"]) == (before["train"], before["val"])


def test_a_removed_or_relabelled_image_changes_its_split(project):
    before = images_of_each_split(project)
    for change in ("removed", "relabelled"):
        path = project / "data/formes" / some_image(project, "train")
        if change == "removed":
            path.unlink()
        else:
            path.rename(project / "data/formes/straße/new.jpg")
        assert prepare_again(project) == {"train", "evaluate"}
        assert images_of_each_split(project)["test"] == before["test"]


# 4. Use the model


@pytest.fixture(scope="module")
def photographs(finished, tmp_path_factory) -> Path:
    """The raw files of the evaluated split, in one folder, with the model: nothing else."""
    place = tmp_path_factory.mktemp("elsewhere")
    shutil.copy(finished / "data/model.keras", place)
    for row in predictions(finished).itertuples():
        (place / "new" / row.path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(finished / "data/formes" / row.path, place / "new" / row.path)
    return place


def predictions(project: Project) -> pd.DataFrame:
    return pd.read_csv(
        project / "metrics/predictions.csv", keep_default_na=False, float_precision="round_trip"
    )


def chances(table: pd.DataFrame) -> np.ndarray:
    return table[[f"p:{name}" for name in sorted(CLASSES)]].to_numpy(float)


def test_predict_agrees_with_evaluate_all_at_once(finished, photographs, capsys):
    evaluated = predictions(finished).set_index("path")
    where = str(photographs / "new"), "--model", str(photographs / "model.keras")
    assert predict.main(options("predict", *where, "--format", "csv")) == 0
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert len(rows) == len(evaluated)
    for row in rows:
        path = Path(next(iter(row.values()))).relative_to(photographs / "new").as_posix()
        assert row["predicted"] == evaluated.loc[path, "predicted"]
        for name in CLASSES:
            assert float(row[f"p:{name}"]) == pytest.approx(
                evaluated.loc[path, f"p:{name}"], abs=1e-5
            )


def test_predict_agrees_with_evaluate_file_by_file(finished, photographs):
    evaluated = predictions(finished)
    for position in range(0, len(evaluated), 3):
        path = evaluated["path"][position]
        row = predict.predict([photographs / "new" / path], model=photographs / "model.keras")
        assert row["predicted"].tolist() == [evaluated["predicted"][position]]
        assert np.abs(chances(row) - chances(evaluated)[position]).max() < 1e-5


def test_the_model_is_one_file_that_plain_keras_loads(finished, photographs):
    """Safe mode, none of our code, raw pixels in, the probabilities of evaluate out."""
    code = (
        "import keras, numpy, sys\n"
        "model = keras.models.load_model(sys.argv[1])\n"
        "images = numpy.concatenate([numpy.load(f) for f in sys.argv[3:]])\n"
        "assert images.dtype == 'uint8'\n"
        "numpy.save(sys.argv[2], model.predict(images, verbose=0))\n"
        "assert not [name for name in sys.modules if name.split('.')[0] == 'stages']"
    )
    files = sorted((finished / "data/prepared/test").glob("images-*.npy"))
    out = photographs / "plain.npy"
    finished.run("python", "-P", "-c", code, photographs / "model.keras", out, *files)
    plain = {tuple(row.round(3)) for row in np.load(out)}
    rows = index(finished)
    expected = predictions(finished)
    expected = expected.assign(row=[int(rows[path]["array_index"]) for path in expected["path"]])
    expected = expected.sort_values("row")
    assert np.abs(np.load(out)[expected["row"]] - chances(expected)).max() < 1e-4
    assert len(plain) > 1


def blocks(language: str) -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_the_readme_s_python_runs_as_it_stands(finished, monkeypatch, capsys):
    monkeypatch.chdir(finished.root)
    draw_dataset(finished / "photos", {"a": 2, "b": 1})
    assert "predict(" in "".join(blocks("python"))
    exec("\n".join(blocks("python")), {})
    assert "photos/a/dessin 000.jpg" in capsys.readouterr().out


def test_the_readme_begins_with_the_two_commands():
    assert "pip install -r requirements.txt" in blocks("bash")[0]
    assert "dvc repro" in blocks("bash")[0]
