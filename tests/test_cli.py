"""Terminal output: how a program ends, progress, summaries."""

import contextlib
import errno
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from conftest import ROOT, options

from stages.run import cli


def program(body: str, folder: Path, **environment: str) -> subprocess.Popen:
    """Start a program whose `main` has this body, under `cli.run`."""
    code = "\n    ".join(["def main():", *body.splitlines()])
    code = f"import os, sys, time\nfrom stages.run import cli, files\n{code}\n"
    code += "cli.run(main, on_interrupt='the first half is kept')"
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
        ("raise OSError(28, 'No space left on device')", 1, "No space left on device; free some"),
        ("open('here', 'x'); open('here', 'x')", 1, "here: File exists; the first half is kept."),
        ("open('x' * 300)", 1, "x: File name too long; the first half is kept."),
        ("os.rename('no', 'yes')", 1, "no: No such file or directory; the first half is kept."),
        ("os.read(99, 1)", 1, "Bad file descriptor; the first half is kept."),
        ("os.chdir(99)", 1, "Bad file descriptor; the first half is kept."),
        ("open(b'a\\nb\\xff')", 1, "a\\nb\\udcff: No such file or directory; the first half"),
        ("raise OSError('a library says so')", 1, "Traceback"),
        ("raise KeyboardInterrupt", 130, "Stopped: the first half is kept."),
        ("raise KeyError('ours')", 1, "Traceback"),
        ("print('\\udce9 \\u2603')", 0, ""),
        (
            r"raise cli.UserError('a\x1b[2J\x9b\r\u202e.png: no image')",
            1,
            r"a\x1b[2J\x9b\r\u202e.png: no image",
        ),
    ],
)
def test_a_program_ends_in_one_line(tmp_path, body, status, errors):
    child = program(body, tmp_path, PYTHONIOENCODING="ascii")
    _, stderr = child.communicate(timeout=60)
    assert child.returncode == status, stderr
    assert errors in stderr
    assert stderr.count("\n") <= 1 or "Traceback" in errors


def test_what_the_system_refuses_ends_in_one_line(capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "tensorflow", raising=False)  # else it exits at once
    handlers = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    for number in errno.errorcode:
        error = OSError(number, os.strerror(number), "data/x.npy")
        if isinstance(error, BrokenPipeError):  # of the output, see below
            continue
        with pytest.raises(SystemExit) as ended:
            cli.run(mock.Mock(side_effect=error), "nothing was written")
        said = capsys.readouterr().err
        assert ended.value.code == 1 and said.count("\n") == 1
        assert said.startswith(f"data/x.npy: {os.strerror(number)}; ")
        assert said.endswith("nothing was written.\n")
    for name, handler in handlers.items():
        signal.signal(name, handler)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_in_one_line(tmp_path, number, status):
    child = program("print('ready', flush=True)\ntime.sleep(60)", tmp_path)
    assert child.stdout.readline() == "ready\n"
    child.send_signal(number)
    _, stderr = child.communicate(timeout=60)
    assert (child.returncode, stderr.count("\n")) == (status, 1)
    assert "the first half is kept" in stderr


@pytest.mark.parametrize("length", [1, 100_000])
def test_a_closed_pipe_ends_without_a_traceback(tmp_path, length):
    body = f"sys.stdin.read()\nprint('x' * {length})"
    child = program(body, tmp_path, PYTHONUNBUFFERED="")
    child.stdout.close()
    child.stdin.close()
    assert (child.wait(60), child.stderr.read()) == (141, "")
    child.stderr.close()


def test_a_summary_is_aligned(capsys):
    cli.summary("prepare", {"images": 3, "left": "none"})
    assert capsys.readouterr().out == "\nprepare\n  images  3\n  left    none\n"


@pytest.mark.parametrize(
    ("number", "words"), [(0, "0 files"), (1, "1 file"), (2, "2 files"), (12345, "12,345 files")]
)
def test_a_number_and_its_noun_agree(number, words):
    assert cli.count(number, "file") == words


def test_names_are_listed_on_one_line():
    assert cli.list_names(["b", "a\nc"]) == "b, a\\nc"
    assert cli.list_names(map(str, range(2000)), 2) == "0, 1 and 1,998 more"


def test_a_terminal_shows_that_tensorflow_is_being_loaded():
    """A pseudo-terminal as standard error; the line is erased at the end."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", "import stages.model"]
    subprocess.run(command, stderr=theirs, cwd=ROOT, check=True)
    os.close(theirs)
    with open(ours, "rb", buffering=0) as screen, contextlib.suppress(OSError):  # of a closed one
        shown = screen.read(1000)
        assert shown.startswith(b"loading TensorFlow ...\r")
        assert shown.endswith(b" \r")


def test_a_message_of_several_lines_is_cut_to_its_first():
    assert cli.first_line(ValueError("\nno\nyes")) == "no"
    assert cli.first_line(KeyboardInterrupt()) == "KeyboardInterrupt"


def test_what_worker_processes_import_is_light():
    code = "import stages.run.cli, stages.run.files, sys; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert "stages.run.files" in modules
    assert not {"tensorflow", "pandas", "numpy", "matplotlib"} & set(modules.split())


def test_a_summary_is_wrapped_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    cli.summary("prepare", {"left": "out: " + " ".join(f"file-{n}.png" for n in range(9))})
    _, _, first, *others = capsys.readouterr().out.splitlines()
    assert first.startswith("  left  out: file-0.png")
    assert others and all(line.startswith("        file-") for line in others)
    assert max(map(len, [first, *others])) <= 40


def test_a_summary_shows_no_control_characters(capsys):
    """Names of files and classes may hold them; a terminal would obey."""
    cli.summary("a\x1b[31m", {"name": "x\x1b]0;title\x07\r\ny\x9b2J\udcff", "path": Path("b\x08")})
    out = capsys.readouterr().out
    assert out == (
        "\na\\x1b[31m\n  name  x\\x1b]0;title\\x07\\r\\ny\\x9b2J\\udcff\n  path  b\\x08\n"
    )


@pytest.mark.parametrize("words", [["prepare"], ["train"], ["evaluate"], ["use", "x"], ["compare"]])
def test_a_python_without_the_packages_is_told_in_a_line(words):
    """As when dvc is of one environment, and `python` of another."""
    done = subprocess.run(
        [sys.executable, "-S", "-m", "stages", *words], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith(f"{sys.executable} lacks the package ")
    assert "pip install -r requirements.txt" in done.stderr


@pytest.mark.parametrize(
    ("path", "advice"),
    [
        ("data/Friut", "did you mean data/Fruit?"),
        ("DATA/FRUIT", "did you mean data/Fruit?"),
        ("dta/Friut/appel", "did you mean data/Fruit/apple?"),
        ("Friut", "did you mean data/Fruit?"),
        ("./data/../data/Fruits/", "did you mean data/../data/Fruit?"),
        ("data/Toys", "DVC tracks it: fetch it with `dvc pull`"),
        ("data/toy", "did you mean data/Toys?"),  # of which there is Toys.dvc only
        ("model.jpg", "name another one"),  # and not data/other.jpg
        ("data/cach", "name another one"),  # and not .cache
        ("data/Fruit/photo.jpg/x", "name another one"),
        ("nothing/like/that", "name another one"),
        ("/data/Friut", "name another one"),
    ],
)
def test_a_path_that_is_not_there_is_told_with_the_nearest_that_is(
    tmp_path, monkeypatch, path, advice
):
    (tmp_path / "data/Fruit/apple").mkdir(parents=True)
    (tmp_path / "data/.cache").mkdir()
    (tmp_path / "data/Fruit/photo.jpg").touch()
    (tmp_path / "data/Toys.dvc").touch()
    (tmp_path / "data/other.jpg").touch()
    monkeypatch.chdir(tmp_path)
    told = cli.no_such("folder", Path(path), "name another one")
    assert told == f"{Path(path)}: no such folder; {advice}"


def test_a_path_from_the_root_is_told_with_one_from_the_root(tmp_path):
    (tmp_path / "Fruit").mkdir()
    near = f"{tmp_path}/Frut: no such file; did you mean {tmp_path}/Fruit?"
    assert cli.no_such("file", tmp_path / "Frut") == near
    assert cli.no_such("file", tmp_path / "x") == f"{tmp_path}/x: no such file"


@pytest.mark.parametrize(
    ("name", "words", "told"),
    [
        ("", "trian", "argument NAME: invalid choice: 'trian'; did you mean train?"),
        ("", "--nothing use x", "unknown: --nothing;"),
        ("use", "data/x --bakbone b", "unknown: --bakbone b; did you mean --backbone?"),
        ("use", "data/My flowers", "unknown: flowers;"),
        ("use", "", "the following arguments are required: FOLDER;"),
        ("predict", "x --treshold=1", "unknown: --treshold=1; did you mean --threshold?"),
        ("predict", "x --format jsno", "invalid choice: 'jsno'; did you mean json?"),
        ("predict", "x --format=gif", "invalid choice: 'gif' (choose from "),
        ("predict", "x --top 0", "--top: expected a whole number from 1 on, found '0';"),
        ("train", "\x1b[2J", "unknown: \\x1b[2J;"),
    ],
)
def test_a_wrong_command_line_is_told_in_one_line_with_the_near_name(capsys, name, words, told):
    with pytest.raises(SystemExit) as ended:
        options(*f"{name} {words}".split())
    line = capsys.readouterr().err
    program = f"python -m stages {name}".strip()
    listed = "options" if name else "stages and commands"
    assert (ended.value.code, line.count("\n")) == (2, 1)
    assert line.startswith(f"{program}: ") and told in line
    assert line.endswith(f" `{program} --help` lists the {listed}\n")
