"""The tables of README and the guides, which `fastgpt bench report --readme FILE` writes between their markers."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from fastgpt.bench import OPS
from fastgpt.bench.compare import ours
from fastgpt.bench.results import Row, hardware, on_cpu, read_rows
from fastgpt.bench.tables import WHOLE, devices, dims, newest, sources_of, speed, times
from fastgpt.core.errors import UserError
from fastgpt.core.page import NOT_MEASURED, markdown_table, number, spread


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


def readme_serve(rows: list[Row]) -> list[list[str]]:
    """Return the table of the server: every load on both servers."""
    lines = [["load", "clients", "server", "tokens/s", "against one client", "ms to the first token, p50 / p99"]]
    lines[0] += [
        "ms between tokens, p50 / p99",
        "peak MB",
        "tokens/s against llama.cpp",
        "first token against llama.cpp",
    ]
    for r in rows:
        if r["bench"] == "serve" and r["shape"] == "gpt2-124m" and "tokens_per_s" in r:
            pair = lambda name, r=r: f"{number(r[f'{name}_p50_ms'])} / {number(r[f'{name}_p99_ms'])}"  # noqa: E731
            cells = [r["kind"], str(r["clients"]), r["variant"], spread(r, "tokens_per_s")]
            cells += [number(r["speed_vs_one"]) if "speed_vs_one" in r else "-", pair("first"), pair("token")]
            against = [spread(r, key) if key in r else "-" for key in ("speed_vs_llama.cpp", "first_vs_llama.cpp")]
            lines.append([*cells, number(r["memory_mb"]), *against])
    return lines


def readme_processes(rows: list[Row]) -> list[list[str]]:
    """Return the table of steps in several processes."""
    lines = [["shape", "processes", "", "ms a step", "tokens/s", "efficiency", "exposed", "overhead / collectives"]]
    lines[0].append("simulated ms")
    for r in rows:
        if r["bench"] == "processes" and "ms" in r:
            cells = [r["shape"], str(r["processes"]), r["variant"], spread(r, "ms"), number(r["tokens_per_s"])]
            more = ["-"] * 3
            if r["processes"] > 1:
                more = [f"{r['exposed']:.1%}", times(tuple(r["overhead_over_network"])), number(r["simulated_ms"])]
            lines.append([*cells, f"{r['efficiency']:.1%}", *more])
    return lines


def readme_patching(rows: list[Row]) -> list[list[str]]:
    """Return the table of patched models on a CPU: every family before and after."""
    lines = [["model", "before", "patched", "time: before / patched (20 % .. 80 %)", "memory: patched / before"]]
    rows = [r for r in rows if r["bench"] == "patching" and "ms" in r and on_cpu(r)]
    for name in dict.fromkeys(r["shape"] for r in rows):
        by = {r["variant"]: r for r in rows if r["shape"] == name}
        if {"transformers", "patched"} <= by.keys():
            before, after = by["transformers"], by["patched"]
            cells = [f"{number(r['ms'])} ms, {number(r['peak_mb'])} MB" for r in (before, after)]
            lines.append([name, *cells, times(tuple(after["speed"])), f"{1 / after['memory']:.2f}"])
    return lines


README_TABLES = {
    "ops": readme_ops,
    "steps": readme_steps,
    "gpus": readme_gpus,
    "generation": readme_generation,
    "data": readme_data,
    "finetune": readme_finetune,
    "evaluate": readme_evaluate,
    "serve": readme_serve,
    "processes": readme_processes,
    "patching": readme_patching,
}
USED: dict[str, Callable[[Row], bool]] = {  # the rows of the tables that name their source
    "ops": lambda r: r["bench"] in OPS,
    "steps": lambda r: r["bench"] == "throughput",
    "generation": lambda r: r["bench"] == "generate" and r["shape"] == "gpt2-124m",
    "data": lambda r: r["bench"] == "data" and "mb_s" in r,
    "finetune": lambda r: r["bench"] == "finetune",
    "evaluate": lambda r: r["bench"] == "evaluate" and r["shape"] == "gpt2-124m",
    "serve": lambda r: r["bench"] == "serve" and r["shape"] == "gpt2-124m",
    "processes": lambda r: r["bench"] == "processes",
    "patching": lambda r: r["bench"] == "patching" and "ms" in r and on_cpu(r),
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
