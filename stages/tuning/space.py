"""Search spaces: the parameters that a search varies, in the names of params.yaml."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.model.parameters import Train
from stages.run.cli import UserError
from stages.run.params import check_section, load_yaml

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

DEFAULT_SPACES = Path(__file__).with_name("default_spaces.yaml")
_FIXED = ("train.seed", "train.replicas", "train.deterministic")  # no hyperparameters
_EXPECTED = "expected a list of values, {range: [low, high]} or {log: [low, high]}"
_DIGITS = 3  # of a number that is drawn from a range


def read_space(path: str | Path | None, parameters: Train) -> dict[str, "BaseDistribution"]:
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
    space : dict of str to Optuna distribution
        Lists as choices of JSON texts; `decode` turns what is drawn into values.

    Raises
    ------
    UserError
        With a line for each wrong key.
    """
    if path is None:
        path, content = DEFAULT_SPACES.name, load_yaml(DEFAULT_SPACES)[_case(parameters)]
    elif Path(path).is_file():
        content = load_yaml(Path(path))
    else:
        raise UserError(f"{path}: no such file; expected a search space in YAML")
    if not content:
        raise UserError(f"{path}: no key; expected some of train.*, such as train.dropout")
    space: dict[str, BaseDistribution] = {}
    errors = []
    unused = parameters.unused()
    if {"train.backbone", "train.fine_tune_fraction"} & set(content):
        unused = []  # in some trials
    for key, entry in content.items():
        try:
            space[key] = _distribution(str(key), entry, parameters)
            if key.split(".")[1] in unused:
                raise UserError(f"{key}: has no effect with the other parameters of params.yaml")
        except UserError as error:
            errors += [f"{path}: {line}" for line in str(error).splitlines()]
    if errors:
        raise UserError("\n".join(errors))
    return space


def decode(drawn: Mapping[str, Any], space: Mapping[str, "BaseDistribution"]) -> dict[str, Any]:
    """Turn what Optuna has drawn into values for params.yaml; numbers have three digits."""
    values = {}
    for key, value in drawn.items():
        if isinstance(value, str):
            value = json.loads(value)
        elif isinstance(value, float):
            low, high = (getattr(space[key], name) for name in ("low", "high"))
            value = min(max(float(f"{value:.{_DIGITS}g}"), low), high)
        values[key] = value
    return values


def encode(parameters: Train, space: Mapping[str, "BaseDistribution"]) -> dict[str, Any] | None:
    """Return the present values as Optuna would draw them; None if one is outside of the space."""
    from optuna.distributions import CategoricalDistribution

    drawn: dict[str, Any] = {}
    for key, distribution in space.items():
        value = lookup(parameters, key)
        if isinstance(distribution, CategoricalDistribution):
            drawn[key] = json.dumps(value)
            inside = drawn[key] in distribution.choices
        else:
            drawn[key] = value
            inside = distribution.low <= value <= distribution.high  # type: ignore[attr-defined]
        if not inside:
            return None
    return drawn


def lookup(parameters: Train, key: str) -> Any:
    """Return the value of a dotted key, such as ``train.augment.flip``."""
    value: Any = parameters.model_dump()
    for name in key.split(".")[1:]:
        value = value[name]
    return value


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


def _case(parameters: Train) -> str:
    if parameters.backbone == "none":
        return "from_scratch"
    return "fine_tuned_backbone" if parameters.fine_tune_fraction else "frozen_backbone"


def _distribution(key: str, entry: Any, parameters: Train) -> "BaseDistribution":
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    if not key.startswith("train."):
        raise UserError(
            f"{key}: only keys of train can be varied: losses on other images don't compare"
        )
    if key in _FIXED:
        raise UserError(f"{key}: not a hyperparameter; set it in params.yaml")
    if isinstance(entry, list) and entry:
        values = [lookup(replace(parameters, {key: value}), key) for value in entry]
        texts = [json.dumps(value) for value in values]
        if len(set(texts)) < len(texts):
            raise UserError(f"{key}: a value is listed twice: {entry}")
        return CategoricalDistribution(texts)
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
    whole = isinstance(low, int)
    return (IntDistribution if whole else FloatDistribution)(low, high, log=scale == "log")
