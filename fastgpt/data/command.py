"""The command `fastgpt data`; SUBCOMMANDS lists what it can do, each with its own module and options."""

from __future__ import annotations

from fastgpt.core.command import run_group

# name -> module and function that runs it (default: main), and what it does
SUBCOMMANDS = {
    "build": ("fastgpt.data.pipeline.command:build_main", "build a data set from a recipe"),
    "inspect": ("fastgpt.data.pipeline.command:inspect_main", "print what is in a data set, and samples of its texts"),
    "card": ("fastgpt.data.pipeline.command:card_main", "print the data card of a data set"),
    "forget": ("fastgpt.data.pipeline.command:forget_main", "erase documents from a data set"),
    "validate": (
        "fastgpt.data.read.validate",
        "list the defects of files: line, byte, what is wrong, how to repair it",
    ),
    "scrape": ("fastgpt.data.read.scrape", "fetch the pages of a list of addresses as one jsonl file, politely"),
    "clean": ("fastgpt.data.clean.command:clean", "clean texts, or show what each rule would drop"),
    "dedup": ("fastgpt.data.dedup.command", "drop duplicates, and documents that occur in evaluation files"),
    "classifier": ("fastgpt.data.clean.command:classifier", "train a quality classifier on good and bad samples"),
}


def main(argv: list[str]) -> int:
    """Run `fastgpt data`."""
    about = "Make token shards from raw text, and check it.\n\ncommands:"
    return run_group("fastgpt data", "...", about, SUBCOMMANDS, argv)
