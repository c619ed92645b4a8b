"""`fastgpt finetune make-pairs`: preference pairs that a model makes from a constitution.

It stands below `finetune` and not `data`, since it runs a model, which the commands of `data` do not, and writes what
`fastgpt finetune --task dpo` reads.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastgpt.core.command import Parser, number
from fastgpt.core.errors import UserError, counted
from fastgpt.core.progress import bar
from fastgpt.data.read.defects import Defect
from fastgpt.data.read.files import find_files
from fastgpt.data.read.format import Format
from fastgpt.data.read.rows import Row, open_rows
from fastgpt.finetune.asking.dialogue import LEFT_OUT, Message, Replier
from fastgpt.finetune.asking.endpoint import Endpoint
from fastgpt.finetune.asking.journal import Journal, write_lines
from fastgpt.finetune.asking.keys import key_of
from fastgpt.finetune.asking.own import OwnModel
from fastgpt.finetune.formats import Wrong, messages
from fastgpt.finetune.pairs.constitution import Rule, load_constitution
from fastgpt.finetune.pairs.make import MODES, Settings, dialogue_of, rules_of


def main(argv: list[str]) -> int:
    """Run `fastgpt finetune make-pairs`."""
    args = _parser().parse_args(argv)
    out = Path(args.out)
    if out.exists():
        raise UserError(f"make-pairs: {out} exists, expected a new file")
    names = [field.name for field in dataclasses.fields(Settings)]
    settings = Settings(**{name: getattr(args, name) for name in names})
    if settings.mode == "compare" and settings.temperature == 0:
        raise UserError("--temperature is 0, expected more with --mode compare: the two answers would be equal")
    rules = rules_of(load_constitution(args.constitution), settings.mode)
    prompts = read_prompts(args.prompts, args.limit)
    replier = open_replier(args)
    with Journal(out.with_name(f"{out.name}.part"), made_by(replier, settings, rules, prompts)) as journal:
        _make(journal, prompts, rules, settings, replier)
    left = Counter(row[LEFT_OUT] for row in journal.records if LEFT_OUT in row)
    pairs = [row for row in journal.records if LEFT_OUT not in row]
    said = "".join(f"; {n:,} left out: {why}" for why, n in sorted(left.items()))
    if not pairs:
        raise UserError(f"make-pairs: no pair came of {counted(len(prompts), 'prompt')}{said} ({journal.path})")
    write_lines(out, [row | {"model": replier.name} for row in pairs])
    journal.path.unlink()
    print(f"{out}: {counted(len(pairs), 'pair')} of {counted(len(prompts), 'prompt')}{said}")
    print(*(f"  {n:,} by the rule {name}" for name, n in Counter(row["rule"] for row in pairs).items()), sep="\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="fastgpt finetune make-pairs", description="Make preference pairs by a constitution.")
    add = parser.add_argument
    add("constitution", metavar="CONSTITUTION.yaml", help="rules, with what asks for critiques and revisions")
    add("--prompts", required=True, metavar="PATH", help="rows with prompt (a text or messages) or messages")
    add("--out", required=True, metavar="FILE", help="the .jsonl file to write; FILE.part until it is complete")
    add("--mode", choices=MODES, default="revise", help="revise: revision against answer; compare: of two answers")
    add("--limit", type=number(int, 1), help="use the first prompts only")
    add("--seed", type=number(int, 0), default=0, help="of the rules that are drawn and of the replies (default: 0)")
    add("--temperature", type=number(float, 0), default=1.0, help="of the replies (default: 1)")
    add("--max-tokens", type=number(int, 1), default=256, help="of a reply, at most (default: 256)")
    add("--keep-cut", action="store_true", help="keep texts that --max-tokens cut off")
    add_replier(parser)
    return parser


def add_replier(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what replies."""
    add = parser.add_argument
    add("--model", required=True, help="run, checkpoint or folder of a model; with --endpoint its name there")
    add("--endpoint", metavar="URL", help="what speaks OpenAI's protocol, as in https://HOST/v1")
    add("--key-env", metavar="NAME", help="environment variable with the key for the endpoint")
    add("--body", metavar="JSON", help="fields to add to each request to the endpoint; null removes one")
    add("--timeout", type=number(float, 0, open_least=True), help="seconds of silence of the endpoint (default: 120)")
    add("--retries", type=number(int, 0), help="further attempts of a request to the endpoint (default: 6)")
    add("--at-once", type=number(int, 1), default=8, help="prompts, or requests, at the same time (default: 8)")
    add("--device", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")


def open_replier(args: argparse.Namespace) -> Replier:
    """Return what the options of add_replier name.

    Raises:
        UserError: an option has no effect, the key is not set, or the model cannot be opened.
    """
    if args.endpoint is None:
        for name in ("key_env", "body", "timeout", "retries"):
            if getattr(args, name) is not None:
                raise UserError(f"--{name.replace('_', '-')} has no effect here: it only applies with --endpoint")
        return OwnModel(args.model, args.at_once, args.device or "auto")
    if args.device is not None:
        raise UserError("--device has no effect here: it only applies without --endpoint")
    options: dict[str, Any] = {name: getattr(args, name) for name in ("timeout", "retries")}
    options = {name: value for name, value in options.items() if value is not None}
    options |= {"key": key_of(args.key_env), "body": _body(args.body), "at_once": args.at_once}
    return Endpoint(args.endpoint, args.model, **options)


def _body(text: str | None) -> dict[str, Any]:
    try:
        body = json.loads(text or "{}")
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise UserError(f"--body is {text!r}, expected an object of JSON")
    return body


def read_prompts(path: str, limit: int | None = None) -> list[list[Message]]:
    """Read prompts as messages, each from the column "prompt" (a text, or messages of which the last is the user's) or
    "messages" (without the reply at their end).

    Raises:
        UserError: no file, no row, or a defect, with file and line.
    """
    found: list[list[Message]] = []
    form = Format()
    for file in find_files(path, form, _ignore).files:
        for row in open_rows(file, form, _ignore):
            try:
                found.append(_prompt(row))
            except Wrong as wrong:
                row.report(wrong.kind, wrong.problem, wrong.remedy)
            if len(found) == limit:
                return found
    if not found:
        raise UserError(f"{path} has no prompts, expected rows with the column prompt")
    return found


def _ignore(defect: Defect) -> None:
    """Take a defect; in the mode "fail" each raises."""


def _prompt(row: Row) -> list[Message]:
    name = "prompt" if row.fields.get("prompt") is not None or "messages" not in row.fields else "messages"
    value = row.fields.get(name)
    if isinstance(value, str) and value.strip():
        return [{"role": "user", "content": value.strip()}]
    if not isinstance(value, list):
        raise Wrong("no prompt", f"the field {name!r} is {value!r:.40}, expected a text or messages", "repair it")
    turns = messages(value, name)
    if name == "messages" and len(turns) > 1 and turns[-1]["role"] == "assistant":
        turns = turns[:-1]
    if turns[-1]["role"] != "user":
        role = turns[-1]["role"]
        raise Wrong("no prompt", f"the last message is of the role {role}, expected the user's", "repair it")
    return turns


def made_by(
    replier: Replier, settings: Settings, rules: Sequence[Rule], prompts: Sequence[list[Message]]
) -> dict[str, Any]:
    """Return what the pairs depend on, with a digest of what is long."""

    def digest(value: Any) -> str:
        return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]

    found = {"constitution": digest([dataclasses.asdict(rule) for rule in rules]), "prompts": digest(prompts)}
    return found | replier.identity | dataclasses.asdict(settings)


def _make(
    journal: Journal, prompts: list[list[Message]], rules: list[Rule], settings: Settings, replier: Replier
) -> None:
    """Ask for the pairs that the journal does not have yet."""
    done = len(journal.records)
    if done:
        print(f"{journal.path} has {counted(done, 'prompt')} of {len(prompts):,}; the others are asked", flush=True)
    dialogues = (dialogue_of(i, prompts[i], rules, settings) for i in range(done, len(prompts)))
    shown = bar(len(prompts), done, desc="pairs", unit="prompt", leave=False)
    try:
        for record in replier.records(dialogues):
            journal.add(record)
            shown.update()
    finally:
        shown.close()
