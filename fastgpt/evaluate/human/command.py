"""`fastgpt eval human`: let people compare the answers of two models, or report what they said."""

from __future__ import annotations

import argparse
import secrets
from pathlib import Path

from fastgpt.core.command import Parser, number
from fastgpt.core.errors import UserError, counted
from fastgpt.evaluate.human import report
from fastgpt.evaluate.human.answers import Answers, Generation, Question, read_answers, read_prompts
from fastgpt.evaluate.human.ratings import Ratings, pairs_of
from fastgpt.evaluate.human.server import NAME, Server, is_name
from fastgpt.evaluate.results import item_id
from fastgpt.inference import terminal

ABOUT = "Serve a page on which people compare the answers of two models without knowing which is which."
GENERATION = "tokens temperature top_k top_p min_p repetition_penalty stop context weights no_graphs device".split()


def main(argv: list[str]) -> int:
    """Run `fastgpt eval human`."""
    if "--report" in argv:
        return report.main(argv)
    parser = _parser()
    args = parser.parse_args(argv)
    if wrong := next((name for name in args.raters or () if not is_name(name)), None):
        raise UserError(f"--raters has {wrong!r}, expected names of 1 to {NAME} printable characters")
    ratings = _ratings(args, parser)
    host = args.host or "127.0.0.1"
    with Server(ratings, secrets.token_urlsafe(24), tuple(args.raters or ()), host, args.port) as server:
        if args.host:
            print(f"warning: whoever reaches {host} and knows the address can read and rate; it is not encrypted")
        print(
            f"{counted(len(ratings), 'pair')} to rate: {server.url}\nCtrl-C ends; votes are in {args.out}", flush=True
        )
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print(f"\n`fastgpt eval human --report {args.out}` shows the results; the same command continues")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="fastgpt eval human", description=ABOUT)
    add = parser.add_argument
    add("a", metavar="A", help="a run, a checkpoint or a model folder; or a JSONL file of answers")
    add("b", metavar="B", help="the other one")
    add("--prompts", type=Path, metavar="FILE", help="JSONL with `prompt`, or one prompt a line")
    add("--n", type=number(int, 1), help="use the first N prompts (default: all)")
    add("--out", type=Path, default=Path("ratings.jsonl"), metavar="FILE", help="votes (default: ratings.jsonl)")
    add("--raters", nargs="+", metavar="NAME", help="who may rate (default: whoever enters a name)")
    add("--port", type=number(int, 0, 65535), default=0, help="of the page (default: a free one)")
    add("--host", help="address to serve on (default: this machine alone)")
    add("--report", nargs="+", metavar="FILE", help="report the votes of these files, instead of serving")
    terminal.add_options(parser, "largest number of tokens of an answer (default: 200)")
    return parser


def _ratings(args: argparse.Namespace, parser: argparse.ArgumentParser) -> Ratings:
    """Read or generate the answers, and open the votes.

    Raises:
        UserError: a setting has no effect, or there is nothing to rate.
    """
    places = [Path(args.a), Path(args.b)]
    if args.a == args.b:
        raise UserError(f"A and B are both {args.a}, expected two models")
    given = [read_answers(p) if p.is_file() else None for p in places]
    if all(given):
        for name in GENERATION:
            if getattr(args, name) != parser.get_default(name):
                raise UserError(f"--{name.replace('_', '-')} has no effect: A and B are files of answers")
    questions = _questions(args, given)
    caches = [args.out.with_suffix(f".{side}.jsonl") for side in "ab"]
    sides = [
        known[0] if known else Generation(path, questions, cache, args)
        for path, cache, known in zip((args.a, args.b), caches, given)
    ]
    answers = [side if isinstance(side, Answers) else side.run() for side in sides]
    names = (answers[0].model, answers[1].model)
    if names[0] == names[1]:
        raise UserError(f"the answers of A and B are both of {names[0]}, expected two models")
    pairs, same = pairs_of(questions, *answers)
    if same:
        print(f"{counted(same, 'prompt')} left out: both answers are the same")
    if not pairs:
        raise UserError("both models give the same answers, expected different ones to rate")
    return Ratings(args.out, pairs, names, args.seed)


def _questions(args: argparse.Namespace, given: list[tuple[Answers, list[Question]] | None]) -> list[Question]:
    """Return the prompts of --prompts, or those that two files of answers share; the first --n of them."""
    a, b = given
    if args.prompts is not None:
        questions = read_prompts(args.prompts)
    elif a and b:
        questions = [q for q in a[1] if item_id(q.prompt) in b[0].texts]
        left = len(a[0].texts) + len(b[0].texts) - 2 * len(questions)
        if left:
            print(f"{counted(left, 'answer')} left out: the other file has none to the same prompt")
        if not questions:
            raise UserError(f"{args.a} and {args.b} have no prompt in common, expected answers to the same prompts")
    else:
        raise UserError("human: --prompts is missing, expected a file of prompts for the models to answer")
    return questions[: args.n]
