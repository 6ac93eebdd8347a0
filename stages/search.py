"""Search for better training parameters: ``python -m stages search --trials 30``.

Each trial is a training with other parameters. Optuna proposes them from the validation losses of
the trials before. The best trials and the present parameters are then trained again with other
seeds, which shows whether a trial was better or only lucky. The test split is not read.
"""

import argparse
import itertools
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from stages.display import search as display
from stages.run import cli, files
from stages.run.cli import UserError
from stages.tuning import space as spaces
from stages.tuning.training import History, TrainingFailed, Trainings, own_folder, unused_folders

if TYPE_CHECKING:
    import optuna

_BEST = 3  # trials, at most, that are trained again with other seeds
_SHARES = 20  # of a training, after each of which a trial is compared with others
_FIRST_SHARE = 5  # that is compared: earlier losses say little
_COMPLETE_TRIALS = 4  # at least, before any is pruned
_MAX_FAILURES = 5  # in a row
_MAX_STUDIES = 20  # in the scratch folder; the oldest are deleted
_SCORES = ["val_loss", "val_accuracy"]


def search(
    trials: int | None,
    seconds: float | None = None,
    seeds: int = 3,
    space_path: str | Path | None = None,
    storage: str | None = None,
    folder: str | Path = "metrics/search",
) -> dict[str, str]:
    """Search, train the best trials again, and write tables and pictures.

    The same search (data, code, parameters and space) goes on where an earlier one has ended.
    Several processes with the same storage work on it together.

    Parameters
    ----------
    trials : int or None
        The number of trials to end with, those of earlier runs included. None: no limit.
    seconds : float, default=None
        After this time no trial is started. The trainings with other seeds come in addition.
    seeds : int, default=3
        The number of other seeds: those after `train.seed`.
    space_path : path, default=None
        The file of a search space (see `read_space`). None: a default space.
    storage : str, default=None
        Where Optuna keeps the trials: the path of a file, or the URL of a database. None: a file
        in the scratch folder.
    folder : path, default="metrics/search"
        For ``trials.csv``, ``seeds.csv`` and the pictures.

    Returns
    -------
    lines : dict of str to str
        What was found, by topic.

    Raises
    ------
    UserError
        If the search can't start, the present parameters can't be trained, five trials in a row
        have failed, or data, code or params.yaml have changed since the start.
    """
    _import_optuna()
    trainings, folder = Trainings("train"), Path(folder)
    space = spaces.read_space(space_path, trainings.parameters)
    name = files.fingerprint([], inputs=trainings.fingerprint, space=space)[:12]
    study = _open_study(name, storage)
    display.print_start(name, space_path or spaces.DEFAULT_SPACES.name, space)
    for outcome in _outcomes(study).values():
        display.print_trial(outcome)
    _enqueue(study, spaces.as_suggested(trainings.parameters, space))
    with own_folder() as own:
        _run_trials(study, trainings, space, own, trials, seconds)
        outcomes = _outcomes(study)
        if outcomes.get(0, {}).get("state") != "complete":  # no time, or another process trains it
            raise UserError("the present parameters are not trained yet: run the same search again")
        for file in display.FILES:  # of an earlier search
            (folder / file).unlink(missing_ok=True)
        table = display.trial_table(outcomes.values())
        files.write_csv(folder / "trials.csv", table)
        display.draw(study, [*space], folder)
        better = table[(table["state"] == "complete") & (table["val_loss"] < table["val_loss"][0])]
        best = better.sort_values("val_loss").drop_duplicates([*space])["trial"][:_BEST]
        again = pd.DataFrame()
        if len(best):
            candidates = {number: outcomes[number]["values"] for number in [0, *best]}
            again = _train_again(study, trainings, candidates, seeds, own)
            files.write_csv(folder / "seeds.csv", again)
    return display.conclude(outcomes, again, folder)


def _import_optuna() -> None:
    try:
        import optuna
    except ImportError:
        raise UserError('a search needs Optuna: pip install ".[search]"') from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)


def _open_study(name: str, storage: str | None) -> "optuna.Study":
    """Open or create the study of this name, in a file (Optuna's journal) or a database."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    folder = files.scratch_dir("search")
    path = str(folder / f"{name}.log") if storage is None else storage
    try:
        opened: str | JournalStorage = path
        if "://" not in path:
            opened = JournalStorage(JournalFileBackend(path, JournalFileOpenLock(path)))
        pruner = optuna.pruners.MedianPruner(_COMPLETE_TRIALS, _FIRST_SHARE)
        study = optuna.create_study(
            study_name=name, storage=opened, pruner=pruner, load_if_exists=True
        )
    except Exception as error:  # each database has its own
        raise UserError(
            "--storage: expected the path of a file of trials, or the URL of a database; Optuna"
            f" can't use this one: {cli.first_line(error)}"
        ) from None
    files.keep_newest(folder, "*.log", _MAX_STUDIES)
    return study


def _numbers(study: "optuna.Study") -> list[int]:
    """Return the number of each trial that Optuna knows; a repeated one has its number again.

    Without repeated ones, a search that was interrupted has the same trials as one that was not.
    """
    new = itertools.count()
    known = [trial.user_attrs for trial in study.get_trials(deepcopy=False)]
    return [attributes["number"] if "number" in attributes else next(new) for attributes in known]


def _enqueue(study: "optuna.Study", present: dict[str, Any]) -> None:
    """Let the present parameters come first, and repeat what has failed or was interrupted."""
    from optuna.trial import TrialState

    for folder in unused_folders():
        for trial in study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
            if trial.user_attrs.get("process") == folder.name:
                study.tell(trial.number, state=TrialState.FAIL)
    trials = study.get_trials(deepcopy=False)
    if not trials:
        study.enqueue_trial(present)
    last = dict(zip(_numbers(study), trials, strict=False))  # of those with the same number
    for number, trial in sorted(last.items()):
        if trial.state == TrialState.FAIL or "error" in trial.user_attrs:
            study.enqueue_trial(trial.params, user_attrs={"number": number})


def _run_trials(
    study: "optuna.Study",
    trainings: Trainings,
    space: dict[str, Any],
    own: Path,
    trials: int | None,
    seconds: float | None,
) -> None:
    """Run trials until so many have ended and none is to be repeated, or the time is over."""
    from optuna.trial import FrozenTrial, TrialState

    errors: list[str] = []  # of the last trials

    def is_done() -> bool:
        waiting = study.get_trials(deepcopy=False, states=[TrialState.WAITING])
        return trials is not None and len(_outcomes(study)) >= trials and not waiting

    def after_trial(study: "optuna.Study", trial: FrozenTrial) -> None:
        outcome = _outcomes(study)[_numbers(study)[trial.number]]
        display.print_trial(outcome)
        if outcome["state"] != "failed":
            errors.clear()
        elif outcome["trial"] == 0:
            raise UserError(f"the present parameters can't be trained: {outcome['error']}")
        elif "number" not in trial.user_attrs:  # that a repeated one fails again is no surprise
            errors.append(outcome["error"])
        if len(errors) == _MAX_FAILURES:
            raise UserError(
                f"{_MAX_FAILURES} trials in a row have failed, the last one with: {errors[-1]};"
                " correct that, or narrow the space"
            )
        if is_done():
            study.stop()

    if not is_done():
        study.optimize(
            lambda trial: _run_trial(study, trial, trainings, space, own),
            timeout=seconds,
            catch=(TrainingFailed,),
            callbacks=[after_trial],
        )


def _run_trial(
    study: "optuna.Study",
    trial: "optuna.Trial",
    trainings: Trainings,
    space: dict[str, Any],
    own: Path,
) -> float:
    """Train with the parameters that Optuna proposes; return the lowest validation loss."""
    import optuna

    trial.set_user_attr("process", own.name)
    present, number = trainings.parameters, _numbers(study)[trial.number]
    # A seed for each trial, so that it does not matter what this process has drawn before.
    seed = np.random.SeedSequence([present.seed, number]).generate_state(1).item()
    study.sampler = optuna.samplers.TPESampler(seed=seed)
    values = {key: spaces.lookup(present, key) for key in space}
    if number or spaces.as_suggested(present, space):
        suggested = {key: spaces.suggest(trial, key, entry) for key, entry in space.items()}
        values = suggested if number else values  # the present ones with all their digits
    trial.set_user_attr("values", values)
    epochs = spaces.replace(present, values).total_epochs

    def on_epoch(history: History) -> None:
        best = min(history, key=lambda row: row["val_loss"])
        trial.set_user_attr("best", best)
        trial.set_user_attr("epochs", len(history))
        # Trainings of different length are compared after the same share of their epochs.
        for share in range(1, _SHARES + 1):
            if math.ceil(share * epochs / _SHARES) == len(history):
                trial.report(best["val_loss"], share)
        if number and len(history) < epochs and trial.should_prune():
            raise optuna.TrialPruned

    try:
        result = trainings.run(values, own, f"trial {number}", on_epoch)
    except TrainingFailed as error:
        failed_before = _outcomes(study).get(number, {}).get("error")
        trial.set_user_attr("error", str(error))
        if failed_before:
            raise
        # Optuna learns from pruned trials, but not from failed ones, to propose other parameters.
        raise optuna.TrialPruned from None
    return result["train"]["val_loss"]


def _outcomes(study: "optuna.Study") -> dict[int, dict[str, Any]]:
    """Return what is known of each trial that has ended, by its number."""
    found: dict[int, dict[str, Any]] = {}
    numbers = _numbers(study)
    for number, trial in zip(numbers, study.get_trials(deepcopy=False), strict=False):
        known, best = trial.user_attrs, trial.user_attrs.get("best", {})
        state = "failed" if "error" in known else trial.state.name.lower()
        if state in ("complete", "pruned", "failed"):  # others wait, run, or were interrupted
            found[number] = {
                "trial": number,
                "state": state,
                **{key: best.get(key) for key in _SCORES},
                "epochs": known.get("epochs", 0),
                "error": known.get("error"),
                "values": known["values"],
            }
    return dict(sorted(found.items()))


def _train_again(
    study: "optuna.Study",
    trainings: Trainings,
    candidates: dict[int, dict[str, Any]],
    seeds: int,
    own: Path,
) -> pd.DataFrame:
    """Train candidates, by their number, with other seeds; return seeds.csv.

    The results are kept in the study. Other processes add to them, each from another place on.
    """
    first = trainings.parameters.seed + 1
    pairs = [(number, seed) for seed in range(first, first + seeds) for number in candidates]
    which = "the present parameters and the best trials"
    print(f"\n{which}, with {cli.count(seeds, 'other seed')}: {cli.count(len(pairs), 'training')}")
    print("\n  trial  seed  val_loss  val_accuracy", flush=True)
    processes = {trial.user_attrs.get("process") for trial in study.get_trials(deepcopy=False)}
    names = sorted({own.name, *filter(None, processes)})
    start = len(pairs) * names.index(own.name) // len(names)
    rows: dict[tuple[int, int], dict[str, Any]] = {}
    for number, seed in pairs[start:] + pairs[:start]:
        name = f"trial {number}, seed {seed}"
        scores, shown = {}, ""
        try:
            if name not in study.user_attrs:
                result = trainings.run(candidates[number] | {"train.seed": seed}, own, name)
                study.set_user_attr(name, {key: result["train"][key] for key in _SCORES})
            scores = study.user_attrs[name]
            shown = f"{scores['val_loss']:8.4f}  {scores['val_accuracy']:12.4f}"
        except TrainingFailed as error:
            shown = f"failed: {error}"
        print(f"  {number:>5}  {seed:>4}  {shown}", flush=True)
        rows[number, seed] = {"trial": number, "seed": seed, **scores}
    return pd.DataFrame([rows[pair] for pair in pairs], columns=["trial", "seed", *_SCORES])


def main(options: argparse.Namespace) -> None:
    """Search with the budget that the command line gives."""
    if options.trials is None and options.time is None:
        raise UserError("a search needs a budget: --trials 30, --time 2h, or both")
    lines = search(options.trials, options.time, options.seeds, options.space, options.storage)
    cli.summary("search: done", lines)
