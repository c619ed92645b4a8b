"""A row of results: one JSON object a line, with the figures of one thing that was measured, and where.

bench      what was measured: an op's name, throughput, host, codegen, memory
machine    its provenance: versions, commit (a digest of the sources where there is no checkout), device, date
IDENTITY   the keys that say which figure it is: two rows with equal values measure the same thing
figures    numbers with the unit at the key's end (ms, us, gb_s, tflop_s, mb, tokens_per_s) or a count (registers)
timed      in addition: ms_q20, ms_q80 (quantiles over the samples), samples; and where something was timed alternately
           with it: reference (its name); relative, relative_q20, relative_q80 (over the rounds, of ms over its ms);
           relative_low (ms_q20 over its ms_q20)
red        in place of figures: why there are none

Rows without provenance are neither written nor read: a figure that cannot be repeated is not a figure.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastgpt.core.errors import UserError

Row = dict[str, Any]
PROVENANCE = ("fastgpt", "sources", "torch", "device_name", "threads", "date")  # and commit, where there is a checkout
IDENTITY = (
    "kind",
    *("bench", "figure", "op", "language", "kernel", "config", "arch", "model", "shape", "batch", "block"),
    *("dtype", "phase", "mode", "device", "provider", "variant", "processes"),
)


def lacking(row: Row) -> str:
    """Return which part of its provenance a row lacks, in words; empty if none."""
    machine = row.get("machine") or {}
    return ", ".join(key for key in PROVENANCE if machine.get(key) in (None, ""))


def append_rows(path: Path, rows: Iterable[Row]) -> None:
    """Append rows to a JSON Lines file.

    Raises:
        ValueError: a row without provenance.
    """
    rows = list(rows)
    for row in rows:
        if missing := lacking(row):
            raise ValueError(f"append_rows: a row of {row.get('bench')} has no {missing} in 'machine'")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)


def read_rows(patterns: Iterable[str]) -> list[Row]:
    """Return the rows of the files that match, in the files' order.

    Args:
        patterns: file names or glob patterns, each with "@COMMIT" at its end for the rows of one commit alone.
    Raises:
        UserError: no such file, no JSON, a row without provenance, no row of that commit.
    """
    return [row for pattern in patterns for row in _read(pattern)]


def _read(pattern: str) -> list[Row]:
    name, commit = pattern, ""
    if not glob.glob(pattern) and "@" in pattern:
        name, _, commit = pattern.rpartition("@")
    files = sorted(glob.glob(name))
    if not files:
        raise UserError(f"results: there is no file {name}")
    rows = [row for file in files for row in _rows_of(Path(file))]
    found = [row for row in rows if str(row["machine"].get("commit") or row["machine"]["sources"]).startswith(commit)]
    if not found:
        raise UserError(f"results: {name} has no rows" + (f" of commit {commit}" if commit else ""))
    return found


def _rows_of(path: Path) -> list[Row]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"results: {path} cannot be read: {e}") from None
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as e:
            raise UserError(
                f"results: {path}, line {number} is not JSON ({e.msg}), expected one row per line"
            ) from None
        if not isinstance(row, dict) or "bench" not in row:
            raise UserError(f"results: {path}, line {number} is not a row, expected an object with a key 'bench'")
        if missing := lacking(row):
            raise UserError(f"results: {path}, line {number}: a row of {row['bench']} without provenance: no {missing}")
        rows.append(row)
    return rows


def version(row: Row) -> str:
    """Return which code a row is of: its commit, with the digest of the sources where the commit alone is ambiguous."""
    commit, sources = row["machine"].get("commit"), row["machine"]["sources"]
    return f"{commit or 'sources'} {sources}" if not commit or commit.endswith("-dirty") else str(commit)


def hardware(row: Row) -> str:
    """Return the hardware that a row was measured on, as far as figures must not be compared across it."""
    machine = row["machine"]
    return f"{machine['device_name']}, {machine['threads']} threads" if on_cpu(row) else str(machine["device_name"])


def on_cpu(row: Row) -> bool:
    """Return whether a row's figures are of a CPU."""
    return not str(row["machine"].get("device") or "cpu").startswith("cuda")


def identity(row: Row) -> tuple[tuple[str, str], ...]:
    """Return what a row is of: (key, value) of the keys in IDENTITY that it has; a shape reads 8192x768."""
    return tuple((key, _text(row[key])) for key in IDENTITY if isinstance(row.get(key), (str, int, list, tuple)))


def _text(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def relative(row: Row) -> tuple[float, float, float] | None:
    """Return time as a share of the reference's: median, 20 and 80 % quantile over the rounds."""
    if row.get("relative"):
        return row["relative"], row["relative_q20"], row["relative_q80"]
    speed = row.get("speed_vs_torch")  # rows of throughput before the keys above existed
    return (1 / speed[0], 1 / speed[2], 1 / speed[1]) if speed else None


def judged_share(row: Row) -> tuple[float, str] | None:
    """Return what `compare` judges: the share of low quantiles, and the reference's name; None if there is no
    reference."""
    if row.get("relative_low"):
        return row["relative_low"], row["reference"]
    share = relative(row)
    return (share[0], str(row.get("reference", "torch"))) if share else None
