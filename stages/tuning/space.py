"""Search spaces: the parameters that a search varies, in the names of params.yaml."""

import json
import operator
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.model.parameters import Train
from stages.run.cli import UserError, no_such
from stages.run.params import check_section, load_yaml

if TYPE_CHECKING:
    from optuna import Trial

DEFAULT_SPACES = Path(__file__).with_name("default_spaces.yaml")
_FIXED = ("train.seed", "train.replicas", "train.deterministic")  # no hyperparameters


def read_space(path: str | Path | None, parameters: Train) -> dict[str, Any]:
    """Read and check a search space: each key is one of the section `train`, with its dots.

    Its value is a list of values, ``{range: [low, high]}`` or ``{log: [low, high]}``; in what is
    returned, the numbers have the type of the parameter. Without a path, it is a default space: for
    a network from scratch, on a frozen or on a fine-tuned backbone, as `parameters` say. A
    UserError has a line for each wrong key.
    """
    if path is None:
        name = "fine_tuned_backbone" if parameters.fine_tune_fraction else "frozen_backbone"
        name = "from_scratch" if parameters.backbone == "none" else name
        path, content = DEFAULT_SPACES.name, load_yaml(DEFAULT_SPACES)[name]
    elif Path(path).is_file():
        content = load_yaml(Path(path))
    else:
        raise UserError(no_such("file", path, "expected a search space in YAML"))
    if not content:
        raise UserError(f"{path}: no key; expected some of train.*, such as train.dropout")
    unused = parameters.unused()
    if {"train.backbone", "train.fine_tune_fraction"} & set(content):
        unused = []  # in some trials
    space: dict[str, Any] = {}
    errors = []
    for key, entry in content.items():
        try:
            space[key] = _check_entry(str(key), entry, parameters)
            if key.split(".")[1] in unused:
                raise UserError(f"{key}: has no effect with the other parameters of params.yaml")
        except UserError as error:
            errors += [f"{path}: {line}" for line in str(error).splitlines()]
    if errors:
        raise UserError("\n".join(errors))
    return space


def suggest(trial: "Trial", key: str, entry: Any) -> Any:
    """Let Optuna propose the value of a key; a number from a range has three digits."""
    if isinstance(entry, list):  # Optuna's choices are texts and numbers, ours can be lists
        return json.loads(trial.suggest_categorical(key, [json.dumps(value) for value in entry]))
    [(scale, (low, high))] = entry.items()
    if isinstance(low, int):
        return trial.suggest_int(key, low, high, log=scale == "log")
    drawn = trial.suggest_float(key, low, high, log=scale == "log")
    return min(max(float(f"{drawn:.3g}"), low), high)


def as_suggested(parameters: Train, space: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of parameters that are in the space, as Optuna stores them."""
    stored: dict[str, Any] = {}
    for key, entry in space.items():
        value = lookup(parameters, key)
        if isinstance(entry, list) and value in entry:
            stored[key] = json.dumps(value)
        elif isinstance(entry, dict):
            [(low, high)] = entry.values()
            stored |= {key: value} if low <= value <= high else {}
    return stored


def lookup(parameters: Train, key: str) -> Any:
    """Return the value of a dotted key, such as ``train.augment.flip``."""
    return operator.attrgetter(key.removeprefix("train."))(parameters)


def replace(parameters: Train, values: Mapping[str, Any]) -> Train:
    """Return parameters in which dotted keys have other values; raise a UserError if they can't."""
    content = parameters.model_dump()
    for key, value in values.items():
        place: Any = content
        *sections, name = key.split(".")[1:]
        for section in sections:
            place = place.get(section)
            if not isinstance(place, dict):
                raise UserError(f"{key}: unknown key; train has no section {section}")
        place[name] = value
    return check_section(Train, "train", content)


def _check_entry(key: str, entry: Any, parameters: Train) -> Any:
    """Return the entry of a key with values of the key's type."""
    if not key.startswith("train."):
        raise UserError(
            f"{key}: only keys of train can be varied: losses on other images don't compare"
        )
    if key in _FIXED:
        raise UserError(f"{key}: not a hyperparameter; set it in params.yaml")

    def check(value: Any) -> Any:
        return lookup(replace(parameters, {key: value}), key)

    match entry:
        case [_, *_]:
            return [check(value) for value in entry]
        case {"range": [low, high]} | {"log": [low, high]} if len(entry) == 1:
            limits = [check(low), check(high)]
            least = 0 if "log" in entry else -float("inf")
            if {*map(type, limits)} <= {int, float} and least < limits[0] < limits[1]:
                return dict.fromkeys(entry, limits)
    raise UserError(
        f"{key}: expected a list of values, {{range: [low, high]}} or {{log: [low, high]}}, with"
        f" low < high, and 0 < low for log; found {entry!r}"
    )
