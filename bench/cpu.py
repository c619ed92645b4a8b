"""The whole report of a machine without a GPU, in under 15 minutes on two cores: `make bench`, `fastgpt bench all`.

Ops, training steps, host, memory plans and codegen, each a separate stage (stages.py), then the report. Results go to
--out (default: bench-results): rows.jsonl (appended), cpu.json (stages), log.txt, model.html, REPORT.md, REPORT.html.
--dry-run prints the plan with guessed times. Exit code: 0, 1 if a stage failed.
"""

from __future__ import annotations

import sys
from pathlib import Path

from fastgpt.bench import OPS
from fastgpt.bench.stages import FRESH, Record, Stage, checkout_commit, run_stages, show_plan
from fastgpt.core.command import Parser
from fastgpt.core.errors import UserError

BUDGET = 880.0  # seconds for all stages
# GPT-2 shapes, in addition to the op's default shape
MORE_SHAPES = {"layer_norm": ["4096x768"], "rms_norm": ["4096x768"], "cross_entropy": ["256x50304"]}
DEFAULT_SHAPE = {"layer_norm": "1024x768", "rms_norm": "1024x768", "cross_entropy": "256x4096"}


def plan(fresh: Path, out: Path, python: str = sys.executable) -> list[Stage]:
    """Return the stages; they append rows to the file `fresh`, and the report goes to the folder `out`."""
    rows = ["--json", str(fresh)]
    module = [python, "-m"]
    steps = [*module, "fastgpt.bench.throughput", "--device", "cpu", *rows]
    timed = ["--device", "cpu", "--seconds", "0.5", *rows]
    shapes = {op: [DEFAULT_SHAPE[op], *more] for op, more in MORE_SHAPES.items()}
    arguments = {op: [f"--shape={shape}" for shape in shapes.get(op, [])] for op in OPS}
    return [
        Stage("doctor", [*module, "fastgpt.cli", "doctor"], 40, 6),
        *(Stage(op, [*module, f"fastgpt.bench.{op}", *timed, *arguments[op]], 90, 15) for op in OPS),
        Stage("small", [*steps, "--shape", "small", "--compile"], 150, 70),
        Stage("medium", [*steps, "--shape", "medium", "--steps", "4"], 120, 50),
        Stage("gpt2-124m", [*steps, "--shape", "gpt2-124m", "--steps", "5"], 120, 50),
        Stage("host", [*module, "fastgpt.bench.host", *rows], 240, 90),
        Stage("roofline", [*module, "fastgpt.bench.roofline", "--device", "cpu", *rows], 90, 30),
        Stage("memory", [*module, "fastgpt.bench.memory", *rows], 60, 20),
        Stage("evaluate", [*module, "fastgpt.bench.evaluate", "--quick", *rows], 60, 15),
        Stage("codegen", [*module, "fastgpt.bench.codegen", *rows], 300, 180),
        Stage("model", [*module, "fastgpt.bench.model.command", "--page", str(out / "model.html")], 300, 120),
        Stage(
            "report", [*module, "fastgpt.cli", "bench", "report", "--out", str(out), str(out / "rows.jsonl")], 60, 15
        ),
    ]


def main(argv: list[str] | None = None) -> int:
    """Run the plan or print it."""
    parser = Parser(prog="fastgpt bench all", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--dry-run", action="store_true", help="print the plan with guessed times, without running it")
    parser.add_argument("--out", type=Path, default=Path("bench-results"), help="folder for rows and report")
    parser.add_argument("--only", action="append", metavar="STAGE", help="stage to run; may be repeated")
    args = parser.parse_args(argv)
    out = args.out.resolve()
    stages = plan(out / FRESH, out)
    if unknown := set(args.only or ()) - {s.name for s in stages}:
        raise UserError(f"all: there is no stage {min(unknown)}, expected {', '.join(s.name for s in stages)}")
    stages = [s for s in stages if not args.only or s.name in args.only]
    if args.dry_run:
        print(show_plan(stages, BUDGET))
        return 0
    commit = checkout_commit(Path(__file__).resolve().parent.parent)
    return run_stages(stages, out, Record("cpu", BUDGET, commit))
