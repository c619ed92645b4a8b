"""Read a recipe from its file and check what the types of its fields cannot say."""

from __future__ import annotations

import dataclasses
import re
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastgpt.core.errors import UserError
from fastgpt.core.options import did_you_mean
from fastgpt.data.clean import Cleaner, SettingError, located
from fastgpt.data.corpus import EOT
from fastgpt.data.dedup import DedupSettings
from fastgpt.data.packing import METHODS
from fastgpt.data.published import ENCODINGS
from fastgpt.data.recipe import PLACES, MiddleRecipe, Recipe, ScrapeRecipe, SourceRecipe, TokenizerRecipe
from fastgpt.data.recipe_reader import Reader, compose

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


def load_recipe(path: str | Path) -> Recipe:
    """Read and check a recipe; its paths come back absolute.

    Raises:
        UserError: the file is missing or not YAML, or a key or value is not allowed; names file, line and key.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as e:
        raise UserError(f"cannot read recipe {path}: {e.strerror}") from None
    except UnicodeDecodeError as e:
        raise UserError(f"recipe {path} is not UTF-8 at byte {e.start}") from None
    reader = Reader(str(path))
    root = compose(text, str(path))
    if not isinstance(root.value, dict):
        reader.fail("", f"the recipe is {root.plain()!r}, expected a mapping with the key sources")
    recipe: Recipe = reader.read(root, Recipe, "")
    recipe = _located(recipe, path.resolve().parent)
    _check(recipe, reader)
    return dataclasses.replace(recipe, name=recipe.name or path.stem)


def _check(recipe: Recipe, reader: Reader) -> None:
    """Check what types cannot say. Raises UserError."""
    if not recipe.sources:
        reader.fail("sources", "sources is empty, expected at least one source")
    for name, source in recipe.sources.items():
        _check_source(name, source, reader)
    _check_range(reader, "validation", recipe.validation, 0 <= recipe.validation < 1, "from 0 to below 1")
    if isinstance(recipe.dedup, DedupSettings):
        for name in recipe.dedup.prefer:
            _known(reader, "dedup.prefer", name, recipe.sources)
    _check_sizes(recipe, reader)
    _check_range(reader, "seed", recipe.seed, 0 <= recipe.seed < 2**63, "0 or more")
    _check_choice(reader, "decontaminate.action", recipe.evaluation.action, ("drop", "cut"))
    _check_choice(reader, "shards.dtype", recipe.shards.dtype, ("auto", "uint16", "uint32"))
    _check_choice(reader, "packing.method", recipe.packing.method, METHODS)
    given = recipe.tokenizer
    if isinstance(given, str) and given not in ENCODINGS and not Path(given).exists():
        expected = f"expected {', '.join(ENCODINGS)} or an existing tokenizer.json"
        reader.fail("tokenizer", f"tokenizer is {given!r}, {expected}{did_you_mean(given, ENCODINGS)}")
    _check_mix(recipe, reader)


def _check_source(name: str, source: SourceRecipe, reader: Reader) -> None:
    key = f"sources.{name}"
    if not NAME.fullmatch(name):
        reader.fail(key, f"source name is {name!r}, expected letters, digits, - and _")
    places = [k for k in PLACES if getattr(source, k)]
    if places in (["path", "debian"], ["path", "hub"]):
        places = places[1:]
    if len(places) != 1:
        reader.fail(key, f"{key} has {' and '.join(places) or 'no texts'}, expected one of {', '.join(PLACES)}")
    _check_choice(reader, f"{key}.defects", source.defects, ("fail", "skip", "replace"))
    _check_range(reader, f"{key}.sample", source.sample, 0 < source.sample <= 1, "more than 0, at most 1")
    if source.validation is not None:
        _check_range(reader, f"{key}.validation", source.validation, 0 <= source.validation < 1, "from 0 to below 1")
    try:
        Cleaner.of(source.clean)
    except SettingError as e:
        reader.fail(".".join((f"{key}.clean", *e.path)), f"sources.{name}.{e}")
    for what in ("weight", "epochs", "max_documents"):
        value = getattr(source, what)
        _check_range(reader, f"{key}.{what}", value, value is None or 0 < value < float("inf"), "more than 0")
    if source.scrape is not None:
        _check_scrape(source, source.scrape, key, reader)
    if source.reordering is not None:
        _check_middle(source.reordering, f"{key}.fill_in_the_middle", reader)


def _check_sizes(recipe: Recipe, reader: Reader) -> None:
    sizes: dict[str, int | None] = {"shards.tokens": recipe.shards.tokens, "part_megabytes": recipe.part_megabytes}
    sizes |= {"workers": recipe.workers, "mix.tokens": recipe.mix.tokens, "packing.length": recipe.packing.length}
    if isinstance(recipe.tokenizer, TokenizerRecipe):
        sizes["tokenizer.train.bytes"] = recipe.tokenizer.train.bytes
        size, least = recipe.tokenizer.train.vocab_size, 257 + len(recipe.sentinels)
        _check_range(reader, "tokenizer.train.vocab_size", size, size >= least, f"{least} or more")
    sizes["decontaminate.common"] = recipe.evaluation.common
    for key, number in sizes.items():
        _check_range(reader, key, number, number is None or number >= 1, "1 or more")


def _check_scrape(source: SourceRecipe, scrape: ScrapeRecipe, key: str, reader: Reader) -> None:
    if not scrape.urls and not scrape.file:
        reader.fail(f"{key}.scrape", f"{key}.scrape names no pages, expected urls or file")
    _check_range(reader, f"{key}.scrape.delay", scrape.delay, 0 <= scrape.delay < float("inf"), "0 or more")
    if not scrape.user_agent.strip().isprintable() or not scrape.user_agent.strip():
        reader.fail(f"{key}.scrape.user_agent", f"{key}.scrape.user_agent is empty or no line of text")
    if source.format != "auto":
        reader.fail(f"{key}.format", f"{key} has scrape and format, expected no format: pages have one of their own")


def _check_middle(middle: MiddleRecipe, key: str, reader: Reader) -> None:
    _check_range(reader, f"{key}.rate", middle.rate, 0 < middle.rate <= 1, "more than 0, at most 1")
    _check_range(reader, f"{key}.spm", middle.spm, 0 <= middle.spm <= 1, "from 0 to 1")
    _check_range(reader, f"{key}.seed", middle.seed, middle.seed is None or middle.seed >= 0, "0 or more")
    tokens = middle.prefix, middle.suffix, middle.middle
    if len({*tokens, EOT, ""}) < 5:
        reader.fail(key, f"{key} has the tokens {', '.join(tokens)}, expected three different ones beside {EOT}")


def _check_mix(recipe: Recipe, reader: Reader) -> None:
    mix, sources = recipe.mix, recipe.sources
    weighted = [n for n, s in sources.items() if s.weight is not None]
    for name, source in sources.items():
        if source.weight is not None and source.epochs is not None:
            reader.fail(f"sources.{name}.epochs", f"sources.{name} has weight and epochs, expected one of them")
        if weighted and source.weight is None:
            reader.fail(f"sources.{name}", f"sources.{name} has no weight, but sources.{weighted[0]} has one")
        if source.epochs is not None and (mix.temperature is not None or mix.stages or mix.tokens or mix.replay):
            reader.fail("mix", f"mix sets the shares, but sources.{name} has epochs: give weights instead")
    if mix.temperature is not None:
        _check_range(reader, "mix.temperature", mix.temperature, 0 < mix.temperature < float("inf"), "more than 0")
        if weighted:
            reader.fail("mix.temperature", f"mix.temperature sets the shares, but sources.{weighted[0]} has a weight")
    for i, stage in enumerate(mix.stages):
        key = f"mix.stages[{i}]"
        _check_range(reader, f"{key}.share", stage.share, 0 < stage.share < float("inf"), "more than 0")
        for name, weight in stage.weights.items():
            _known(reader, f"{key}.weights.{name}", name, sources)
            _check_range(reader, f"{key}.weights.{name}", weight, 0 <= weight < float("inf"), "0 or more")
        if stage.weights and not any(stage.weights.values()):
            reader.fail(f"{key}.weights", f"{key}.weights are all 0, expected at least one above 0")
    if mix.replay is not None:
        _check_range(reader, "mix.replay.share", mix.replay.share, 0 < mix.replay.share < 1, "between 0 and 1")
        for name in mix.replay.sources:
            _known(reader, "mix.replay.sources", name, sources)
        if not 0 < len(set(mix.replay.sources)) < len(sources):
            reader.fail("mix.replay", "mix.replay.sources names all sources or none, expected some of them")


def _known(reader: Reader, key: str, name: str, sources: dict[str, SourceRecipe]) -> None:
    if name not in sources:
        of = "" if key.endswith(name) else f" {name!r}, which"
        reader.fail(key, f"{key}{' names' if of else ''}{of} is not a source{did_you_mean(name, sources)}")


def _check_choice(reader: Reader, key: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        expected = f"{', '.join(choices[:-1])} or {choices[-1]}"
        reader.fail(key, f"{key} is {value!r}, expected {expected}")


def _check_range(reader: Reader, key: str, value: Any, right: bool, expected: str) -> None:
    if not right:
        reader.fail(key, f"{key} is {value}, expected {expected}")


def _located(recipe: Recipe, folder: Path) -> Recipe:
    """Return the recipe with absolute paths."""

    def place(path: str) -> str:
        path = path.replace("{stdlib}", sysconfig.get_path("stdlib"))
        return str(folder / Path(path).expanduser())

    sources = {
        name: dataclasses.replace(
            s,
            path=s.path if s.debian or s.hub else [place(p) for p in s.path],
            clean=located(s.clean, folder),
            scrape=s.scrape and dataclasses.replace(s.scrape, file=[place(p) for p in s.scrape.file]),
        )
        for name, s in recipe.sources.items()
    }
    tokenizer = recipe.tokenizer
    if isinstance(tokenizer, str) and (folder / tokenizer).exists():
        tokenizer = str(folder / tokenizer)
    files = [place(p) for p in recipe.evaluation.files]
    plain = isinstance(recipe.decontaminate, list)
    held_out = files if plain else dataclasses.replace(recipe.evaluation, files=files)
    return dataclasses.replace(recipe, sources=sources, tokenizer=tokenizer, decontaminate=held_out)
