"""The stages of a build, one after another: scan, clean, select, tokenize, mix, write.

Every stage finds the results that exist and makes those that are missing. A build that was killed therefore goes on
where it was, and one whose sources changed does again what depends on them. The shards are a function of the recipe and
the input alone, whatever was killed, kept or done in parallel.
"""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastgpt.core.device import return_freed_memory
from fastgpt.core.errors import UserError
from fastgpt.data.clean import Cleaner
from fastgpt.data.dedup import DedupSettings
from fastgpt.data.load import load_tokenizer
from fastgpt.data.pipeline.clean import CleanTask, Counts, chunks_of, clean, counts_of
from fastgpt.data.pipeline.engine import Engine
from fastgpt.data.pipeline.gather import format_for, gather
from fastgpt.data.pipeline.layout import Layout, lay_out
from fastgpt.data.pipeline.leaks import LeakTask, contents_of, find_leaks
from fastgpt.data.pipeline.manifest import (
    ERASED,
    FILES,
    about,
    check_owner,
    is_current,
    put_in_place,
    trained_before,
    write_manifest,
)
from fastgpt.data.pipeline.report import report_of
from fastgpt.data.pipeline.select import Selection, Selector, read_erased
from fastgpt.data.pipeline.show import PAGE, write_page
from fastgpt.data.pipeline.store import Chunk, has_results, key_of, locked, read_json, remove_partial, write_json
from fastgpt.data.pipeline.tokens import Encoding, choose_tokenizer, encode, reorderings
from fastgpt.data.pipeline.workers import Workers
from fastgpt.data.pipeline.write import ShardTask, write_shard
from fastgpt.data.published import open_tokenizer
from fastgpt.data.recipe import Recipe
from fastgpt.data.shards import dtype_for
from fastgpt.data.tokenizer import available_cores

log = logging.getLogger("fastgpt")

CHUNK = 32 << 20  # bytes of cleaned text that later stages work on at a time
ALONE = ("clean", "select", "tokenize")  # stages that a task can do alone; a whole build does what is missing


@dataclass(frozen=True)
class Share:
    """The share of one of several independent tasks: parts index, index + of, ..."""

    index: int = 0
    of: int = 1


@dataclass(frozen=True)
class Cleaned:
    """All chunks, in order, and the counts of each source."""

    chunks: list[Chunk]
    counts: dict[str, Counts]


@dataclass(frozen=True)
class Tokenized:
    """The chunks with tokens: one folder for each, and what encoded them."""

    folders: list[Path]
    tokenizer: Path
    n_vocab: int
    dtype: str


class Build:
    """One build of a recipe into a folder."""

    def __init__(self, recipe: Recipe, out: Path, workers: Engine, share: Share = Share()) -> None:
        self.recipe, self.out, self.workers, self.share = recipe, out, workers, share
        self.work = out.absolute() / "work"  # workers on other machines have other current folders
        self.dedup = DedupSettings() if recipe.dedup is True else recipe.dedup or None
        self.erased = read_erased(out)
        self.held_out = contents_of(recipe.evaluation.files)
        if recipe.sentinels and isinstance(recipe.tokenizer, str):
            reorderings(recipe, open_tokenizer(recipe.tokenizer))  # refuses it now, not after hours of cleaning
        self.tasks = self._clean_tasks()

    def inputs(self) -> str:
        """Return a digest of everything that the data set depends on."""
        settings = {
            k: v for k, v in self.recipe.settings().items() if k not in ("name", "out", "workers", "decontaminate")
        }
        sources = settings.pop("sources")
        kept = ("license", "weight", "epochs", "max_documents", "fill_in_the_middle")
        taken = [[name, {k: source[k] for k in kept}] for name, source in sources.items()]
        erased = [sorted(self.erased.ids), sorted(self.erased.hashes)]
        evaluation = self.recipe.evaluation
        held_out = [self.held_out, evaluation.action, evaluation.common] if evaluation.files else []
        return key_of("inputs", settings, taken, [task.key for task in self.tasks], held_out, erased)

    def clean(self) -> None:
        """Clean this task's share of the parts."""
        mine = self.tasks[self.share.index :: self.share.of]
        self.workers.run("clean", clean, mine, [task.unit.size for task in mine])

    def cleaned(self) -> Cleaned:
        """Return the results of `clean`. Raises UserError if some are missing."""
        missing = [task for task in self.tasks if not (task.folder / task.key).exists()]
        if missing:
            raise UserError(
                f"{len(missing)} of {len(self.tasks)} parts in {self.work} are not cleaned yet: run "
                "`fastgpt data build --only clean` for every task first"
            )
        counts = {name: Counts() for name in self.recipe.sources}
        for name, defects in self.unfetched.items():
            for defect in defects:
                counts[name].defect(defect)
        chunks: list[Chunk] = []
        for task in self.tasks:
            counts[task.unit.source].add(counts_of(task.folder, task.key))
            chunks += chunks_of(task.folder, task.unit.source, task.key)
        return Cleaned(chunks, counts)

    def select(self, cleaned: Cleaned) -> Selection:
        """Decide which documents are kept."""
        leaks: list[Path] = []
        files = tuple(self.recipe.evaluation.files)
        if files:
            tasks = [LeakTask(chunk, files, self.held_out, self.work / "leaks") for chunk in cleaned.chunks]
            self.workers.run("decontaminate", find_leaks, tasks, [task.chunk.bytes for task in tasks])
            leaks = [task.path for task in tasks]
        selection = Selector(self.recipe, self.dedup, cleaned.chunks, leaks, self.erased).run(self.work / "select")
        return_freed_memory()
        return selection

    def tokenizer(self, cleaned: Cleaned, selection: Selection) -> Path:
        """Return the path of the tokenizer.json to encode with."""
        before = trained_before(self.out, self.recipe)
        return choose_tokenizer(self.recipe, cleaned.chunks, selection.masks, before, self.work)

    def tokenize(self, cleaned: Cleaned, selection: Selection) -> Tokenized:
        """Encode this task's share of the chunks."""
        path = self.tokenizer(cleaned, selection)
        tokenizer = load_tokenizer(path)
        dtype = dtype_for(tokenizer.n_vocab) if self.recipe.shards.dtype == "auto" else self.recipe.shards.dtype
        if dtype == "uint16" and dtype_for(tokenizer.n_vocab) != dtype:
            raise UserError(f"shards.dtype is uint16, but the tokenizer has {tokenizer.n_vocab} ids, expected uint32")
        middles = reorderings(self.recipe, tokenizer)
        tasks = [
            Encoding(
                chunk,
                mask,
                path,
                tokenizer.fingerprint,
                dtype,
                self.work / "tokens",
                None if chunk.held else middles.get(chunk.source),
                pieces,
            )
            for chunk, mask, pieces in zip(cleaned.chunks, selection.masks, selection.pieces, strict=True)
        ]
        mine = tasks[self.share.index :: self.share.of]
        self.workers.run("tokenize", encode, mine, [task.chunk.bytes for task in mine])
        return Tokenized([task.path for task in tasks], path, tokenizer.n_vocab, dtype)

    def write(self, layout: Layout, tokenized: Tokenized) -> list[dict[str, Any]]:
        """Write all shards into the folder of the new data set and return their records."""
        new = self.work / "next"
        key = key_of("next", layout.folder.name, tokenized.dtype)
        if read_json(new / ".key.json") != key:
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir(parents=True)
            write_json(new / ".key.json", key)
        tasks = [
            ShardTask(new, f"train_{i:06}", layout.folder, tokenized.n_vocab, tokenized.dtype, None, first, count)
            for i, (first, count, _) in enumerate(layout.shards)
        ]
        sizes = [2 * tokens for _, _, tokens in layout.shards]
        for i, (name, facts) in enumerate(layout.sources.items()):
            if facts["val"]["documents"]:
                task = ShardTask(new, f"val_{name}", layout.folder, tokenized.n_vocab, tokenized.dtype, i, 0, 0)
                tasks.append(task)
                sizes.append(2 * facts["val"]["tokens"])
        return self.workers.run("write", write_shard, tasks, sizes)

    def finish(self, cleaned: Cleaned, selection: Selection, tokenized: Tokenized) -> None:
        """Mix, write the shards, the report and, last, the manifest; put them in the place of an older data set."""
        layout = lay_out(self.recipe, cleaned.chunks, tokenized.folders, self.work / "layout")
        shards = self.write(layout, tokenized)
        new = self.work / "next"
        tokenizer = load_tokenizer(tokenized.tokenizer)
        tokenizer.save(new / "tokenizer.json")
        if (self.out / ERASED).exists():
            shutil.copyfile(self.out / ERASED, new / ERASED)
        report = report_of(self.recipe, cleaned.counts, selection.report, layout)
        write_json(new / "report.json", report)
        facts = about(self.recipe, self.inputs(), tokenizer, layout, shards, report, self.out)
        write_manifest(new, facts)
        (self.out / PAGE).unlink(missing_ok=True)  # of an older generation
        put_in_place(self.out)

    def _clean_tasks(self) -> list[CleanTask]:
        gathered = gather(self.recipe, self.work, self.workers)
        self.unfetched = gathered.defects
        licenses = gathered.licenses
        known = {name: replace(source, license=licenses[name]) for name, source in self.recipe.sources.items()}
        recipe = self.recipe = replace(self.recipe, sources=known)
        formats = {name: format_for(name, source) for name, source in known.items()}
        cleaners = {name: Cleaner.of(source.clean).fingerprint for name, source in known.items()}
        return [
            CleanTask(
                unit,
                known[unit.source],
                formats[unit.source],
                cleaners[unit.source],
                recipe.validation if (own := known[unit.source].validation) is None else own,
                recipe.seed,
                self.dedup,
                CHUNK,
                self.work / "clean",
            )
            for unit in gathered.units
        ]


def build(
    recipe: Recipe,
    out: str | Path,
    *,
    workers: int | None = None,
    keep: bool = False,
    only: str | None = None,
    share: Share = Share(),
    show: bool = True,
    engine: Engine | None = None,
) -> dict[str, Any] | None:
    """Build a data set; return its report, or None if `only` names a stage.

    Args:
        workers: processes, instead of the recipe's.
        keep: keep the results of parts in OUT/work, so that the next build does again only what changed.
        only: do one stage for this share of the parts: clean, select or tokenize.
        show: display progress bars.
        engine: what runs the tasks, instead of processes of this machine.

    Raises:
        UserError: bad input, a disk that cannot be written, or workers that die again and again.
    """
    out = Path(out)
    check_folder(out)
    count = workers or recipe.workers or available_cores()
    with engine or Workers(count, show) as pool, locked(out / "work", alone=only is None):
        if only is None:
            remove_partial(out / "work")
            put_in_place(out)  # of a build that was killed while it did this
        try:
            return _build(Build(recipe, out, pool, share), only, keep)
        except OSError as e:
            raise UserError(f"cannot write {e.filename or out}: {e.strerror}{_kept(out)}") from e
        except UserError as e:
            e.args = (f"{e}{_kept(out)}",)
            raise


def _kept(out: Path) -> str:
    return f"; {out / 'work'} keeps what is finished for the next build" if has_results(out / "work") else ""


def _build(run: Build, only: str | None, keep: bool) -> dict[str, Any] | None:
    if only is None and is_current(run.out, run.inputs()):
        log.info("%s is up to date", run.out)
        if not (run.out / PAGE).is_file():
            write_page(run.out)  # the build was killed before it
    else:
        check_owner(run.out, run.recipe)
        if only in (None, "clean"):
            run.clean()
            if only:
                return None
        cleaned = run.cleaned()
        selection = run.select(cleaned)
        if only == "select":
            run.tokenizer(cleaned, selection)
            return None
        tokenized = run.tokenize(cleaned, selection)
        if only == "tokenize":
            return None
        run.finish(cleaned, selection, tokenized)
        write_page(run.out)
    if not keep:
        shutil.rmtree(run.work, ignore_errors=True)
    report: dict[str, Any] = read_json(run.out / "report.json")
    return report


def dry_run(
    recipe: Recipe,
    out: str | Path,
    *,
    workers: int | None = None,
    show: bool = True,
    engine: Engine | None = None,
) -> dict[str, Any]:
    """Clean and select as `build` does, keep the results for it, and return the report of what would be dropped."""
    out = Path(out)
    check_folder(out)
    count = workers or recipe.workers or available_cores()
    with engine or Workers(count, show) as pool, locked(out / "work", alone=True):
        run = Build(recipe, out, pool)
        run.clean()
        cleaned = run.cleaned()
        return report_of(recipe, cleaned.counts, run.select(cleaned).report, None)


def check_folder(out: Path) -> None:
    """Raise UserError if a folder holds something else than a data set."""
    if out.is_dir():
        others = [p.name for p in out.iterdir() if not FILES.fullmatch(p.name)]
        if others:
            raise UserError(f"{out} holds {others[0]}, which is not of a data set; name a new folder with --out")
    elif out.exists():
        raise UserError(f"{out} is not a folder; name a new folder with --out")
