"""The program: ``python -m stages`` lists the stages and commands, and runs one of them.

The environment is set up before a stage is imported, since NumPy and TensorFlow read it when they
are imported. Importing a module of this project has no such effect.
"""

import argparse
import difflib
import functools
import importlib
import re
import signal
import sys
from collections.abc import Iterable
from typing import Any, NoReturn

from stages.run import cli, environment

_PROGRAM = "python -m stages"
_UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}


class _Parser(argparse.ArgumentParser):
    """A command line whose errors are one line, of the command that was named, with near names."""

    def parse_known_args(self, *args: Any, **kwargs: Any) -> tuple[Any, list[str]]:
        """Refuse what is unknown here: the program would print the usage of all commands."""
        options, unknown = super().parse_known_args(*args, **kwargs)
        if unknown:
            known = re.findall(r"--[\w-]+", self.format_usage())
            near = (_near(word.partition("=")[0], known) for word in unknown)
            self.error(f"unknown: {' '.join(unknown)}", next(filter(None, near), ""))
        return options, unknown

    def error(self, message: str, near: str = "") -> NoReturn:
        """End with one line."""
        wrong = re.fullmatch(r"(.*invalid choice: '(.*)') \(choose from (.*)\)", message)
        if wrong and (near := _near(wrong[2], re.findall(r"[\w-]+", wrong[3]))):
            message = wrong[1]
        listed = "stages and commands" if self.prog == _PROGRAM else "options"
        line = f"{self.prog}: {message}; {near}`{self.prog} --help` lists the {listed}"
        self.exit(2, f"{cli.printable(line)}\n")


def _near(word: str, known: Iterable[str]) -> str:
    """Return a question that names the nearest of the known words, if one is near."""
    near = difflib.get_close_matches(word, known, 1)
    return f"did you mean {near[0]}? " if near else ""


def _probability(text: str) -> float:
    """Read a number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, found {text!r}")
    return value


def _seconds(text: str) -> float:
    """Read a duration such as ``90m`` or ``1h30m``."""
    parts = re.findall(r"(\d+(?:\.\d+)?)([dhms])", text)
    if not parts or "".join(map("".join, parts)) != text:
        raise argparse.ArgumentTypeError(f"expected a time such as 2h or 1h30m, found {text!r}")
    return sum(float(number) * _UNITS[unit] for number, unit in parts)


def parser() -> argparse.ArgumentParser:
    """Return the command line of the program: a sub-command for each stage and command.

    Each has the default ``on_interrupt``, which is printed when it is stopped: what is left behind,
    and how to go on.
    """
    program = _Parser(
        prog=_PROGRAM,
        description="Train and use an image classifier. `dvc repro` runs the three stages.",
        epilog="Run `python -m stages NAME --help` for the options of one of them.",
    )
    names = program.add_subparsers(title="stages and commands", dest="name", metavar="NAME")

    def add(name: str, words: str, on_interrupt: str) -> argparse.ArgumentParser:
        added = names.add_parser(name, help=words, description=f"{words[0].upper()}{words[1:]}.")
        added.set_defaults(on_interrupt=on_interrupt)
        return added

    add(
        "prepare",
        "assign images to train, val and test, and write them resized as arrays",
        "decoded images are kept; run `dvc repro` to continue",
    )
    train = add(
        "train",
        "train the network on the prepared images",
        "finished epochs are kept; `dvc repro` resumes after the last one",
    )
    train.add_argument(
        "--replica", action="store_true",
        help="run as one replica, which TF_CONFIG describes (`dvc repro` starts replicas itself)",
    )  # fmt: skip
    evaluate = add(
        "evaluate",
        "evaluate the model on the test split, or on a labeled folder",
        "no partial files are left",
    )
    evaluate.add_argument(
        "--on", metavar="FOLDER",
        help="labeled images, a folder per class or labels.csv; without it, run the stage as"
        " `dvc repro` does",
    )  # fmt: skip
    evaluate.add_argument(
        "--output", metavar="FOLDER",
        help="where to write the results of --on (default: metrics/on/NAME, the folder's name)",
    )  # fmt: skip

    start = add(
        "start",
        "go from a folder of images to a trained model: copy, use, commit, dvc repro",
        "what is finished is kept; the same command goes on",
    )
    words = "images, a sub-folder per class or with a table of labels; or a zip or tar of them"
    start.add_argument("folder", metavar="FOLDER_OR_ARCHIVE", help=words)
    words = "of the copy in data/ (default: that of the folder)"
    start.add_argument("--name", dest="copy_name", metavar="NAME", help=words)
    start.add_argument("--yes", action="store_true", help="answer all questions with yes")
    use = add("use", "set params.yaml up for a folder of images", "no partial files are left")
    use.add_argument(
        "folder",
        metavar="FOLDER",
        help="with a sub-folder of images per class, or a table of labels",
    )
    for command in (start, use):
        network = command.add_mutually_exclusive_group()
        network.add_argument(
            "--backbone", metavar="NAME_OR_FILE",
            help="the pre-trained network to use: one in data/backbones/, or a .keras file",
        )  # fmt: skip
        network.add_argument(
            "--from-scratch", action="store_const", const="none", dest="backbone",
            help="start from random weights, without a backbone",
        )  # fmt: skip
        command.add_argument(
            "--quality", choices=["best"],
            help="fine-tune the backbone: better, at about nine times the CPU time",
        )  # fmt: skip

    backbone = add(
        "backbone",
        "write a pre-trained backbone to data/backbones/; without a name, list some",
        "no backbone was written",
    )
    backbone.add_argument(
        "backbone", nargs="?", metavar="NAME",
        help="one of the list, or as in keras.applications",
    )  # fmt: skip
    backbone.add_argument(
        "--weights", metavar="FILE",
        help="the published weights, instead of a download: model.safetensors, or the .h5 file of"
        " keras.applications without top",
    )  # fmt: skip
    backbone.add_argument(
        "--size", type=cli.whole_number(1), metavar="PIXELS",
        help="height and width of the images, of dinov2 only: a multiple of 14 (default: 224)",
    )  # fmt: skip

    backbone.add_argument(
        "--from", dest="model", metavar="MODEL",
        help="make it of a model that was trained here, such as data/model.keras",
    )  # fmt: skip

    predict = add("predict", "predict the classes of images", "no file was written")
    predict.add_argument("paths", nargs="+", metavar="IMAGE_OR_FOLDER")
    predict.add_argument("--model", default="data/model.keras", help="default: %(default)s")
    predict.add_argument("--format", choices=("table", "csv", "json"), default="table")
    predict.add_argument(
        "--top",
        type=cli.whole_number(1),
        metavar="K",
        help="show the K most probable classes (default: 3 in a table, else all)",
    )
    predict.add_argument(
        "--threshold", type=_probability, default=0.0, metavar="P",
        help="mark predictions of lower confidence as unsure (evaluate suggests a value)",
    )  # fmt: skip
    predict.add_argument(
        "--sort",
        choices=["uncertain"],
        help="list the least confident predictions first: what to label next",
    )
    predict.add_argument(
        "--explain", metavar="FOLDER",
        help="write a heatmap of each image to FOLDER: the evidence for its class; uses"
        " TensorFlow and the .keras file even if there is an export",
    )  # fmt: skip

    compare = add(
        "compare",
        "compare two versions: what changed in data and predictions",
        "no partial files are left",
    )
    words = "commit, branch, tag or experiment; default: %(default)s"
    compare.add_argument("before", nargs="?", default="HEAD", metavar="REV", help=words)
    words = "default: the %(default)s"
    compare.add_argument("after", nargs="?", default="workspace", metavar="REV", help=words)
    compare.add_argument("--format", choices=("text", "json"), default="text")
    compare.add_argument(
        "--history", action="store_true",
        help="list all versions instead: images, and accuracy with its interval",
    )  # fmt: skip
    words = "also draw the images that were fixed or broke"
    compare.add_argument("--picture", metavar="FILE", help=words)

    audit = add(
        "audit",
        "find wrong labels, poor images and shortcuts in the data, for a person to decide",
        "nothing was written; run it again",
    )
    audit.add_argument(
        "--apply", metavar="FILE",
        help="add the decisions that the page saved to data/corrections.csv, for `dvc repro`",
    )  # fmt: skip

    search = add(
        "search",
        "search for better training parameters than those of params.yaml",
        "finished trials and epochs are kept; the same command resumes",
    )
    search.epilog = "Run it again to resume an interrupted search, or with a larger budget."
    search.add_argument("--trials", type=cli.whole_number(1), metavar="N", help="end with N trials")
    words = "start no new trial after this time, such as 2h or 1h30m"
    search.add_argument("--time", type=_seconds, metavar="DURATION", help=words)
    search.add_argument(
        "--seeds", type=cli.whole_number(2), default=3, metavar="N",
        help="train the best trials again with N other seeds (default: %(default)s)",
    )  # fmt: skip
    words = "YAML file with the parameters to vary and their ranges"
    search.add_argument("--space", metavar="FILE", help=words)
    search.add_argument(
        "--storage", metavar="URL",
        help="where to keep the trials: a file on a shared drive or the URL of a database, so that"
        " several machines, each with this command, search together",
    )  # fmt: skip

    repeat = add(
        "repeat",
        "train with several seeds: the mean and its standard deviation",
        "finished trainings and epochs are kept; the same command resumes",
    )
    repeat.add_argument(
        "--seeds",
        type=cli.whole_number(2),
        default=5,
        metavar="N",
        help="number of seeds, from train.seed on (default: %(default)s)",
    )
    repeat.add_argument("--test", action="store_true", help="evaluate on the test split, too")

    export = add(
        "export", "export the model for use without TensorFlow or Python", "nothing was exported"
    )
    export.add_argument(
        "--format", nargs="+", action="extend", choices=("tflite", "saved_model"), default=[],
        help="also write these formats",
    )  # fmt: skip
    return program


def main() -> None:
    """Run the stage or command that the command line names."""
    environment.setup()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during imports prints no traceback
    options = parser().parse_args()
    if options.name is None:
        parser().print_help()
        return
    try:
        if options.name in ("train", "evaluate"):
            environment.load_tensorflow()
        module = importlib.import_module(f"stages.{options.name}")
    except ModuleNotFoundError as error:
        if str(error.name).startswith("stages"):  # a bug
            raise
        sys.exit(
            f"{sys.executable or 'this Python'} lacks the package {error.name!r}: activate the"
            " environment that has the packages, or run `pip install -r requirements.txt` in it"
        )
    cli.run(functools.partial(module.main, options), options.on_interrupt)


if __name__ == "__main__":
    main()
