"""From a folder of images to a trained model: ``python -m stages start ~/Pictures/flowers``.

Each step is a command that it prints as one would type it, and that it leaves out if it was done.
"""

import argparse
import contextlib
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np

from stages.data.checks import check_class_sizes
from stages.data.dataset import find
from stages.data.images import is_image_name
from stages.data.layout import split_of
from stages.data.listing import is_data_folder
from stages.data.parameters import Prepare
from stages.data.splits import add_groups, splits_to_make
from stages.display.first_look import (
    BACKBONE_FOLDER,
    SMALL_SIDE,
    list_backbones,
    locate_backbone,
    propose_backbone,
    short_sides,
)
from stages.display.label_tables import is_table
from stages.display.status import check_merged, git
from stages.run import cli
from stages.run.cli import UserError, count, list_names
from stages.run.files import atomic_write
from stages.run.params import load_yaml, read_section
from stages.use import use

_OWN = ("prepared", "backbones", "export", "model.keras")  # what the pipeline writes to data/
_TABLES = (".csv", ".tsv")
_GIT_INIT = [("git", "init", "-q"), ("git", "add", "-A"), ("git", "commit", "-qm", "Start")]


def main(options: argparse.Namespace) -> None:
    """Do what is not done yet of the way from the folder that the command line names to a model."""
    parameters, named = read_section(Prepare, "prepare"), load_yaml(Path("params.yaml"))
    _check_git()
    source = cli.expand_home(options.folder).resolve()
    files = _list_files(source)
    inner = _innermost(files)
    files = {path[len(inner) :]: size for path, size in files.items() if path.startswith(inner)}
    target = _target(source, inner, options.copy_name)
    is_here = target.exists()
    _check_copy(source, target, files)
    is_named = named.get("dataset") == target.as_posix()
    is_used = is_named and _is_tracked(target) and not (options.backbone or options.quality)
    is_new = not git("rev-parse", "--verify", "-q", "HEAD")
    with _at_hand(source, is_here, target) as folder:
        looked_at = target if is_here else folder / inner
        try:
            sides = _look(looked_at, files, parameters, is_named)
        except UserError as error:  # in the words of the user, who knows nothing of our copy
            raise UserError(str(error).replace(str(folder), str(source))) from None
        is_small = np.median(sides) <= SMALL_SIDE
        if options.quality and (options.backbone == "none" or (is_small and not options.backbone)):
            raise UserError(
                f"--quality {options.quality} fine-tunes a backbone, and "
                + ("--from-scratch is without one" if options.backbone else "the images are small")
            )
        if options.backbone:
            locate_backbone(options.backbone)  # a mistake ends here, before anything is copied
        asks_backbone = not (options.backbone or is_small) and _lacks_backbone(is_used)
        _check_answers(options.yes, is_new, asks_backbone)
        network = _choose(options.yes, len(files)) if asks_backbone else options.backbone
        is_used = is_used and network in (None, "none")
        if inner:
            print(f"\n{source.name} holds one folder only: taking {inner}")
        if is_new:
            for command in _GIT_INIT:
                _run(*command)
        if is_here:
            print(f"\n{target}: it is here already, nothing is copied")
        else:
            _copy(source, folder, inner, target, files)
    name, file = locate_backbone(network or "none")
    if not file and f"{name}.keras" not in list_backbones() and name != "none":
        advice = (
            "run this again later, or with --from-scratch, or with --backbone FILE, a .keras file"
            " that you have"
        )
        _run("python", "-m", "stages", "backbone", name, advice=advice)
    if not is_used:
        flags = [] if network is None else ["--backbone", network]
        flags = ["--from-scratch"] if network == "none" else flags
        flags += ["--quality", options.quality] if options.quality else []
        _announce("python", "-m", "stages", "use", str(target), *flags)
        use(target, network, options.quality)
    own = [f"{target}.dvc", str(target.parent / ".gitignore"), str(BACKBONE_FOLDER)]
    if git("status", "--porcelain", "--", *own, *[] if is_used else ["params.yaml"]):
        is_known = git("ls-files", "--", own[0])
        own = ["params.yaml", *filter(os.path.exists, own)]
        _run("git", "add", *own)
        message = f"Settings for {target.name}" if is_known else f"Dataset {target.name}"
        _run("git", "commit", "-m", message, "--", *own)
    _run("dvc", "repro")
    _show()


def _check_git() -> None:
    """Raise a UserError if a commit can't be made here."""
    check_merged()
    if not git("var", "GIT_COMMITTER_IDENT"):
        raise UserError(
            "Git does not know who you are, which a commit needs: `git config --global user.name"
            ' "Your Name"` and `git config --global user.email "you@example.com"`, then run this'
            " again"
        )
    if git("rev-parse", "--verify", "-q", "HEAD") and not git("symbolic-ref", "-q", "HEAD"):
        raise UserError(
            "no branch is checked out, so that the commit would be on none: `git switch -c NAME`,"
            " then run this again"
        )


def _list_files(source: Path) -> dict[str, int]:
    """Return the size of each file in a folder or archive, but hidden ones and a system's.

    Raises
    ------
    UserError
        If it is neither, is damaged, would write outside of its folder, or holds no image.
    """
    try:
        found = _list_all(source)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error) as error:
        raise UserError(f"{source}: damaged ({error}); download or copy it again") from None
    if outside := [path for path in found if ".." in path.split("/") or path.startswith("/")]:
        raise UserError(f"{source}: would write outside of its folder: {list_names(outside)}")
    files = {}
    for path, size in found.items():
        *folders, name = path.split("/")
        if all(map(is_data_folder, folders)) and not name.startswith("."):
            files[path] = size
    if not any(is_image_name(PurePosixPath(path).name) for path in files):
        raise UserError(f"{source}: no images in it; expected a folder of images per class")
    return files


def _list_all(source: Path) -> dict[str, int]:
    if source.is_dir():
        paths = [
            Path(top, name) for top, _, names in os.walk(source, followlinks=True) for name in names
        ]
        return {
            path.relative_to(source).as_posix(): path.stat().st_size
            for path in paths
            if path.is_file()
        }
    if not source.exists():
        raise UserError(cli.no_such("folder or file", source))
    if zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as archive:
            members = [one for one in archive.infolist() if not one.is_dir()]
        if any(one.flag_bits & 1 for one in members):
            raise UserError(f"{source}: needs a password; unpack it, and name the folder")
        return {one.filename: one.file_size for one in members}
    if tarfile.is_tarfile(source):
        with tarfile.open(source) as tar:
            return {one.name.removeprefix("./"): one.size for one in tar if one.isfile()}
    advice = "name the folder it is in" if is_table(source) else "expected a folder, a zip or a tar"
    raise UserError(f"{source}: {advice}")


def _innermost(files: dict[str, int]) -> str:
    """Return the folder that holds all images, classes, splits or a table: "" or ``"photos/"``."""
    paths = [path for path in files if is_image_name(path.split("/")[-1]) or _is_table_name(path)]
    inner = ""
    while True:
        tops = {path[len(inner) :].partition("/")[0] for path in paths}
        below = inner + f"{next(iter(tops))}/"
        rest = [path[len(below) :] for path in paths]
        is_class = not any("/" in path or _is_table_name(path) for path in rest)
        if len(tops) > 1 or is_class or split_of(next(iter(tops))):
            return inner
        inner = below


def _is_table_name(path: str) -> bool:
    return path.lower().endswith(_TABLES)


def _target(source: Path, inner: str, name: str | None) -> Path:
    """Return where the dataset is or will be: in data/, unless it is in the project already."""
    here = Path.cwd().resolve()
    if source.is_dir() and source.is_relative_to(here):
        return source.relative_to(here) / inner
    if name is None:
        name = source.name
        for _ in source.suffixes if source.is_file() else ():
            stem, ending = os.path.splitext(name)
            name = stem if ending in (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz") else name
    if not (name and Path(name).name == name == name.strip()) or name.startswith(("-", ".")):
        raise UserError(f"--name: expected the name of a folder in data/, found {name!r}")
    if name in _OWN:
        raise UserError(f"data/{name} is what the pipeline writes; give another --name")
    return Path("data", name)


def _check_copy(source: Path, target: Path, files: dict[str, int]) -> None:
    """Raise a UserError if the copy that is here is of something else, or there is no space."""
    if target.exists():
        there = [target / path for path in files]
        differ = [
            path
            for path, copy in zip(files, there, strict=True)
            if not copy.is_file() or copy.stat().st_size != files[path]
        ]
        if differ:
            raise UserError(
                f"{target} exists, and {len(differ):,} of {count(len(files), 'file')} of {source}"
                f" are not in it, or have another size: {list_names(differ, 3)}; give another"
                f" --name, or, to add to it, copy them yourself and run `python -m stages start"
                f" {shlex.quote(str(target))}`"
            )
        return
    size, free = sum(files.values()), shutil.disk_usage(".").free
    if 2 * size > free:  # DVC keeps a copy of its own
        raise UserError(
            f"{source}: {size / 1e9:.1f} GB, twice with DVC's copy, and {free / 1e9:.1f} GB are"
            " free here; free some, or leave the images where they are, without versions:"
            f" `python -m stages use {shlex.quote(str(source))}`, then `dvc repro`"
        )


@contextlib.contextmanager
def _at_hand(source: Path, is_here: bool, target: Path) -> Iterator[Path]:
    """Yield the folder that holds the images: that of the user, or an archive's, for a while."""
    if is_here or source.is_dir():
        yield target if is_here else source
        return
    Path(".dvc", "tmp").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=Path(".dvc", "tmp")) as folder:
        print(f"unpacking {source.name} ...", flush=True)
        kind = None if zipfile.is_zipfile(source) else "data"
        try:
            if kind is None:
                shutil.unpack_archive(source, folder, "zip")
            else:
                with tarfile.open(source) as tar:
                    tar.extractall(folder, filter="data")
        except (
            zipfile.BadZipFile,
            shutil.ReadError,
            tarfile.TarError,
            EOFError,
            zlib.error,
        ) as error:
            raise UserError(f"{source}: can't be unpacked: {error}; nothing was changed") from None
        yield Path(folder)


def _look(folder: Path, files: dict[str, int], parameters: Prepare, is_named: bool) -> np.ndarray:
    """Return the short sides of some images, if `use` and prepare will accept them."""
    try:
        images, _ = find(folder, "data/prepared", parameters.layout if is_named else "auto")
        images = add_groups(images, parameters.group_by if is_named else None)
        fractions = parameters.val_fraction, parameters.test_fraction
        check_class_sizes(images, splits_to_make(images, *fractions))
    except UserError:
        if not any(_is_table_name(path) for path in files if "/" not in path):
            raise  # otherwise `use` looks into the tables
    return short_sides(folder, [path for path in files if is_image_name(path.split("/")[-1])])[0]


def _is_tracked(target: Path) -> bool:
    """Return whether `use` has come to its end: the last that it does is to track the backbone."""
    train = load_yaml(Path("params.yaml")).get("train") or {}
    backbone = train.get("backbone", "none")
    paths = [target] + ([BACKBONE_FOLDER / backbone] if backbone != "none" else [])
    return all(Path(f"{path}.dvc").is_file() or git("ls-files", "--", path) for path in paths)


def _lacks_backbone(is_used: bool) -> bool:
    """Return whether there is a backbone to ask for: none is here, or one that is not used."""
    if is_used:
        is_scratch = (load_yaml(Path("params.yaml")).get("train") or {}).get("backbone") == "none"
        return is_scratch and bool(list_backbones())
    return not list_backbones()


def _check_answers(yes: bool, is_new: bool, asks_backbone: bool) -> None:
    """Ask whether to make a repository; raise a UserError if a question can't be asked."""
    question = "There is no Git repository here, which DVC needs. Make one (git init)?"
    if yes:
        print(question if is_new else "", end="\n" * is_new, flush=True)
    elif (is_new or asks_backbone) and not sys.stdin.isatty():
        flags = "--backbone NAME_OR_FILE, --from-scratch or --yes" if asks_backbone else "--yes"
        question = question if is_new else "Use a pre-trained network (a backbone)?"
        raise UserError(
            f"{question} There is no terminal to ask on: answer with"
            f" {'--yes' if is_new else flags}; nothing was changed"
        )
    elif is_new and _ask(question).lower().startswith("n"):
        raise UserError("nothing was changed")


def _choose(yes: bool, images: int) -> str:
    """Ask which backbone to use, and return its name or path, or "none"."""
    words = "A network that has learned from millions of photographs (a backbone) is better than"
    words += " one from scratch,\nand faster to train. "
    if here := list_backbones():  # and the model in params.yaml is from scratch
        name, words = here[0], f"{words}Use {BACKBONE_FOLDER / here[0]}?"
    else:
        name, cost = propose_backbone(images)
        words += f"Download {name} ({cost})?"
    answer = "" if yes else _ask(f"{words}\nn: from scratch; or type the path of a .keras file")
    if answer.lower() in ("", "y", "yes"):
        return name
    if answer.lower() in ("n", "no"):
        return "none"
    locate_backbone(answer)  # or it is a mistake
    return answer


def _ask(question: str) -> str:
    """Ask on the terminal; Enter is yes."""
    try:
        return input(cli.printable(question, "\n") + " [Y/n] ").strip()
    except EOFError:
        raise KeyboardInterrupt from None


def _copy(source: Path, folder: Path, inner: str, target: Path, files: dict[str, int]) -> None:
    """Copy the images to data/, or move them there from an unpacked archive."""
    if source.is_dir():
        command = f"cp -r {shlex.quote(str(source / inner))} {shlex.quote(str(target))}"
    else:
        unpack = "unzip -q" if zipfile.is_zipfile(source) else "tar -xf"
        place = shlex.quote(str(target if not inner else target.with_suffix(".tmp")))
        to = "-d" if unpack.startswith("unzip") else "-C"
        command = f"mkdir {place} && {unpack} {shlex.quote(str(source))} {to} {place}"
        if inner:
            moved = shlex.quote(f"{target.with_suffix('.tmp')}/{inner.rstrip('/')}")
            command += f" && mv {moved} {shlex.quote(str(target))}"
    print(f"\n$ {cli.printable(command)}\n{count(len(files), 'file')},", end=" ")
    print(f"{sum(files.values()) / 1e6:,.0f} MB", flush=True)
    with atomic_write(target) as tmp:  # so that half a copy never counts
        shutil.copytree(folder / inner, tmp, ignore=_left_out, ignore_dangling_symlinks=True)


def _left_out(folder: str, names: list[str]) -> list[str]:
    """Return the names that are not copied: hidden ones, and folders of systems."""
    is_folder = {name: os.path.isdir(os.path.join(folder, name)) for name in names}
    return [n for n in names if n.startswith(".") or (is_folder[n] and not is_data_folder(n))]


def _announce(*words: str) -> str:
    """Print a command as one types it, and return it."""
    command = cli.printable(shlex.join(words))
    print(f"\n$ {command}", flush=True)
    return command


def _run(*words: str, advice: str = "solve that, and the same command goes on") -> None:
    """Print a command, and run it to its end.

    Raises
    ------
    UserError
        If it fails.
    """
    command = _announce(*words)
    python = {"python": [sys.executable], "dvc": [sys.executable, "-m", "dvc"]}
    process = subprocess.Popen([*python.get(words[0], [words[0]]), *words[1:]])
    try:
        status = process.wait()
    except BaseException as stop:
        if not isinstance(stop, KeyboardInterrupt):  # the terminal sends Ctrl-C to both
            process.terminate()
        process.wait()
        raise
    if status:
        raise UserError(f"`{command}` failed, for the reason above: {advice}")


def _show() -> None:
    """Open the page of the results where that is possible, and say what comes next."""
    can_open = sys.platform == "darwin" or {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys()
    if can_open and sys.stdout.isatty() and "CI" not in os.environ:
        _run("dvc", "plots", "show", "--open")
    cli.summary(
        "done",
        {
            "see the result": "dvc plots show --open",
            "keep it": 'git add -A && git commit -m "First run" && git tag v1',
            "use it": "python -m stages predict photo.jpg",
        },
    )


if __name__ == "__main__":
    raise SystemExit("run it as: python -m stages start")
