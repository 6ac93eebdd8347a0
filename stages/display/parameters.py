"""What every stage checks first: all of params.yaml, also what other stages read of it."""

import os
from collections.abc import Callable
from pathlib import Path

from stages.data.parameters import Prepare
from stages.model.parameters import Train, find_backbone
from stages.report.parameters import Evaluate
from stages.run.cli import UserError
from stages.run.params import Parameters, load_yaml, read_dataset, read_section

_SECTIONS: dict[str, type[Parameters]] = {"prepare": Prepare, "train": Train, "evaluate": Evaluate}


def check_parameters() -> None:
    """Check the whole of params.yaml, before a stage works for minutes.

    Raises
    ------
    UserError
        With a line for each mistake in any section.
    """
    problems = []
    # What can't be read at all is told once, without the lines below.
    for key in sorted(map(str, load_yaml(Path("params.yaml")).keys() - _SECTIONS.keys())):
        for name, section in _SECTIONS.items():
            if key in section.model_fields:
                problems.append(f"params.yaml: {key}: no effect here; expected below `{name}:`")
    for check in (read_dataset, *map(_check, _SECTIONS)):
        try:
            check()
        except UserError as error:
            problems += str(error).splitlines()
    if problems and "DVC_STAGE" in os.environ:  # DVC sets it
        problems.append(
            "Nothing is lost: correct params.yaml, and `dvc repro` brings back the results that DVC"
            " deleted before it started this stage."
        )
    if problems:
        raise UserError("\n".join(problems))


def _check(name: str) -> Callable[[], object]:
    """Return a function that checks a section."""

    def check() -> None:
        parameters = read_section(_SECTIONS[name], name)
        if isinstance(parameters, Train):
            find_backbone("data/backbones", parameters.backbone)

    return check
