"""A search as a sequence of trials: what to try next, when to stop it, which were the best."""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from stages.model.parameters import Train
from stages.run import files
from stages.run.cli import UserError
from stages.tuning.experiments import Result, Task
from stages.tuning.space import decode, encode, replace

if TYPE_CHECKING:
    import optuna.trial
    from optuna.distributions import BaseDistribution

_SHARES = 20  # of a training, after each of which a trial is compared with others
_FIRST_SHARE = 5  # that is compared: earlier losses say little
_MAX_FAILURES = 5  # in a row
_COMPLETE_TRIALS = 4  # at least, before any is stopped


@dataclass(frozen=True)
class Trial:
    """A trial that has ended."""

    number: int
    task: Task
    result: Result

    @property
    def state(self) -> str:
        """``"complete"``, ``"stopped"`` or ``"failed"``."""
        if self.result.metrics:
            return "complete"
        return "failed" if self.result.error else "stopped"

    @property
    def best_epoch(self) -> dict[str, str] | None:
        """The row of the history with the lowest validation loss; None if there is no row."""
        return min(self.result.history, key=lambda row: float(row["val_loss"]), default=None)

    @property
    def loss(self) -> float:
        """The lowest validation loss; infinity if the trial was stopped or failed."""
        return self.result.metrics["train"]["val_loss"] if self.result.metrics else math.inf


class Study:
    """An Optuna study that minimizes the validation loss.

    Trial 0 is that of the present parameters. Any other is stopped (pruned) if its lowest
    validation loss, after a share of its epochs, is above the median of the complete trials after
    the same share. The same study tries the same parameters: one that was interrupted is repeated,
    with the results that were kept.

    Parameters
    ----------
    parameters : Train
        The present parameters.
    space : dict of str to Optuna distribution
    commit : str
        From which the trials start.
    side_by_side : int
        The number of trials that run at once.

    Attributes
    ----------
    key : str
        4 hexadecimal digits, part of the names of the experiments.
    trials : list of Trial
    """

    def __init__(
        self,
        parameters: Train,
        space: "Mapping[str, BaseDistribution]",
        commit: str,
        side_by_side: int,
    ) -> None:
        import_optuna()
        import optuna

        self.parameters, self.space, self.commit = parameters, dict(space), commit
        shown = {key: str(distribution) for key, distribution in space.items()}
        inputs = json.dumps([commit, shown, optuna.__version__, side_by_side])
        digest = hashlib.sha256(inputs.encode()).hexdigest()
        self.key = digest[:4]
        self.trials: list[Trial] = []
        self._path = files.scratch_dir("searches") / f"{digest}.json"
        self._saved: dict[str, Any] = {}
        if self._path.exists():
            self._saved = json.loads(self._path.read_text(encoding="utf-8"))
        sampler = optuna.samplers.TPESampler(seed=parameters.seed)
        self.optuna_study = optuna.create_study(sampler=sampler)
        self._pruner = optuna.pruners.MedianPruner(_COMPLETE_TRIALS, _FIRST_SHARE)
        self._asked: list[optuna.trial.Trial | None] = []

    def ask(self, numbers: Iterable[int]) -> Iterator[Task]:
        """Yield the trials of these numbers, which begin with 0; a stopped one with its result."""
        for number in numbers:
            asked: optuna.trial.Trial | None = None
            values: dict[str, Any] = {}
            if number:
                asked = self.optuna_study.ask(self.space)
                values = decode(asked.params, self.space)
            elif present := encode(self.parameters, self.space):  # otherwise out of the space
                self.optuna_study.enqueue_trial(present)
                asked = self.optuna_study.ask(self.space)
            self._asked.append(asked)
            name = f"search-{self.key}-{number}"
            epochs = replace(self.parameters, values).total_epochs
            saved = self._saved.get(str(number))
            result = Result(**saved["result"]) if saved and saved["values"] == values else None
            yield Task(name, values, epochs, self._stop_rule(epochs) if number else None, result)

    def tell(self, task: Task, result: Result) -> None:
        """Take the result of the first trial that has none yet; save it if it was stopped.

        A complete trial is kept as an experiment. What failed is run again in the next search: the
        cause may be gone.

        Raises
        ------
        UserError
            If trial 0 failed, or the last five.
        """
        from optuna.trial import TrialState

        number = len(self.trials)
        self.trials.append(Trial(number, task, result))
        if self.trials[-1].state == "failed":
            self._check_failures()
        if self.trials[-1].state == "stopped":
            self._saved[str(number)] = {"values": task.values, "result": asdict(result)}
            files.write_json(self._path, self._saved)
        asked = self._asked[number]
        if asked is None:
            return
        for share, loss in _losses_by_share(result.history, task.epochs).items():
            asked.report(loss, share)
        if result.metrics:
            self.optuna_study.tell(asked, self.trials[-1].loss)
        else:  # also after an error, so that such parameters are not proposed again
            self.optuna_study.tell(asked, state=TrialState.PRUNED)

    def _check_failures(self) -> None:
        last = self.trials[-_MAX_FAILURES:]
        error = last[-1].result.error
        if len(self.trials) == 1:
            raise UserError(f"the present parameters can't be trained: {error}")
        if len(last) == _MAX_FAILURES and all(trial.state == "failed" for trial in last):
            raise UserError(
                f"{_MAX_FAILURES} trials in a row have failed, the last one with: {error}; correct"
                " that, or narrow the space"
            )

    def best(self, count: int) -> list[Trial]:
        """Return the best trials, of different parameters, that have a lower loss than trial 0."""
        best: list[Trial] = []
        for trial in sorted(self.trials, key=lambda trial: trial.loss):
            if trial.loss < self.trials[0].loss and trial.task.values not in [
                other.task.values for other in best
            ]:
                best.append(trial)
        return best[:count]

    def _stop_rule(self, epochs: int) -> Any:
        """Return the function that says after how many epochs to stop a trial that starts now."""
        import optuna
        from optuna.trial import TrialState

        others = optuna.create_study()
        others.add_trials(self.optuna_study.get_trials(states=[TrialState.COMPLETE]))

        def stop(history: list[dict[str, str]]) -> int | None:
            for end in range(1, min(len(history) + 1, epochs)):
                losses = _losses_by_share(history[:end], epochs)
                trial = optuna.create_trial(state=TrialState.RUNNING, intermediate_values=losses)
                if self._pruner.prune(others, trial):
                    return end
            return None

        return stop


def import_optuna() -> None:
    """Import Optuna, and turn its log lines off.

    Raises
    ------
    UserError
        If it is not installed.
    """
    try:
        import optuna
    except ImportError:
        raise UserError('a search needs Optuna: pip install ".[search]"') from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)


def _losses_by_share(history: list[dict[str, str]], epochs: int) -> dict[int, float]:
    """Return the lowest validation loss until each share of the epochs, from 1 to 20."""
    losses = [float(row["val_loss"]) for row in history]
    ends = {share: math.ceil(share * epochs / _SHARES) for share in range(1, _SHARES + 1)}
    return {share: min(losses[:end]) for share, end in ends.items() if end <= len(losses)}
