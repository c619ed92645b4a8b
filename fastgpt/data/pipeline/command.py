"""The commands `fastgpt data build`, `inspect`, `card` and `forget`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from fastgpt.core.command import Parser, number
from fastgpt.core.errors import UserError
from fastgpt.core.options import did_you_mean
from fastgpt.data.built import BuiltDataset, open_built, verify
from fastgpt.data.pipeline import report as reports
from fastgpt.data.pipeline.engine_dask import DaskEngine
from fastgpt.data.pipeline.forget import forget as erase
from fastgpt.data.pipeline.show import PAGE, card, packing_rows, recipe_length, samples, write_page
from fastgpt.data.pipeline.stages import ALONE, Share, build, dry_run
from fastgpt.data.pipeline.store import read_json
from fastgpt.data.recipe import Recipe
from fastgpt.data.recipe_file import load_recipe
from fastgpt.data.recipe_reader import KeyedError, at_line
from fastgpt.data.tokenizer import available_cores

ENGINES = ("processes", "dask")
SAMPLE = 300  # characters of a document that `inspect` prints


def build_main(argv: list[str]) -> int:
    """Run `fastgpt data build`."""
    about = "Build a data set: read, clean, deduplicate, mix and tokenize texts, write shards, a manifest and a report."
    parser = Parser(prog="fastgpt data build", description=about)
    parser.add_argument("recipe", metavar="RECIPE", help="YAML file that names the sources and the settings")
    parser.add_argument("--out", help="folder of the data set (default: as in the recipe, else data/RECIPE)")
    parser.add_argument("--workers", type=number(int, 1), help="processes (default: as in the recipe, else all cores)")
    parser.add_argument("--keep", action="store_true", help="keep OUT/work: the next build redoes only what changed")
    parser.add_argument("--dry-run", action="store_true", help="report what would be dropped; write no data set")
    parser.add_argument("--only", metavar="STAGE", help=f"do one stage and stop: {', '.join(ALONE)}")
    parser.add_argument("--task", type=_share, metavar="I/N", help="with --only: the share I of N of its parts, from 0")
    parser.add_argument(
        "--engine", choices=ENGINES, default=ENGINES[0], help="what runs the tasks (default: processes)"
    )
    about = "with --engine dask: the address of a scheduler, or the file of `dask scheduler --scheduler-file`"
    parser.add_argument("--scheduler", metavar="ADDRESS", help=f"{about} (default: a cluster of --workers processes)")
    args = parser.parse_args(argv)
    if args.scheduler is not None and args.engine != "dask":
        raise UserError("--scheduler names a Dask cluster: give --engine dask")
    if args.scheduler is not None and args.workers is not None:
        raise UserError(
            "--workers is the number of processes on this machine, but --scheduler names a cluster: give one"
        )
    if args.only is not None and args.only not in ALONE:
        expected = f"expected one of {', '.join(ALONE)}{did_you_mean(args.only, ALONE)}"
        raise UserError(f"--only is {args.only!r}, {expected}")
    if args.task is not None and args.only not in ("clean", "tokenize"):
        raise UserError("--task divides the parts of one stage: give --only clean or --only tokenize")
    recipe = load_recipe(args.recipe)
    try:
        return _build(args, recipe)
    except KeyedError as e:
        raise at_line(args.recipe, e) from None


def _build(args: argparse.Namespace, recipe: Recipe) -> int:
    out = Path(args.out or recipe.out or Path("data") / recipe.name)
    engine = None
    if args.engine == "dask":
        count = args.workers or recipe.workers or available_cores()
        engine = DaskEngine(out / "work", args.scheduler, count)
    if args.dry_run:
        print(reports.describe(dry_run(recipe, out, workers=args.workers, engine=engine)))
        return 0
    share = args.task or Share()
    made = build(recipe, out, workers=args.workers, keep=args.keep, only=args.only, share=share, engine=engine)
    if made is not None:
        print(reports.describe(made))
        print(f"{out} is ready: fastgpt train --data {out}; {out / PAGE} is the report")
    return 0


def inspect_main(argv: list[str]) -> int:
    """Run `fastgpt data inspect`."""
    parser = Parser(prog="fastgpt data inspect", description="Print what is in a data set, and samples of its texts.")
    parser.add_argument("out", metavar="OUT", help="folder of the data set")
    parser.add_argument("--samples", type=number(int, 0), default=3, help="documents to print (default: 3)")
    parser.add_argument(
        "--length", type=number(int, 1), help="tokens of the windows to count padding for (default: the recipe's)"
    )
    parser.add_argument("--verify", action="store_true", help="compare the sha256 of every file with the manifest")
    args = parser.parse_args(argv)
    data = open_built(args.out)
    if args.verify:
        verify(data.path)
        print("every file has the sha256 that was written")
    length = args.length or recipe_length(data)
    packing = [f"packing into windows of {length:,} tokens:", *reports.table(packing_rows(data, length)), ""]
    report = reports.describe(read_json(data.path / "report.json"))
    print("\n".join([*_head(data), report, *packing, *_samples(data, args.samples)]))
    print(f"page: {write_page(data.path)}")
    return 0


def card_main(argv: list[str]) -> int:
    """Run `fastgpt data card`."""
    parser = Parser(prog="fastgpt data card", description="Print the data card of a data set, in Markdown.")
    parser.add_argument("out", metavar="OUT", help="folder of the data set")
    print(card(Path(parser.parse_args(argv).out)), end="")
    return 0


def forget_main(argv: list[str]) -> int:
    """Run `fastgpt data forget`."""
    about = "Erase documents from a data set. Later builds leave them out."
    parser = Parser(prog="fastgpt data forget", description=about)
    parser.add_argument("out", metavar="OUT", help="folder of the data set")
    parser.add_argument("--doc-id", action="append", default=[], metavar="ID", help="id of a document; repeat for more")
    parser.add_argument(
        "--match", action="append", default=[], metavar="TEXT", help="all documents that hold this text"
    )
    parser.add_argument("--workers", type=number(int, 1), default=1, help="processes (default: 1)")
    args = parser.parse_args(argv)
    if not args.doc_id and not args.match:
        raise UserError("forget got neither --doc-id nor --match, expected at least one document")
    entries = erase(args.out, args.doc_id, args.match, workers=args.workers)
    for entry in entries:
        print(f"erased {entry['source']} {entry['id']}: {entry['tokens']:,} tokens in {', '.join(entry['shards'])}")
    return 0


def _share(text: str) -> Share:
    index, _, of = text.partition("/")
    if not index.isdigit() or not of.isdigit() or int(index) >= int(of):
        raise argparse.ArgumentTypeError(f"is {text!r}, expected I/N with I from 0 to N - 1, such as 0/16")
    return Share(int(index), int(of))


def _head(data: BuiltDataset) -> Iterator[str]:
    m = data.manifest
    train, last = m["train"], m["generations"][-1]
    held = sum(map(len, data.val.values()))
    yield f"{data.path}: generation {m['generation']} of {last['date']}, {len(m['shards'])} shards"
    yield f"{train['tokens']:,} training tokens in {train['documents']:,} documents, {held:,} tokens held out"
    yield f"tokenizer of {m['tokenizer']['n_vocab']:,} ids, fingerprint {m['tokenizer']['fingerprint'][:16]}"
    yield "licenses: " + ", ".join(f"{name} {facts['license']}" for name, facts in m["sources"].items())
    yield ""


def _samples(data: BuiltDataset, n: int) -> Iterator[str]:
    """Yield the beginnings of n training documents."""
    width = os.get_terminal_size().columns if sys.stdout.isatty() else 80
    for found in samples(data.path, data.tokenizer, n, SAMPLE):
        yield f"{'-' * width}\n{found.source} {found.id} ({found.tokens:,} tokens)\n{found.text[:SAMPLE]}"
