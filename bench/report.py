"""`fastgpt bench report [ROWS ...]`: write all measurements as tables and plots to REPORT.md and self-contained
REPORT.html.

The newest row of each figure on each device counts. Where nothing was measured the cell says so. --readme FILE rewrites
the tables between FILE's markers from the files that each marker names:

    <!-- bench:ops bench/results/a.jsonl -->   (or another table of readme.py)
    <!-- /bench -->
"""

from __future__ import annotations

import datetime
from pathlib import Path

from fastgpt.bench import OPS, plots
from fastgpt.bench.compare import ours
from fastgpt.bench.readme import update_readme
from fastgpt.bench.results import Row, hardware, read_rows
from fastgpt.bench.tables import WHOLE, devices, dims, newest, sources_of, speed, times
from fastgpt.core.command import Parser
from fastgpt.core.page import NOT_MEASURED, Plot, Section, Table, markdown, number, page, spread

OTHERS = {
    "roofline": ("Where a step's time goes", "Shares of a training step by class of kernel; `fastgpt bench roofline`."),
    "memory": ("Memory", "The largest batch and the longest context that fit; `fastgpt bench memory`."),
    "host": ("Host", "Microseconds per call, launches, import, compile and install; `fastgpt bench host`."),
    "patching": ("Patched models", "A step of transformers' models before and after `fastgpt.patch`."),
    "generate": ("Generation", "Tokens per second against transformers and llama.cpp; `fastgpt bench generate`."),
    "adapters": ("Adapters", "A decode step with LoRA adapters in the batch; `fastgpt bench adapters`."),
    "muon": ("Muon", "The iteration over GPT-2 124M's matrices against torch's own; `fastgpt bench muon`."),
    "data": ("Data sets", "MB of text per second of one core against tiktoken, datasketch and datatrove."),
    "finetune": ("Fine-tuning", "Steps against transformers, TRL and PEFT; `fastgpt bench finetune`."),
    "evaluate": ("Evaluation", "Log-likelihoods against lm_eval's own model; `fastgpt bench evaluate`."),
    "serve": ("Server", "Clients at once against llama.cpp's server; `fastgpt bench serve`."),
    "processes": ("Processes", "Steps in 1 to N processes; `torchrun -m fastgpt.bench.throughput`."),
    "codegen": ("Codegen", "Compiler output for each kernel; `fastgpt bench codegen`. No GPU is needed."),
}
HIDDEN = "bench figure backend machine gpu losses sets samples cut_samples reference relative_low red".split()
HERE, CHECKOUT = Path("bench-results"), Path("bench/results")


def summary(rows: list[Row]) -> Table:
    """Return one line per op, shape and dtype: the fastest fastgpt backend against PyTorch on every device."""
    whole = [r for r in rows if r["phase"] in WHOLE and ours(r) and "ms" in r]
    keys = sorted({(OPS.index(r["bench"]), dims(r), r["dtype"]) for r in whole})
    columns = devices(rows)
    lines = [["op", "shape", "dtype", *columns]]
    for op, shape, dtype in keys:
        cells = []
        for there in columns.values():
            here = [
                r for r in there if r in whole and (OPS.index(r["bench"]), dims(r), r["dtype"]) == (op, shape, dtype)
            ]
            best = min(here, key=lambda r: r["ms"], default=None)
            cells.append(f"{times(speed(best, there))} {best['provider']}" if best else NOT_MEASURED)
        lines.append([OPS[op], shape, dtype, *cells])
    return Table("PyTorch / fastgpt, forward and backward (over 1: fastgpt is faster), with the backend", lines)


def details(name: str, rows: list[Row]) -> Table:
    """Return every figure of the ops on one device."""
    head = ["op", "shape", "dtype", "phase", "provider", "ms (20 .. 80 %)", "GB/s", "TFLOP/s", "% datasheet", "% copy"]
    lines = [[*head, "% matmul", "PyTorch / this", "peak MB", "host us"]]
    for r in rows:
        start = [r["bench"], dims(r), r["dtype"], r["phase"], r["provider"]]
        if "red" in r:
            lines.append([*start, f"{NOT_MEASURED}: {r['red']}", *["-"] * 8])
            continue
        keys = ("gb_s", "tflop_s", "pct_of_datasheet", "pct_of_copy", "pct_of_gemm")
        cells = [spread(r, "ms"), *(number(r.get(key)) for key in keys)]
        lines.append([*start, *cells, times(speed(r, rows)), number(r.get("peak_mb")), number(r.get("host_us"))])
    return Table(f"Every figure on {name}", lines, long=True)


def ops_section(rows: list[Row]) -> Section:
    """Return the section on ops."""
    rows = [r for r in rows if r["bench"] in OPS]
    section = Section(
        "Ops", ["One op against PyTorch and other libraries, interleaved; `fastgpt bench OP`.", *sources_of(rows)]
    )
    if not rows:
        section.about.append(f"Ops: {NOT_MEASURED}.")
        return section
    section.tables = [summary(rows), *(details(name, there) for name, there in devices(rows).items() if there)]
    for name, there in devices(rows).items():
        fast = [
            (f"{r['bench']} {dims(r)} {r['provider']}", speed(r, there))
            for r in there
            if r["phase"] in WHOLE and ours(r)
        ]
        if bars := [(label, found) for label, found in fast if found]:
            section.plots.append(plots.speeds(f"Ops on {name}", bars))
    return section


def step_rows(rows: list[Row]) -> list[list[str]]:
    """Return the training steps of one device as a table."""
    head = ["shape", "B", "T", "dtype", "variant", "ms (20 .. 80 %)", "tokens/s", "MFU full", "MFU causal", "peak MB"]
    lines = [[*head, "J/token", "speed vs torch", "vs torch compile"]]
    for r in rows:
        start = [r["shape"], str(r["batch"]), str(r["block"]), r["dtype"], r.get("variant", "-")]
        if "red" in r:
            lines.append([*start, f"{NOT_MEASURED}: {r['red']}", *["-"] * 7])
            continue
        mfu = [f"{r[k]:.1%}" if 0 < r.get(k, 0) <= 1 else "-" for k in ("mfu_full", "mfu_causal")]
        against = [times(tuple(r[k]) if r.get(k) else None) for k in ("speed_vs_torch", "speed_vs_torch compile")]
        joules = next((number(r[k]) for k in r if k.startswith("joules") or k.startswith("j_per")), "-")
        lines.append(
            [*start, spread(r, "ms"), number(r["tokens_per_s"]), *mfu, number(r.get("peak_mb")), joules, *against]
        )
    return lines


def steps_section(rows: list[Row]) -> Section:
    """Return the section on training steps."""
    rows = [r for r in rows if r["bench"] == "throughput"]
    about = (
        "The trainer's step against a nanoGPT-class model in plain PyTorch; same weights, tokens, seed and schedule; "
    )
    section = Section("Training steps", [about + "`fastgpt bench throughput`.", *sources_of(rows)])
    absent = [name for name, there in devices(rows).items() if not there]
    section.about += [f"{', '.join(absent)}: {NOT_MEASURED}."] * bool(absent)
    if any(max(r.get("mfu_full", 0), r.get("mfu_causal", 0)) > 1 for r in rows):
        section.about.append("MFU over 100 % is left out: the peak was measured while the machine was otherwise busy.")
    for name, there in ((name, there) for name, there in devices(rows).items() if there):
        section.tables.append(Table(f"On {name}", step_rows(there)))
        fast = [(f"{r['shape']} B {r['batch']} {r['variant']}", r.get("speed_vs_torch")) for r in there if "ms" in r]
        if bars := [(label, tuple(found)) for label, found in fast if found]:
            section.plots.append(plots.speeds(f"Training steps on {name}, PyTorch eager = 1", bars))
        for key in sorted({(r["shape"], r["batch"]) for r in there}):
            curves = {r["variant"]: r["losses"] for r in there if (r["shape"], r["batch"]) == key and r.get("losses")}
            if curves:
                section.plots.append(plots.losses(f"Losses at {key[0]}, B {key[1]}, on {name}", curves))
    return section


def other_section(bench: str, rows: list[Row]) -> Section:
    """Return the rows of any other benchmark: a table per kind of figure and machine, a column per key."""
    title, about = OTHERS.get(bench, (bench.capitalize(), f"`fastgpt bench {bench}`."))
    rows = [r for r in rows if r["bench"] == bench]
    section = Section(title, [about, *(sources_of(rows) or [f"{title}: {NOT_MEASURED}."])])
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        kinds.setdefault(f"{row.get('figure', bench)} on {hardware(row)}", []).append(row)
    for kind, there in kinds.items():
        keys = [
            k
            for k in dict.fromkeys(k for r in there for k in r)
            if k not in HIDDEN and not k.endswith(("_q20", "_q80"))
        ]
        keys = [k for k in keys if not any(isinstance(r.get(k), (dict, list)) and k != "shape" for r in there)]
        lines = [keys]
        for r in there:
            cells = [dims(r) if k == "shape" and k in r else spread(r, k) if k in r else "-" for k in keys]
            if "red" in r:
                cells[-1] = f"{NOT_MEASURED}: {r['red']}"
            lines.append(cells)
        section.tables.append(Table(kind, lines, long=len(lines) > 40))
    if bench == "patching":
        section.plots += patching_plots(rows)
    return section


def patching_plots(rows: list[Row]) -> list[Plot]:
    """Draw time and memory of patched models against unpatched ones, for each device."""
    found = []
    for name, there in devices(rows).items():
        after = [r for r in there if "speed" in r and not r["variant"].startswith(("transformers", "only"))]
        for what, key in (("time", "speed"), ("peak memory", "memory")):
            bars = [(f"{r['shape']} {r['variant']}", tuple(r[key] if key == "speed" else [r[key]])) for r in after]
            title = f"Patched models on {name}: {what} before / after"
            found += [plots.speeds(title, bars, f"{what} before / after; over 1: less")] if bars else []
    return found


def sections_of(rows: list[Row]) -> list[Section]:
    """Return the whole report."""
    rows = newest(rows)
    more = sorted({r["bench"] for r in rows} - {*OPS, "throughput", *OTHERS})
    return [ops_section(rows), steps_section(rows), *(other_section(name, rows) for name in (*OTHERS, *more))]


def main(argv: list[str] | None = None) -> int:
    """Run `fastgpt bench report`."""
    parser = Parser(prog="fastgpt bench report", description=__doc__.partition("\n\n")[0])
    parser.add_argument("rows", nargs="*", help="files of rows or globs (default: *.jsonl in the folder of results)")
    parser.add_argument("--out", type=Path, help=f"folder (default: {HERE}, or {CHECKOUT} if only that exists)")
    parser.add_argument(
        "--readme", type=Path, metavar="FILE", help="also rewrite the tables between the markers of this file"
    )
    args = parser.parse_args(argv)
    out = args.out or (CHECKOUT if CHECKOUT.is_dir() and not HERE.is_dir() else HERE)
    rows = read_rows(args.rows or [str(out / "*.jsonl")])
    sections = sections_of(rows)
    made = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    title, about = (
        "fastgpt: measurements",
        f"Written on {made} by `fastgpt bench report`; docs/benchmarks.md describes the method.",
    )
    out.mkdir(parents=True, exist_ok=True)
    (out / "REPORT.md").write_text(markdown(title, about, sections, out / "plots"), encoding="utf-8")
    (out / "REPORT.html").write_text(page(title, about, sections), encoding="utf-8")
    print(f"wrote {out / 'REPORT.md'} and {out / 'REPORT.html'}: {len(rows)} rows, {len(newest(rows))} figures")
    if args.readme:
        text = args.readme.read_text(encoding="utf-8")
        args.readme.write_text(update_readme(text, args.readme.parent), encoding="utf-8")
        print(f"wrote the tables of {args.readme}")
    return 0
