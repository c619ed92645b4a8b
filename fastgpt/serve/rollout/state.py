"""The state of a deployment: one JSON file, replaced whole, with the versions, which of them is served, and a history.

DIR/deployment.json     the state
DIR/versions/N          the weights, tokenizer and chat template of version N
"""

from __future__ import annotations

import dataclasses
import getpass
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from fastgpt.core.errors import UserError, cause_of
from fastgpt.data.pipeline.store import in_turn, write_json

FORMAT = 1
FILE, LOCK, VERSIONS = "deployment.json", ".lock", "versions"
INIT, PROPOSE, ROLL_OUT, ROLL_BACK = "init", "propose", "roll-out", "roll-back"


@dataclass(frozen=True)
class Gate:
    """What a gate decided about a version.

    Attributes:
        base: number of the version that it was held against.
        alpha, min_difference: as in `fastgpt eval compare --gate`.
        tests: number of metrics that were tested.
        failed: a line for each metric that became worse.
        evaluations: the files, (base, new) of each comparison.
    """

    base: int
    alpha: float
    min_difference: float
    tests: int
    failed: list[str]
    evaluations: list[list[str]]

    @property
    def passed(self) -> bool:
        return not self.failed


@dataclass(frozen=True)
class Version:
    """A model of a deployment.

    Attributes:
        folder: what to serve, below the deployment's folder.
        source: path that it was taken from.
        fingerprint: hash of the weights, as in the results of an evaluation.
        gate: None where no evaluations were given.
    """

    number: int
    folder: str
    source: str
    fingerprint: str
    gate: Gate | None = None


@dataclass(frozen=True)
class Event:
    """A line of the history.

    Attributes:
        time: UTC, in ISO 8601.
        by: who ran the command.
        action: "init", "propose", "roll-out" or "roll-back".
        version: the number that it is about; it is served after a roll-out or a roll-back.
        before: number of the version that was served; None for the first one.
        fingerprint: hash of the weights of `version`.
        reason: given by the user; always there if a gate was overruled.
    """

    time: str
    by: str
    action: str
    version: int
    before: int | None
    fingerprint: str
    reason: str | None = None


@dataclass
class State:
    """A deployment.

    Attributes:
        versions: by number.
        served: numbers in the order in which they were rolled out; the last one is served, and a roll-back removes it.
        history: oldest first.
    """

    versions: dict[int, Version] = field(default_factory=dict)
    served: list[int] = field(default_factory=list)
    history: list[Event] = field(default_factory=list)

    @property
    def current(self) -> Version:
        return self.versions[self.served[-1]]

    @property
    def switches(self) -> int:
        """How often the served version was set."""
        return sum(event.action != PROPOSE for event in self.history)

    def note(self, action: str, number: int, by: str | None, reason: str | None = None) -> None:
        """Add an event to the history; `by` is the user of this process if it is None."""
        before = self.served[-1] if self.served else None
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        fingerprint = self.versions[number].fingerprint
        self.history.append(Event(now, by or user(), action, number, before, fingerprint, reason))

    def plain(self) -> dict[str, Any]:
        """Return it as JSON values."""
        versions = {str(number): dataclasses.asdict(version) for number, version in self.versions.items()}
        history = [dataclasses.asdict(event) for event in self.history]
        return {"format": FORMAT, "served": self.served, "versions": versions, "history": history}


def user() -> str:
    """Return the name of the user of this process."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return "unknown"


def is_deployment(path: str | Path) -> bool:
    """Return whether a path is the folder of a deployment."""
    return (Path(path) / FILE).is_file()


def read(folder: Path) -> State:
    """Read the state of a deployment.

    Raises:
        UserError: there is none, or its file is damaged.
    """
    file = folder / FILE
    if not file.is_file():
        raise UserError(f"{folder} is not a deployment, expected a folder that `fastgpt deploy init` made")
    try:
        return _state(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as e:
        said = f"{e} is missing" if isinstance(e, KeyError) else cause_of(e)
        raise UserError(f"{file} is damaged ({said}), expected the file that `fastgpt deploy` wrote") from None


def _state(values: dict[str, Any]) -> State:
    """Return the state of JSON values. Raises ValueError and the like where they are not one."""
    if values["format"] != FORMAT:
        raise ValueError(f"format {values['format']!r}, expected {FORMAT}")
    versions = {int(number): _version(version) for number, version in values["versions"].items()}
    state = State(versions, list(values["served"]), [Event(**event) for event in values["history"]])
    if unknown := [number for number in state.served if number not in versions]:
        raise ValueError(f"version {unknown[0]!r} is served and not listed")
    if not state.served:
        raise ValueError("no version is served")
    return state


def _version(values: dict[str, Any]) -> Version:
    gate = values["gate"]
    return Version(**{**values, "gate": None if gate is None else Gate(**gate)})


@contextmanager
def changing(folder: Path) -> Iterator[State]:
    """Yield the state to change, and write it when the block ends; nothing is written if the block raises. Other
    commands wait meanwhile.

    Raises:
        UserError: as `read`, or the state cannot be written.
    """
    read(folder)  # no lock in a folder that is no deployment
    with in_turn(folder / LOCK):
        state = read(folder)
        yield state
        write(folder, state)


def write(folder: Path, state: State) -> None:
    """Replace the file of the state. Raises UserError if it cannot be written."""
    write_json(folder / FILE, state.plain())
