"""Run recipes at a small size: `python recipes/dry_run.py [FOLDER ...]`, by default those of RECIPES, in their order.

The commands are those of each folder's README.md. They run on a copy of the folders in a temporary folder, on made-up
texts, shards and benchmarks in the formats of the real files, and train a model of one block for a few steps with
everything else as in the recipe. Plans run as they are. The first command that fails ends the dry run.
"""

from __future__ import annotations

import argparse
import bz2
import os
import random
import re
import shlex
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import yaml

from fastgpt.cli import COMMANDS
from fastgpt.core.command import run_command
from fastgpt.data.shards import ShardWriter

HERE = Path(__file__).resolve().parent
RECIPES = ("gpt2-350m", "gpt2-350m-domain", "gpt2-124m-speedrun")  # the second one starts from the model of the first
MIXED, HELD_OUT = 20_000, 0.1  # tokens of a mixture, and the share of documents to hold out
DOCUMENTS = 60  # of each source
GPT2 = 50257  # ids of its tokenizer
# What replaces a recipe's sizes, by command; a command that is not here runs as it is
SMALL = {
    "train": "--device cpu --max-steps 3 --warmup-steps 1 --block-size 256 --micro-batch 2 --batch-tokens 512 "
    "--eval-every 2 --eval-batches 1 --sample-every 2 --sample-tokens 4 --save-every 2",
    "eval": "--device cpu --limit 2",
}
SHAPE = "--model.n-layers 1 --model.width 64 --model.n-heads 2"  # of a model that does not start from another one
WORDS = """a about all and are as at be but by can do for from had has have he her his how if in is it its may more
most no not of on one or out she so some than that the their them then there these they this to two up was
we were what when which who will with would you page river stone house paper letter garden winter summer
window market village teacher doctor answer question number story music bridge island forest morning evening
kitchen""".split()


def main(argv: list[str] | None = None) -> int:
    """Run the recipes that argv names; return the exit code of the first command that fails, else 0."""
    parser = argparse.ArgumentParser(description="Run recipes at a small size, on made-up data.")
    parser.add_argument("folders", nargs="*", type=Path, default=[HERE / name for name in RECIPES], metavar="FOLDER")
    folders = [folder.resolve() for folder in parser.parse_args(argv).folders]
    before = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="fastgpt-dry-run-") as place:
        try:
            os.chdir(place)
            stand_ins()
            return next((code for folder in folders if (code := dry_run(folder))), 0)
        finally:
            os.chdir(before)


def dry_run(folder: Path) -> int:
    """Run the commands of a recipe on its copy in the current folder; return the exit code of the first that fails."""
    copy = Path("recipes") / folder.name
    shutil.copytree(folder, copy)
    for path in copy.glob("*.yaml"):
        shrink(path)
    for words in commands((copy / "README.md").read_text(encoding="utf-8")):
        words += small(words)
        print(f"$ {shlex.join(words)}", flush=True)
        if code := run_command(lambda: COMMANDS[words[1]](words[2:])):  # noqa: B023 (called at once)
            print(f"{folder.name}: exit code {code} of {shlex.join(words)}", file=sys.stderr)
            return code
    return 0


def commands(page: str) -> list[list[str]]:
    """Return the commands of a page as words, in their order, without comments."""
    text = "".join(re.findall(r"^```bash\n(.*?)^```", page, re.M | re.S)).replace("\\\n", " ")
    return [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]


def small(words: list[str]) -> list[str]:
    """Return the options that make a command small."""
    if "--plan" in words or "compare" in words[2:3]:
        return []
    options = SMALL.get(words[1], "")
    if words[1] == "train":
        settings = yaml.safe_load(Path(words[words.index("--config") + 1]).read_text(encoding="utf-8"))
        options += "" if "init" in settings else f" {SHAPE}"
    return options.split()


def shrink(path: Path) -> None:
    """Make the mixture of a recipe for data small; leave other files as they are."""
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    if isinstance(recipe, dict) and "sources" in recipe:
        recipe["mix"]["tokens"], recipe["validation"] = MIXED, HELD_OUT
        for source in recipe["sources"].values():
            source.pop("sample", None)
        path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")


def stand_ins() -> None:
    """Write files of each kind that the recipes read."""
    draw = random.Random(0)
    for name in ("web", "wiki", "code", "domain"):
        Path("corpora", name).mkdir(parents=True)
    _parquet([_text(draw) for _ in range(DOCUMENTS)])
    pages = "".join(
        f"<page><title>{i}</title><ns>0</ns><id>{i}</id><revision><id>1</id><text>{_text(draw)}</text></revision></page>"
        for i in range(DOCUMENTS)
    )
    Path("corpora/wiki/a.xml.bz2").write_bytes(bz2.compress(f"<mediawiki>{pages}</mediawiki>".encode()))
    for i in range(DOCUMENTS):
        names = [draw.choice(WORDS) for _ in range(60)]
        code = "".join(f"def {a}_{i}({b}):\n    return {b}.{c}()\n\n\n" for a, b, c in zip(*[iter(names)] * 3))
        Path(f"corpora/code/{i}.py").write_text(code, encoding="utf-8")
        Path(f"corpora/domain/{i}.md").write_text(f"# Part {i}\n\n{_text(draw)}\n", encoding="utf-8")
    _shards()
    _benchmarks()


def _text(draw: random.Random) -> str:
    """Return some sentences of random words."""
    return " ".join(" ".join(draw.choices(WORDS, k=draw.randint(6, 20))).capitalize() + "." for _ in range(25))


def _parquet(texts: list[str]) -> None:
    import pyarrow
    from pyarrow import parquet

    rows = pyarrow.table({"text": texts, "id": [str(i) for i, _ in enumerate(texts)]})
    parquet.write_table(rows, "corpora/web/a.parquet")


def _shards() -> None:
    """Write shards in the format of llm.c."""
    Path("fineweb10B").mkdir()
    for name in ("train_000001", "val_000000"):
        with ShardWriter(f"fineweb10B/fineweb_{name}.bin", GPT2) as shard:
            shard.write(np.random.default_rng(0).integers(0, GPT2, 8192))


def _benchmarks() -> None:
    """Write the benchmarks in their official schemas, as the tests do."""
    sys.path.insert(0, str(HERE.parent / "tests"))
    from benchmark_files import write_all

    data = write_all(Path("benchmarks"), n=3)
    for path in data.glob("*.jsonl"):  # hellaswag_val.jsonl, ...
        (data / path.name.partition("_")[0]).mkdir(exist_ok=True)
        path.rename(data / path.name.partition("_")[0] / path.name)


if __name__ == "__main__":
    sys.exit(main())
