"""Temporary projects in which the tests drive the real ``dvc``, and a dataset that they draw."""

import argparse
import contextlib
import fcntl
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import yaml
from PIL import Image, ImageDraw

from stages.__main__ import parser
from stages.run import environment

ROOT = Path(__file__).resolve().parents[1]

# Neither the settings of whoever runs the tests, nor theirs of Git and DVC, reach a project.
ENVIRONMENT = {
    "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_CONFIG_SYSTEM": os.devnull,
    "GIT_CONFIG_COUNT": "1",
    "GIT_CONFIG_KEY_0": "init.defaultBranch",
    "GIT_CONFIG_VALUE_0": "main",
    "GIT_AUTHOR_NAME": "Test",
    "GIT_AUTHOR_EMAIL": "test@example.com",
    "GIT_COMMITTER_NAME": "Test",
    "GIT_COMMITTER_EMAIL": "test@example.com",
    "DVC_NO_ANALYTICS": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
}
for _name in list(os.environ):
    if _name.startswith(("AWS_", "DASK_", "DVC_", "GIT_")):
        del os.environ[_name]
os.environ.update(ENVIRONMENT)
_worker = os.environ.get("PYTEST_XDIST_WORKER", "")[2:]
if _worker and hasattr(os, "sched_setaffinity"):
    # A core for each process: threads that wait for each other cost a sixth of the time.
    _cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {_cores[int(_worker) % len(_cores)]})
environment.setup()  # what tests call in this process runs as in a program
os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", tempfile.gettempdir() + "/hypothesis")

hypothesis.settings.register_profile(
    "ours", deadline=None, database=None, derandomize=bool(os.environ.get("CI"))
)
hypothesis.settings.load_profile("ours")

# The files whose tests take longest; not the first two need the project that is run once.
LONG = [
    "test_end_to_end", "test_replicas", "test_reproducible", "test_search", "test_train",
    "test_params", "test_plots_page", "test_prepare", "test_remote", "test_compare",
]  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let each of two processes, which get half of the list each, begin with long tests.

    Near the end, pytest-xdist can then share what is left evenly: short tests.
    """
    files = {name: [item for item in items if item.path.stem == name] for name in LONG}
    long = [[item for name in LONG[half::2] for item in files[name]] for half in (0, 1)]
    short = [item for item in items if item.path.stem not in LONG]
    middle = len(items) // 2 - len(long[0])
    items[:] = long[0] + short[:middle] + long[1] + short[middle:]


def options(*words: str) -> argparse.Namespace:
    """Return what ``python -m stages WORDS`` gives to a stage or command."""
    return parser().parse_args(words)


class Project:
    """A copy of this repository's working tree in a folder of its own, with Git and DVC.

    Attributes
    ----------
    root : Path
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def __truediv__(self, name: str | Path) -> Path:
        return self.root / name

    def run(
        self, *command: str | Path, status: int = 0, **environment: str
    ) -> subprocess.CompletedProcess:
        """Run a command here, to its end, and expect its exit status."""
        done = subprocess.run(
            [str(word) for word in command], cwd=self.root, env={**os.environ, **environment},
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == status, f"{command}\n{done.stdout}\n{done.stderr}"
        return done

    def dvc(self, *words: str | Path, status: int = 0, **environment: str) -> str:
        """Run ``dvc``; return what it printed."""
        done = self.run("dvc", *words, status=status, **environment)
        return done.stdout + done.stderr if status else done.stdout

    def git(self, *words: str | Path) -> str:
        """Run ``git``; return what it printed, without the last newline."""
        return self.run("git", *words).stdout.rstrip("\n")

    def python(self, *words: str | Path, status: int = 0, **environment: str) -> str:
        """Run Python; return what it printed."""
        done = self.run(sys.executable, *words, status=status, **environment)
        return done.stdout + done.stderr if status else done.stdout

    def stage(self, name: str) -> None:
        """Run a stage by itself, in this process: a new one would import TensorFlow first."""
        with contextlib.chdir(self.root):
            importlib.import_module(f"stages.{name}").main(options(name))

    def commit(self, message: str = "Change") -> None:
        """Commit everything that Git may know."""
        self.git("add", "--all")
        self.git("commit", "--quiet", "--allow-empty", "--message", message)

    @property
    def parameters(self) -> dict[str, Any]:
        return yaml.safe_load((self / "params.yaml").read_text(encoding="utf-8"))

    def configure(self, changes: Mapping[str, Any]) -> None:
        """Change keys of params.yaml, named with dots: ``{"train.epochs": 2}``."""
        values = self.parameters
        for name, value in changes.items():
            *sections, key = name.split(".")
            place = values
            for section in sections:
                place = place[section]
            place[key] = value
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
        (self / "params.yaml").write_text(text, encoding="utf-8")

    def changed(self) -> dict[str, set[str]]:
        """Ask DVC, in this process, which stages a ``dvc repro`` would run first.

        Returns
        -------
        stages : dict
            For each stage of dvc.yaml whose own inputs or outputs differ: their names.
        """
        from dvc.repo import Repo

        with Repo(str(self.root)) as repository:
            status = repository.status()
        stages: dict[str, set[str]] = {}
        for address, entries in status.items():
            if address.endswith(".dvc"):
                continue
            names = stages.setdefault(address.rpartition(":")[2], set())
            for entry in entries:
                for changes in entry.values() if isinstance(entry, dict) else [{entry: entry}]:
                    for name, change in changes.items():
                        names.update(change if isinstance(change, dict) else [name])
        return stages


def _is_needed(name: str, digits: bool) -> bool:
    """Leave out what few projects need: tests, the digits, and what a run on them has written."""
    if name.endswith(".gitignore"):
        return True
    if name.startswith(("data/digits/", "metrics/")) or name == "dvc.lock":
        return digits
    return not name.startswith(("tests/", ".github/", ".ci/", "data/prepared/", "data/model"))


def _listed(kind: str) -> list[str]:
    """List the files that Git tracks, or those that it would with the next ``git add``."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--exclude-standard", kind],
        cwd=ROOT, capture_output=True, check=True,
    )  # fmt: skip
    return [name for name in os.fsdecode(listed.stdout).split("\0") if name]


def clone_working_tree(root: Path, *, digits: bool = False) -> Project:
    """Copy this repository's files, committed or not, and start a history of them."""
    names = _listed("--cached")
    names += [name for name in _listed("--others") if not name.startswith(("data/", "metrics/"))]
    for name in names:
        if (ROOT / name).is_file() and _is_needed(name, digits):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, root / name)
    project = Project(root)
    project.git("init", "--quiet")
    project.commit("The repository")
    return project


CLASSES = {"café noir": 34, "deux mots": 24, "straße": 16}

# Enough to learn the drawn shapes by, in a second or two.
SMALL = {
    "dataset": "data/formes",
    "prepare.image_size": [16, 16],
    "prepare.val_fraction": 0.2,
    "prepare.test_fraction": 0.2,
    "train.epochs": 4,
    "train.batch_size": 8,
    "train.filters": [8, 8],
    "train.convs_per_block": 1,
    "train.dense_units": 16,
    "evaluate.grid_images": 6,
}


def draw(seed: int, kind: int) -> Image.Image:
    """Draw a shape of its class's color on a ground of four random colors."""
    random = np.random.default_rng([seed, kind])
    height, width = (int(side) for side in random.integers(20, 41, 2))
    ground = Image.fromarray(random.integers(0, 200, (4, 4, 3), dtype=np.uint8))
    image = ground.resize((width, height), Image.Resampling.BICUBIC)
    color = tuple(int(v) for v in np.roll([250, 40, 60], kind) + random.integers(-30, 6, 3))
    left, top, right, bottom = random.uniform([0.1, 0.1, 0.6, 0.6], [0.35, 0.35, 0.9, 0.9])
    box = [left * width, top * height, right * width, bottom * height]
    pencil = ImageDraw.Draw(image)
    [pencil.ellipse, pencil.rectangle, pencil.rounded_rectangle][kind % 3](box, fill=color)
    return image


def draw_dataset(folder: Path, classes: Mapping[str, int] = CLASSES, first: int = 0) -> Path:
    """Draw a folder of images per class; half of them PNG, half JPEG."""
    for kind, (name, count) in enumerate(classes.items()):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(first, first + count):
            ending = "png" if number % 2 else "jpg"
            draw(number, kind).save(folder / name / f"dessin {number:03}.{ending}", quality=92)
    return folder


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Let one of the test processes in at a time."""
    with open(path, "w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all test processes of this run share."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base
    (base / "shared").mkdir(exist_ok=True)
    return base / "shared"


@pytest.fixture(scope="session", autouse=True)
def _own_settings(shared: Path) -> None:
    """Keep DVC's settings and caches of this user and this machine out of the tests."""
    for name in ("GLOBAL_CONFIG_DIR", "SYSTEM_CONFIG_DIR", "SITE_CACHE_DIR"):
        os.environ[f"DVC_{name}"] = str(shared / "dvc" / name.lower())


@pytest.fixture(scope="session")
def _finished(shared: Path) -> Path:
    """A project on the drawn dataset whose three stages have run, made once."""
    with _alone(shared / "lock"):
        place = shared / "finished"
        if not (place / ".git" / "done").exists():
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            project = clone_working_tree(place)
            draw_dataset(project / "data" / "formes")
            project.dvc("add", "--quiet", "data/formes")
            project.configure(SMALL)
            project.commit("A dataset")
            (shared / "temporary").mkdir(exist_ok=True)
            said = project.dvc("repro", TMPDIR=str(shared / "temporary"))
            (shared / "said.txt").write_text(said, encoding="utf-8")
            project.commit("A first run")
            (place / ".git" / "done").touch()
        return place


@pytest.fixture(scope="session")
def finished(_finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project on the drawn dataset, run and committed: for tests that only look at it."""
    root = tmp_path_factory.mktemp("finished") / "project"
    shutil.copytree(_finished, root, symlinks=True)
    return Project(root)


@pytest.fixture
def project(_finished: Path, tmp_path: Path) -> Project:
    """A project on the drawn dataset, run and committed, to be changed at will."""
    root = tmp_path / "project"
    shutil.copytree(_finished, root, symlinks=True)
    return Project(root)


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The drawn dataset: color, three classes of uneven size, names with spaces and accents."""
    return draw_dataset(tmp_path_factory.mktemp("drawn") / "formes")
