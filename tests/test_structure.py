"""The structure of the code: imports, dvc.yaml, style, and limits that keep it readable."""

import ast
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "stages").rglob("*.py"))
}
PROGRAMS = {name for name, path in MODULES.items() if path.parent.name == "stages"} - {"stages"}
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


@cache
def named_imports(module: str) -> frozenset[str]:
    """Return every module that a module's text imports, wherever in the text."""
    names = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are written in full"
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return frozenset(names)


def imports(module: str) -> set[str]:
    """Return the project's modules that run when this one is imported, itself included.

    Importing a module runs the ``__init__`` of each package above it.
    """
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        parents = {name.rsplit(".", depth)[0] for depth in range(1, name.count(".") + 1)}
        for known in ({name} | parents) & MODULES.keys() - seen:
            seen.add(known)
            waiting.extend(named_imports(known))
    return seen


def file_of(module: str) -> str:
    return MODULES[module].relative_to(ROOT).as_posix()


@pytest.mark.parametrize("stage", STAGES)
def test_dvc_yaml_lists_the_modules_that_a_stage_imports(stage):
    listed = [name for name in STAGES[stage]["deps"] if str(name).startswith("stages/")]
    assert sorted(listed) == sorted(file_of(module) for module in imports(f"stages.{stage}"))


def test_touching_a_module_changes_exactly_the_stages_that_import_it(project):
    """Asked of DVC, with a module for each set of stages; tests and prose change no stage."""
    assert project.changed() == {}
    users = {
        module: frozenset(stage for stage in STAGES if module in imports(f"stages.{stage}"))
        for module in MODULES
    }
    for stages, module in {stages: module for module, stages in users.items()}.items():
        copy = project / MODULES[module].relative_to(ROOT)
        text = copy.read_bytes()
        copy.write_bytes(text + b"\n")
        assert project.changed() == {stage: {file_of(module)} for stage in stages}
        copy.write_bytes(text)
    (project / "README.md").write_text("Another", encoding="utf-8")
    (project / "requirements.txt").write_text("another", encoding="utf-8")
    assert project.changed() == {}


@pytest.mark.parametrize("stage", STAGES)
def test_help_of_a_stage_does_not_run_it(stage, tmp_path):
    command = [sys.executable, "-m", f"stages.{stage}", "-h"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert f"python -m stages.{stage}" in done.stdout
    assert not list(tmp_path.iterdir())


def test_each_stage_is_a_module_of_its_name():
    assert list(STAGES) == ["prepare", "train", "evaluate"]
    for stage, entry in STAGES.items():
        assert entry["cmd"] == f"python -m stages.{stage}"


@pytest.mark.parametrize("program", sorted(PROGRAMS))
def test_no_stage_imports_a_stage(program):
    assert not (imports(program) - {program}) & PROGRAMS


@pytest.mark.parametrize("module", sorted(MODULES.keys() - PROGRAMS - {"stages"}))
def test_support_does_not_import_a_stage(module):
    assert not imports(module) & PROGRAMS


def test_every_module_is_used():
    exported = {"stages.deploy.classify"}  # a program of its own, copied by export
    assert set().union(*map(imports, PROGRAMS)) == MODULES.keys() - exported


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_private_attribute_of_a_library_is_used(module):
    documented = {"_exit", "_fields", "_replace"}  # of os and of named tuples
    used = {
        ast.unparse(node)
        for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.startswith("__")
        and node.attr not in documented
        and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"))
    }
    assert used == set()


def loaded_by(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return {name.split(".")[0] for name in done.stdout.split()}


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("stages.prepare", {"tensorflow", "keras", "sklearn", "distributed"}),
        ("stages.compare", {"tensorflow", "keras"}),
        ("stages.search", {"tensorflow", "keras", "sklearn", "optuna", "distributed"}),
        ("stages.data.images", {"tensorflow", "keras", "sklearn", "pandas", "matplotlib"}),
    ],
)
def test_what_is_not_needed_is_not_imported(module, heavy):
    assert not loaded_by(f"import {module}") & heavy


@pytest.mark.parametrize("output", ["metrics", "plots"])
def test_only_metrics_and_plots_are_kept_outside_the_cache(output):
    """Any other uncached output, and any persistent one, switches DVC's run cache off."""
    for entry in STAGES.values():
        for out in entry.get("outs", []):
            options = next(iter(out.values())) if isinstance(out, dict) else {}
            assert options.get("cache", True)
            assert not options.get("persist", False)
        for out in entry.get(output, []):
            assert not (isinstance(out, dict) and next(iter(out.values())).get("persist", False))


def test_parameters_of_a_stage_are_its_own_section():
    sections = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8")).keys()
    assert sections == {"dataset", *STAGES}
    for stage, entry in STAGES.items():
        assert set(entry["params"]) <= {stage, "dataset"}
        assert stage in entry["params"]


HOOKS = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
CHECKS = {hook["id"]: hook["entry"].split() for hook in HOOKS["repos"][0]["hooks"]}


@pytest.mark.parametrize(
    "check",
    [
        "lint",
        "format",
        "types",
    ],
)
def test_the_checks_before_a_commit_pass(check):
    """As pyproject.toml says; `ruff check --fix` and `ruff format` fix most of what they find."""
    python, *words = CHECKS[check]
    assert python == "python"
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_check_before_a_commit_is_a_test():
    assert CHECKS.keys() == {"lint", "format", "types"}


def private(name: str) -> bool:
    """Tell whether a name is private; `os._exit` and a few of named tuples are public."""
    public = ("_exit", "_asdict", "_fields", "_make", "_replace")
    return name.startswith("_") and not name.endswith("__") and name not in public


@pytest.mark.parametrize("module", sorted(MODULES))
def test_nothing_private_of_another_object_is_used(module):
    used = []
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Attribute) and private(node.attr):
            owner = ast.unparse(node.value)
            used += [] if owner in ("self", "cls") else [f"{owner}.{node.attr}"]
        elif isinstance(node, ast.ImportFrom):
            used += [f"{node.module}.{alias.name}" for alias in node.names if private(alias.name)]
    assert used == []


def functions(module: str) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree(module)) if isinstance(node, ast.FunctionDef)]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_functions_are_short(module):
    """At most 50 lines of code: of the body, without docstring, comments and blank lines."""
    text = MODULES[module].read_text(encoding="utf-8").splitlines()
    long = []
    for function in functions(module):
        first, documented = function.body[0], ast.get_docstring(function) is not None
        start = first.end_lineno if documented else first.lineno - 1
        lines = [line.strip() for line in text[start : function.end_lineno]]
        code = [line for line in lines if line and not line.startswith("#")]
        long += [f"{function.name}: {len(code)}"] if len(code) > 50 else []
    assert long == []


def keys(section: dict) -> set[str]:
    """Return the keys of a section of params.yaml, and of the sections in it."""
    return set(section).union(*(keys(inner) for inner in section.values() if type(inner) is dict))


@pytest.mark.parametrize("module", sorted(MODULES))
def test_functions_have_few_parameters(module):
    """At most six, not counting those that bear the name of a key of params.yaml."""
    free = keys(yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8")))
    many = []
    for function in functions(module):
        args = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
        counted = [arg.arg for arg in args if arg.arg not in free | {"self", "cls"}]
        many += [f"{function.name}: {counted}"] if len(counted) > 6 else []
    assert many == []


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_path_of_a_machine_is_in_the_code(module):
    text = MODULES[module].read_text(encoding="utf-8")
    assert not any(word in text for word in (" /tmp/", "/home/", "/root/"))
