"""Trials that Optuna proposes, each of which is trained with every seed.

Optuna's journal in the folder of the sweep holds the trials, result.json in the folder of a run what that came to. A
trial is told to Optuna once all its runs have a result, or one of them was pruned or failed. So a sweep that was killed
at any moment continues with the same trials: those that were under way get the runs that they lack.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import warnings
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgpt.core.errors import UserError
from fastgpt.core.folders import write_text
from fastgpt.report.rows import read_json
from fastgpt.sweep import outcome
from fastgpt.sweep.check import Candidate
from fastgpt.sweep.jobs import Job, Row
from fastgpt.sweep.space import Choices, Dimension, text_of_number
from fastgpt.sweep.spec import Spec
from fastgpt.training.config import to_dict

if TYPE_CHECKING:
    import optuna

ENOUGH = 10  # complete trials of which importances say something
JOURNAL, SETTINGS = "optuna.journal", "sweep.json"
FREE = ("trials", "parallel", "devices", "keep_checkpoints")  # settings that may change when a sweep continues


def require_optuna() -> None:
    """Refuse to search without Optuna.

    Raises:
        UserError: it is not installed.
    """
    if importlib.util.find_spec("optuna") is None:
        raise UserError("a search needs Optuna, expected `pip install 'fastgpt[sweep]'`, or sampler grid")


class Search:
    """The trials of a sweep, in the folder `out`."""

    def __init__(self, spec: Spec, found: list[Candidate], out: Path) -> None:
        self.spec, self.out, self.dimensions = spec, out, spec.dimensions
        _require_same(spec, found, out)
        self.study = open_study(spec, found, out)
        self.waiting: deque[Job] = deque()
        self.trials: dict[str, optuna.Trial] = {}
        import optuna

        for frozen in self.study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
            self._begin(optuna.trial.Trial(self.study, frozen._trial_id))

    def next(self) -> Job | None:
        while not self.waiting and (n := len(self.study.get_trials(deepcopy=False))) < (self.spec.trials or 0):
            # A seed of its own for each trial: a sweep that continues proposes what it would have proposed.
            self.study.sampler = sampler_of(self.spec, n)
            self._begin(self.study.ask())
        return self.waiting.popleft() if self.waiting else None

    def _begin(self, trial: optuna.Trial) -> None:
        """Choose the settings of a trial that it does not have yet, and queue its next run."""
        for one in self.dimensions:
            suggest(trial, one)
        self.trials[_name(trial)] = trial
        self._advance(trial)

    def _advance(self, trial: optuna.Trial) -> None:
        """Queue the next run of a trial, or tell Optuna how it ended."""
        from optuna.trial import TrialState

        values = []
        for job in self._jobs(trial):
            found = outcome.read(job.folder)
            if found is None:
                self.waiting.append(job)
                return
            if found.status != "complete":
                trial.set_user_attr("reason", found.reason)
                state = TrialState.PRUNED if found.status == "pruned" else TrialState.FAIL
                self.study.tell(trial, state=state)
                return
            values.append(found.value)
        self.study.tell(trial, sum(value for value in values if value is not None) / len(values))

    def _jobs(self, trial: optuna.Trial | optuna.trial.FrozenTrial) -> list[Job]:
        name, arguments = _name(trial), self.spec.arguments(_given(trial))
        return [Job(name, self.out / name / f"seed-{seed}", arguments, seed) for seed in self.spec.seeds]

    def report(self, job: Job, value: float, step: int) -> bool:
        if self.spec.pruner == "none" or job.seed != self.spec.seeds[0]:
            return False  # trials are compared in their first run
        trial = self.trials[job.name]
        frozen = self.study.get_trials(deepcopy=False)[trial.number]
        if step in frozen.intermediate_values:  # a run that resumed repeats steps
            return False
        trial.report(value, step)
        return trial.should_prune()

    def ended(self, job: Job) -> None:
        self._advance(self.trials[job.name])

    def rows(self) -> list[Row]:
        found = []
        for frozen in self.study.get_trials(deepcopy=False):
            results = [outcome.read(job.folder) for job in self._jobs(frozen)]
            found.append(Row(_name(frozen), _given(frozen), [one for one in results if one is not None]))
        return found

    def total(self) -> int:
        return (self.spec.trials or 0) * len(self.spec.seeds)

    def importances(self) -> dict[str, float]:
        """Return how much each setting explains of the difference between the best trials and the others, by
        PED-ANOVA; {} where too few trials are complete."""
        import optuna

        done = self.study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
        if len(done) < ENOUGH or len(self.dimensions) < 2:
            return {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on settings with few trials
            return optuna.importance.get_param_importances(self.study)


def _name(trial: optuna.Trial | optuna.trial.FrozenTrial) -> str:
    return f"trial-{trial.number:04d}"


def _given(trial: optuna.Trial | optuna.trial.FrozenTrial) -> dict[str, str]:
    """Return the settings of a trial as text."""
    return {
        key: value if isinstance(value, str) else text_of_number(value) for key, value in sorted(trial.params.items())
    }


def suggest(trial: optuna.Trial, one: Dimension) -> None:
    """Let a trial choose a setting, unless it has."""
    if isinstance(one, Choices):
        trial.suggest_categorical(one.key, one.values)
    elif isinstance(one.low, int) and isinstance(one.high, int):
        trial.suggest_int(one.key, one.low, one.high, step=int(one.step or 1), log=one.log)
    else:
        trial.suggest_float(one.key, one.low, one.high, step=one.step, log=one.log)


def sampler_of(spec: Spec, n: int) -> optuna.samplers.BaseSampler:
    """Return the sampler of trial number n."""
    import optuna

    if spec.sampler == "random":
        return optuna.samplers.RandomSampler(seed=n)
    liar = (spec.parallel or len(spec.devices)) > 1  # trials under way count as bad ones, so that others differ
    return optuna.samplers.TPESampler(seed=n, constant_liar=liar)


def pruner_of(spec: Spec, found: list[Candidate]) -> optuna.pruners.BasePruner:
    """Return the pruner, whose resource is steps."""
    from optuna import pruners

    first = max(1, min(one.cfg.eval_every for one in found))
    lengths = {one.cfg.max_steps for one in found}
    if spec.pruner == "median":
        return pruners.MedianPruner()
    if spec.pruner == "halving":
        return pruners.SuccessiveHalvingPruner(min_resource=first, reduction_factor=3)
    if spec.pruner == "hyperband":
        known = [length for length in lengths if length is not None]
        most: Any = max(known) if len(known) == len(lengths) else "auto"
        return pruners.HyperbandPruner(min_resource=first, max_resource=most, reduction_factor=3)
    return pruners.NopPruner()


def open_study(spec: Spec, found: list[Candidate], out: Path) -> optuna.Study:
    """Open the study in the folder of a sweep, which this process alone uses, or make a new one."""
    import optuna
    from optuna.storages.journal import JournalFileBackend

    path = out / JOURNAL
    for stale in out.glob(f"{JOURNAL}.lock*"):  # of a process that was killed
        stale.unlink()
    if path.exists() and (text := path.read_bytes()) and not text.endswith(b"\n"):
        with path.open("r+b") as file:  # it was killed while writing a line
            file.truncate(text.rfind(b"\n") + 1)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    return optuna.create_study(
        study_name="sweep",  # Hyperband's brackets depend on the name
        storage=optuna.storages.JournalStorage(JournalFileBackend(str(path))),
        direction="maximize" if spec.rises else "minimize",
        sampler=sampler_of(spec, 0),
        pruner=pruner_of(spec, found),
        load_if_exists=True,
    )


def _require_same(spec: Spec, found: list[Candidate], out: Path) -> None:
    """Write the settings of a new sweep to its folder, and compare those of one that continues.

    Raises:
        UserError: the folder holds a sweep with other settings.
    """
    own = {key: value for key, value in dataclasses.asdict(spec).items() if key not in FREE}
    own["start"] = to_dict(found[0].cfg)  # the configuration may be a file that has changed
    own = json.loads(json.dumps(own))
    path = out / SETTINGS
    if not path.exists():
        write_text(path, json.dumps(own, indent=1))
        return
    before = read_json(path)
    for key, value in own.items():
        if before.get(key) != value:
            changed = f"{key} is {value!r}, not {before.get(key)!r}"
            changed = "the configuration has changed" if key == "start" else changed
            raise UserError(f"{out} holds a sweep with other settings ({changed}), expected another --out")
