"""The commands `fastgpt data clean` and `fastgpt data classifier`."""

from __future__ import annotations

import json
import os
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import yaml

from fastgpt.core.command import Parser, number
from fastgpt.core.errors import UserError
from fastgpt.core.progress import bar
from fastgpt.data.clean.classifier import train
from fastgpt.data.clean.cleaner import Cleaner, Outcome, Tally
from fastgpt.data.clean.settings import PRESETS
from fastgpt.data.document import Document
from fastgpt.data.read import Format, find_files, open_documents, read_all
from fastgpt.data.read.validate import add_format_options, format_of_options

EXCERPT = 200  # characters of a text that --show prints


def settings_of(preset: str, changes: list[str]) -> dict[str, Any]:
    """Return settings from a preset and changes "rule=value" or "rule.key=value", with values in YAML."""
    settings: dict[str, Any] = {"preset": preset}
    for change in changes:
        path, equals, text = change.partition("=")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value, equals = None, ""
        rule, dot, key = path.partition(".")
        if not equals or not rule or (dot and not key):
            raise UserError(f"clean: --set {change!r}, expected RULE=VALUE or RULE.KEY=VALUE, such as spam=false")
        if not dot:
            settings[rule] = value
        elif isinstance(settings.setdefault(rule, {}), dict):
            settings[rule][key] = value
        else:
            settings[rule] = {key: value}
    return settings


def documents_of(paths: list[str], format: Format) -> Iterator[Document]:
    """Yield the documents of all paths, with a progress bar."""
    files = [file for path in paths for file in find_files(path, format).files]
    total = sum(file.size for file in files)
    with closing(bar(total, desc="clean", unit="B", unit_scale=True, leave=False)) as shown:
        for file in files:
            yield from open_documents(file, format, progress=shown.update)


def clean(argv: list[str]) -> int:
    """Run `fastgpt data clean`."""
    about = "Clean the texts of files, or show with --dry-run what each rule would drop. Only --show prints texts."
    parser = Parser(prog="fastgpt data clean", description=about)
    parser.add_argument("paths", nargs="+", metavar="PATH", help="files, folders or globs in quotes")
    parser.add_argument("--preset", default="web", choices=PRESETS, help="rules and thresholds (default: web)")
    about = "change a rule of the preset, such as spam=false or gopher_quality.min_doc_words=20; may be repeated"
    parser.add_argument("--set", action="append", default=[], metavar="RULE=VALUE", help=about)
    parser.add_argument("--out", metavar="FILE", help="write the cleaned documents to this .jsonl file")
    parser.add_argument("--dry-run", action="store_true", help="let every rule decide on every document; write nothing")
    about = "print the beginnings of N texts for each rule"
    parser.add_argument("--show", type=number(int, 0), default=0, metavar="N", help=about)
    parser.add_argument("--json", action="store_true", help="print the counts as one JSON object")
    add_format_options(parser)
    args = parser.parse_args(argv)
    if args.dry_run == bool(args.out):
        raise UserError("clean: expected either --out FILE or --dry-run")
    cleaner = Cleaner.of(settings_of(args.preset, args.set))
    tally, shown = Tally(), dict[str, list[Document]]()
    with ExitStack() as stack:
        write = stack.enter_context(_Output(Path(args.out))) if args.out else None
        for document in documents_of(args.paths, format_of_options(args)):
            outcome = cleaner.process(document, args.dry_run)
            tally.add(document, outcome)
            _remember(shown, document, outcome, args.show)
            if write and outcome.document is not None:
                write(outcome.document)
    _report(tally, shown, args)
    return 0


class _Output:
    """A .jsonl file that is written aside and renamed when it is complete."""

    def __init__(self, path: Path) -> None:
        self.path, self.aside = path, path.with_name(f".{path.name}.{os.getpid()}.tmp")

    def __enter__(self) -> _Output:
        try:
            self.file = self.aside.open("w", encoding="utf-8", newline="\n")
        except OSError as e:
            raise UserError(f"clean: cannot write {self.path}: {e.strerror}") from None
        return self

    def __call__(self, document: Document) -> None:
        record = {"text": document.text, "id": document.id, "source": document.source, "meta": document.meta}
        try:
            self.file.write(json.dumps(record, ensure_ascii=False) + "\n")
        except OSError as e:
            raise UserError(f"clean: cannot write {self.path}: {e.strerror}") from None

    def __exit__(self, kind: object, *rest: object) -> None:
        try:
            self.file.close()
            if kind is None:
                self.aside.replace(self.path)
        except OSError as e:
            raise UserError(f"clean: cannot write {self.path}: {e.strerror}") from None
        finally:
            self.aside.unlink(missing_ok=True)


def _remember(shown: dict[str, list[Document]], document: Document, outcome: Outcome, most: int) -> None:
    """Keep up to `most` documents for each rule that drops them."""
    for rule in outcome.would_drop:
        if len(texts := shown.setdefault(rule, [])) < most:
            texts.append(document)


def describe(tally: Tally) -> list[str]:
    """Return lines on what the rules did: documents and ids by rule, then changes, then terms per million words."""
    before, after = tally.characters
    lines = [f"{tally.kept:,} of {tally.documents:,} documents stay, {after / max(before, 1):.1%} of the characters"]
    for rule, count in sorted(tally.dropped.items(), key=lambda item: (-item[1], item[0])):
        share = count / max(tally.documents, 1)
        lines.append(f"  {rule:<30} {count:>9,} {share:>7.1%}  {', '.join(tally.examples[rule])}")
    if tally.changes:
        lines.append("changed or found, and in how many documents")
    for name, count in sorted(tally.changes.items()):
        lines.append(f"  {name:<30} {count:>9,} {tally.changed[name]:>9,}")
    for source, times in sorted(tally.rates().items()):
        lines.append(f"terms per million words in {source}: before, after")
        for name in sorted({name for counts in times.values() for name in counts}):
            pair = [f"{times.get(when, {}).get(name, 0):>9,.0f}" for when in ("before", "after")]
            lines.append(f"  {name:<30} {' '.join(pair)}")
    return lines


def _report(tally: Tally, shown: dict[str, list[Document]], args: Namespace) -> None:
    """Print the counts, and the beginnings of texts that --show asks for."""
    if args.json:
        print(json.dumps(tally.to_json(), ensure_ascii=False))
        return
    print(*describe(tally), sep="\n")
    for rule, documents in sorted(shown.items()):
        for document in documents:
            print(f"\n{rule}: {document.id}\n{json.dumps(document.text[:EXCERPT], ensure_ascii=False)}")


def classifier(argv: list[str]) -> int:
    """Run `fastgpt data classifier`."""
    about = "Train a quality classifier for the rule `classifier`, and print its accuracy on samples held out."
    parser = Parser(prog="fastgpt data classifier", description=about)
    parser.add_argument("action", choices=("train",))
    parser.add_argument("good", metavar="GOOD", help="file, folder or glob of good samples")
    parser.add_argument("bad", metavar="BAD", help="file, folder or glob of bad samples")
    parser.add_argument("out", metavar="OUT", help="file to write, such as quality.npz")
    parser.add_argument("--bits", type=number(int, 8, 26), default=18, help="bits of a feature's hash (default: 18)")
    parser.add_argument("--words", type=number(int, 1, 4), default=2, help="longest run of words in it (default: 2)")
    parser.add_argument("--epochs", type=number(int, 1), default=5, help="passes over the samples (default: 5)")
    parser.add_argument(
        "--seed", type=number(int, 0), default=0, help="seed of order and held-out samples (default: 0)"
    )
    add_format_options(parser)
    args = parser.parse_args(argv)
    format = format_of_options(args)
    good, bad = ([document.text for document in read_all(path, format)] for path in (args.good, args.bad))
    training = train(good, bad, bits=args.bits, n=args.words, epochs=args.epochs, seed=args.seed)
    training.classifier.save(Path(args.out))
    held = f"{training.held_out[0]:,} good and {training.held_out[1]:,} bad samples held out"
    print(f"accuracy {training.accuracy:.4f}, AUC {training.auc:.4f} on {held}; wrote {args.out}")
    return 0
