"""The options of `fastgpt serve` that make it watch its answers."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from fastgpt.core.command import number
from fastgpt.core.errors import UserError

if TYPE_CHECKING:
    from fastgpt.serve.app import Part
    from fastgpt.serve.watch.settings import Watch
    from fastgpt.serve.watch.store import Store

DAYS, ALPHA, THRESHOLD = 30, 0.01, 0.5


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    group = parser.add_argument_group("watching (off by default; docs/watching.md)")

    def add(name: str, **options: object) -> None:
        group.add_argument(name, **options)  # type: ignore[arg-type]

    many = {"action": "append", "default": []}
    add(
        "--flag-words",
        **many,
        metavar="[NAME=]FILE",
        help="flag answers that have one of these words, one on each line",
    )
    add("--flag-patterns", **many, metavar="[NAME=]FILE", help="flag answers that match one of these RE2 expressions")
    add(
        "--flag-scorer",
        **many,
        metavar="NAME=SCORER",
        help="flag answers by FILE.py:FUNCTION, or a classifier RUN:LABEL",
    )
    add("--flag-threshold", type=float, metavar="X", help=f"least score of a flagged answer (default: {THRESHOLD})")
    add("--flag-prompts", action="store_true", help="flag prompts, too, by words and patterns")
    add("--on-flag", choices=("count", "stop"), default="count", help="stop: end flagged answers (default: count)")
    add(
        "--baseline",
        type=Path,
        metavar="FILE",
        help="report drift from these answers; recorded first if there is no file",
    )
    add(
        "--drift-window",
        type=number(int, 20),
        metavar="N",
        help="answers that are compared (default: 500, or as in FILE)",
    )
    add(
        "--drift-alpha", type=number(float, 0, 1, open_least=True), help=f"chance of any false alarm (default: {ALPHA})"
    )
    add("--webhook", metavar="URL", help="send flags and drift as JSON; FASTGPT_WEBHOOK_SECRET signs them")
    add("--store", type=Path, metavar="DIR", help="keep a record of each flagged answer, without texts")
    add("--keep-texts", action="store_true", help="keep every prompt and answer in the store")
    add("--keep-days", type=number(int, 1), metavar="N", help=f"days that records are kept (default: {DAYS})")


def watchers_of(args: argparse.Namespace) -> list[Part]:
    """Return the part that watches answers, if it is asked for. Raises UserError as watch_of."""
    watch = watch_of(args)
    if watch is None:
        return []
    from fastgpt.serve.watch.part import Watching

    return [Watching(watch).add]


def watch_of(args: argparse.Namespace) -> Watch | None:
    """Return what to watch for; None for nothing. The store is made if there is none.

    Raises:
        UserError: something cannot be opened, a name is given twice, or a setting has no effect.
    """
    from fastgpt.serve.watch.baseline import Baselines  # these take seconds, which `fastgpt serve --help` does not need
    from fastgpt.serve.watch.flags import Flag, PatternFlag, WordFlag
    from fastgpt.serve.watch.scorers import open_rater
    from fastgpt.serve.watch.settings import Watch
    from fastgpt.serve.watch.webhook import read_secret, read_url

    _check(args)
    words, patterns, raters = (_named(args, name) for name in ("flag_words", "flag_patterns", "flag_scorer"))
    names = [*words, *patterns, *raters]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"two flags are named {twice}, expected NAME=FILE with different names")
    if not (names or args.baseline or args.store):
        return None
    threshold = THRESHOLD if args.flag_threshold is None else args.flag_threshold
    tests: list[Flag] = [WordFlag(name, Path(file)) for name, file in words.items()]
    tests += [PatternFlag(name, Path(file)) for name, file in patterns.items()]
    return Watch(
        flags=tuple(tests),
        scorers=tuple(open_rater(name, what, threshold) for name, what in raters.items()),
        toxic=frozenset([*words, *raters]),
        prompts=args.flag_prompts,
        stop=args.on_flag == "stop",
        baselines=Baselines(args.baseline, args.drift_window, args.drift_alpha or ALPHA) if args.baseline else None,
        webhook=read_url(args.webhook) if args.webhook else None,
        secret=read_secret(os.environ.get("FASTGPT_WEBHOOK_SECRET", "")),
        store=_store(args),
        keep_texts=args.keep_texts,
        keep_days=args.keep_days or DAYS,
    )


def _store(args: argparse.Namespace) -> Store | None:
    from fastgpt.serve.watch.store import Store

    if args.store is None:
        return None
    store = Store(args.store, create=True)
    store.describe(keep_texts=args.keep_texts, keep_days=args.keep_days or DAYS)
    return store


def _check(args: argparse.Namespace) -> None:
    """Raise UserError for a setting without effect."""
    tests = args.flag_words or args.flag_patterns
    for given, option, needs, what in (
        (args.flag_threshold is not None, "--flag-threshold", args.flag_scorer, "--flag-scorer"),
        (args.flag_prompts, "--flag-prompts", tests, "--flag-words or --flag-patterns"),
        (args.on_flag == "stop", "--on-flag stop", tests, "--flag-words or --flag-patterns"),
        (args.drift_window is not None, "--drift-window", args.baseline, "--baseline"),
        (args.drift_alpha is not None, "--drift-alpha", args.baseline, "--baseline"),
        (args.webhook, "--webhook", tests or args.flag_scorer or args.baseline, "flags or --baseline"),
        (args.keep_texts, "--keep-texts", args.store, "--store"),
        (args.keep_days is not None, "--keep-days", args.store, "--store"),
    ):
        if given and not needs:
            raise UserError(f"{option} has no effect without {what}")


def _named(args: argparse.Namespace, option: str) -> dict[str, str]:
    """Return what the values of an option name, by name; a file without a name has that of its stem."""
    found: dict[str, str] = {}
    for value in getattr(args, option):
        name, equal, what = value.partition("=")
        flag = "--" + option.replace("_", "-")
        if not equal and option == "flag_scorer":
            raise UserError(f"{flag} is {value!r}, expected NAME=FILE.py:FUNCTION or NAME=RUN:LABEL")
        if not equal:
            name, what = Path(value).stem, value
        if not name or not what:
            raise UserError(f"{flag} is {value!r}, expected NAME=FILE")
        if name in found:
            raise UserError(f"two flags are named {name}, expected NAME=FILE with different names")
        found[name] = what
    return found
