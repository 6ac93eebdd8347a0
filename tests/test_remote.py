"""Data on S3, as the README describes it: a remote to share results, and a bucket of images.

The server is Moto's, a process of its own on the loopback interface.
"""

import contextlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import boto3
import pandas as pd
import pytest
from conftest import Project, draw_dataset
from dvc.api import metrics_show

from stages.predict import predict

UNREACHABLE = "http://127.0.0.1:9"
BUCKET = "bucket"
SETTINGS = {
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_ENDPOINT_URL": UNREACHABLE,  # unless a test names the server: never Amazon's
    "NO_PROXY": "127.0.0.1",
}


@contextlib.contextmanager
def running(log: Path) -> Iterator[str]:
    """Run an S3 server on a free port; yield its address."""
    command = [sys.executable, "-m", "moto.server", "--host", "127.0.0.1", "--port", "0"]
    with open(log, "w") as file:
        server = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 60
        while not (found := re.search(r"Running on (http://127\.0\.0\.1:\d+)", log.read_text())):
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield found[1]
    finally:
        server.kill()
        server.wait()


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> Iterator[str]:
    """The address of an S3 server; its keys are in the environment, and nobody's own settings."""
    folder = tmp_path_factory.mktemp("s3")
    (folder / "config").touch()
    files = dict.fromkeys(["AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"], folder / "config")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (SETTINGS | files).items():
            patch.setenv(name, str(value))
        with running(folder / "log") as address:
            boto3.client("s3", endpoint_url=address).create_bucket(Bucket=BUCKET)
            yield address


def upload(address: str, folder: Path, prefix: str) -> None:
    client = boto3.client("s3", endpoint_url=address)
    for path in filter(Path.is_file, folder.rglob("*")):
        key = f"{prefix}/{path.relative_to(folder).as_posix()}"
        client.put_object(Bucket=BUCKET, Key=key, Body=path.read_bytes())


def index(project: Project) -> pd.DataFrame:
    return pd.read_csv(project / "data/prepared/index.csv").set_index("path")


def test_a_colleague_pulls_what_was_pushed(project, address, tmp_path):
    """Results can be looked at and used at once; only the arrays are made again."""
    project.dvc("remote", "add", "--quiet", "--default", "team", f"s3://{BUCKET}/team")
    project.commit("A remote")
    project.dvc("push", "--quiet", AWS_ENDPOINT_URL=address)

    project.git("clone", "--quiet", ".", tmp_path / "colleague")
    colleague = Project(tmp_path / "colleague")
    colleague.dvc("pull", "--quiet", "--allow-missing", AWS_ENDPOINT_URL=address)
    assert not (colleague / "data/prepared/train").exists()
    numbers = json.loads((project / "metrics/evaluate.json").read_text(encoding="utf-8"))
    with contextlib.chdir(colleague.root):
        assert metrics_show("metrics/evaluate.json") == numbers
    name = "metrics/plots/confusion.png"
    assert (colleague / name).read_bytes() == (project / name).read_bytes()
    evaluated = pd.read_csv(project / "metrics/predictions.csv").iloc[:9]
    images = [colleague / "data/formes" / path for path in evaluated["path"]]
    table = predict(images, model=colleague / "data/model.keras")
    assert table["predicted"].tolist() == evaluated["predicted"].tolist()

    said = colleague.dvc("repro")
    assert re.findall(r"Running stage '(\w+)'", said) == ["prepare"]
    assert colleague.git("status", "--porcelain") == ""  # dvc.lock has the digest of every output
    assert colleague.changed() == {}


def test_a_dataset_that_is_a_bucket(project, address, tmp_path):
    """`dvc import-url` fetches it, `dvc update` its changes; a run needs no server."""
    upload(address, draw_dataset(tmp_path / "photos", {"a": 20, "b": 20}), "photos")
    project.dvc("import-url", f"s3://{BUCKET}/photos", "data/photos", AWS_ENDPOINT_URL=address)
    said = project.python("-m", "stages", "use", "data/photos")
    assert "40 in 2 classes" in said and "data/photos is tracked by DVC" in said
    assert "40 decoded now" in project.dvc("repro", "prepare")
    before = index(project)
    project.commit("Photos")

    upload(address, draw_dataset(tmp_path / "more", {"a": 5, "b": 3}, first=50), "photos")
    project.dvc("update", "data/photos.dvc", AWS_ENDPOINT_URL=address)
    assert "48 of 2 classes, 8 decoded now" in project.dvc("repro", "prepare")
    after = index(project)
    assert len(before) == 40 and len(after) == 48
    assert after.loc[before.index, "split"].equals(before["split"])
    changed = project.git("diff", "--name-only").splitlines()
    assert changed[:2] == ["data/photos.dvc", "dvc.lock"]
    assert changed[2:] == ["metrics/prepare.json", "metrics/prepare_classes.csv"]
