"""`fastgpt init`: a recipe for fine-tuning, written from a goal, and what it still needs."""

from __future__ import annotations

import json
import os
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastgpt.core.command import Parser
from fastgpt.core.errors import UserError

SIZES = ("tiny", "gpt2-124m", "llama-125m")
WIDTH = 118


@dataclass(frozen=True)
class Goal:
    """What a goal needs.

    Attributes:
        about: what the model learns to do.
        rows: of the data, two examples.
        least: rows below which the data is probably too small.
        metric: how to tell whether the result is good.
        advice: what decides whether it works.
        task: setting of the same name. settings: others.
        asks: (setting, question, default) of a question for this goal alone.
    """

    about: str
    rows: tuple[dict[str, Any], dict[str, Any]]
    least: int
    metric: str
    advice: str
    task: str = "sft"
    settings: dict[str, Any] = field(default_factory=dict)
    asks: tuple[str, str, str] | None = None


EPOCHS = ("epochs", "passes over the data", "3")


def _turns(asked: str, reply: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": reply}]}


def _pair(prompt: str, completion: str) -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion}


GOALS = {
    "chat": Goal(
        "replies in a conversation",
        (
            _turns("Which days are you open?", "Monday to Friday."),
            _turns("And on Sunday?", "We are closed."),
        ),
        500,
        "val_loss on replies that are held out, and twenty conversations read by a person",
        "Only the replies are learned. Write them in the voice that the model should have; a few hundred good ones do "
        "more than thousands of mixed quality. The base needs a chat template, or name one by `template`. Afterwards "
        "`fastgpt finetune make-pairs` makes preference pairs, for `task: dpo`.",
    ),
    "content": Goal(
        "writes texts like yours",
        ({"text": "The first of your texts, whole."}, {"text": "Another one."}),
        200,
        "val_loss on texts that are held out, compared with the base's before training",
        "Texts count by their tokens: 100,000 are few. Remove what shall not be imitated: headers, signatures, copies.",
        asks=EPOCHS,
    ),
    "code": Goal(
        "continues code like yours",
        ({"text": "def area(width, height):\n    return width * height\n"}, {"text": "SIZES = (1, 2, 4)\n"}),
        200,
        "val_loss on files that are held out, and the share of completions that pass your tests",
        "Whole files, one a row, without generated and copied code and without keys and passwords. Hold out whole "
        "projects by `val_data`, since files of one project are alike.",
        asks=EPOCHS,
    ),
    "summarize": Goal(
        "writes summaries",
        (_pair("A long text.\n\nSummary:", " Its summary."), _pair("Another text.\n\nSummary:", " Another summary.")),
        500,
        "ROUGE-L of summaries that are held out, next to that of each text's first sentences",
        "A text and its summary must fit the context together; `too_long: error` shows which do not.",
        settings={"too_long": "error"},
        asks=EPOCHS,
    ),
    "qa": Goal(
        "answers questions about a passage",
        (
            _pair("The bridge was built in 1932.\n\nQuestion: When was it built?\nAnswer:", " 1932"),
            _pair("The bridge was built in 1932.\n\nQuestion: Who built it?\nAnswer:", " not in the text"),
        ),
        1000,
        "exact match and F1 of the words of answers that are held out",
        "Add questions that the passage does not answer, or the model will make answers up. Hold out whole passages by "
        "`val_data`, since questions about one passage are alike.",
        settings={"too_long": "error"},
        asks=EPOCHS,
    ),
    "translate": Goal(
        "translates sentences",
        (_pair("English: Good morning.\nGerman:", " Guten Morgen."), _pair("English: Thank you.\nGerman:", " Danke.")),
        5000,
        "chrF of translations that are held out",
        "The base must have read both languages; fine-tuning does not teach a language.",
        asks=EPOCHS,
    ),
    "classify": Goal(
        "gives each text one of several labels",
        ({"text": "It broke after a day.", "label": "negative"}, {"text": "Works well.", "label": "positive"}),
        200,
        "macro_f1 of texts that are held out, next to the share of the most frequent label",
        "At least 50 rows of each label. If one label is rare, set `class_weights: balanced`.",
        task="classify",
        settings={"metric": "macro_f1"},
        asks=("labels", "labels, separated by commas (empty: those of the data)", ""),
    ),
    "extract": Goal(
        "finds the fields of a record in a text, as JSON",
        (
            _pair("Order 17, two chairs, by Friday.\n\nJSON:", ' {"order": 17, "item": "chair", "count": 2}'),
            _pair("Three lamps, please.\n\nJSON:", ' {"order": null, "item": "lamp", "count": 3}'),
        ),
        500,
        "the share of records that are held out and come out exactly right, and of those that are valid JSON",
        "The same fields in the same order in every row, null where the text has none; add texts without any field.",
        settings={"too_long": "error"},
        asks=EPOCHS,
    ),
}


def main(argv: list[str], ask: Callable[[str], str] = input) -> int:
    """Run `fastgpt init`."""
    parser = Parser(prog="fastgpt init", description="Write a recipe for a goal, and say what data it needs.")
    goals = "; ".join(f"{name}: {goal.about}" for name, goal in GOALS.items())
    parser.add_argument("--goal", choices=GOALS, required=True, help=goals)
    parser.add_argument("--out", type=Path, default=Path("recipe.yaml"), metavar="FILE", help="default: recipe.yaml")
    parser.add_argument("--yes", action="store_true", help="take the defaults, ask nothing")
    args = parser.parse_args(argv)
    if args.out.exists():
        raise UserError(f"init: {args.out} exists, expected a new file")
    asking = not args.yes and sys.stdin.isatty()
    answers = _answers(args.goal, ask if asking else lambda question: "")
    text = recipe(args.goal, answers, args.out)
    aside = args.out.with_name(f".{args.out.name}.writing")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, args.out)
    print(f"wrote {args.out}: {GOALS[args.goal].about}")
    lacking = list(missing(GOALS[args.goal], answers))
    print(*(lacking or ["nothing is missing"]), sep="\n")
    print(f"then: fastgpt finetune {args.out}")
    return 0


def _answers(name: str, ask: Callable[[str], str]) -> dict[str, str]:
    """Ask at most five questions; an empty reply is the default."""

    def answer(question: str, default: str) -> str:
        return ask(f"{question} [{default}] ").strip() or default

    goal = GOALS[name]
    found = {"data": answer("data, a file with one row a line", f"data/{name}.jsonl")}
    found["base"] = answer("model to start from, a run or the folder of a model", _some_run())
    if not is_model(found["base"]):
        known = answer(f"that is not a model yet; size to train it in ({', '.join(SIZES)})", SIZES[0])
        if known not in SIZES:
            raise UserError(f"init: size is {known!r}, expected one of {', '.join(SIZES)}")
        found["size"] = known
    found["method"] = answer("train all weights, or an adapter in less memory (all, lora)", "all")
    if found["method"] not in ("all", "lora"):
        raise UserError(f"init: method is {found['method']!r}, expected all or lora")
    if goal.asks is not None:
        setting, question, default = goal.asks
        found[setting] = answer(question, default)
    try:
        right = float(found.get("epochs", "1")) > 0
    except ValueError:
        right = False
    if not right:
        raise UserError(f"init: epochs is {found['epochs']!r}, expected a number more than 0")
    return found


def is_model(path: str) -> bool:
    """Return whether a path is a run, a checkpoint or the folder of a model, without reading it."""
    folder = Path(path)
    return any((folder / name).is_file() for name in ("state.json", "config.json")) or any(folder.glob("step_*/"))


def _some_run() -> str:
    """Return the run that was written last, or the name of the one that a first training makes."""
    runs = [path for path in Path("runs").glob("*") if is_model(str(path))]
    return str(max(runs, key=lambda path: path.stat().st_mtime)) if runs else f"runs/{SIZES[0]}"


def recipe(name: str, answers: dict[str, str], out: Path) -> str:
    """Return the text of a recipe: what is needed as comments, then the settings."""
    goal, data = GOALS[name], answers["data"]
    settings: dict[str, Any] = {"task": goal.task, "base": answers["base"], "data": data, **goal.settings}
    settings["out"] = f"runs/{name}"
    settings["epochs"] = float(answers.get("epochs", "3"))
    if answers["method"] == "lora":
        settings["lora"] = {"rank": 16}
    if labels := [label.strip() for label in answers.get("labels", "").split(",") if label.strip()]:
        settings["labels"] = labels
    if Path(answers["base"]).name == SIZES[0]:
        settings["lr"] = 1e-3  # a small model, trained for minutes, has to move further than the default lets it
    settings |= {"eval_every": 50, "patience": 3}
    rows = [json.dumps(row, ensure_ascii=False) for row in goal.rows]
    steps = [f"Write {data}, one row a line, {goal.least} rows or more, like these two:", *rows]
    notes = [f"{name}: {goal.about}.", "", *steps, "", goal.advice, "", f"Metric: {goal.metric}.", "", "Plan:"]
    lines = [f"# {line}".rstrip() for note in [*notes, *_plan(answers, out)] for line in _wrapped(note, rows)]
    return "\n".join([*lines, "", *(f"{key}: {_yaml(value)}" for key, value in settings.items()), ""])


def _plan(answers: dict[str, str], out: Path) -> list[str]:
    first = []
    if "size" in answers:
        first = [
            f"fastgpt train --config {answers['size']} --out {answers['base']}   # on your own text: --data FILE",
            f"(or, with a published model: fastgpt import NAME {answers['base']})",
        ]
    return [*first, f"fastgpt finetune {out}   # ends after 3 validations without an improvement"]


def _wrapped(text: str, rows: list[str]) -> list[str]:
    """Return a text in lines; rows stay whole, so that they can be copied."""
    return [text] if text in rows or not text else textwrap.wrap(text, WIDTH)


def _yaml(value: Any) -> str:
    """Return a value in YAML, which has JSON's forms too."""
    return value if isinstance(value, str) and value.replace("_", "a").isalnum() else json.dumps(value)


def missing(goal: Goal, answers: dict[str, str]) -> Iterator[str]:
    """Yield a sentence for what the data and the base lack."""
    data, base = Path(answers["data"]), answers["base"]
    columns = " and ".join(goal.rows[0])
    if not data.exists():
        yield f"missing: {data}, {goal.least} rows or more with {columns}; the recipe shows two"
    elif data.is_file() and data.suffix == ".jsonl":
        with data.open("rb") as f:
            count = sum(not line.isspace() for line in f)
        if count < goal.least:
            yield f"missing: {data} has {count} rows, expected {goal.least} or more for this goal"
    if not is_model(base):
        yield f"missing: {base}, the model to start from; the recipe shows how to make it"
