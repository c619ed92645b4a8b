"""Recipes: the YAML files that say how a data set is built, read into dataclasses by the types of their fields.

Paths are relative to the recipe's folder, and `{stdlib}` in a path is the folder of the standard library. Each error
names the file, the line and the key, the value found and the value expected.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from fastgpt.data.dedup import DedupSettings
from fastgpt.data.read.web import USER_AGENT

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
