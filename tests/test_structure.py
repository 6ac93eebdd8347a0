"""The structure of the code: what imports what, dvc.yaml, and style."""

import ast
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
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
COMMANDS = {name for name, path in MODULES.items() if path.parent.name == "stages"}
COMMANDS -= {"stages", "stages.__main__"}


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
    """Return the project's modules that this one imports, also by way of others, and itself."""
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in MODULES and name not in seen:
            seen.add(name)
            waiting.extend(named_imports(name))
    return seen


def place(module: str) -> str:
    """Return the folder of a module within stages/; for a stage or command its own name."""
    return module.split(".")[1] if "." in module else ""


def results_depend_on(stage: str) -> set[str]:
    """Return the modules whose code can change the results of a stage.

    These are all that it imports, but for those that say how it runs (run/) and those that tell
    what it did (display/).
    """
    seen: set[str] = set()
    waiting = [f"stages.{stage}"]
    while waiting:
        name = waiting.pop()
        if name in MODULES and name not in seen and place(name) not in ("run", "display", ""):
            seen.add(name)
            waiting.extend(named_imports(name))
    return seen


@pytest.mark.parametrize("stage", STAGES)
def test_dvc_yaml_names_the_code_that_a_stage_depends_on(stage):
    listed = [ROOT / dep for dep in STAGES[stage]["deps"] if str(dep).startswith("stages/")]
    assert 2 <= len(listed) <= 4
    files = {MODULES[name] for name in results_depend_on(stage)}
    assert all(any(file.is_relative_to(one) for one in listed) for file in files)
    assert all(any(file.is_relative_to(one) for file in files) for one in listed)


def test_how_a_stage_runs_depends_on_no_result():
    places = {
        place(name) for module in MODULES if place(module) == "run" for name in imports(module)
    }
    assert places == {"run"}


def test_a_change_of_code_reruns_the_stages_that_it_affects(project):
    """Asked of DVC: words, figures, locks and the cluster are no reason to train again."""
    assert project.changed() == {}
    for name, stages in {
        "display/preparation.py": set(),
        "display/evaluation.py": set(),
        "run/cli.py": set(),
        "run/files.py": set(),
        "run/cluster.py": set(),
        "predict.py": set(),
        "data/notes.txt": set(),
        "data/splits.py": {"prepare", "evaluate"},
        "data/arrays.py": {"prepare", "train", "evaluate"},
        "model/network.py": {"train", "evaluate"},
        "train.py": {"train"},
        "report/metrics.py": {"evaluate"},
        "report/figures.py": {"evaluate"},
    }.items():
        path = project / "stages" / name
        before = path.read_bytes() if path.exists() else None
        path.write_bytes((before or b"") + b"\n")
        assert project.changed().keys() == stages, name
        path.unlink() if before is None else path.write_bytes(before)
    for name in ("README.md", "requirements.txt"):
        (project / name).write_text("another", encoding="utf-8")
    assert project.changed() == {}


def test_each_stage_is_a_command_of_its_name():
    assert list(STAGES) == ["prepare", "train", "evaluate"]
    for stage, entry in STAGES.items():
        assert entry["cmd"] == f"python -m stages {stage}"


def test_what_is_run_as_a_module_says_how_to_run_it():
    for name in ("predict", "use", "prepare"):
        words = [sys.executable, "-m", f"stages.{name}", "photo.jpg"]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (1, f"run it as: python -m stages {name}\n")


def test_no_module_imports_a_stage_or_command():
    allowed = {"stages.start": {"stages.use"}}  # one of the steps that it takes
    offenders = {
        module: found
        for module in MODULES
        if (found := (imports(module) - {module}) & COMMANDS - allowed.get(module, set()))
    }
    assert offenders == {}


def test_every_module_is_used():
    exported = {"stages.deploy.classify"}  # a program of its own, copied by export
    used = set().union(*map(imports, COMMANDS | {"stages.__main__"}))
    assert MODULES.keys() - used == exported | {"stages"}


def loaded_by(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return {name.split(".")[0] for name in done.stdout.split()}


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        (
            "stages.prepare, stages.compare, stages.search",
            {"tensorflow", "keras", "sklearn", "optuna", "distributed"},
        ),
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


def test_nothing_private_of_another_object_is_used():
    public = ("_exit", "_asdict", "_fields", "_make", "_replace")  # of os and of named tuples
    used = []
    for module in MODULES:
        for node in ast.walk(tree(module)):
            if isinstance(node, ast.Attribute):
                owner, names = ast.unparse(node.value), [node.attr]
            elif isinstance(node, ast.ImportFrom):
                owner, names = str(node.module), [alias.name for alias in node.names]
            else:
                continue
            if owner not in ("self", "cls"):
                private = [n for n in names if n.startswith("_") and not n.endswith("__")]
                used += [f"{module}: {owner}.{name}" for name in private if name not in public]
    assert used == []


def test_no_path_of_a_machine_is_in_the_code():
    words = (" /tmp/", "/home/", "/root/")
    texts = {module: path.read_text(encoding="utf-8") for module, path in MODULES.items()}
    assert [name for name, text in texts.items() if any(word in text for word in words)] == []
