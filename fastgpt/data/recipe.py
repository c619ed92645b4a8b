"""Recipes: the YAML files that say how a data set is built, read into dataclasses by the types of their fields.

Paths are relative to the recipe's folder, and `{stdlib}` in a path is the folder of the standard library. Each error
names the file, the line and the key, the value found and the value expected.
"""

from __future__ import annotations

import dataclasses
import re
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastgpt.core.errors import UserError
from fastgpt.core.options import did_you_mean
from fastgpt.data.clean import Cleaner, SettingError, located
from fastgpt.data.corpus import EOT
from fastgpt.data.dedup import DedupSettings
from fastgpt.data.packing import METHODS
from fastgpt.data.published import ENCODINGS
from fastgpt.data.read.web import USER_AGENT
from fastgpt.data.recipe_reader import Reader, compose

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
PLACES = ("path", "url", "hub", "debian", "scrape", "pydoc")  # where texts of a source come from
MAX_EPOCHS = 4  # repeating text more often helps little (Muennighoff et al. 2023)


@dataclass(frozen=True)
class MiddleRecipe:
    """Fill-in-the-middle for the training documents of a source, as a rule code.

    Attributes:
        rate: share of the documents to reorder.
        spm: share among these in the order suffix, prefix, middle instead of prefix, suffix, middle.
        seed: decides, with a document's id, what happens to it; without it, the recipe's.
        prefix: the special token before the prefix.
        suffix: the special token before the suffix.
        middle: the special token before the middle.
    """

    rate: float = 0.5
    spm: float = 0.5
    seed: int | None = None
    prefix: str = "<|fim_prefix|>"
    suffix: str = "<|fim_suffix|>"
    middle: str = "<|fim_middle|>"


@dataclass(frozen=True)
class ScrapeRecipe:
    """Pages of the web to fetch, as `fastgpt data scrape` does: robots.txt is obeyed.

    Attributes:
        urls: addresses of pages.
        file: files with one address on each line.
        delay: least seconds between two requests to a host; robots.txt may ask for more.
        user_agent: how requests name their sender; an address to reach you at belongs in it.
    """

    urls: list[str] = field(default_factory=list)
    file: list[str] = field(default_factory=list)
    delay: float = 1.0
    user_agent: str = USER_AGENT


@dataclass(frozen=True)
class SourceRecipe:
    """One source of text.

    Attributes:
        path: files, folders and glob patterns.
        exclude: glob patterns of files to leave out, relative to the folder or the fixed part of the pattern.
        url: addresses of files to download; #sha256=... at the end is the checksum that a file must have.
        hub: name of a data set of the Hugging Face Hub; `path` then names files in it.
        debian: names of Debian packages to download with apt-get; `path` then names files within them.
        scrape: pages to fetch, as jsonl with ids.
        pydoc: use the help topics and docstrings of Python's standard library, as jsonl with ids.
        optional: leave the source out with a warning if it cannot be had (no network, no apt-get, no such files).
        format: how records are read: a format's name, or its settings ({name: jsonl, text: body, id: url}).
        license: license of the texts, copied to the manifest.
        clean: preset of rules (web, prose, docs, code, none), or its changes, such as {preset: web, language: null}.
        defects: what happens to a broken record: fail, skip or replace.
        sample: share of the documents to use, chosen by the hash of their ids.
        max_documents: use at most so many documents, the first ones of each split.
        validation: share of documents held out, instead of the recipe's.
        weight: share of the training tokens, relative to the other weights.
        epochs: how often the source is repeated, instead of a weight; may be a fraction.
        fill_in_the_middle: true, or settings: reorder documents, so that a model learns to fill in what is missing.
    """

    path: list[str] = field(default_factory=list)
    exclude: list[str] = field(default_factory=list)
    url: list[str] = field(default_factory=list)
    hub: str | None = None
    debian: list[str] = field(default_factory=list)
    scrape: ScrapeRecipe | None = None
    pydoc: bool = False
    optional: bool = False
    format: str | dict[str, str | list[str]] = "auto"
    license: str = "unknown"
    clean: str | dict[str, Any] = "none"
    defects: str = "fail"
    sample: float = 1.0
    max_documents: int | None = None
    validation: float | None = None
    weight: float | None = None
    epochs: float | None = None
    fill_in_the_middle: bool | MiddleRecipe = False

    @property
    def reordering(self) -> MiddleRecipe | None:
        """The settings of fill-in-the-middle, if it is on."""
        return MiddleRecipe() if self.fill_in_the_middle is True else self.fill_in_the_middle or None


@dataclass(frozen=True)
class TrainedTokenizer:
    """A byte-level BPE to train on the data set's training text.

    Attributes:
        vocab_size: number of ids, special tokens included.
        bytes: text to learn from at most; the documents are chosen by the hash of their ids.
    """

    vocab_size: int = 4096
    bytes: int = 64 << 20


@dataclass(frozen=True)
class TokenizerRecipe:
    """Settings of a tokenizer to train.

    Attributes:
        train: vocabulary and text of the training.
    """

    train: TrainedTokenizer = TrainedTokenizer()


@dataclass(frozen=True)
class Replay:
    """Sources that keep a fixed share, so that a model does not forget them while it learns another domain.

    Attributes:
        sources: names of the sources.
        share: their share of the training tokens, together.
    """

    sources: list[str] = field(default_factory=list)
    share: float = 0.1


@dataclass(frozen=True)
class StageRecipe:
    """One stage of training.

    Attributes:
        share: share of the training tokens, relative to the other stages.
        weights: source -> share of the stage's tokens; without them, the weights of the sources.
    """

    share: float = 1.0
    weights: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class MixRecipe:
    """How sources are mixed.

    Attributes:
        tokens: length of the mixture in tokens; without it, all sources together.
        temperature: shares are tokens ** (1 / temperature), instead of weights: 1 keeps the sizes, more evens them out.
        replay: sources with a fixed share.
        stages: mixtures that follow one another; each source continues where the stage before stopped.
    """

    tokens: int | None = None
    temperature: float | None = None
    replay: Replay | None = None
    stages: list[StageRecipe] = field(default_factory=list)


@dataclass(frozen=True)
class DecontaminateRecipe:
    """How documents that share 13 words in a row with evaluation texts are treated.

    Attributes:
        files: files of evaluation texts.
        action: drop the documents, or cut the shared words and 200 characters on each side out of them.
        common: ignore 13 words that more than so many training documents hold (GPT-3: 10); without it, none.
    """

    files: list[str] = field(default_factory=list)
    action: str = "drop"
    common: int | None = None


@dataclass(frozen=True)
class ShardsRecipe:
    """Shards of the training split.

    Attributes:
        tokens: tokens of a shard; documents are never cut, so that a shard may hold more by less than a document.
        dtype: auto (uint16 where the vocabulary allows it), uint16 or uint32.
    """

    tokens: int = 100_000_000
    dtype: str = "auto"


@dataclass(frozen=True)
class PackingRecipe:
    """How documents share the windows of a trainer. It does not change the shards.

    Attributes:
        method: concatenate, best-fit or pad; what `fastgpt train` does unless it is told otherwise.
        length: tokens of the windows that the report counts padding for.
    """

    method: str = "concatenate"
    length: int = 1024


@dataclass(frozen=True)
class Recipe:
    """How a data set is built.

    Attributes:
        sources: name -> source.
        name: the recipe's name; without it, the file's. A build does not replace the data set of another recipe.
        out: folder of the data set; without it, data/ and the name, below the current folder.
        seed: decides the split, the order and every sample.
        validation: share of documents held out, chosen by the hash of seed and id.
        dedup: true, false, or settings of deduplication.
        decontaminate: files of evaluation texts, or settings of decontamination. Documents that share 13 words in a row
            with them are dropped, or cut.
        tokenizer: gpt2, another published name, a tokenizer.json, or {train: {vocab_size: 4096}}.
        mix: how sources are mixed.
        shards: size and dtype of the shards.
        packing: how documents share windows in training.
        workers: processes; without it, the cores.
        part_megabytes: input per part. A part is what one worker processes at a time.
    """

    sources: dict[str, SourceRecipe]
    name: str = ""
    out: str | None = None
    seed: int = 0
    validation: float = 0.005
    dedup: bool | DedupSettings = True
    decontaminate: list[str] | DecontaminateRecipe = field(default_factory=list)
    tokenizer: str | TokenizerRecipe = "gpt2"
    mix: MixRecipe = MixRecipe()
    shards: ShardsRecipe = ShardsRecipe()
    packing: PackingRecipe = PackingRecipe()
    workers: int | None = None
    part_megabytes: int = 32

    @property
    def sentinels(self) -> list[str]:
        """The special tokens of fill-in-the-middle, in the order of the sources."""
        used = [m for source in self.sources.values() if (m := source.reordering)]
        return list(dict.fromkeys(token for m in used for token in (m.prefix, m.suffix, m.middle)))

    @property
    def evaluation(self) -> DecontaminateRecipe:
        """The settings of decontamination."""
        found = self.decontaminate
        return found if isinstance(found, DecontaminateRecipe) else DecontaminateRecipe(found)

    def settings(self) -> dict[str, Any]:
        """Return the recipe as plain values, for the manifest."""
        return dataclasses.asdict(self)


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
    positive = "more than 0"
    for name, source in recipe.sources.items():
        key = f"sources.{name}"
        if not NAME.fullmatch(name):
            reader.fail(key, f"source name is {name!r}, expected letters, digits, - and _")
        places = [k for k in PLACES if getattr(source, k)]
        if places in (["path", "debian"], ["path", "hub"]):
            places = places[1:]
        if len(places) != 1:
            reader.fail(key, f"{key} has {' and '.join(places) or 'no texts'}, expected one of {', '.join(PLACES)}")
        if source.defects not in ("fail", "skip", "replace"):
            reader.fail(f"{key}.defects", f"{key}.defects is {source.defects!r}, expected fail, skip or replace")
        _check_range(reader, f"{key}.sample", source.sample, 0 < source.sample <= 1, "more than 0, at most 1")
        if source.validation is not None:
            right = 0 <= source.validation < 1
            _check_range(reader, f"{key}.validation", source.validation, right, "from 0 to below 1")
        try:
            Cleaner.of(source.clean)
        except SettingError as e:
            reader.fail(".".join((f"{key}.clean", *e.path)), f"sources.{name}.{e}")
        for what in ("weight", "epochs", "max_documents"):
            value = getattr(source, what)
            _check_range(reader, f"{key}.{what}", value, value is None or 0 < value < float("inf"), positive)
        if source.scrape is not None:
            _check_scrape(source, source.scrape, key, reader)
        if source.reordering is not None:
            _check_middle(source.reordering, f"{key}.fill_in_the_middle", reader)
    if not recipe.sources:
        reader.fail("sources", "sources is empty, expected at least one source")
    _check_range(reader, "validation", recipe.validation, 0 <= recipe.validation < 1, "from 0 to below 1")
    if isinstance(recipe.dedup, DedupSettings):
        for name in recipe.dedup.prefer:
            _known(reader, "dedup.prefer", name, recipe.sources)
    sizes: dict[str, int | None] = {"shards.tokens": recipe.shards.tokens, "part_megabytes": recipe.part_megabytes}
    sizes |= {"workers": recipe.workers, "mix.tokens": recipe.mix.tokens, "packing.length": recipe.packing.length}
    if isinstance(recipe.tokenizer, TokenizerRecipe):
        sizes["tokenizer.train.bytes"] = recipe.tokenizer.train.bytes
        size, least = recipe.tokenizer.train.vocab_size, 257 + len(recipe.sentinels)
        _check_range(reader, "tokenizer.train.vocab_size", size, size >= least, f"{least} or more")
    sizes["decontaminate.common"] = recipe.evaluation.common
    for size_key, number in sizes.items():
        _check_range(reader, size_key, number, number is None or number >= 1, "1 or more")
    action = recipe.evaluation.action
    if action not in ("drop", "cut"):
        reader.fail("decontaminate.action", f"decontaminate.action is {action!r}, expected drop or cut")
    _check_range(reader, "seed", recipe.seed, 0 <= recipe.seed < 2**63, "0 or more")
    if recipe.shards.dtype not in ("auto", "uint16", "uint32"):
        reader.fail("shards.dtype", f"shards.dtype is {recipe.shards.dtype!r}, expected auto, uint16 or uint32")
    if recipe.packing.method not in METHODS:
        reader.fail("packing.method", f"packing.method is {recipe.packing.method!r}, expected {', '.join(METHODS)}")
    given = recipe.tokenizer
    if isinstance(given, str) and given not in ENCODINGS and not Path(given).exists():
        expected = f"expected {', '.join(ENCODINGS)} or an existing tokenizer.json"
        reader.fail("tokenizer", f"tokenizer is {given!r}, {expected}{did_you_mean(given, ENCODINGS)}")
    _check_mix(recipe, reader)


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
