"""Versions of the pipeline, read from the workspace, from DVC's cache and from its remote."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import Project
from history import CLASSES, finish, make_history, predictions_of

from stages import export
from stages.data.arrays import read_split
from stages.display.status import check_merged, git
from stages.display.versions import open_version
from stages.run.cli import UserError
from stages.run.files import write_csv
from stages.use import use


@pytest.fixture(scope="module")
def versions(tmp_path_factory) -> Project:
    return make_history(tmp_path_factory.mktemp("versions"))


@pytest.fixture
def clone(versions, tmp_path) -> Project:
    """A copy of the repository, its cache included, to be changed at will."""
    shutil.copytree(versions.root, tmp_path / "clone", symlinks=True)
    return Project(tmp_path / "clone")


def predictions(name, project):
    with open_version(name, project.root) as version:
        return version.predictions()


@pytest.mark.parametrize("name", ["two", "workspace"])
def test_images_of_any_rows_are_read(versions, name):
    rows = np.array([7, 3, 59])
    expected = read_split(versions / "data/prepared/test").gather(rows)
    with open_version(name, versions.root) as version:
        assert np.array_equal(version.images("test", rows), expected)


def test_a_file_that_is_only_on_the_remote_is_read(clone):
    expected = predictions("one", clone)[0]
    clone.dvc("push", "--all-commits", "--quiet")
    shutil.rmtree(clone / ".dvc/cache/files")
    for name in ("one", "workspace"):
        (clone / "metrics/predictions.csv").unlink(missing_ok=True)
        table, classes = predictions(name, clone)
        assert table["path"].equals(expected["path"]) and classes == CLASSES
    assert predictions("one", clone)[0].equals(expected)
    with open_version("one", clone.root) as version:
        assert len(version.index()) == 78
        message = "one: data/prepared/test can't be read .*or `dvc repro` with one checked out"
        with pytest.raises(UserError, match=message):  # never pushed: made from the dataset
            version.images("test", np.array([0]))


def test_a_file_that_is_nowhere_is_named(clone):
    (clone / "metrics/predictions.csv").unlink()
    write_csv(clone / "metrics/predictions.csv", predictions_of(clone.root, 1))
    finish(clone, "three")  # and never pushed
    shutil.rmtree(clone / ".dvc/cache/files")
    with pytest.raises(UserError, match=r"three: metrics/predictions.csv .*`dvc push`") as caught:
        predictions("three", clone)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nonsense", "nonsense: unknown Git revision.*`dvc exp list`"),
        ("", "unknown Git revision"),
    ],
)
def test_what_is_no_version_is_refused(versions, name, message):
    with pytest.raises(UserError, match=message), open_version(name, versions.root):
        pass


def test_a_version_that_was_never_run_is_refused(versions):
    message = r"bare: metrics/predictions.csv can't be read .*`dvc repro` with bare checked out"
    with (
        open_version("bare", versions.root) as version,
        pytest.raises(UserError, match=message),
    ):
        version.predictions()


def test_a_workspace_that_was_edited_but_not_reproduced_is_refused(clone):
    (clone / "params.yaml").write_text("prepare: {seed: 1}\ntrain: {epochs: 6, filters: [8]}\n")
    message = r"not up to date \(train: .*dvc repro"
    with pytest.raises(UserError, match=message), open_version("workspace", clone.root):
        pass
    clone.git("checkout", "--quiet", "params.yaml")
    (clone / "data/prepared/index.csv").unlink()  # not pulled: no edit
    with open_version("workspace", clone.root) as version:
        assert len(version.index()) == 79


def conflict(clone, name="dvc.lock"):
    """Merge two branches that have changed a line of a file, with a conflict."""
    for branch in ("theirs", "ours"):
        clone.git("checkout", "--quiet", "-B", branch, "two")
        text = (clone / name).read_text()
        (clone / name).write_text(text.replace("size: ", f"size: {len(branch)}"))
        clone.commit(branch)
    clone.run("git", "merge", "--quiet", "theirs", status=1)


def test_a_conflict_of_a_merge_is_named(clone, monkeypatch):
    conflict(clone)
    with (
        pytest.raises(UserError, match=r"^dvc\.lock: in conflict since a merge; .*`git add FILE`"),
        open_version("workspace", clone.root),
    ):
        pass
    assert len(predictions("one", clone)[0]) == 60  # versions before are read as ever
    monkeypatch.chdir(clone.root)
    before = (clone / "params.yaml").read_bytes()
    with pytest.raises(UserError, match=r"^dvc\.lock: in conflict since a merge"):
        use("data/digits")
    assert (clone / "params.yaml").read_bytes() == before
    with pytest.raises(UserError, match=r"^dvc\.lock, line \d+: not valid YAML"):
        export._read_lock()
    clone.commit("with the markers")
    for name, message in (("HEAD", "HEAD: .*dvc.lock.*of a merge"), ("workspace", "dvc.lock")):
        with pytest.raises(UserError, match=message) as caught:
            predictions(name, clone)
        assert "\n" not in str(caught.value)


def test_a_conflict_is_named_as_the_file_is(clone):
    (clone / "data/blüten 1.dvc").write_text("size: 1\n")  # Git would escape it
    clone.commit()
    clone.git("tag", "--force", "two")
    conflict(clone, "data/blüten 1.dvc")
    with pytest.raises(UserError, match=r"^data/blüten 1\.dvc: in conflict"):
        check_merged(clone.root)


def test_a_repository_of_another_user_is_told_with_git_s_own_advice(clone, monkeypatch):
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")  # for Git's own tests
    monkeypatch.chdir(clone.root)
    for call in (lambda: predictions("one", clone), lambda: use("data"), lambda: git("log")):
        with pytest.raises(UserError, match=r"config --global --add safe\.directory /") as caught:
            call()
        assert "\n" not in str(caught.value)


def test_outside_a_repository(tmp_path):
    with pytest.raises(UserError, match="not in a DVC repository"), open_version("HEAD", tmp_path):
        pass


def test_an_index_with_other_columns_is_of_an_earlier_version(clone):
    (clone / "data/prepared/index.csv").unlink()
    (clone / "data/prepared/index.csv").write_text(
        "path,class,split,digest,row\na.png,a,test,0,0\n"
    )
    finish(clone, "earlier")
    with (
        open_version("earlier", clone.root) as version,
        pytest.raises(UserError, match="earlier: .*index.csv has no column 'array_index'"),
    ):
        version.index()


def test_prepared_images_in_other_files_are_of_an_earlier_version(clone):
    (clone / "data/prepared/test/images-0000.npy").rename(clone / "data/prepared/test/pixels.npy")
    finish(clone, "earlier")
    with (
        open_version("earlier", clone.root) as version,
        pytest.raises(UserError, match="earlier: data/prepared/test has no image 59: an earlier"),
    ):
        version.images("test", np.array([3, 59]))


def test_a_project_in_a_folder_of_a_repository(versions, tmp_path):
    project = Project(tmp_path)
    project.git("init", "--quiet")
    shutil.copytree(
        versions.root, tmp_path / "below", symlinks=True,
        ignore=lambda folder, names: {".git"} & set(names),
    )  # fmt: skip
    project.commit()
    for root in (tmp_path / "below", tmp_path / "below/data"):
        for name in ("HEAD", "workspace"):
            with open_version(name, root) as version:
                assert len(version.predictions()[0]) == 60
                assert len(version.images("test", np.arange(3))) == 3


def test_a_partial_clone_fetches_what_it_lacks_or_says_so(clone, tmp_path):
    """DVC would wait forever for the files of an older commit."""
    clone.git("config", "uploadpack.allowFilter", "true")
    clone.git("config", "uploadpack.allowAnySHA1InWant", "true")
    for kind in ("blob:none", "tree:0"):
        place = tmp_path / kind.replace(":", "")
        clone.git("clone", "--quiet", f"--filter={kind}", f"file://{clone.root}", place)
        origin = Project(place).git("remote", "get-url", "origin")
        Project(place).git("remote", "set-url", "origin", "file:///nowhere")
        with (
            pytest.raises(UserError, match="^one: this partial clone lacks files"),
            open_version("one", place),
        ):
            pass
        Project(place).git("remote", "set-url", "origin", origin)
        with open_version("one", place) as version:
            assert "epochs: 3" in version.files.read_text("/params.yaml")


def test_a_shallow_clone_says_how_to_get_the_rest(clone, tmp_path):
    clone.git("clone", "--quiet", "--depth=1", f"file://{clone.root}", tmp_path / "shallow")
    for name in ("HEAD~1", "one"):
        with (
            pytest.raises(UserError, match=r"shallow clone, .*`git fetch --unshallow --tags`"),
            open_version(name, tmp_path / "shallow"),
        ):
            pass


def test_a_user_s_setting_for_signed_commits_does_not_reach_the_export(
    clone, tmp_path, monkeypatch
):
    program = tmp_path / "gpg"
    program.write_text(
        "#!/bin/sh\ncase $* in *-bsau*) cat > /dev/null; echo '[GNUPG:] SIG_CREATED ' >&2\n"
        "echo '-----BEGIN PGP SIGNATURE-----\n-----END PGP SIGNATURE-----';;\n"
        "*) echo '[GNUPG:] GOODSIG 1'; echo 'gpg: Signature made' >&2;; esac\n"
    )
    program.chmod(0o755)
    for key, value in (("gpg.program", program), ("log.showSignature", "true")):
        clone.git("config", key, value)
    (clone / "dvc.lock").write_text((clone / "dvc.lock").read_text() + "\n")
    clone.git("commit", "--quiet", "--all", "-S", "--message", "signed")
    assert "gpg: Signature made" in clone.git("log", "-1", "--format=%H")
    monkeypatch.chdir(clone.root)
    version = export._version(Path("data/model.keras"), export._read_lock())
    assert version["commit"] == clone.git("rev-parse", "HEAD")
