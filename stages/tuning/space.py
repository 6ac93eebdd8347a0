"""Search spaces: the parameters that a search varies, in the names of params.yaml."""

import json
import operator
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.model.parameters import Train
from stages.run.cli import UserError
from stages.run.params import check_section, load_yaml

if TYPE_CHECKING:
    from optuna import Trial

DEFAULT_SPACES = Path(__file__).with_name("default_spaces.yaml")
_FIXED = ("train.seed", "train.replicas", "train.deterministic")  # no hyperparameters
_EXPECTED = "expected a list of values, {range: [low, high]} or {log: [low, high]}"


def read_space(path: str | Path | None, parameters: Train) -> dict[str, Any]:
    """Read and check a search space.

    Parameters
    ----------
    path : path or None
        A YAML file. Each key is one of the section `train` with its dots, and its value a list of
        values, ``{range: [low, high]}`` or ``{log: [low, high]}``. None: one of the default spaces,
        for a network from scratch, on a frozen or on a fine-tuned backbone.
    parameters : Train
        The parameters of params.yaml.

    Returns
    -------
    space : dict
        The content of the file, with numbers of the types that the parameters have.

    Raises
    ------
    UserError
        With a line for each wrong key.
    """
    if path is None:
        path, content = DEFAULT_SPACES.name, load_yaml(DEFAULT_SPACES)[_default_name(parameters)]
    elif Path(path).is_file():
        content = load_yaml(Path(path))
    else:
        raise UserError(f"{path}: no such file; expected a search space in YAML")
    if not content:
        raise UserError(f"{path}: no key; expected some of train.*, such as train.dropout")
    space: dict[str, Any] = {}
    errors = []
    unused = parameters.unused()
    if {"train.backbone", "train.fine_tune_fraction"} & set(content):
        unused = []  # in some trials
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
    """Return the values of parameters as Optuna stores them; none if one is outside the space."""
    stored: dict[str, Any] = {}
    for key, entry in space.items():
        value = lookup(parameters, key)
        if isinstance(entry, list):
            is_inside = value in entry
            stored[key] = json.dumps(value)
        else:
            [(low, high)] = entry.values()
            is_inside = low <= value <= high
            stored[key] = value
        if not is_inside:
            return {}
    return stored


def lookup(parameters: Train, key: str) -> Any:
    """Return the value of a dotted key, such as ``train.augment.flip``."""
    return operator.attrgetter(key.removeprefix("train."))(parameters)


def replace(parameters: Train, values: Mapping[str, Any]) -> Train:
    """Return parameters in which dotted keys have other values.

    Raises
    ------
    UserError
        If there is no such key, or its value is not allowed.
    """
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


def _default_name(parameters: Train) -> str:
    if parameters.backbone == "none":
        return "from_scratch"
    return "fine_tuned_backbone" if parameters.fine_tune_fraction else "frozen_backbone"


def _check_entry(key: str, entry: Any, parameters: Train) -> Any:
    """Return the entry of a key with values of the key's type."""
    if not key.startswith("train."):
        raise UserError(
            f"{key}: only keys of train can be varied: losses on other images don't compare"
        )
    if key in _FIXED:
        raise UserError(f"{key}: not a hyperparameter; set it in params.yaml")
    if isinstance(entry, list) and entry:
        values = [lookup(replace(parameters, {key: value}), key) for value in entry]
        if len({json.dumps(value) for value in values}) < len(values):
            raise UserError(f"{key}: a value is listed twice: {entry}")
        return values
    if not (isinstance(entry, dict) and len(entry) == 1 and {*entry} <= {"range", "log"}):
        raise UserError(f"{key}: {_EXPECTED}, found {entry!r}")
    [(scale, limits)] = entry.items()
    numbers = isinstance(limits, list) and all(type(limit) in (int, float) for limit in limits)
    if not numbers or len(limits) != 2:
        raise UserError(f"{key}: {_EXPECTED}, found {entry!r}")
    low, high = (lookup(replace(parameters, {key: limit}), key) for limit in limits)
    if not low < high:
        raise UserError(f"{key}: an empty range, {limits}: expected [low, high], low < high")
    if scale == "log" and low <= 0:
        raise UserError(
            f"{key}: on a logarithmic scale, the lower limit must be above 0, found {low}"
        )
    return {scale: [low, high]}
