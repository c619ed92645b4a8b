"""`fastgpt eval score`: text metrics of predictions in a JSONL file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastgpt.core.command import Parser, number
from fastgpt.core.errors import UserError
from fastgpt.evaluate import metrics
from fastgpt.evaluate.json_lines import read_objects

OPTIONS = ("tokenizer", "sentences", "model", "num_layers")


def read_pairs(path: Path) -> tuple[list[str], list[str | list[str]]]:
    """Return the predictions and references of a file: each line has `prediction` and `reference`, a text or several.

    Raises:
        UserError: the file cannot be read, or a line lacks a key.
    """
    predictions: list[str] = []
    references: list[str | list[str]] = []
    for at, row in read_objects(path):
        reference: Any = row.get("reference")
        several = isinstance(reference, list) and all(isinstance(r, str) for r in reference)
        if not isinstance(reference, str) and not several or not isinstance(row.get("prediction"), str):
            raise UserError(f"{path}:{at}: expected prediction, a text, and reference, a text or a list of texts")
        predictions.append(row["prediction"])
        references.append(reference)
    return predictions, references


def main(argv: list[str]) -> int:
    """Run `fastgpt eval score`."""
    parser = Parser(prog="fastgpt eval score", description="Print text metrics of predictions, with standard errors.")
    parser.add_argument("file", metavar="FILE", type=Path, help="JSONL with prediction and reference on each line")
    parser.add_argument("--metric", nargs="+", required=True, choices=metrics.METRICS, help="metrics to print")
    parser.add_argument("--tokenizer", help="default, unicode, char; for bleu also each of sacrebleu's, such as zh")
    parser.add_argument("--sentences", help="of rougeLsum: newline or punctuation")
    parser.add_argument("--model", help="of bertscore: folder of an encoder")
    parser.add_argument("--num-layers", type=number(int, 1), help="of bertscore: the layer to compare")
    args = parser.parse_args(argv)
    given = {name: getattr(args, name) for name in OPTIONS if getattr(args, name) is not None}
    options: dict[str, dict[str, Any]] = {
        metric: {name: value for name, value in given.items() if name in metrics.OPTIONS[metric]}
        for metric in args.metric
    }
    for name in given:
        if not any(name in chosen for chosen in options.values()):
            raise UserError(f"score: --{name.replace('_', '-')} has no effect on {', '.join(args.metric)}")
    for metric in args.metric:
        metrics.check(metric, options[metric])
    predictions, references = read_pairs(args.file)
    found = [metrics.score(metric, predictions, references, **options[metric]) for metric in args.metric]
    width = max(map(len, args.metric))
    for one in found:
        error = "" if one.stderr is None else f"  ± {one.stderr:.4f}"
        print(f"{one.metric:<{width}}  {one.value:.4f}{error}  ({len(one.items):,} items)")
    for note in dict.fromkeys(note for one in found for note in one.notes):
        print(f"note: {note}")
    return 0
