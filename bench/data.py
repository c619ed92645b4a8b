"""From text to token shards against other libraries: `fastgpt bench data`, MB of text a second on one core.

encode   ids of GPT-2's tokenizer: fastgpt, tiktoken, tokenizers; only if all ids are equal
dedup    near-duplicates (5 words, 14 bands of 8 hashes): fastgpt with true similarity, datasketch without
build    validate, clean with the web preset, remove duplicates, tokenize, write shards: fastgpt, datatrove
memory   peak memory of fastgpt's build with the docs preset, all its processes together, at two sizes of input

All read the same documents (bench/_corpus.py). Each is a process of its own, in turn; speeds are of the seconds of
processor time of a process and its children, so a second process does not make them faster. encode and dedup leave out
the time to load; build does not. datatrove needs an environment of its own: --datatrove names its Python.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from fastgpt.bench import _corpus
from fastgpt.bench._harness import append_rows, provenance, where
from fastgpt.bench._options import command_line
from fastgpt.core.command import number, run_command
from fastgpt.core.errors import UserError

FIGURES = ("encode", "dedup", "build", "memory")
PEERS = {"encode": ["tiktoken", "tokenizers"], "dedup": ["datasketch"], "build": ["datatrove"], "memory": []}
RECIPE = """\
sources:
  corpus: {{path: "{folder}/in/*.jsonl", format: jsonl, clean: {rules}}}
tokenizer: gpt2
"""
Result = dict[str, Any]


def texts_of(folder: Path) -> list[str]:
    """Return the texts of the corpus."""
    with (folder / "in" / "corpus.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


# ---- one contestant, in a process of its own ----


def encoder(name: str) -> Callable[[str], Any]:
    """Return the function from a text to ids."""
    from fastgpt.data.published import open_tokenizer

    tokenizer = open_tokenizer("gpt2")
    if name == "fastgpt":
        return tokenizer.fastest()[1]
    if name == "tiktoken":
        return tokenizer._bpe.encode_ordinary
    from tokenizers import Tokenizer

    spec = json.loads(tokenizer.text)
    spec["added_tokens"] = []
    hf = Tokenizer.from_str(json.dumps(spec))
    return lambda text: hf.encode(text, add_special_tokens=False).ids


def encode(name: str, folder: Path) -> Result:
    """Encode every text; digest is equal if the ids are."""
    import hashlib

    import numpy as np

    texts, one = texts_of(folder), encoder(name)
    start = time.process_time()
    ids = [one(text) for text in texts]
    seconds = time.process_time() - start
    digest = hashlib.sha256(b"".join(np.asarray(i, np.uint32).tobytes() for i in ids)).hexdigest()
    return {"seconds": seconds, "tokens": sum(map(len, ids)), "digest": digest}


def dedup(name: str, folder: Path) -> Result:
    """Find planted copies among the texts; recall is the share that is found."""
    from fastgpt.bench import _dedup
    from fastgpt.data.dedup import DedupSettings

    texts = texts_of(folder)
    texts, planted = _dedup.plant(texts, len(texts) // 10)
    settings = DedupSettings()
    measure = _dedup.measure_fastgpt if name == "fastgpt" else _dedup.measure_datasketch
    found = measure(texts, _dedup.planted_duplicates(texts, planted, settings), settings)
    return {"seconds": found.seconds, "recall": found.recall, "text_mb": found.megabytes}


def build(name: str, folder: Path, workers: int = 1, python: str = "", rules: str = "web") -> Result:
    """Build a data set in a process of its own; peak_mb is the peak memory of the process and its children."""
    from fastgpt.data.published import gpt2_json

    work = folder / f"{name}-{workers}"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    if name == "fastgpt":
        recipe = work / "recipe.yaml"
        recipe.write_text(RECIPE.format(folder=folder, rules=rules))
        command = [sys.executable, "-m", "fastgpt.cli", "data", "build", str(recipe), "--out", str(work / "out")]
        command += ["--workers", str(workers)]
    else:
        (work / "in").symlink_to(folder / "in")
        (work / "gpt2.json").write_text(gpt2_json())
        command = [python, str(Path(__file__).with_name("_datatrove.py")), str(work), str(work / "gpt2.json")]
    before, start = os.times(), time.monotonic()
    with (work / "log.txt").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        peak = 0.0
        while process.poll() is None:
            peak = max(peak, tree_mb(process.pid))
            time.sleep(0.05)
    after = os.times()
    if process.returncode:
        raise UserError(f"data: {name} ended with exit code {process.returncode}: {work / 'log.txt'}")
    seconds = after.children_user - before.children_user + after.children_system - before.children_system
    return {"seconds": seconds, "wall_seconds": time.monotonic() - start, "peak_mb": peak}


def tree_mb(pid: int) -> float:
    """Return the memory in MB of a process and its children, shared pages counted once (Pss)."""
    total, waiting = 0, [pid]
    while waiting:
        folder = Path("/proc") / str(waiting.pop())
        try:
            lines = (folder / "smaps_rollup").read_text().splitlines()
            total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
            for task in (folder / "task").iterdir():
                waiting += map(int, (task / "children").read_text().split())
        except (OSError, ValueError):
            continue  # it has ended
    return total / 1e3


# ---- rounds and rows ----


def installed(name: str, python: str) -> str:
    """Return the version of a contestant, '' if it is not there."""
    if name == "datatrove":
        if not python:
            return ""
        code = f"from importlib.metadata import version; print(version({name!r}))"
        found = subprocess.run([python, "-c", code], capture_output=True, text=True)
        return found.stdout.strip()
    try:
        return version(name) if find_spec(name) else ""
    except PackageNotFoundError:
        return ""


def apart(figure: str, name: str, folder: Path) -> Result:
    """Run a contestant of encode or dedup in a process of its own."""
    code = "import json, sys; from pathlib import Path; from fastgpt.bench import data; "
    code += f"print(json.dumps(data.{figure}({name!r}, Path(sys.argv[1]))))"
    command = [sys.executable, "-c", code, str(folder)]
    one = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | one)
    if done.returncode:
        raise UserError(f"data: {figure} with {name} failed: {done.stderr.strip().splitlines()[-1:]}")
    result: Result = json.loads(done.stdout.splitlines()[-1])
    return result


def compare(figure: str, folder: Path, size: int, rounds: int, python: str) -> list[Result]:
    """Return a row for each contestant of a figure: median of the rounds, and its speed over each peer's."""
    there = {name: installed(name, python) for name in PEERS[figure]}
    names = ["fastgpt", *(name for name, found in there.items() if found)]
    results: dict[str, list[Result]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            run = build(name, folder, 1, python) if figure == "build" else apart(figure, name, folder)
            results[name].append(run)
    about = {"bench": "data", "figure": figure, "machine": provenance(torch.device("cpu"))}
    if len({r["digest"] for runs in results.values() for r in runs if "digest" in r}) > 1:
        return [{**about, "text_mb": size / 1e6, "red": "the contestants return different ids"}]
    speeds = {name: [r.get("text_mb", size / 1e6) / r["seconds"] for r in runs] for name, runs in results.items()}
    rows = []
    for name, runs in results.items():
        row = {**about, "text_mb": size / 1e6, "provider": name, "provider_version": there.get(name, "")}
        row |= {key: value for key, value in runs[-1].items() if key not in ("seconds", "digest")}
        row |= {"mb_s": statistics.median(speeds[name]), "samples": rounds}
        row["speed"] = statistics.median(a / b for a, b in zip(speeds["fastgpt"], speeds[name]))
        rows.append(row)
    return rows


def memory(folder: Path, sizes: list[float], workers: int) -> list[Result]:
    """Return a row for each size of input, in MB: peak memory of a build, and how long it took."""
    rows = []
    for megabytes in sizes:
        size = fill(folder, megabytes)
        run = build("fastgpt", folder, workers, rules="docs")
        row = {"bench": "data", "figure": "memory", "provider": "fastgpt", "text_mb": size / 1e6, "workers": workers}
        row |= {"shape": f"{megabytes:g}MB", "peak_mb": run["peak_mb"], "wall_seconds": run["wall_seconds"]}
        rows.append({**row, "machine": provenance(torch.device("cpu"))})
        shutil.rmtree(folder / f"fastgpt-{workers}", ignore_errors=True)
    return rows


def fill(folder: Path, megabytes: float) -> int:
    """Write the corpus; return the bytes of its text."""
    shutil.rmtree(folder / "in", ignore_errors=True)
    (folder / "in").mkdir(parents=True)
    return _corpus.write_corpus(folder / "in" / "corpus.jsonl", megabytes)


def show(row: Result) -> str:
    """Return a row as a line."""
    if "red" in row:
        return f"{row['figure']:<8}no speed is shown: {row['red']}"
    line = f"{row['figure']:<8}{row['provider']:<11}{row['text_mb']:>8.0f} MB"
    if row["figure"] == "memory":  # the seconds of workers are not those of this process's children
        return f"{line} in {row['wall_seconds']:.0f} s with {row['workers']} workers, peak {row['peak_mb']:.0f} MB"
    line += f" {row['mb_s']:>8.2f} MB/s of one core"
    if row.get("peak_mb"):
        line += f", peak {row['peak_mb']:.0f} MB"
    if row.get("recall"):
        line += f", recall {row['recall']:.3f}"
    return line + (f", fastgpt is {row['speed']:.2f} times as fast" if row.get("provider_version") else "")


def main(argv: list[str] | None = None) -> int:
    """Measure, print, and append the rows to --json; return 1 if ids differ."""
    parser = command_line("data", __doc__)
    parser.add_argument("figures", nargs="*", choices=[*FIGURES, []], help="default: encode dedup build")
    parser.add_argument("--megabytes", type=number(float, 0, open_least=True), default=16.0, help="of text")
    parser.add_argument("--memory-megabytes", nargs="+", type=number(float, 0), default=[1000.0, 4000.0], metavar="MB")
    parser.add_argument("--rounds", type=number(int, 1), default=3)
    parser.add_argument("--workers", type=number(int, 1), default=2, help="of the builds of memory (default: 2)")
    parser.add_argument("--datatrove", default="", metavar="PYTHON", help="a Python that has datatrove")
    args = parser.parse_args(argv)
    status = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = fill(folder, args.megabytes)
        print(where(provenance(torch.device("cpu"))), flush=True)
        for figure in args.figures or FIGURES[:3]:
            if figure == "memory":
                rows = memory(folder, args.memory_megabytes, args.workers)
            else:
                rows = compare(figure, folder, size, args.rounds, args.datatrove)
            print(*map(show, rows), sep="\n", flush=True)
            if args.json:
                append_rows(args.json, rows)
            status |= any("red" in row for row in rows)
    return status


if __name__ == "__main__":
    sys.exit(run_command(main))
