"""Read one section of params.yaml, and explain what is wrong with it; change values."""

import difflib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from stages.run.cli import UserError, first_line, list_names
from stages.run.files import atomic_write


class Parameters(BaseModel):
    """Base class of a stage's parameters: typed, checked, complete with defaults, read-only."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


Section = TypeVar("Section", bound=Parameters)


def read_dataset(path: str | Path = "params.yaml") -> str:
    """Return the folder that the key `dataset` of params.yaml names."""
    value = load_yaml(Path(path)).get("dataset")
    if not isinstance(value, str) or not value:
        raise UserError(
            f"{path}: dataset: expected the path of a folder of images, found {value!r}"
        )
    if value.startswith("~"):
        raise UserError(
            f"{path}: dataset: expected a path from here or from /, found {value!r}; DVC does not"
            f" replace ~: write {str(Path(value).expanduser())!r}"
        )
    return value


def read_section(section: type[Section], name: str, path: str | Path = "params.yaml") -> Section:
    """Read and check one section of params.yaml.

    Parameters
    ----------
    section : subclass of Parameters
        The section's keys with their types, ranges and defaults.
    name : str
        The section's key in the file, for instance ``"train"``.
    path : path, default="params.yaml"

    Returns
    -------
    parameters : instance of `section`
        A key that the file leaves out has its default.

    Raises
    ------
    UserError
        With a line for each wrong key: what was found and what was expected.
    """
    content = load_yaml(Path(path))
    if name not in content:
        raise UserError(f"{path}: no section `{name}:`; it may be empty (`{name}: {{}}`)")
    values = {} if content[name] is None else content[name]
    if not isinstance(values, dict):
        raise UserError(f"{path}: {name}: expected a section of keys, found {values!r}")
    return check_section(section, name, values, f"{path}: ")


def check_section(
    section: type[Section], name: str, values: Mapping[str, Any], prefix: str = ""
) -> Section:
    """Check the values of a section, as `read_section` does; each line of an error has a prefix."""
    try:
        return section.model_validate(values)
    except ValidationError as error:
        lines = [f"{prefix}{_explain(section, name, problem)}" for problem in error.errors()]
        raise UserError("\n".join(dict.fromkeys(lines))) from None


def watch_inputs(
    stage: str, others: Callable[[], dict[str, Any]] = lambda: {}
) -> Callable[[], None]:
    """Return a function for the end of a stage: a UserError if its inputs have changed since now.

    DVC records parameters, code and dataset as they are when a stage has ended, not as they were
    when it read them (treeverse/dvc, issue 11058). Without DVC, nothing is recorded or refused.

    Parameters
    ----------
    stage : str
        Its code and parameters are those that dvc.yaml names.
    others : callable
        Returns what else is watched: names, and values to compare.
    """

    def read() -> dict[str, Any]:
        if "DVC_STAGE" not in os.environ:  # DVC sets it
            return {}
        entry, values = load_yaml(Path("dvc.yaml"))["stages"][stage], load_yaml(Path("params.yaml"))
        parameters = {f"{name} in params.yaml": values.get(name) for name in entry["params"]}
        names = [Path(name) for name in entry["deps"] if name.startswith("stages/")]
        code = [path for name in names for path in (name, *name.rglob("[!.]*.py"))]
        return parameters | {str(p): p.read_bytes() for p in code if p.is_file()} | others()

    before = read()

    def check() -> None:
        now = read()
        if changed := [name for name in before | now if before.get(name) != now.get(name)]:
            raise UserError(
                f"{stage}: {list_names(changed)}: changed while it ran, and DVC would record that"
                " the result is of what is there now; `dvc repro` runs it anew, or, if you take the"
                " change back first, goes on from what is finished"
            )

    return check


def list_changes(
    values: Mapping[str, Any], path: str | Path = "params.yaml"
) -> dict[str, tuple[Any, Any]]:
    """Return what `set_values` would change; nothing is written."""
    return _edit(values, Path(path), YAML())[1]


def set_values(
    values: Mapping[str, Any], path: str | Path = "params.yaml"
) -> dict[str, tuple[Any, Any]]:
    """Set keys of params.yaml and keep its comments.

    Parameters
    ----------
    values : mapping
        Keys with their sections (``"train.augment.flip"``) and values.
    path : path, default="params.yaml"

    Returns
    -------
    changes : dict
        For each key whose value differs: the old value (None if there was none) and the new one.

    Raises
    ------
    UserError
        If the file can't be read as YAML, or a section is not one; nothing is then written.
    """
    yaml = YAML()
    yaml.preserve_quotes, yaml.width = True, 4096
    content, changes = _edit(values, Path(path), yaml)
    if changes:
        with atomic_write(path) as tmp, open(tmp, "w", encoding="utf-8", newline="\n") as file:
            yaml.dump(content, file)
    return changes


def _edit(
    values: Mapping[str, Any], path: Path, yaml: YAML
) -> tuple[dict[Any, Any], dict[str, tuple[Any, Any]]]:
    """Return the content of a file with new values, and the changes that these are."""
    content, changes = load_yaml(path, yaml), {}
    for name, new in values.items():
        place, (*sections, key) = content, name.split(".")
        for section in sections:
            if place.get(section) is None:
                place[section] = {}
            place = place[section]
            if not isinstance(place, dict):
                raise UserError(f"{path}: {section}: expected a section of keys, found {place!r}")
        old = place.get(key)
        if old == new:
            continue
        changes[name] = list(old) if isinstance(old, list) else old, new
        if isinstance(old, list) and isinstance(new, list):
            old[:] = new  # keeps its form and its comment
        else:
            place[key] = new
    return content, changes


def load_yaml(path: Path, yaml: YAML | None = None) -> dict[Any, Any]:
    """Read a YAML file exactly as DVC does: by the same library, with the same settings."""
    try:
        yaml = yaml or YAML(typ="safe", pure=True)
        values = yaml.load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file here; run this from the folder that holds dvc.yaml"
        ) from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; save it as UTF-8") from None
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or first_line(error)
        raise UserError(f"{path}{where}: not valid YAML: {problem}") from None
    except ValueError as error:  # a scalar that looks like a number or a date but is not one
        raise UserError(f"{path}: not valid YAML: {first_line(error)}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected `key: value` lines, found {values!r}")
    return values


def _explain(section: type[Parameters], name: str, problem: ErrorDetails) -> str:
    """Put one of pydantic's errors into the words of params.yaml."""
    location = [part for part in problem["loc"] if not str(part).startswith("function-")]
    key = name + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    if problem["type"] in ("extra_forbidden", "invalid_key"):
        owner: Any = section
        for part in location[:-1]:
            owner = owner.model_fields[part].annotation
        known = list(owner.model_fields)
        near = difflib.get_close_matches(str(location[-1]), known, 1)
        hint = f"did you mean `{near[0]}`?" if near else f"known keys: {', '.join(known)}"
        return f"{key}: unknown key; {hint}"
    message = problem["msg"].removeprefix("Value error, ").replace(" after validation", "")
    message = message.replace("Input should be ", "expected ").replace("List should", "list should")
    return f"{key}: {message}, found {problem['input']!r}"
