"""The tables of a page: final values, evaluations, settings and where the runs differ, machines and data."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from fastgpt.core.page import Table, number
from fastgpt.report.charts import is_evaluation
from fastgpt.report.metrics import RECENT
from fastgpt.report.run import RunFiles
from fastgpt.report.words import digits, duration

UNKNOWN = "not recorded"
PLACES = ("out", "resume")  # settings that differ between any two runs
Row = tuple[str, Callable[[RunFiles], str]]


def final_values(runs: Sequence[RunFiles]) -> Table:
    """Return what the runs have reached; a row that no run has is left out."""
    rows: list[Row] = [
        ("steps", _steps),
        ("tokens", lambda r: number(r.metrics.last.get("tokens"))),
        ("time of training", lambda r: duration(r.metrics.last.get("seconds"))),
        (f"training loss, last {RECENT} steps", lambda r: digits(r.metrics.recent_mean("loss"))),
        *((f"{name}, last", _latest(name)) for name in _validated(runs)),
        ("best value of the run's metric", _best),
        ("tokens/s, mean", lambda r: number(r.metrics.tokens_per_second())),
        ("share of peak FLOP/s, recent", lambda r: number(r.metrics.recent_mean("mfu_causal"))),
        ("memory, most (GB)", lambda r: _scaled(r.metrics.peak_gb or None, 1)),
        ("energy (kWh)", lambda r: _scaled(r.metrics.joules or None, 1 / 3.6e6)),
        ("skipped steps", lambda r: number(r.metrics.skipped)),
    ]
    cells = [[title, *(find(run) for run in runs)] for title, find in rows]
    return Table("Final values", [_head("figure", runs), *(c for c in cells if set(c[1:]) != {"-"})])


def _head(first: str, runs: Sequence[RunFiles]) -> list[str]:
    return [first, *(run.name for run in runs)]


def _validated(runs: Sequence[RunFiles]) -> list[str]:
    found = dict.fromkeys(name for run in runs for name in run.metrics.latest)
    return [name for name in found if name.startswith("val_")]


def _steps(run: RunFiles) -> str:
    last = run.last_step
    return number(run.metrics.last.get("step")) + (f" of {number(last)}" if last is not None else "")


def _scaled(value: float | None, factor: float) -> str:
    return "-" if value is None else f"{value * factor:.3g}"


def _latest(name: str) -> Callable[[RunFiles], str]:
    return lambda run: digits(run.metrics.latest.get(name, (0, None))[1])


def _best(run: RunFiles) -> str:
    found = run.best()
    if found is None:
        return "-"
    name, value, step, path = found
    return f"{name} {digits(value)} at step {step:,}" + ("" if path is None else f" ({path.name})")


def evaluations(runs: Sequence[RunFiles]) -> Table | None:
    """Return the last value of each evaluation with its step; None if there is none."""
    names = dict.fromkeys(name for run in runs for name in run.metrics.latest if is_evaluation(name))
    if not names:
        return None
    rows = []
    for name in names:
        found = [run.metrics.latest.get(name) for run in runs]
        rows.append([name, *("-" if f is None else f"{f[1]:.4g} at step {f[0]:,}" for f in found)])
    return Table("Last evaluations", [_head("figure", runs), *rows])


def settings(runs: Sequence[RunFiles]) -> list[Table]:
    """Return the settings that differ, and all of them, the different ones marked."""
    flat = [dict(_flat(run.settings)) for run in runs]
    names = list(dict.fromkeys(name for one in flat for name in one))
    rows = {name: [name, *(one.get(name, UNKNOWN) for one in flat)] for name in names}
    differ = frozenset(name for name in names if name not in PLACES and len(set(rows[name][1:])) > 1)
    head = _head("setting", runs)
    tables = []
    if differ:
        tables.append(Table("Settings that differ", [head, *(rows[name] for name in names if name in differ)]))
    if names:
        tables.append(Table(f"All {len(names)} settings", [head, *rows.values()], long=True, marked=differ))
    return tables


def _flat(settings: dict[str, Any], before: str = "") -> list[tuple[str, str]]:
    """Return settings with dotted names and values as text."""
    found: list[tuple[str, str]] = []
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            found += _flat(value, f"{before}{name}.")
        else:
            found.append((before + name, value if isinstance(value, str) and value else json.dumps(value)))
    return found


def provenance(runs: Sequence[RunFiles]) -> Table:
    """Return machines, versions, data, licences and kernels, and mark what differs."""
    columns = [_provenance(run) for run in runs]
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = [[name, *(column.get(name, UNKNOWN) for column in columns)] for name in names]
    for row in rows:
        row[0] += " (differs)" if row[0] != "folder" and len(set(row[1:])) > 1 else ""
    differ = frozenset(row[0] for row in rows if row[0].endswith(" (differs)"))
    return Table("Machine, versions and data", [_head("what", runs), *rows], marked=differ)


def _provenance(run: RunFiles) -> dict[str, str]:
    h = run.header
    machine, kernels = h.get("machine"), h.get("kernels")
    found = {"folder": str(run.folder), "data": _known(h.get("data")), "licences": _known(h.get("licences"))}
    if isinstance(machine, dict):
        found |= {name: _known(value) for name, value in machine.items()}
    if isinstance(kernels, dict):
        picked = {op: value[0] if isinstance(value, list) and value else value for op, value in kernels.items()}
        found["kernels"] = ", ".join(f"{op} {name}" for op, name in picked.items())
    return found


def _known(value: Any) -> str:
    if value is None or value == "":
        return UNKNOWN
    return value if isinstance(value, str) else json.dumps(value)
