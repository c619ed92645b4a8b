"""`fastgpt store`: what a server has kept, the records of one user, and their deletion; also while the server runs."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from fastgpt.core.command import Parser, number, run_group
from fastgpt.core.errors import counted
from fastgpt.core.folders import write_text
from fastgpt.serve.watch.store import Store

_HERE = "fastgpt.serve.watch.store_command"
SUBCOMMANDS = {
    "show": (f"{_HERE}:show", "print what is kept, for how long, and how much of it there is"),
    "export": (f"{_HERE}:export", "print all records of a user as JSON lines"),
    "forget": (f"{_HERE}:forget", "delete all records of a user"),
    "expire": (f"{_HERE}:expire", "delete old records, as the server does each day"),
}


def main(argv: list[str]) -> int:
    """Run `fastgpt store`."""
    about = "Look into the store of a server.\n"
    return run_group("fastgpt store", "DIR ...", about, SUBCOMMANDS, argv)


def show(argv: list[str]) -> int:
    """Run `fastgpt store show`."""
    store = Store(_parser("show").parse_args(argv).store)
    about = store.about
    texts = "prompts and answers" if about.get("keep_texts") else "no texts of calls"
    days = about.get("keep_days")
    print(f"kept: {texts}; each record " + (f"for at most {counted(days, 'day')}" if days else "until it is deleted"))
    for path, _ in store.files():
        print(f"{path.name}: {counted(sum(1 for _ in path.open('rb')), 'record')}")
    rows = list(store.records())
    users = Counter(str(row["user"]) for row in rows if row.get("user"))
    print(f"in all: {counted(len(rows), 'record')}, {counted(len(users), 'user')}")
    for flag, n in sorted(Counter(flag for row in rows for flag in row.get("flags") or ()).items()):
        print(f"flag {flag}: {counted(n, 'record')}")
    for deletion in store.deletions:
        print(f"forgotten: {counted(deletion['records'], 'record')} at {deletion['time']}")
    return 0


def export(argv: list[str]) -> int:
    """Run `fastgpt store export`."""
    parser = _parser("export", user=True)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write them to a file (default: print them)")
    args = parser.parse_args(argv)
    rows = Store(args.store).export(args.user)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if args.out is None:
        print(text, end="")
        return 0
    write_text(args.out, text)
    print(f"{args.out}: {counted(len(rows), 'record')}")
    return 0


def forget(argv: list[str]) -> int:
    """Run `fastgpt store forget`."""
    args = _parser("forget", user=True).parse_args(argv)
    deleted = Store(args.store).forget(args.user)
    print(f"deleted: {counted(deleted, 'record')}")
    return 0


def expire(argv: list[str]) -> int:
    """Run `fastgpt store expire`."""
    parser = _parser("expire")
    parser.add_argument("--keep-days", type=number(int, 1), required=True, metavar="N", help="days to keep records for")
    args = parser.parse_args(argv)
    print(f"deleted: {counted(Store(args.store).expire(args.keep_days), 'file')}")
    return 0


def _parser(name: str, user: bool = False) -> Parser:
    parser = Parser(prog=f"fastgpt store {name}", description=f"{SUBCOMMANDS[name][1].capitalize()}.")
    parser.add_argument("store", type=Path, metavar="DIR", help="folder that `fastgpt serve --store` wrote to")
    if user:
        parser.add_argument("--user", required=True, metavar="ID", help="the user, as clients send it")
    return parser
