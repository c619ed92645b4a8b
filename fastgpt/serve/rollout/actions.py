"""What can be done with a deployment: begin one, propose a version, roll it out, go back."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from fastgpt.core.errors import UserError
from fastgpt.core.folders import new_folder, require_new
from fastgpt.evaluate.compare import open_all, row_line
from fastgpt.evaluate.gate import held_against
from fastgpt.evaluate.paired import Options
from fastgpt.evaluate.results import Results
from fastgpt.evaluate.target import open_target
from fastgpt.serve.rollout.state import (
    INIT,
    PROPOSE,
    ROLL_BACK,
    ROLL_OUT,
    VERSIONS,
    Gate,
    State,
    Version,
    changing,
    read,
    write,
)
from fastgpt.training.checkpoint import OPTIMIZER, STATE, is_part

WEIGHTS = (".safetensors", ".bin")
OTHERS = (".json", ".jinja", ".txt", ".model")


def init(folder: Path, model: str, by: str | None = None) -> Version:
    """Begin a deployment, whose version 1 is served.

    Raises:
        UserError: the folder is not new, or the model cannot be opened.
    """
    require_new(folder)
    source, fingerprint = _open(model)
    with new_folder(folder) as aside:
        state = State()
        version = _take(aside, 1, source, fingerprint, None)
        state.versions[1] = version
        state.note(INIT, 1, by)
        state.served.append(1)
        write(aside, state)
    return version


def propose(
    folder: Path,
    model: str,
    gates: Sequence[tuple[str, str]] = (),
    options: Options = Options(),
    alpha: float = 0.05,
    min_difference: float = 0.0,
    by: str | None = None,
) -> Version:
    """Add a version to a deployment, with what a gate says about it.

    Args:
        gates: evaluations (of the served version, of the new one), as files or runs; the chance alpha of a false alarm
            is divided among them.

    Raises:
        UserError: the model cannot be opened, or an evaluation is of other weights or not comparable.
    """
    base = read(folder).current
    pairs = [open_all([old, new], None) for old, new in gates]  # read first: opening a model takes longer
    source, fingerprint = _open(model)
    failed: list[str] = []
    tests = 0
    for (old, new), results in zip(gates, pairs):
        _is_of(old, results[0], base.fingerprint, f"version {base.number}, which is served")
        _is_of(new, results[1], fingerprint, model)
        verdict = held_against(results[0], results[1], options, alpha / len(pairs), min_difference, (old, new))
        failed += [row_line(row) for row in verdict.failed]
        tests += len(verdict.tested)
    gate = None
    if gates:
        places = [[str(Path(p).resolve()) for p in pair] for pair in gates]
        gate = Gate(base.number, alpha, min_difference, tests, failed, places)
    with changing(folder) as state:
        number = max(state.versions) + 1
        shutil.rmtree(folder / VERSIONS / str(number), ignore_errors=True)  # of a command that was killed
        version = _take(folder, number, source, fingerprint, gate)
        state.versions[number] = version
        state.note(PROPOSE, number, by)
    return version


def roll_out(folder: Path, number: int, force: str | None = None, by: str | None = None) -> Version:
    """Make a version the one that is served.

    Args:
        force: reason to do so although no gate let it pass.

    Raises:
        UserError: there is no such version, it is served already, or no gate let it pass.
    """
    with changing(folder) as state:
        version, before = state.versions.get(number), state.current
        if version is None:
            known = ", ".join(map(str, state.versions))
            raise UserError(f"{folder} has no version {number}, expected one of {known}")
        if number == before.number:
            raise UserError(f"version {number} is served already, expected another one")
        why = _refusal(version, before)
        if why and not force:
            raise UserError(f"{why}; `--force REASON` rolls it out nevertheless")
        if force and not why:
            raise UserError(f"--force has no effect: the gate of version {number} passed")
        state.note(ROLL_OUT, number, by, force)
        state.served.append(number)
    return version


def roll_back(folder: Path, reason: str | None = None, by: str | None = None) -> Version:
    """Make the version that was served before the current one the one that is served.

    Raises:
        UserError: there is none.
    """
    with changing(folder) as state:
        if len(state.served) < 2:
            raise UserError(f"version {state.current.number} is the first one of {folder}, expected an earlier one")
        number = state.served[-2]
        state.note(ROLL_BACK, number, by, reason)
        state.served.pop()
        return state.versions[number]


def _refusal(version: Version, served: Version) -> str | None:
    """Return why a gate does not let a version replace the one that is served; None if it does."""
    gate = version.gate
    if gate is None:
        return f"version {version.number} has no gate, expected evaluations with `fastgpt deploy propose --gate`"
    if gate.failed:
        return f"the gate of version {version.number} failed: {'; '.join(gate.failed)}"
    if gate.base != served.number:
        held = f"the gate of version {version.number} held it against version {gate.base}"
        return f"{held}, and version {served.number} is served; propose it again"
    return None


def _is_of(place: str, results: Results, fingerprint: str, what: str) -> None:
    if results.model.get("fingerprint") != fingerprint:
        raise UserError(f"{place} is an evaluation of other weights, expected those of {what}")


def _open(model: str) -> tuple[Path, str]:
    """Return the folder of a model's weights and their fingerprint, after opening it."""
    target = open_target(model, device="cpu")
    return target.folder.resolve(), target.about["fingerprint"]


def _take(folder: Path, number: int, source: Path, fingerprint: str, gate: Gate | None) -> Version:
    """Take a model into a deployment, so that it stays there whatever becomes of its run."""
    with new_folder(folder / VERSIONS / str(number)) as aside:
        inside = ""
        if (source / STATE).is_file():  # a checkpoint; tokenizer and chat template are in its run
            inside = source.name
            _take_files(source.parent, aside, OTHERS)
        _take_files(source, aside / inside, OTHERS + WEIGHTS)
    place = "/".join(filter(None, (VERSIONS, str(number), inside)))
    return Version(number, place, str(source), fingerprint, gate)


def _take_files(source: Path, target: Path, endings: tuple[str, ...]) -> None:
    """Copy the files of a folder. Weights of a checkpoint, which is never changed in place, are linked where the file
    system can."""
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if not file.is_file() or file.suffix not in endings or is_part(file.name, OPTIMIZER):
            continue
        if file.suffix in WEIGHTS and (source / STATE).is_file():
            with suppress(OSError):  # another file system
                os.link(file.resolve(), target / file.name)
                continue
        shutil.copyfile(file, target / file.name)
