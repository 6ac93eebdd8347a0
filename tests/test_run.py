"""What every stage stands on: parameters, terminal, scratch folder, whole files."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from stages.utils import files
from stages.utils.cli import UserError
from stages.utils.params import Parameters, read_dataset, read_section


class Shape(Parameters):
    translation: Annotated[float, Field(ge=0, le=1)] = 0.0


class Example(Parameters):
    epochs: Annotated[int, Field(gt=0)] = 3
    rate: float = 0.5
    size: tuple[Annotated[int, Field(gt=0)], ...] = (8, 8)
    mode: Literal["auto", "rgb"] = "auto"
    pattern: str | None = None
    shape: Shape = Shape()


def read(folder: Path, text: str) -> Example:
    path = folder / "params.yaml"
    path.write_text(text, encoding="utf-8")
    return read_section(Example, "example", path)


def test_section_is_read_and_completed_with_defaults(tmp_path):
    section = read(tmp_path, "example: {epochs: 7, size: [4, 5], shape: {translation: 0.25}}")
    assert section == Example(epochs=7, size=(4, 5), shape=Shape(translation=0.25))
    assert read(tmp_path, "example:") == read(tmp_path, "example: {}") == Example()


def test_numbers_are_read_as_dvc_reads_them(tmp_path):
    assert read(tmp_path, "example: {rate: 1e-3}").rate == 1e-3
    assert read(tmp_path, "example: {rate: 2}").rate == 2.0
    assert read(tmp_path, "example: {pattern: off}").pattern == "off"
    assert read(tmp_path, "example: {pattern: null}").pattern is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("example: {epoch: 1}", ["example.epoch", "unknown key", "`epochs`"]),
        ("example: {zzz: 1}", ["example.zzz", "known keys", "epochs, rate"]),
        ("example: {shape: {shfit: 1}}", ["example.shape.shfit", "`shift`"]),
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
        ("example: {epochs: 1", ["line ", "not valid YAML"]),
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
def test_no_text_makes_the_reader_fall_over(tmp_path_factory, text):
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


def program(body: str, folder: Path, **environment: str) -> subprocess.Popen:
    """Start a program whose `main` has this body, under `cli.run`."""
    code = "\n    ".join(["def main():", *body.splitlines()])
    code = f"import os, sys, time\nfrom stages.utils import cli, files\n{code}\n"
    code += "cli.run(main, kept='the first half is kept')"
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), **environment}
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=folder, env=environment, text=True, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("body", "status", "errors"),
    [
        ("print('fine')", 0, ""),
        ("return 3", 3, ""),
        ("raise cli.UserError('x.png: no image; remove it')", 1, "x.png: no image; remove it"),
        ("raise OSError(28, 'No space left on device')", 1, "No space left on device: free some"),
        ("open('here', 'x'); open('here', 'x')", 1, "here: File exists; the first half is kept."),
        ("raise KeyboardInterrupt", 130, "Stopped: the first half is kept."),
        ("raise KeyError('ours')", 1, "Traceback"),
        ("print('\\udce9 \\u2603')", 0, ""),
    ],
)
def test_a_program_ends_in_one_line(tmp_path, body, status, errors):
    child = program(body, tmp_path, PYTHONIOENCODING="ascii")
    _, said = child.communicate(timeout=60)
    assert child.returncode == status, said
    assert errors in said
    assert said.count("\n") <= 1 or "Traceback" in errors


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_in_one_line(tmp_path, number, status):
    child = program("print('ready', flush=True)\ntime.sleep(60)", tmp_path)
    assert child.stdout.readline() == "ready\n"
    child.send_signal(number)
    _, said = child.communicate(timeout=60)
    assert (child.returncode, said.count("\n")) == (status, 1)
    assert "the first half is kept" in said


@pytest.mark.parametrize("length", [1, 100_000])
def test_a_closed_pipe_is_no_failure_worth_a_traceback(tmp_path, length):
    body = f"sys.stdin.read()\nprint('x' * {length})"
    child = program(body, tmp_path, PYTHONUNBUFFERED="")
    child.stdout.close()
    child.stdin.close()
    assert (child.wait(60), child.stderr.read()) == (141, "")
    child.stderr.close()


def test_a_lock_is_for_one_and_ends_with_its_process(tmp_path):
    body = "with files.stage_lock('train'):\n    print('mine', flush=True)\n    time.sleep({})"
    first = program(body.format(60), tmp_path)
    assert first.stdout.readline() == "mine\n"
    second = program(body.format(0), tmp_path)
    _, said = second.communicate(timeout=60)
    assert second.returncode == 1
    assert said.count("\n") == 1
    assert f"train (process {first.pid}) is still at work" in said
    first.kill()
    first.communicate(timeout=60)
    third = program(body.format(0), tmp_path)
    assert third.communicate(timeout=60) == ("mine\n", "")


def test_a_lock_is_held_for_one_workspace(tmp_path):
    """Experiments in temporary workspaces share the scratch folder, but not the lock."""
    first, second = tmp_path / "a", tmp_path / "b"
    first.mkdir()
    second.mkdir()
    body = "with files.stage_lock('train'):\n    print('mine', flush=True)\n    sys.stdin.read()"
    children = [program(body, place, DVC_ROOT=str(first)) for place in (first, second)]
    assert [child.stdout.readline() for child in children] == ["mine\n", "mine\n"]
    for child in children:
        child.communicate(timeout=60)
    assert [path.name for path in (second / ".dvc" / "tmp").iterdir()] == ["stage.lock"]


def test_one_folder_of_scratch_is_taken_in_turns(tmp_path):
    body = (
        "place = files.scratch_dir('features')\n"
        "with files.exclusive(place):\n"
        "    for word in ('in', 'out'):\n"
        "        with open(place / 'log', 'a') as log:\n"
        "            log.write(word + ' ')\n"
        "        time.sleep(0.3)"
    )
    children = [program(body, tmp_path) for _ in range(3)]
    assert [child.wait(60) for child in children] == [0, 0, 0]
    log = tmp_path / ".dvc/tmp/scratch/features/log"
    assert log.read_text().split() == ["in", "out"] * 3


def test_the_newest_files_are_kept(tmp_path):
    for number in range(5):
        (tmp_path / f"{number}.npy").touch()
        os.utime(tmp_path / f"{number}.npy", (number, number))
    (tmp_path / "other").touch()
    files.keep_newest(tmp_path, "*.npy", 2)
    assert {path.name for path in tmp_path.iterdir()} == {"3.npy", "4.npy", "other"}


def test_scratch_is_the_main_checkout_s(tmp_path, monkeypatch):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    assert files.scratch_dir("store") == tmp_path / ".dvc" / "tmp" / "scratch" / "store"
    assert files.scratch_dir("store").is_dir()


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "file.txt"
    with files.atomic_write(path) as tmp:
        tmp.write_text("old")
        assert not path.exists()
        assert tmp.parent == path.parent
    with pytest.raises(ZeroDivisionError), files.atomic_write(path) as tmp:
        tmp.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert os.listdir(path.parent) == ["file.txt"]


def test_a_folder_is_replaced_whole(tmp_path):
    path = tmp_path / "rows"
    path.write_text("a file in its place")
    for name in ("old", "new"):
        with files.atomic_write(path) as tmp:
            tmp.mkdir()
            (tmp / name).write_text(name)
    assert [file.name for file in path.iterdir()] == ["new"]
    assert os.listdir(tmp_path) == ["rows"]


def test_a_replaced_file_does_not_change_its_other_links(tmp_path):
    """With DVC's hardlink cache, a change in place would be one of the cache."""
    path, cached = tmp_path / "model", tmp_path / "cache"
    path.write_text("old")
    os.link(path, cached)
    files.write_json(path, {"a": 1})
    assert cached.read_text() == "old"


def test_what_a_killed_writer_left_does_no_harm(tmp_path):
    body = (
        "from stages.utils import files\n"
        "with files.atomic_write('x') as tmp:\n"
        "    tmp.mkdir()\n    (tmp / 'half').touch()\n"
        "    print('ready', flush=True)\n    time.sleep(60)"
    )
    child = program(body, tmp_path)
    child.stdout.readline()
    child.kill()
    child.communicate(timeout=60)
    assert not (tmp_path / "x").exists()
    files.write_json(tmp_path / "x", {"é": "ü"})
    assert (tmp_path / "x").read_bytes() == '{\n  "é": "ü"\n}\n'.encode()
    assert os.listdir(tmp_path) == ["x"]


def test_json_holds_only_what_json_can(tmp_path):
    with pytest.raises(ValueError):
        files.write_json(tmp_path / "x", {"loss": float("nan")})
    assert os.listdir(tmp_path) == []


HOSTILE = {
    "KERAS_BACKEND": "torch", "KERAS_HOME": "/nowhere", "KERAS_NNX_ENABLED": "1",
    "MPLBACKEND": "TkAgg", "MATPLOTLIBRC": "/nowhere", "OMP_NUM_THREADS": "7",
    "TF_ENABLE_ONEDNN_OPTS": "0", "TF_XLA_FLAGS": "--x", "XLA_FLAGS": "--y",
    "ONEDNN_MAX_CPU_ISA": "SSE41", "TF_NUM_INTRAOP_THREADS": "1", "NPY_DISABLE_CPU_FEATURES": "AVX",
}  # fmt: skip


def test_settings_of_the_user_are_without_effect(tmp_path):
    body = "import json\njson.dump(dict(os.environ), sys.stdout)"
    seen = []
    for hostile in ({}, HOSTILE):
        out, _ = program(body, tmp_path, **hostile).communicate(timeout=60)
        seen.append(out)
    assert seen[0] == seen[1]


@pytest.mark.parametrize("name", ["CUDA_VISIBLE_DEVICES", "DVC_ROOT"])
def test_where_a_run_goes_stays_the_user_s_choice(tmp_path, name):
    out, _ = program(f"print(os.environ['{name}'])", tmp_path, **{name: "x"}).communicate()
    assert out == "x\n"


def test_the_surroundings_of_a_command_are_light():
    code = "import stages.utils.cli, stages.utils.files, sys; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert not {"tensorflow", "pandas", "numpy", "matplotlib"} & set(modules.split())
