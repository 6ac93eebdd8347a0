"""Read one section of params.yaml, and explain what is wrong with it."""

import difflib
import re
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from stages.utils.cli import UserError


class Parameters(BaseModel):
    """Base class of a stage's parameters: typed, checked, complete with defaults, read-only."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


Section = TypeVar("Section", bound=Parameters)


class Loader(yaml.SafeLoader):
    """YAML 1.2 scalars, as DVC reads them: 1e-3 is a number, ``off`` and ``yes`` are words."""


Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)"
        r"|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
):
    Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), [*_first, ""]
    )


def _load(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file here; run this from the folder that holds dvc.yaml"
        ) from None
    except yaml.YAMLError as error:
        line = getattr(getattr(error, "problem_mark", None), "line", 0) + 1
        problem = getattr(error, "problem", None) or "can't be parsed"
        raise UserError(f"{path}, line {line}: not valid YAML: {problem}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text in UTF-8; save it as UTF-8") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected `key: value` lines, found {values!r}")
    return values


def read_dataset(path: str | Path = "params.yaml") -> str:
    """Return the folder that the key `dataset` of params.yaml names."""
    value = _load(Path(path)).get("dataset")
    if not isinstance(value, str) or not value:
        raise UserError(
            f"{path}: dataset: expected the path of a folder of images, found {value!r}"
        )
    return value


def read_section(kind: type[Section], name: str, path: str | Path = "params.yaml") -> Section:
    """Read and check one section of params.yaml.

    Parameters
    ----------
    kind : subclass of Parameters
        The section's keys with their types, ranges and defaults.
    name : str
        The section's key in the file, for instance ``"train"``.
    path : path, default="params.yaml"

    Returns
    -------
    section : instance of `kind`
        A key that the file leaves out has its default.

    Raises
    ------
    UserError
        With a line for each wrong key: what was found and what was expected.
    """
    values = _load(Path(path))
    if name not in values:
        raise UserError(f"{path}: no section `{name}:`; it may be empty (`{name}: {{}}`)")
    section = values[name] if values[name] is not None else {}
    if not isinstance(section, dict):
        raise UserError(f"{path}: {name}: expected a section of keys, found {section!r}")
    try:
        return kind.model_validate(section)
    except ValidationError as error:
        problems = error.errors()
        wrong_items = {problem["loc"][:-1] for problem in problems}  # and then no short list
        lines = [
            f"{path}: {_explain(kind, name, problem)}"
            for problem in problems
            if not (problem["type"] == "too_short" and problem["loc"] in wrong_items)
        ]
        raise UserError("\n".join(dict.fromkeys(lines))) from None


def _tuples(value: Any) -> Any:
    """Lists as tuples, since a frozen section holds nothing that can change."""
    if isinstance(value, list):
        return tuple(_tuples(item) for item in value)
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return value


def _explain(kind: type[Parameters], name: str, problem: dict[str, Any]) -> str:
    location = [part for part in problem["loc"] if not str(part).startswith("function-")]
    key = name + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    found = problem["input"]
    found = list(found) if isinstance(found, tuple) else found
    if problem["type"] in ("extra_forbidden", "invalid_key"):
        owner: Any = kind
        for part in location[:-1]:
            owner = owner.model_fields[part].annotation
        known = list(owner.model_fields)
        near = difflib.get_close_matches(str(location[-1]), known, 1)
        hint = f"did you mean `{near[0]}`?" if near else f"known keys: {', '.join(known)}"
        return f"{key}: unknown key; {hint}"
    message = problem["msg"]
    message = message.removeprefix("Value error, ").replace("Input should be ", "expected ")
    message = message.replace("valid tuple", "list").replace("Tuple should", "the list should")
    message = message.replace(" after validation", "")
    return f"{key}: {message}, found {found!r}"
