"""Two people change one dataset: what Git merges, with the drivers of .dvc/merge.gitconfig."""

import os
import shutil
import subprocess

import pytest
from conftest import ROOT, Project

from stages.display.status import set_up_merges

PARAMETERS = "train:\n  epochs: 20\n\n  batch_size: 64\n\n  dropout: 0.3\n"


def write(project, images):
    for name in images:
        path = project / "data/pets" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"the image {name}")
    project.dvc("add", "--quiet", "data/pets")


def change(project, branch, add, remove, parameters):
    """Commit what one person did: images, parameters, and a run, which changes what it writes."""
    project.git("checkout", "--quiet", "-b", branch, "main")
    project.dvc("checkout", "--quiet")
    for name in remove:
        (project / "data/pets" / name).unlink()
    write(project, add)
    for old, new in parameters.items():
        text = (project / "params.yaml").read_text()
        (project / "params.yaml").write_text(text.replace(old, new))
    (project / "dvc.lock").write_text(f"stages: {{train: {branch}}}\n")
    (project / "metrics/evaluate.json").write_text(f'{{"run": "{branch}"}}\n')
    project.commit(branch)


@pytest.fixture
def pets(tmp_path, monkeypatch, request):
    """A project with two images, in a folder of the repository; the working folder."""
    project = Project(tmp_path / "repository" / getattr(request, "param", ""))
    project.root.mkdir(parents=True)
    Project(tmp_path / "repository").git("init", "--quiet", "--initial-branch=main")
    project.dvc("init", "--quiet", "--subdir")
    for name in (".gitattributes", ".dvc/merge.gitconfig"):
        shutil.copy(ROOT / name, project / name)
    (project / "metrics").mkdir()
    (project / "dvc.lock").write_text("stages: {}\n")
    (project / "metrics/evaluate.json").write_text('{"accuracy": 0.5}\n')
    (project / "params.yaml").write_text(PARAMETERS)
    write(project, ["cat/1.png", "dog/1.png"])
    project.commit("start")
    monkeypatch.chdir(project.root)
    return project


def merge(project, branch, environment=None):
    """Merge a branch into the present one; return the paths in conflict."""
    words = ["git", "merge", "--quiet", "--no-edit", branch]
    subprocess.run(words, cwd=project.root, env=environment, capture_output=True, check=False)
    return set(project.git("diff", "--relative", "--name-only", "--diff-filter=U").splitlines())


@pytest.mark.parametrize("pets", ["", "sub folder"], indirect=True)
def test_both_peoples_images_and_parameters_are_kept(pets):
    change(pets, "ann", ["cat/2.png", "cat/3.png"], ["dog/1.png"], {"epochs: 20": "epochs: 30"})
    change(pets, "bob", ["dog/2.png"], [], {"dropout: 0.3": "dropout: 0.5"})
    pets.dvc("install")  # its driver keeps ours in a project in a sub-folder
    folder = pets.root.relative_to(pets.git("rev-parse", "--show-toplevel").strip())
    included = (".." / folder / ".dvc/merge.gitconfig").as_posix()
    assert set_up_merges() == f"git config --add include.path {included}"
    assert pets.git("config", "merge.ours.driver") == "true"
    assert set_up_merges() == ""  # it is done
    assert merge(pets, "ann") == set()
    pets.dvc("checkout", "--quiet")
    images = {
        path.relative_to(pets / "data/pets").as_posix() for path in (pets / "data/pets").glob("*/*")
    }
    assert images == {"cat/1.png", "cat/2.png", "cat/3.png", "dog/2.png"}
    assert (pets / "params.yaml").read_text() == PARAMETERS.replace("20", "30").replace(
        "0.3", "0.5"
    )
    assert "bob" in (pets / "dvc.lock").read_text()  # ours, until `dvc repro` writes it anew


def test_what_two_people_changed_differently_is_a_conflict(pets):
    change(pets, "ann", ["cat/2.png"], [], {"epochs: 20": "epochs: 30"})
    change(pets, "bob", ["dog/2.png"], [], {"epochs: 20": "epochs: 40"})
    set_up_merges()
    assert merge(pets, "ann") == {"params.yaml"}


def test_without_the_drivers_git_merges_as_ever(pets):
    change(pets, "ann", ["cat/2.png"], [], {})
    change(pets, "bob", ["dog/2.png"], [], {})
    assert merge(pets, "ann") == {"data/pets.dvc", "dvc.lock", "metrics/evaluate.json"}


@pytest.mark.parametrize("missing", ["DVC", "images"])
def test_where_dvc_cannot_merge_the_file_has_both_sides(pets, missing):
    change(pets, "ann", ["cat/2.png"], [], {})
    change(pets, "bob", ["dog/2.png"], [], {})
    set_up_merges()
    if missing == "images":  # of a colleague, not yet fetched
        shutil.rmtree(pets / ".dvc/cache")
    path = os.environ["PATH"] if missing == "images" else "/usr/bin:/bin"
    assert merge(pets, "ann", {**os.environ, "PATH": path}) == {"data/pets.dvc"}
    assert "<<<<<<< ours" in (pets / "data/pets.dvc").read_text()
    assert not list((pets / "data").glob("merge.*"))


def test_two_new_datasets_are_both_ignored_by_git(pets):
    for name in ("ann", "bob"):
        pets.git("checkout", "--quiet", "-b", name, "main")
        (pets / f"data/{name}").mkdir()
        (pets / f"data/{name}/1.png").write_text(name)
        pets.dvc("add", "--quiet", f"data/{name}")
        pets.commit(name)
    assert merge(pets, "ann") == set()
    assert {"/ann", "/bob", "/pets"} <= set((pets / "data/.gitignore").read_text().split())


def test_in_a_worktree_the_same_drivers_are_set_up(pets, monkeypatch):
    pets.git("worktree", "add", "--quiet", "../worktree", "-b", "other")
    monkeypatch.chdir(pets.root.parent / "worktree")
    assert set_up_merges()
    driver = ["git", "config", "merge.ours.driver"]
    assert subprocess.run(driver, capture_output=True, text=True).stdout == "true\n"
    monkeypatch.chdir(pets.root)
    assert set_up_merges() == ""
