"""The short table of `make gpu`: rows and stages in lines that fit a screen. Rows are dicts from rows.jsonl.

Like bench/gpu.py, which prints it, it imports nothing from fastgpt.
"""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]
WHOLE = ("both", "step")
FAR = 1.5  # a kernel that takes so many times its modelled time is marked


def figures(rows: list[Row]) -> list[str]:
    """Return the table's lines: training steps, ops, choices, the training run, tiles, kernels beside their model;
    whichever were measured."""
    parts = [part(rows) for part in (steps, ops, tuned, trained, tiles, modelled)]
    return [line for part in parts for line in ([*part, ""] if part else [])][:-1]


def _numbers(values: list[tuple[float | None, str]]) -> str:
    return "".join(f"{'-':>11}" if value is None else f"{format(value, form):>11}" for value, form in values)


def steps(rows: list[Row]) -> list[str]:
    """Return one line per variant and batch of the training steps."""
    found = [r for r in rows if r["bench"] == "throughput"]
    if not found:
        return []
    heads = ("ms", "tokens/s", "MFU", "peak MB", "x torch", "loss gap")
    lines = [f"{'training steps':<42}" + "".join(f"{head:>11}" for head in heads)]
    for r in found:
        name = f"{r['shape']} B {r['batch']}, {r.get('variant', 'all')} ({r['stage']})"
        if "ms" not in r:
            lines.append(f"{name:<42} {r['red'][:90]}")
            continue
        against = r.get("speed_vs_torch")
        cells = [(r["ms"], ".1f"), (r["tokens_per_s"], ",.0f"), (r.get("mfu_causal"), ".1%"), (r["peak_mb"], ",.0f")]
        cells += [(against[0] if against else None, ".3f"), (r["loss_gap"], ".1e")]
        lines.append(f"{name:<42}{_numbers(cells)}")
    joules = [f"{r['variant']} {1e3 * r['joules_per_token']:.3f}" for r in rows if r["bench"] == "energy"]
    return lines + ([f"mJ per token: {', '.join(joules)}"] if joules else [])


def ops(rows: list[Row]) -> list[str]:
    """Return the ops, forward and backward together: ms of each provider, fastest first."""
    found: dict[tuple[str, str, str], dict[str, str]] = {}
    whole = [r for r in rows if r.get("phase") in WHOLE and "provider" in r]
    for r in sorted(whole, key=lambda r: r.get("ms", float("inf"))):
        if "ms" in r or r.get("backend"):
            key = r["bench"], "x".join(map(str, r["shape"])), r["dtype"]
            found.setdefault(key, {}).setdefault(r["provider"], f"{r['ms']:.3f}" if "ms" in r else "RED")
    lines = [
        f"{op + ' ' + shape + ' ' + dtype:<42} {', '.join(f'{name} {ms}' for name, ms in told.items())}"
        for (op, shape, dtype), told in found.items()
    ]
    return ["ops, ms of forward and backward, or of a step", *lines] if lines else []


def tuned(rows: list[Row]) -> list[str]:
    """Return the choices of `fastgpt tune`."""
    found = [r for r in rows if r["bench"] == "tune"]
    lines = [f"{r['op']:<42} {r['chosen']} ({r['note']}){'; ' + r['red'] if 'red' in r else ''}"[:118] for r in found]
    return ["chosen by tune", *lines] if lines else []


def trained(rows: list[Row]) -> list[str]:
    """Return the training run with its resume."""
    return [f"training run: {r.get('red') or r['note']}" for r in rows if r["bench"] == "training"]


def tiles(rows: list[Row]) -> list[str]:
    """Return the launch shapes of attention's kernels, fastest first."""
    found = [r for r in rows if r["bench"] == "tiles" and "ms" in r]
    kernels = dict.fromkeys(r["kernel"] for r in found)
    lines = []
    for kernel in kernels:
        mine = sorted((r for r in found if r["kernel"] == kernel), key=lambda r: r["ms"])
        told = ", ".join(f"{r['mode']}{' (in use)' if r['in_use'] else ''} {r['ms']:.3f}" for r in mine)
        lines.append(f"tiles of {kernel}, ms: {told}")
    return lines


def modelled(rows: list[Row]) -> list[str]:
    """Return the kernels of a profiled step with their measured and modelled milliseconds, the largest ratio first."""
    times: dict[str, float] = {}
    for r in rows:
        if r["bench"] == "model" and r["figure"] == "kernel" and r["class"] == "own":
            times[r["kernel"]] = times.get(r["kernel"], 0.0) + r["ms"]
    profiled = [r for r in rows if r["bench"] == "roofline" and r.get("kernels") and r["variant"].startswith("fastgpt")]
    if not times or not profiled:
        return []
    found = [(k["ms"] / times[k["name"]], k) for k in profiled[-1]["kernels"] if times.get(k["name"])]
    name = f"kernels of a step ({profiled[-1]['variant']})"
    lines = [f"{name:<42}" + "".join(f"{head:>11}" for head in ("ms", "modelled", "ratio"))]
    for ratio, k in sorted(found, key=lambda pair: -pair[0]):
        numbers = _numbers([(k["ms"], ".3f"), (times[k["name"]], ".3f"), (ratio, ".2f")])
        lines.append(f"{k['name']:<42}{numbers}{f'  over {FAR}' if ratio > FAR else ''}")
    return lines
