"""The command start: from a folder of images to a model, and on from where it stopped."""

import io
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from conftest import Project, clone_working_tree, draw_dataset, options

from stages import start
from stages.run.cli import UserError

CLASSES = {"deux mots": 12, "noir": 12}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return draw_dataset(tmp_path_factory.mktemp("pictures") / "shapes", CLASSES)


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> Path:
    return clone_working_tree(tmp_path_factory.mktemp("clean") / "project").root


@pytest.fixture
def place(clean, tmp_path, monkeypatch) -> Project:
    shutil.copytree(clean, tmp_path / "project", symlinks=True)
    monkeypatch.chdir(tmp_path / "project")
    return Project(tmp_path / "project")


@pytest.fixture
def steps(monkeypatch) -> list[str]:
    """What start runs: the real Git and `use`; of the other commands, what they leave."""
    run, announce, done = start._run, start._announce, []

    def record(*words: str) -> str:
        done.append(" ".join(words))
        return announce(*words)

    def quick(*words: str, **advice: str) -> None:
        if words[0] == "git":
            run(*words, **advice)
            return
        record(*words)
        if "backbone" in words:
            Path("data/backbones", f"{words[4]}.keras").write_bytes(b"a model")

    monkeypatch.setattr(start, "_announce", record)
    monkeypatch.setattr(start, "_run", quick)
    return done


@pytest.fixture
def quick_add(monkeypatch) -> None:
    """In place of `dvc add`, which takes a second: what it leaves in Git."""

    def track(path: Path, is_new: bool = False) -> str:
        Path(f"{path}.dvc").touch()
        with open(path.parent / ".gitignore", "a") as file:
            file.write(f"/{path.name}\n")
        return ""

    monkeypatch.setattr("stages.use._track", track)


def run(*words: str | Path) -> None:
    start.main(options("start", *map(str, words)))


def tree(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def class_folders(root: Path, images: Path) -> Path:
    return Path(shutil.copytree(images, root / "shapes"))


def own_splits(root: Path, images: Path) -> Path:
    for split in ("train", "test"):
        shutil.copytree(images, root / "shapes" / split)
    return root / "shapes"


def a_zip(root: Path, images: Path) -> Path:
    """As macOS makes it, of a folder."""
    with zipfile.ZipFile(root / "shapes.zip", "w") as archive:
        for path, data in tree(images).items():
            archive.writestr(f"shapes/{path}", data)
            archive.writestr(f"__MACOSX/shapes/{path}", b"\0\5\x16\7")
    return root / "shapes.zip"


def a_tar(root: Path, images: Path) -> Path:
    with tarfile.open(root / "shapes.tar.gz", "w:gz") as archive:
        archive.add(images, "./")
    return root / "shapes.tar.gz"


def a_table(root: Path, images: Path) -> Path:
    paths = sorted(tree(images))
    (root / "shapes" / "pictures").mkdir(parents=True)
    lines = ["image,breed"]
    for number, path in enumerate(paths):
        name = f"{number}{Path(path).suffix}"
        shutil.copy(images / path, root / "shapes" / "pictures" / name)
        lines.append(f"{name},{Path(path).parts[0]}")
    (root / "shapes" / "train.csv").write_text("\n".join(lines))
    return root / "shapes"


def one_too_deep(root: Path, images: Path) -> Path:
    shutil.copytree(images, root / "shapes" / "pictures")
    (root / "shapes" / "LICENSE.txt").touch()
    return root / "shapes"


LAYOUTS = [class_folders, own_splits, a_zip, a_tar, a_table, one_too_deep]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_is_copied_set_up_committed_and_run(
    place, steps, tmp_path, images, layout, capfd
):
    source = layout(tmp_path, images)
    before = tree(source) if source.is_dir() else None
    run(source)
    assert place.parameters["dataset"] == "data/shapes"
    assert (place / "data/shapes.dvc").is_file() and place.git("status", "--porcelain") == ""
    pictures = {data for path, data in tree(place / "data/shapes").items() if path[-4:] != ".csv"}
    assert pictures == set(tree(images).values())
    assert not list((place / "data").glob(".*.part")) and not list(
        (place / ".dvc/tmp").glob("tmp*")
    )
    assert [step.split()[0] for step in steps] == ["python", "git", "git", "dvc"]
    assert before is None or before == tree(source)
    is_deep = layout in (a_zip, one_too_deep)
    out = capfd.readouterr().out
    assert ("holds one folder only" in out) == is_deep and "\n$ " in out
    head = place.git("rev-parse", "HEAD")
    del steps[:]
    place.configure({"train.epochs": 3})  # the user's
    run(source)  # again: all is done
    assert steps == ["dvc repro"] and place.git("rev-parse", "HEAD") == head
    assert "nothing is copied" in capfd.readouterr().out


STEPS = ["copy", "backbone", "use", "add", "commit", "repro"]


@pytest.mark.parametrize("stopped", ["copy", "backbone", "use", "add", "commit", "repro"])
def test_interrupted_at_a_step_the_same_command_goes_on(
    place, steps, quick_add, images, monkeypatch, stopped
):
    record, quick, copytree = start._announce, start._run, shutil.copytree
    monkeypatch.setattr(start, "SMALL_SIDE", 10)  # as photographs are

    def stop(*words: str, **advice: str) -> None:
        if stopped in words:
            raise KeyboardInterrupt
        (quick if words[0] != "python" or "backbone" in words else record)(*words, **advice)

    def half(source, target, **_):
        copytree(Path(source) / "noir", Path(target) / "noir")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(start, "_run", stop)
        patch.setattr(start, "_announce", stop if stopped == "use" else record)
        if stopped == "copy":
            patch.setattr(start.shutil, "copytree", half)
        with pytest.raises(KeyboardInterrupt):
            run(images, "--yes")
    if stopped == "copy":
        assert not (place / "data/shapes").exists() and place.git("status", "--porcelain") == ""
    done = [*steps]
    del steps[:]
    run(images, "--yes")
    first = STEPS.index(stopped)
    names = [next(name for name in STEPS if name in step.split()) for step in steps]
    first -= stopped == "commit"  # what is added is added again
    assert names == [name for name in STEPS[first:] if name != "copy"], done
    assert place.git("status", "--porcelain") == ""
    assert tree(place / "data/shapes") == tree(images)


def test_what_is_there_is_not_overwritten(place, steps, quick_add, images, tmp_path):
    other = class_folders(tmp_path, images)
    run(other)
    (other / "noir" / "new.png").write_bytes((other / "noir" / "dessin 001.png").read_bytes())
    before = tree(place / "data/shapes")
    with pytest.raises(UserError, match=r"data/shapes exists, and 1 of 25 files .*noir/new.png"):
        run(other)
    assert tree(place / "data/shapes") == before
    run(other, "--name", "more")
    assert place.parameters["dataset"] == "data/more"
    for name in ("prepared", "a/b", ".."):
        with pytest.raises(UserError, match="--name"):
            run(other, "--name", name)


def test_what_is_in_the_project_is_not_copied(place, steps, quick_add, images):
    shutil.copytree(images, place / "data" / "deep" / "deep")
    run("data/deep")
    assert place.parameters["dataset"] == "data/deep/deep"


def test_questions_are_asked_before_anything_is_changed(
    place, steps, quick_add, images, monkeypatch, capfd
):
    monkeypatch.setattr(start, "SMALL_SIDE", 10)
    status = place.git("status", "--porcelain")
    monkeypatch.setattr("sys.stdin", io.StringIO())
    with pytest.raises(UserError, match="--backbone NAME_OR_FILE, --from-scratch or --yes; noth"):
        run(images)
    with pytest.raises(UserError, match="no/such.keras: no such file"):
        run(images, "--backbone", "no/such.keras")
    assert steps == [] and not (place / "data/shapes").exists()
    assert place.git("status", "--porcelain") == status

    asked = answer(monkeypatch, "n")
    run(images)
    assert "MB to download" in asked[0]
    assert steps[0] == "python -m stages use data/shapes --from-scratch"
    assert place.parameters["train"]["backbone"] == "none"
    with pytest.raises(UserError, match="--from-scratch is without one"):
        run(images, "--from-scratch", "--quality", "best")


def answer(monkeypatch, *answers: str) -> list[str]:
    """Answer questions as on a terminal; return them."""
    asked: list[str] = []
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr(start, "_ask", lambda text: asked.append(text) or answers[len(asked) - 1])
    return asked


def test_a_backbone_that_is_here_later_is_asked_about_and_never_in_git(
    place, steps, quick_add, images, tmp_path, monkeypatch
):
    monkeypatch.setattr(start, "SMALL_SIDE", 10)
    with zipfile.ZipFile(tmp_path / "net.keras", "w") as archive:
        archive.writestr("config.json", '"batch_shape": [null, 96, 96, 3]')
    monkeypatch.setattr("sys.stdin", io.StringIO())
    asked = answer(monkeypatch, "n", "n", "")
    run(images)
    shutil.copy(tmp_path / "net.keras", place / "data/backbones")
    run(images)
    assert place.parameters["train"]["backbone"] == "none"
    run(images)
    assert "Use data/backbones/net.keras?" in asked[1] == asked[2]
    assert place.parameters["train"]["backbone"] == "net.keras"
    assert place.parameters["prepare"]["image_size"] == [96, 96]
    assert place.git("status", "--porcelain") == "" and len(steps) == 4 + 1 + 4
    assert place.git("ls-files", "data/backbones").split() == [
        "data/backbones/.gitignore", "data/backbones/net.keras.dvc", "data/backbones/none",
    ]  # fmt: skip
    assert place.git("log", "--format=%s", "-2") == "Settings for shapes\nDataset shapes"


@pytest.mark.parametrize("way", ["option", "answer"])
def test_a_backbone_is_named_by_its_path(
    place, steps, quick_add, images, tmp_path, monkeypatch, way
):
    monkeypatch.setattr(start, "SMALL_SIDE", 10)
    with zipfile.ZipFile(tmp_path / "net.keras", "w") as archive:
        archive.writestr("config.json", "{}")
    monkeypatch.setattr("sys.stdin", io.StringIO())
    asked = answer(monkeypatch, str(tmp_path / "net.keras"))
    run(images, *["--backbone", tmp_path / "net.keras"] * (way == "option"))
    assert ["path of a .keras file" in text for text in asked] == [True] * (way == "answer")
    assert place.parameters["train"]["backbone"] == "net.keras"
    assert (place / "data/backbones/net.keras").read_bytes() == (
        tmp_path / "net.keras"
    ).read_bytes()
    (tmp_path / "net.keras").write_bytes(b"other")
    for path, message in (("net.keras", "not a .keras file"), ("net.h5", "no such file")):
        with pytest.raises(UserError, match=message):
            run(images, "--backbone", tmp_path / path)


def test_what_else_was_changed_is_not_committed(place, steps, quick_add, images):
    (place / "my notes.txt").write_text("mine")
    (place / "README.md").write_text("mine")
    place.git("add", "README.md")
    run(images)
    assert place.git("status", "--porcelain") == 'M  README.md\n?? "my notes.txt"'


def test_without_an_identity_or_a_branch_nothing_is_changed(
    place, steps, quick_add, images, monkeypatch
):
    place.git("switch", "--quiet", "--detach")
    with pytest.raises(UserError, match="no branch is checked out"):
        run(images)
    for name in ("GIT_COMMITTER_NAME", "GIT_COMMITTER_EMAIL"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_CONFIG_KEY_0", "user.useConfigOnly")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", "true")
    with pytest.raises(UserError, match=r"`git config --global user.name .*user.email"):
        run(images)
    assert steps == [] and not (place / "data/shapes").exists()


def test_a_downloaded_zip_of_this_project_becomes_a_repository(
    place, steps, quick_add, images, monkeypatch
):
    shutil.rmtree(place / ".git")
    monkeypatch.setattr("sys.stdin", io.StringIO())
    answer(monkeypatch, "No")
    with pytest.raises(UserError, match="nothing was changed"):
        run(images)
    assert not (place / ".git").exists() and not (place / "data/shapes").exists()
    run(images, "--yes")
    assert steps[:3] == ["git init -q", "git add -A", "git commit -qm Start"]
    assert place.git("rev-list", "--count", "HEAD") == "2"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("out.zip", r"would write outside of its folder: ../a/1.png"),
        ("half.zip", "damaged|expected a folder, a zip or a tar"),
        ("half.tar.gz", "damaged|can't be unpacked"),
        ("labels.csv", "name the folder it is in"),
        ("nowhere", "no such folder or file"),
        ("small", "too few images: class noir has 2 images"),
        ("empty", "no images in it"),
    ],
)
def test_what_can_not_be_used_is_refused(place, steps, quick_add, images, tmp_path, name, message):
    with zipfile.ZipFile(tmp_path / "out.zip", "w") as archive:
        archive.writestr("../a/1.png", b"x")
    for whole in (a_zip(tmp_path, images), a_tar(tmp_path, images)):
        data = whole.read_bytes()
        whole.with_name(whole.name.replace("shapes", "half")).write_bytes(data[: len(data) // 2])
    (tmp_path / "labels.csv").touch()
    (tmp_path / "empty").mkdir()
    draw_dataset(tmp_path / "small", {"deux mots": 3, "noir": 2})
    with pytest.raises(UserError, match=message):
        run(tmp_path / name)
    assert steps == [] and place.git("status", "--porcelain") == ""


def test_a_copy_that_does_not_fit_is_refused(place, steps, quick_add, images, monkeypatch):
    usage = shutil.disk_usage(".")._replace(free=1000)
    monkeypatch.setattr(start.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match="free some, or leave .*`python -m stages use "):
        run(images)


def test_in_a_process_of_its_own_a_mistake_ends_in_one_line(place, images):
    place.configure({"prepare.max_unreadable_fraction": 2})
    place.commit()
    words = [sys.executable, "-m", "stages", "start", str(images)]
    done = subprocess.run(
        words, capture_output=True, text=True, stdin=subprocess.DEVNULL, env={**os.environ}
    )
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    assert "prepare.max_unreadable_fraction" in done.stderr
