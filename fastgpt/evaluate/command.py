"""The command `fastgpt eval`; SUBCOMMANDS lists what else it can do, each with its own module and options."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fastgpt.core.command import Parser, listed, number, run_subcommand
from fastgpt.core.errors import UserError
from fastgpt.core.folders import write_text

if TYPE_CHECKING:
    from fastgpt.evaluate.results import Results

# name -> module and function that runs it (default: main), and what it does
SUBCOMMANDS = {
    "init": ("fastgpt.evaluate.suite_init", "write a template of a suite of your own"),
    "check": ("fastgpt.evaluate.suite_checks", "check a suite: duplicates, leaked documents, balance of the labels"),
    "export-suite": ("fastgpt.evaluate.suite_export", "write a suite as a task of the LM Evaluation Harness"),
    "compare": ("fastgpt.evaluate.compare", "compare two evaluations, or refuse a regression (--gate)"),
    "human": ("fastgpt.evaluate.human.command", "let people rate the answers of two models, blind"),
    "score": ("fastgpt.evaluate.score", "print BLEU, ROUGE, F1 and other metrics of predictions in a file"),
    "power": ("fastgpt.evaluate.power", "say how many items tell two models apart"),
    "safety-report": ("fastgpt.evaluate.safety.report", "report safety before and after fine-tuning"),
}


def main(argv: list[str]) -> int:
    """Run `fastgpt eval`."""
    if argv and argv[0] in SUBCOMMANDS:
        return run_subcommand(SUBCOMMANDS, argv[0], argv[1:])
    return run(_parser().parse_args(argv))


def _parser() -> Parser:
    parser = Parser(
        prog="fastgpt eval",
        usage="fastgpt eval [-h] RUN [options] | COMMAND ...",
        description="Evaluate a model on benchmarks, perplexity, suites of your own and safety, from local files.\n\n"
        f"commands:\n{listed(SUBCOMMANDS)}\n\n`fastgpt eval COMMAND --help` explains a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="RUN", help="run, checkpoint, or folder with config.json and weights")
    parser.add_argument(
        "--preset", default="base", help="base, full, safety, or a file: a list of tasks, or a suite (default: base)"
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder with the files of the benchmarks")
    parser.add_argument(
        "--texts", type=Path, nargs="+", default=[], metavar="FILE", help="files whose perplexity is computed besides"
    )
    parser.add_argument("--limit", type=number(int, 1), metavar="N", help="items of each task (default: all)")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="results as JSON (default: RUN/eval/step-STEP-PRESET.json)"
    )
    parser.add_argument("--page", type=Path, metavar="FILE", help="write results as one HTML page, with plots")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument(
        "--batch-tokens", type=number(int, 1), metavar="N", help="tokens in one forward pass (default: by device)"
    )
    parser.add_argument("--all-checkpoints", action="store_true", help="evaluate each checkpoint of the run")
    return parser


def run(args: argparse.Namespace) -> int:
    """Evaluate, print the table, and write the results."""
    from fastgpt.core import page as core_page
    from fastgpt.evaluate import table
    from fastgpt.evaluate.presets import parts_of
    from fastgpt.evaluate.run import run_parts
    from fastgpt.evaluate.target import open_target

    models = _models(args)
    for path in filter(None, (args.out, args.page)):
        if path.is_dir():
            raise UserError(f"{path} is a folder, expected the name of a file")
    if args.page and len(models) > 1:
        core_page.figure(lambda axes: None, 1, 1)  # matplotlib is missed now, not at the end
    parts = parts_of(args.preset, args.data, args.texts)
    found: list[Results] = []
    for model in models:
        target = open_target(model, device=args.device, dtype=args.dtype)
        shown = sys.stderr.isatty()
        results = run_parts(
            target, args.preset, parts, limit=args.limit, progress=shown, batch_tokens=args.batch_tokens
        )
        out = args.out or default_path(target.folder, results.model.get("step"), args.preset)
        results.save(out)
        found.append(results)
        print(f"{model}, preset {args.preset}\n{table.text(results)}\nresults: {out}")
    if args.page:
        _write_page(args.page, found if args.out else _of_all_steps(found[-1], target.folder))
    return 0


def _models(args: argparse.Namespace) -> list[str]:
    """Return the model, or the checkpoints of the run, oldest first."""
    if not args.all_checkpoints:
        return [args.model]
    from fastgpt.training.checkpoint import checkpoints

    found = [str(path) for path in checkpoints(Path(args.model))]
    if not found:
        raise UserError(f"{args.model} has no checkpoints, expected the folder of a run")
    if args.out:
        raise UserError(
            f"out is {args.out}, but --all-checkpoints writes a file for each checkpoint, expected no --out"
        )
    return found


def default_path(folder: Path, step: int | None, preset: str) -> Path:
    """Return where results are kept: in the folder `eval` of the run, or of the folder of the model.

    Args:
        folder: checkpoint, or folder with config.json.
    """
    name = Path(preset).stem
    if step is None:
        return folder / "eval" / f"{name}.json"
    return folder.parent / "eval" / f"step-{step}-{name}.json"


def _of_all_steps(last: Results, folder: Path) -> list[Results]:
    """Return the results of a preset for all steps of the run that have some, oldest first.

    Args:
        last: the newest ones. folder: checkpoint, or folder with config.json.
    """
    from fastgpt.evaluate.results import load_results

    if last.model.get("step") is None:
        return [last]
    name = re.compile(rf"step-(\d+)-{re.escape(Path(last.preset).stem)}\.json")
    steps = {int(m[1]): path for path in (folder.parent / "eval").iterdir() if (m := name.fullmatch(path.name))}
    return [load_results(path) for _, path in sorted(steps.items())]


def _write_page(path: Path, results: list[Results]) -> None:
    from fastgpt.evaluate import page

    write_text(path, page.render(results))
    print(f"page: {path}")
