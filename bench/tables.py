"""Rows as parts of tables: the newest ones, by device, with their sources, shapes and speeds as text."""

from __future__ import annotations

from typing import Any

from fastgpt.bench.results import Row, hardware, identity, relative

WANTED_GPUS = ("A100", "H100", "H200")
WHOLE = ("both", "step")  # phases that a training step consists of


def newest(rows: list[Row]) -> list[Row]:
    """Return the last measured row of each identity and hardware, in the rows' order."""
    found: dict[Any, Row] = {}
    for row in sorted(rows, key=lambda r: str(r["machine"]["date"])):
        found[identity(row), hardware(row)] = row
    kept = {id(row) for row in found.values()}
    return [row for row in rows if id(row) in kept]


def sources_of(rows: list[Row]) -> list[str]:
    """Return where rows are from, a sentence per machine, commit and driver."""
    found: dict[str, list[str]] = {}
    for row in rows:
        m = row["machine"]
        driver = (row.get("gpu") or {}).get("driver")
        versions = [f"torch {m['torch']}", f"triton {m.get('triton')}", f"Python {m.get('python')}"]
        versions += [f"CUDA {m.get('cuda')}"] * bool(m.get("cuda")) + [f"driver {driver}"] * bool(driver)
        commit = f"commit {m['commit']}" if m.get("commit") else f"sources {m['sources']}"
        found.setdefault(f"{hardware(row)}; {', '.join(versions)}; {commit}", []).append(str(m["date"]))
    return [f"Measured on {text}; {_dates(dates)}; {len(dates)} rows." for text, dates in found.items()]


def _dates(dates: list[str]) -> str:
    first, last = min(dates)[:10], max(dates)[:10]
    return first if first == last else f"{first} to {last}"


def dims(row: Row) -> str:
    """Format a shape."""
    return row["shape"] if isinstance(row["shape"], str) else " × ".join(map(str, row["shape"]))


def speed(row: Row, rows: list[Row]) -> tuple[float, ...] | None:
    """Return PyTorch's time over this row's: median, and quantiles where both were timed in the same rounds."""
    if share := relative(row):
        return (1 / share[0], 1 / share[2], 1 / share[1]) if row.get("reference", "torch").startswith("torch") else None
    keys = ("bench", "shape", "dtype", "phase")
    for other in rows:  # older rows have no `relative`
        same = all(other.get(k) == row.get(k) for k in keys) and other["machine"]["date"] == row["machine"]["date"]
        if same and str(other.get("provider")).startswith("torch") and "ms" in other and "ms" in row:
            return (other["ms"] / row["ms"],)
    return None


def times(found: tuple[float, ...] | None) -> str:
    """Format a speed with its quantiles."""
    if found is None:
        return "-"
    return f"{found[0]:.2f}" + (f" ({found[1]:.2f} .. {found[2]:.2f})" if len(found) == 3 else "")


def devices(rows: list[Row]) -> dict[str, list[Row]]:
    """Return the rows by hardware, then the GPUs whose figures are still to be measured."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(hardware(row), []).append(row)
    return found | {gpu: [] for gpu in WANTED_GPUS if not any(gpu in name for name in found)}
