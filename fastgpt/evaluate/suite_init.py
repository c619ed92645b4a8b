"""Templates of suites: `fastgpt eval init` writes settings with comments and three items to replace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastgpt.core.command import Parser
from fastgpt.core.errors import UserError
from fastgpt.data.shards import atomic_file
from fastgpt.evaluate.suite_settings import GENERATES, KINDS, PROMPTS

ABOUT = {
    "choice": "pick the right one of several answers: acc, and acc_norm (by characters)",
    "classification": "pick the label of a text: acc and macro_f1",
    "cloze": "continue a text: acc if greedy decoding writes the answer, and perplexity of the answer",
    "qa": "answer a question freely: exact_match and f1, as SQuAD",
    "span": "answer a question about a context with words from it: exact_match and f1, as SQuAD",
    "perplexity": "predict texts: word_perplexity, byte_perplexity and bits_per_byte",
    "generation": "write freely; a regular expression, a JSON schema or a model judges",
}
KEYS = {
    "choice": "question, choices (two or more), answer (its text, or its number from 0 on)",
    "classification": "text, label (one of labels)",
    "cloze": "text, answer",
    "qa": "question, answers (one right text or several)",
    "span": "context, question, answers (one right text or several, as in the context)",
    "perplexity": "text",
    "generation": "prompt; regex, unless judge is set; reference, for examples and a judge that compares",
}
ITEMS: dict[str, list[dict[str, Any]]] = {
    "choice": [
        {
            "question": "Which tool drives a nail?",
            "choices": ["a saw", "a hammer", "a screwdriver"],
            "answer": "a hammer",
        },
        {"question": "Which unit measures force?", "choices": ["newton", "joule", "kilogram"], "answer": "newton"},
        {"question": "Which metal is liquid at 20 °C?", "choices": ["tin", "zinc", "mercury"], "answer": 2},
    ],
    "classification": [
        {"text": "The pump stopped after two hours.", "label": "fault"},
        {"text": "How do I order a filter?", "label": "question"},
        {"text": "Everything works since the update.", "label": "praise"},
    ],
    "cloze": [
        {"text": "Opening hours are from nine to", "answer": "five"},
        {"text": "The capital of France is", "answer": "Paris"},
        {"text": "Water boils at one hundred", "answer": "degrees"},
    ],
    "qa": [
        {"question": "How many legs does a spider have?", "answers": ["eight", "8"]},
        {"question": "Which planet is nearest to the sun?", "answers": ["Mercury"]},
        {"question": "What do bees make?", "answers": ["honey", "wax"]},
    ],
    "span": [
        {"context": "The valve closes at 3 bar.", "question": "When does it close?", "answers": ["at 3 bar", "3 bar"]},
        {"context": "Anna wrote the manual in 2019.", "question": "Who wrote it?", "answers": ["Anna"]},
        {"context": "The warranty lasts two years.", "question": "How long does it last?", "answers": ["two years"]},
    ],
    "perplexity": [
        {"text": "The pump is driven by an electric motor of 2 kW."},
        {"text": "Replace the filter every six months, or earlier if the light blinks."},
        {"text": "Before you open the housing, disconnect the power supply."},
    ],
    "generation": [
        {"prompt": "What is 6 times 7? Answer with the number.", "regex": r"\b42\b"},
        {"prompt": "Write the year of the first moon landing.", "regex": r"\b1969\b"},
        {"prompt": "Name a colour of the French flag.", "regex": r"(?i)\b(blue|white|red)\b"},
    ],
}
JUDGES = """\
# judge:                   # for all items; without it, each item has its own regex
#   regex: '\\b42\\b'        # a right text contains it; `full: true`: it matches the whole text
#   schema: answer.json    # or: a right text is JSON that fits this schema
#   model:                 # or: a model judges, behind a server with OpenAI's chat completions. It receives all prompts
#     url: http://localhost:8000/v1
#     model: NAME
#     key: OPENAI_API_KEY  # the environment variable with the key; leave it out for none
#     style: score         # 1 to 5; or versus: compared with the item's reference, in both orders
"""


def template(kind: str, name: str) -> str:
    """Return the YAML of a suite of a kind, with comments."""
    lines = [
        f"# `fastgpt eval check {name}.yaml` checks this suite; `fastgpt eval RUN --preset {name}.yaml` runs it.",
        f"suite: {name}",
        f"# {ABOUT[kind]}",
        f"kind: {kind}",
        f"# one item a line, as JSON, with {KEYS[kind]}",
        f"items: {name}.jsonl",
    ]
    if kind == "classification":
        lines.append("labels: [fault, question, praise]  # the model picks the most likely; short ones are best")
    if kind != "perplexity":
        lines += [
            f"prompt: {json.dumps(PROMPTS[kind])}  # {{key}} becomes that key of the item; no space at its end",
        ]
    if kind in ("choice", "classification", "cloze"):
        lines.append('delimiter: " "  # between prompt and answer; "" for languages without spaces')
    if kind in GENERATES:
        lines += [
            "max_new_tokens: 32  # longest answer",
            'stop: ["\\n"]  # what ends an answer; [] for none',
            "chat: false  # true: the prompt is the message of a user, in the model's chat template",
        ]
    if kind in ("qa", "span"):
        lines += [
            "tokenizer: default  # words of f1: unicode for other scripts than Latin, char for characters",
            "normalize: true  # compare without case, punctuation and English articles",
        ]
    if kind != "perplexity":
        lines += [
            '# description: ""       # text before everything',
            f"# examples: {name}.examples.jsonl  # pool of examples, as items; none may be an item too",
            "# shots: 5               # examples in each prompt, the first of the pool",
        ]
    return "\n".join(lines) + "\n" + (JUDGES if kind == "generation" else "")


def main(argv: list[str]) -> int:
    """Run `fastgpt eval init`."""
    parser = Parser(
        prog="fastgpt eval init", description="Write a suite to fill in: settings with comments, and three items."
    )
    parser.add_argument("suite", metavar="SUITE", type=Path, help="name of the suite, or its file, as in my-suite.yaml")
    parser.add_argument("--kind", choices=KINDS, required=True, help="what an item is")
    args = parser.parse_args(argv)
    path: Path = (
        args.suite if args.suite.suffix in (".yaml", ".yml") else args.suite.with_name(args.suite.name + ".yaml")
    )
    items = path.with_suffix(".jsonl")
    for file in (path, items):
        if file.exists():
            raise UserError(f"{file} exists, expected a new name")
    if not path.parent.is_dir():
        raise UserError(f"{path.parent} is not a folder, expected the folder of the suite")
    rows = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ITEMS[args.kind])
    for file, text in ((items, rows), (path, template(args.kind, path.stem))):
        with atomic_file(file) as f:
            f.write(text.encode())
    print(f"wrote {path} and {items}\nreplace the items, then: fastgpt eval check {path}")
    return 0
