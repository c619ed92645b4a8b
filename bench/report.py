"""`fastgpt bench report [ROWS ...]`: write all measurements as tables and plots to REPORT.md and self-contained
REPORT.html.

The newest row of each figure on each device counts. Where nothing was measured the cell says so. --readme FILE rewrites
the tables between FILE's markers from the files that each marker names:

    <!-- bench:ops bench/results/a.jsonl -->   (or bench:steps, bench:gpus, bench:generation)
    <!-- /bench -->
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastgpt.bench import OPS, plots
from fastgpt.bench.compare import ours
from fastgpt.bench.results import Row, hardware, identity, on_cpu, read_rows, relative
from fastgpt.core.command import Parser
from fastgpt.core.errors import UserError
from fastgpt.core.page import NOT_MEASURED, Section, Table, markdown, markdown_table, number, page, spread

WANTED_GPUS = ("A100", "H100", "H200")
WHOLE = ("both", "step")  # phases that a training step consists of
OTHERS = {
    "roofline": ("Where a step's time goes", "Shares of a training step by class of kernel; `fastgpt bench roofline`."),
    "memory": ("Memory", "The largest batch and the longest context that fit; `fastgpt bench memory`."),
    "host": ("Host", "Microseconds per call, launches, import, compile and install; `fastgpt bench host`."),
    "generate": ("Generation", "Tokens per second against transformers and llama.cpp; `fastgpt bench generate`."),
    "data": ("Data sets", "MB of text per second of one core against tiktoken, datasketch and datatrove."),
    "finetune": ("Fine-tuning", "Steps against transformers, TRL and PEFT; `fastgpt bench finetune`."),
    "evaluate": ("Evaluation", "Log-likelihoods against lm_eval's own model; `fastgpt bench evaluate`."),
    "codegen": ("Codegen", "Compiler output for each kernel; `fastgpt bench codegen`. No GPU is needed."),
}
HIDDEN = "bench figure backend machine gpu losses sets samples cut_samples reference relative_low red".split()
HERE, CHECKOUT = Path("bench-results"), Path("bench/results")


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
    return section


def sections_of(rows: list[Row]) -> list[Section]:
    """Return the whole report."""
    rows = newest(rows)
    more = sorted({r["bench"] for r in rows} - {*OPS, "throughput", *OTHERS})
    return [ops_section(rows), steps_section(rows), *(other_section(name, rows) for name in (*OTHERS, *more))]


def readme_ops(rows: list[Row]) -> list[list[str]]:
    """Return README's table of ops: forward and backward, or a step, fastgpt against PyTorch."""
    lines = [["op", "shape", "fastgpt", "PyTorch", "PyTorch / fastgpt"]]
    rows = [r for r in rows if r["bench"] in OPS and r["phase"] in WHOLE and "ms" in r]
    for r in sorted(filter(ours, rows), key=lambda r: OPS.index(r["bench"])):
        theirs = [o for o in rows if (o["bench"], o["shape"], o["dtype"]) == (r["bench"], r["shape"], r["dtype"])]
        torch = next((o["ms"] for o in theirs if o["provider"].startswith("torch")), None)
        name = r["bench"] if r["provider"] == r["backend"] else f"{r['bench']}, {r['provider'].partition(' ')[2]}"
        lines.append([name, dims(r), f"{number(r['ms'])} ms", f"{number(torch)} ms", times(speed(r, rows))])
    return lines


def readme_steps(rows: list[Row]) -> list[list[str]]:
    """Return README's table of training steps: eager, both compiled, memory."""
    head = ["training step", "fastgpt", "PyTorch", "ratio", "compiled: fastgpt", "PyTorch", "ratio"]
    lines = [[*head, "peak MB: fastgpt", "PyTorch"]]
    rows = [r for r in rows if r["bench"] == "throughput" and "ms" in r and on_cpu(r)]
    for key in dict.fromkeys((r["shape"], r["batch"], r["block"]) for r in rows):
        by = {r["variant"]: r for r in rows if (r["shape"], r["batch"], r["block"]) == key}
        cells = [f"{key[0]}, B {key[1]}, T {key[2]}"]
        for suffix in ("", " compile"):
            one, two = by.get(f"fastgpt{suffix}"), by.get(f"torch{suffix}")
            ratio = tuple(one.get(f"speed_vs_torch{suffix}") or ()) if one else ()
            cells += [f"{number(r['ms'])} ms" if r else NOT_MEASURED for r in (one, two)] + [times(ratio or None)]
        cells += [number(by[name].get("peak_mb")) if name in by else NOT_MEASURED for name in ("fastgpt", "torch")]
        lines.append(cells)
    return lines


def readme_gpus(rows: list[Row]) -> list[list[str]]:
    """Return README's table of GPUs: tokens/s of GPT-2 124M, each side's best at any batch; only GPUs with a row."""
    lines = [["GPT-2 124M on a GPU, tokens/s", "fastgpt", "torch.compile"]]
    rows = [r for r in rows if r["bench"] == "throughput" and r["shape"] == "gpt2-124m" and "ms" in r and not on_cpu(r)]
    for name, there in devices(rows).items():
        if not there:
            continue
        cells = []
        for variants in (("fastgpt", "fastgpt compile"), ("torch compile",)):
            found = [r["tokens_per_s"] for r in there if r["variant"] in variants]
            cells.append(number(max(found)) if found else NOT_MEASURED)
        lines.append([name, *cells])
    return lines


def readme_generation(rows: list[Row]) -> list[list[str]]:
    """Return the table of generation: every variant at each batch, on the machine that was measured last."""
    lines = [["batch", "variant", "tokens/s", "ms per step", "% of the floor", "prefill GFLOP/s", "% of the products"]]
    lines[0] += ["peak MB", "/ (weights + cache)", "against transformers", "against llama.cpp"]
    rows = [r for r in rows if r["bench"] == "generate" and "ms" in r]
    last = hardware(max(rows, key=lambda r: str(r["machine"]["date"]))) if rows else ""
    by: dict[tuple[int, str], dict[str, Row]] = {}
    for r in rows:
        if hardware(r) == last and r["shape"] == "gpt2-124m":
            by.setdefault((r["batch"], r["variant"]), {})[r["phase"]] = r
    share: Callable[[Row, str], str] = lambda row, key: f"{row[key]:.0%}" if key in row else "-"  # noqa: E731
    for (batch, name), phases in by.items():
        whole, prefill, decode = (phases[phase] for phase in ("generate", "prefill", "decode"))
        cells = [str(batch), name, number(whole["tokens_per_s"]), number(decode["ms"]), share(decode, "share_of_floor")]
        cells += [number(prefill.get("gflop_s")), share(prefill, "share_of_products"), number(whole["peak_mb"])]
        keys = ("speed_vs_transformers", "speed_vs_llama.cpp")
        cells += [f"{whole['peak_share']:.2f}", *(spread(whole, key) if key in whole else "-" for key in keys)]
        lines.append(cells)
    return lines


def readme_data(rows: list[Row]) -> list[list[str]]:
    """Return the table of data sets: MB of text per second of one core, against each peer."""
    lines = [["what", "program", "MB/s of one core", "fastgpt / it", "MB of text", "rounds"]]
    for r in rows:
        if r["bench"] == "data" and "mb_s" in r:
            own = r["provider"] == "fastgpt"
            cells = [r["figure"], f"{r['provider']} {r['provider_version']}".strip(), f"{r['mb_s']:.3g}"]
            lines.append([*cells, "-" if own else f"{r['speed']:.2f}", number(r["text_mb"]), str(r["samples"])])
    return lines


def readme_finetune(rows: list[Row]) -> list[list[str]]:
    """Return the table of fine-tuning: both sides of each comparison."""
    lines = [["model", "task", "side", "ms per step", "tokens/s", "peak MB", "speed against TRL", "memory against TRL"]]
    lines[0].append("memory of the loss against two logit tensors")
    for r in rows:
        if r["bench"] == "finetune" and "ms" in r:
            cells = [r["shape"], r["kind"], r["variant"], number(r["ms"]), number(r["tokens_per_s"])]
            against = [spread(r, "speed"), f"{r['memory']:.2f}"] if "speed" in r else ["-", "-"]
            loss = f"{r['loss_mb'] / r['two_logits_mb']:.2f}" if "loss_mb" in r else "-"
            lines.append([*cells, number(r["peak_mb"]), *against, loss])
    return lines


def readme_evaluate(rows: list[Row]) -> list[list[str]]:
    """Return the table of evaluation."""
    lines = [["requests", "side", "requests/s", "tokens per request", "time / products", "speed against lm_eval"]]
    for r in rows:
        if r["bench"] == "evaluate" and r["shape"] == "gpt2-124m" and "ms" in r:
            against = [spread(r, key) if key in r else "-" for key in ("over_products", "speed")]
            figures = [number(r[key]) for key in ("requests_per_s", "tokens_per_request")]
            lines.append([r["kind"], r["variant"], *figures, *against])
    return lines


README_TABLES = {
    "ops": readme_ops,
    "steps": readme_steps,
    "gpus": readme_gpus,
    "generation": readme_generation,
    "data": readme_data,
    "finetune": readme_finetune,
    "evaluate": readme_evaluate,
}
USED: dict[str, Callable[[Row], bool]] = {  # the rows of the tables that name their source
    "ops": lambda r: r["bench"] in OPS,
    "steps": lambda r: r["bench"] == "throughput",
    "generation": lambda r: r["bench"] == "generate" and r["shape"] == "gpt2-124m",
    "data": lambda r: r["bench"] == "data" and "mb_s" in r,
    "finetune": lambda r: r["bench"] == "finetune",
    "evaluate": lambda r: r["bench"] == "evaluate" and r["shape"] == "gpt2-124m",
}


def update_readme(text: str, folder: Path) -> str:
    """Return README with the tables between its markers rewritten from the files that the markers name; without a row
    nothing remains between the markers."""

    def table(found: re.Match[str]) -> str:
        kind, names = found[1], found[2].split()
        if kind not in README_TABLES:
            raise UserError(f"report: README has a marker bench:{kind}, expected one of {', '.join(README_TABLES)}")
        rows = newest(read_rows([str(folder / name) for name in names]))
        made = README_TABLES[kind](rows)
        if len(made) == 1:
            return f"{found[0].splitlines()[0]}\n<!-- /bench -->"
        sources = sources_of(list(filter(USED.get(kind, lambda r: False), rows)))
        return "\n\n".join([found[0].splitlines()[0], *sources, markdown_table(made), "<!-- /bench -->"])

    return re.sub(r"<!-- bench:(\w+)([^>]*?) *-->\n.*?<!-- /bench -->", table, text, flags=re.S)


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
