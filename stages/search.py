"""Search for better training parameters: ``python -m stages search --trials 30``.

Each trial is a training with other parameters. Optuna proposes them from the validation losses of
the trials before. The best trials and the present parameters are then trained again with other
seeds, which shows whether a trial was better or only lucky. The test split is not read.
"""

import argparse
import math
import os
import random
import socket
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from stages.display import search as display
from stages.run import cli, files
from stages.run.cli import UserError
from stages.tuning.space import DEFAULT_SPACES, as_suggested, lookup, read_space, replace, suggest
from stages.tuning.training import History, TrainingFailed, Trainings

if TYPE_CHECKING:
    import optuna

_BEST = 3  # trials, at most, that are trained again with other seeds
_SHARES = 20  # of a training, after each of which a trial is compared with others
_FIRST_SHARE = 5  # that is compared: earlier losses say little
_COMPLETE_TRIALS = 4  # at least, before any is pruned
_SCORES = ["val_loss", "val_accuracy"]
_FOLDER = Path("metrics/search")
_START_SECONDS = 60  # in which a trial says which process runs it
_MAX_STUDIES = 20  # in the scratch folder; the oldest are deleted


def main(options: argparse.Namespace) -> None:
    """Search, train the best trials again, and write tables and pictures.

    The same search (data, code, packages, parameters and space) goes on where an earlier one has
    ended, and several processes with the same storage work on it together.
    """
    if options.trials is None and options.time is None:
        raise UserError("a search needs a budget: --trials 30, --time 2h, or both")
    try:
        import optuna
        from optuna.trial import FrozenTrial, TrialState
    except ImportError:
        raise UserError('a search needs Optuna: pip install ".[search]"') from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    trainings = Trainings("train")
    space = read_space(options.space, trainings.parameters)
    name = files.fingerprint([], inputs=trainings.fingerprint, space=space)[:12]
    study = _open_study(name, options.storage)
    ended = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)

    def is_done() -> bool:  # a failed trial counts no more if it is repeated
        repeated = sum("repeats" in trial.user_attrs for trial in study.get_trials(deepcopy=False))
        known = len(study.get_trials(states=ended)) - repeated
        return options.trials is not None and known >= options.trials

    def after_trial(study: optuna.Study, trial: FrozenTrial) -> None:
        display.print_trial(trial)
        if "present" in trial.user_attrs and trial.state == TrialState.FAIL:
            error = trial.user_attrs["error"]
            raise UserError(f"the present parameters can't be trained: {error}")
        if is_done():
            study.stop()

    display.print_start(name, options.space or DEFAULT_SPACES.name, space)
    _enqueue(study, as_suggested(trainings.parameters, space))
    for trial in study.get_trials(states=ended):
        display.print_trial(trial)
    if not is_done():
        study.optimize(
            lambda trial: _run_trial(study, trial, trainings, space),
            timeout=options.time,
            catch=(TrainingFailed,),
            callbacks=[after_trial],
        )
    known = {trial.number: trial for trial in study.get_trials(states=ended)}
    complete = [trial for trial in known.values() if trial.state == TrialState.COMPLETE]
    present = next((trial for trial in complete if "present" in trial.user_attrs), None)
    if present is None:  # no time, or another process trains it
        raise UserError("the present parameters are not trained yet: run the same search again")
    for file in display.FILES:  # of an earlier search
        (_FOLDER / file).unlink(missing_ok=True)
    table = display.trial_table(known.values())
    files.write_csv(_FOLDER / "trials.csv", table)
    display.draw(study, [*space], _FOLDER)
    better = table[(table["state"] == "complete") & (table["val_loss"] < present.value)]
    best = better.sort_values("val_loss").drop_duplicates([*space])["trial"][:_BEST].tolist()
    rows: list[dict[str, Any]] = []
    if best:
        candidates = {n: known[n].user_attrs["values"] for n in [present.number, *best]}
        first = trainings.parameters.seed + 1
        pairs = [(n, seed) for seed in range(first, first + options.seeds) for n in candidates]
        display.print_candidates(len(pairs), options.seeds)
        # Processes that share the trials share these trainings, too: each takes them in its order.
        for number, seed in random.sample(pairs, len(pairs)) if options.storage else pairs:
            name, scores, error = f"trial {number}, seed {seed}", {}, ""
            try:
                if name not in study.user_attrs:
                    result = trainings.run(candidates[number] | {"train.seed": seed}, name)
                    study.set_user_attr(name, {key: result["train"][key] for key in _SCORES})
                scores = study.user_attrs[name]
            except TrainingFailed as failed:
                error = str(failed)
            rows.append({"trial": number, "seed": seed, **scores})
            display.print_candidate(rows[-1], error)
    again = pd.DataFrame(rows, columns=["trial", "seed", *_SCORES]).sort_values(["seed", "trial"])
    if rows:
        files.write_csv(_FOLDER / "seeds.csv", again)
    lines = display.conclude(known, present.number, again, _FOLDER)
    cli.summary("search: done", lines)


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
        what = "the path of a file of trials, or the URL of a database"
        raise UserError(f"--storage: expected {what}: {cli.first_line(error)}") from None
    if storage is None:
        Path(path).touch()  # it may be an old one, which goes on
        files.keep_newest(Path(path), "*.log", _MAX_STUDIES)
    return study


def _enqueue(study: "optuna.Study", present: dict[str, Any]) -> None:
    """Let the present parameters come first, and repeat what has failed or was interrupted."""
    from optuna.trial import TrialState

    for trial in study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
        if _is_gone(trial):
            study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
    trials = study.get_trials(deepcopy=False)
    if not trials:
        study.enqueue_trial(present, user_attrs={"present": True})
    repeated = {trial.user_attrs.get("repeats") for trial in trials}
    for trial in trials:
        if trial.state == TrialState.FAIL and trial.number not in repeated:
            kind = {"present": True} if "present" in trial.user_attrs else {}
            study.enqueue_trial(trial.params, user_attrs=kind | {"repeats": trial.number})


def _is_gone(trial: "optuna.trial.FrozenTrial") -> bool:
    """Tell whether the process of a running trial was one of this host and runs no more."""
    process = trial.user_attrs.get("process")
    if process is None:  # killed before it could say so, or just started
        start = trial.datetime_start
        return start is not None and (datetime.now() - start).total_seconds() > _START_SECONDS
    if process[0] != socket.gethostname():
        return False
    try:
        os.kill(process[1], 0)
    except OSError as error:
        return isinstance(error, ProcessLookupError)
    return process[1] == os.getpid()  # the ID of an earlier one, as after a container's restart


def _run_trial(
    study: "optuna.Study", trial: "optuna.Trial", trainings: Trainings, space: dict[str, Any]
) -> float:
    """Train with the parameters that Optuna proposes; return the lowest validation loss."""
    import optuna

    trial.set_user_attr("process", [socket.gethostname(), os.getpid()])
    present, is_present = trainings.parameters, "present" in trial.user_attrs
    # A seed for each trial, so that it does not matter what this process has drawn before.
    study.sampler = optuna.samplers.TPESampler(seed=(present.seed + trial.number) % 2**32)
    keys = as_suggested(present, space) if is_present else space
    values = {key: suggest(trial, key, space[key]) for key in keys}
    if is_present:  # with all their digits, and those outside of the space
        values = {key: lookup(present, key) for key in space}
    trial.set_user_attr("values", values)
    epochs = replace(present, values).total_epochs

    def on_epoch(history: History) -> None:
        best = min(history, key=lambda row: row["val_loss"])
        trial.set_user_attr("scores", best | {"epochs": len(history)})
        # Trainings of different length are compared after the same share of their epochs.
        for share in range(1, _SHARES + 1):
            if math.ceil(share * epochs / _SHARES) == len(history):
                trial.report(best["val_loss"], share)
        if not is_present and len(history) < epochs and trial.should_prune():
            raise optuna.TrialPruned

    try:
        result = trainings.run(values, f"trial {trial.number}", on_epoch)
    except TrainingFailed as error:
        trial.set_user_attr("error", str(error))
        raise
    return result["train"]["val_loss"]


if __name__ == "__main__":
    raise SystemExit("run it as: python -m stages search")
