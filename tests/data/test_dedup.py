"""Duplicates, against brute force: all pairs compared by their shingles as sets of strings."""

from __future__ import annotations

import hashlib
import itertools
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from fastgpt.bench._dedup import measure_datasketch, measure_fastgpt, plant, planted_duplicates
from fastgpt.core.errors import UserError
from fastgpt.data.dedup import Counts, DedupPart, DedupSettings, Duplicates, Outcome, find, fingerprint, result
from fastgpt.data.dedup.forest import Forest
from fastgpt.data.dedup.similarity import jaccard, shingle_sets
from fastgpt.data.dedup.words import ASSIGNED, UNSPACED, grams, hash_words, lowered, spans, split

pytest.importorskip("hypothesis")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

# One row a band: similar documents share a band with probability 1 - (1 - J)^24, so the result is that of brute force.
SURE = DedupSettings(bands=24, rows=1, shingle=2, threshold=0.5)
QUICK = settings(max_examples=30, deadline=None)
TEXTS = st.text(
    st.sampled_from("ab c_1.,\n\u00e9\u4e00\u4e8c\u0e01\u0e31 \U0001f600\U00020001\u0130\ud800e\u0301-ΑΣ"), max_size=30
)
DOCUMENTS = st.lists(st.lists(st.sampled_from("a b c d".split()), max_size=8).map(" ".join), max_size=12)


def words_of(text: str) -> list[str]:
    """Return the words of a text, one character after the other."""
    words, open_ = [], False
    for character in lowered(text):
        inside = unicodedata.category(character)[0] in "LNM" or character == "_"
        alone = inside and any(first <= ord(character) <= last for first, last in UNSPACED)
        if inside and open_ and not alone:
            words[-1] += character
        elif inside:
            words.append(character)
        open_ = inside and not alone
    return words


def shingles(text: str, n: int) -> set[tuple[str, ...]]:
    words = words_of(text)
    return {tuple(words[i : i + n]) for i in range(max(len(words) - n + 1, 1))} if words else set()


def similar(a: str, b: str, options: DedupSettings) -> bool:
    """Return whether two documents that are not empty are duplicates of each other."""
    left, right = shingles(a, options.shingle), shingles(b, options.shingle)
    if " ".join(a.split()) == " ".join(b.split()):
        return True
    return bool(left and right) and len(left & right) / len(left | right) >= options.threshold


def brute_force(texts: list[str], options: DedupSettings) -> list[set[int]]:
    """Return the clusters: the connected components of all similar pairs. Empty documents are in none."""
    clusters = [{i} for i, text in enumerate(texts) if text.strip()]
    for i, j in itertools.combinations(range(len(texts)), 2):
        if texts[i].strip() and texts[j].strip() and similar(texts[i], texts[j], options):
            one, other = (next(c for c in clusters if k in c) for k in (i, j))
            if one is not other:
                one |= other
                clusters.remove(other)
    return clusters


class Corpus:
    """Parts made from texts by name, and the texts by part."""

    def __init__(self, texts: dict[str, list[str]], options: DedupSettings = SURE, split: str = "train") -> None:
        self.texts, self.options = dict(texts), options
        self.parts = [DedupPart(name, f"of {name}", split, fingerprint(t, options)) for name, t in texts.items()]

    def add(self, name: str, texts: list[str], split: str = "train", source: str = "") -> DedupPart:
        self.texts[name] = texts
        self.parts.append(DedupPart(name, source or f"of {name}", split, fingerprint(texts, self.options)))
        return self.parts[-1]

    def find(self, parts: list[DedupPart] | None = None) -> Duplicates:
        read = self.texts
        return find(
            self.parts if parts is None else parts, lambda part, rows: [read[part.name][i] for i in rows], self.options
        )

    def kept(self) -> dict[str, list[int]]:
        found = self.find()
        return {part.name: np.flatnonzero(found.keep(part)).tolist() for part in self.parts}


@QUICK
@given(TEXTS)
def test_words(text: str) -> None:
    assert split(text) == words_of(text)
    assert [lowered(text)[start:end] for start, end in spans(lowered(text))] == words_of(text)


def test_letters_digits_and_marks_are_where_the_table_looks() -> None:
    outside = [i for i in range(0x110000) if not any(first <= i < last for first, last in ASSIGNED)]
    assert not any(unicodedata.category(chr(i))[0] in "LNM" for i in outside)


@QUICK
@given(st.lists(TEXTS, max_size=8))
def test_equal_words_have_equal_hashes(texts: list[str]) -> None:
    words = hash_words([*texts, "x" * 9, "x" * 300, "x" * 301])
    names = [word for text in texts for word in words_of(text)] + ["x" * 9, "x" * 300, "x" * 301]
    assert len(set(zip(names, words.hashes.tolist()))) == len(set(names)) == len(set(words.hashes.tolist()))
    assert np.diff(words.bounds).tolist() == [*(len(words_of(text)) for text in texts), 1, 1, 1]


@QUICK
@given(st.lists(TEXTS, max_size=8), st.integers(1, 4))
def test_grams_are_those_of_each_text(texts: list[str], n: int) -> None:
    hashes, _, bounds = grams(hash_words(texts), n)
    for i, text in enumerate(texts):
        assert len(set(hashes[bounds[i] : bounds[i + 1]].tolist())) == len(shingles(text, n))


@QUICK
@given(DOCUMENTS)
def test_jaccard(texts: list[str]) -> None:
    sets = shingle_sets(texts, 2)
    for (a, i), (b, j) in itertools.combinations(zip(texts, sets), 2):
        left, right = shingles(a, 2), shingles(b, 2)
        assert jaccard(i, j) == (len(left & right) / len(left | right) if left | right else 1)


@QUICK
@given(DOCUMENTS, st.integers(0, 12), st.integers(1, 5))
def test_clusters_are_those_of_brute_force_in_any_order(texts: list[str], border: int, at_once: int) -> None:
    options = DedupSettings(bands=24, rows=1, shingle=2, threshold=0.5, rows_in_memory=at_once)
    names = np.arange(len(texts))
    for order in (names, names[::-1]):
        corpus = Corpus({"a": [texts[i] for i in order[:border]], "b": [texts[i] for i in order[border:]]}, options)
        found = corpus.find()
        keep = np.concatenate([found.keep(part) for part in corpus.parts])
        cluster = np.concatenate([found.outcome(part).cluster for part in corpus.parts])
        groups = [set(order[cluster == label].tolist()) for label in set(cluster.tolist()) - {0}]
        expected = brute_force(texts, options)
        assert sorted(map(sorted, groups)) == sorted(map(sorted, expected))
        assert sorted(order[keep]) == sorted(min(c, key=order.tolist().index) for c in expected)
        dropped = sum(count.exact + count.near for count in found.counts.values())
        assert keep.sum() + dropped + sum(found.empty.values()) == len(texts)


@QUICK
@given(DOCUMENTS, DOCUMENTS, DOCUMENTS)
def test_refresh_equals_a_build_from_scratch(one: list[str], two: list[str], three: list[str]) -> None:
    corpus = Corpus({})
    scratch: list[DedupPart] = []
    for i, texts in enumerate((one, two, three)):
        scratch.append(corpus.add(str(i), texts))
        found = corpus.find([*corpus.parts[:i], scratch[-1]])
        for part in corpus.parts:
            part.earlier = found.outcome(part)
    whole = find(
        [DedupPart(part.name, part.source, part.split, part.prints) for part in corpus.parts],
        lambda part, rows: [corpus.texts[part.name][row] for row in rows],
        SURE,
    )
    outcomes = [part.earlier for part in corpus.parts if part.earlier]
    kept = np.concatenate([outcome.keep for outcome in outcomes])
    cluster = np.concatenate([outcome.cluster for outcome in outcomes])
    expected = [whole.outcome(part) for part in corpus.parts]
    assert len(set(zip(cluster, np.concatenate([e.cluster for e in expected])))) == len(set(cluster.tolist()))
    # A document that links two earlier clusters comes too late to drop the second one's document.
    late = kept & ~np.concatenate([e.keep for e in expected])
    assert not (np.concatenate([e.keep for e in expected]) & ~kept).any()
    for label in cluster[late]:
        assert (kept & (cluster == label)).sum() > 1


# Similarity 0.6 to the next one, 0.33 to the one after that.
CHAIN = [" ".join(map(str, range(start, start + 21))) for start in (0, 5, 10)]


def test_all_pairs_of_a_small_bucket_are_compared() -> None:
    corpus = Corpus({"a": CHAIN}, DedupSettings(bands=1, rows=1, shingle=2, threshold=0.5))
    corpus.parts[0].prints.bands[:] = 1  # type: ignore[union-attr]
    assert corpus.kept() == {"a": [0]}


def test_a_new_document_joins_an_earlier_cluster_through_a_dropped_one() -> None:
    corpus = Corpus({"a": CHAIN[:2]})
    corpus.parts[0].earlier = corpus.find().outcome(corpus.parts[0])
    corpus.add("b", CHAIN[2:])
    assert corpus.kept() == {"a": [0], "b": []}


BASE = "the quick brown fox jumps over the lazy dog while the cat sleeps in the warm sun".split()


def test_keep_policies() -> None:
    longer = " ".join([*BASE, "today"])
    texts = {"a": [" ".join(BASE), "other words"], "b": [longer]}
    assert Corpus(texts).kept() == {"a": [0, 1], "b": []}
    longest = DedupSettings(bands=24, rows=1, shingle=2, threshold=0.5, keep="longest")
    assert Corpus(texts, longest).kept() == {"a": [1], "b": [0]}
    preferred = DedupSettings(bands=24, rows=1, shingle=2, threshold=0.5, keep="source", prefer=("of b",))
    assert Corpus(texts, preferred).kept() == {"a": [1], "b": [0]}


def test_the_longest_of_a_cluster_larger_than_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The documents of one cluster are compared in blocks, each with the best one before it."""
    sizes = [3, 1, 4, 2, 7, 9, 2, 8, 9, 6, 5, 0]
    texts = [" ".join([*BASE, *("more" for _ in range(size))]) for size in sizes]
    options = DedupSettings(bands=24, rows=1, shingle=1, threshold=0.5, keep="longest", rows_in_memory=6)
    at_once: list[int] = []
    real = result._best
    monkeypatch.setattr(result, "_best", lambda c, r, m, s: at_once.append(len(m)) or real(c, r, m, s))
    for order in (sizes, sizes[::-1]):
        corpus = Corpus({"a": [texts[sizes.index(size)] for size in order[:5]], "b": []}, options)
        corpus.add("c", [texts[sizes.index(size)] for size in order[5:]])
        kept = corpus.kept()
        place = order.index(9)
        assert kept == {"a": [place] if place < 5 else [], "b": [], "c": [place - 5] if place >= 5 else []}
    assert max(at_once) <= 4 and len(at_once) == 8  # 3 documents and the best before them


@pytest.mark.parametrize("keep", ["first", "longest", "source"])
def test_held_out_documents_stay(keep: str) -> None:
    options = DedupSettings(bands=24, rows=1, shingle=2, threshold=0.5, keep=keep, prefer=("web",))  # type: ignore[arg-type]
    corpus = Corpus({"a": [" ".join([*BASE, "and", "more"])]}, options)
    corpus.add("b", [" ".join(BASE), " ".join(BASE)], split="val", source="books")
    assert corpus.kept() == {"a": [], "b": [0]}
    assert corpus.find().counts == {("of a", "books"): Counts(near=1), ("books", "books"): Counts(exact=1)}


def test_earlier_documents_stay_even_when_held_out_ones_duplicate_them() -> None:
    corpus = Corpus({"a": [" ".join(BASE), "gone"]})
    corpus.parts[0].earlier = Outcome(np.array([True, False]), corpus.find().outcome(corpus.parts[0]).cluster)
    corpus.add("0", [" ".join(BASE), "gone", "new"], split="val")
    assert corpus.kept() == {"a": [0], "0": [1, 2]}


def test_empty_documents_are_in_no_cluster() -> None:
    corpus = Corpus({"a": ["", " \n", "!", "!", "word", "Word.", "?!"]})
    found = corpus.find()
    assert found.keep(corpus.parts[0]).tolist() == [False, False, True, False, True, False, True]
    assert found.empty == {"of a": 2}
    assert found.counts == {("of a", "of a"): Counts(exact=1, near=1)}
    assert Corpus({}).find().counts == {}
    assert Corpus({"a": []}).kept() == {"a": []}


EQUAL = DedupSettings(near=False)


def test_unicode_forms_are_equal_text() -> None:
    assert Corpus({"a": ["Caf\u00e9  au lait", "Cafe\u0301  au lait\r\n", "\ud800"]}, EQUAL).kept() == {"a": [0, 2]}


def test_a_huge_document() -> None:
    text = " ".join(map(str, range(100_000)))
    corpus = Corpus({"a": [text, f"{text} end", "x" * 1_000_000]}, DedupSettings())
    assert corpus.kept() == {"a": [0, 2]}
    assert corpus.find().pairs[0].similarity == pytest.approx(1, abs=1e-4)


def test_large_buckets_cost_linear_time() -> None:
    """Of 500 documents in one bucket each is compared 16 times at most, although there are 124,750 pairs."""
    same = [f"the same boilerplate begins here {i}" for i in range(500)]
    options = DedupSettings(bands=1, rows=1, shingle=1, threshold=0.9)
    one = Corpus({"a": same}, DedupSettings(bands=1, rows=1, shingle=1, threshold=0.5))
    part = one.parts[0]
    part.prints.bands[:] = 1  # type: ignore[union-attr]
    found = one.find()
    assert found.keep(part).sum() == 1 and found.work.compared == 499 and found.work.cut_buckets == 0
    many = Corpus({"a": same}, options)
    many.parts[0].prints.bands[:] = 1  # type: ignore[union-attr]
    found = many.find()
    assert found.work.compared == sum(range(499, 499 - 16, -1)) and found.work.cut_buckets == 1


def test_counts_and_sample_do_not_depend_on_the_order_of_parts() -> None:
    texts = {name: [" ".join([*BASE, name, str(i)]) for i in range(5)] for name in "abc"}
    corpus = Corpus(texts)
    one, two = corpus.find(), corpus.find(corpus.parts[::-1])
    assert one.counts == two.counts and one.pairs == two.pairs and one.work == two.work
    assert sum(c.near for c in one.counts.values()) == 14
    assert {pair.first[0] for pair in one.pairs} <= {"a", "b", "c"}


def texts_of_a_part(seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(map(str, rng.integers(0, 50, 30))) for _ in range(20)]


def test_another_process_gives_the_same_fingerprints() -> None:
    """A worker has its own hash seed."""
    code = (
        "import hashlib, sys; from fastgpt.data.dedup import fingerprint; p = fingerprint(sys.argv[1:]);"
        "print(hashlib.md5(p.exact.tobytes() + p.bands.tobytes() + p.lengths.tobytes()).hexdigest())"
    )
    texts = texts_of_a_part(0)
    other = subprocess.run(
        [sys.executable, "-c", code, *texts],
        env={**os.environ, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    p = fingerprint(texts)
    here = hashlib.md5(p.exact.tobytes() + p.bands.tobytes() + p.lengths.tobytes()).hexdigest()
    assert other.stdout.strip() == here


def test_fingerprints_in_files(tmp_path: Path) -> None:
    prints = fingerprint(texts_of_a_part(0))
    assert sorted(p.name for p in prints.save(tmp_path / "p")) == ["p.bands.npy", "p.exact.npy", "p.lengths.npy"]
    corpus = Corpus({"a": texts_of_a_part(0)}, DedupSettings())
    part = DedupPart("b", "s", "train", tmp_path / "p")
    assert part.fingerprints().bands.flags.f_contiguous
    corpus.texts["b"] = texts_of_a_part(0)
    found = corpus.find([*corpus.parts, part])
    assert not found.keep(part).any() and found.counts == {("s", "of a"): Counts(exact=20)}


def test_rensa_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rensa", None)
    with pytest.raises(UserError, match=r"pip install 'fastgpt\[data\]'"):
        fingerprint(["a"])
    assert len(fingerprint(["a"], DedupSettings(near=False))) == 1


@pytest.mark.parametrize("wrong", [{"threshold": 0}, {"threshold": 2}, {"keep": "last"}, {"bands": 0}])
def test_wrong_settings(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} of deduplication: got"):
        DedupSettings(**wrong)  # type: ignore[arg-type]


def test_two_parts_of_one_name() -> None:
    corpus = Corpus({"a": ["x"]})
    with pytest.raises(ValueError, match="got the name 'a' more than once"):
        corpus.find([*corpus.parts, *corpus.parts])


@QUICK
@given(st.lists(st.tuples(st.integers(0, 19), st.integers(0, 19)), max_size=30))
def test_forest(pairs: list[tuple[int, int]]) -> None:
    forest = Forest(20)
    forest.union(*(np.array(side, np.uint32) for side in (zip(*pairs) if pairs else ([], []))))
    label = list(range(20))
    for a, b in pairs:
        label = [min(label[a], label[b]) if x in (label[a], label[b]) else x for x in label]
    assert forest.roots(np.arange(20)).tolist() == label
    forest.flatten()
    assert forest.parent.tolist() == label


def test_estimated_similarity_scatters_no_more_than_binomially() -> None:
    """Minima that agree estimate J without bias; rensa's deviate less than independent ones, never more."""
    options = DedupSettings(bands=128, rows=1, shingle=1)
    pairs = [(range(k, k + 180), range(k + 20, k + 200)) for k in range(0, 300_000, 1000)]  # J = 160 / 200
    bands = fingerprint([" ".join(map(str, side)) for pair in pairs for side in pair], options).bands
    estimates = (bands[0::2] == bands[1::2]).mean(1)
    binomial = np.sqrt(0.8 * 0.2 / 128)
    assert abs(estimates.mean() - 0.8) < 4 * binomial / np.sqrt(len(pairs))
    assert estimates.std() <= binomial * (1 + 3 / np.sqrt(2 * len(pairs)))  # three deviations of an estimated deviation


def test_recall_is_that_of_the_formula_as_with_datasketch() -> None:
    pytest.importorskip("datasketch")
    rng, options = np.random.default_rng(0), DedupSettings()
    texts, pairs = plant([" ".join(map(str, rng.integers(0, 5000, 150))) for _ in range(300)], 200)
    pairs = planted_duplicates(texts, pairs, options)
    sets = shingle_sets(texts, options.shingle)
    chance = np.array([1 - (1 - jaccard(sets[a], sets[b]) ** options.rows) ** options.bands for a, b in pairs])
    least = chance.mean() - 3 * np.sqrt((chance * (1 - chance)).sum()) / len(pairs)
    for measure in (measure_fastgpt, measure_datasketch):
        measured = measure(texts, pairs, options)
        assert measured.planted == len(pairs) > 100 and measured.recall >= least > 0.9


@pytest.mark.extended
def test_memory_of_two_million_documents(tmp_path: Path) -> None:
    """The search needs less than 10 bytes a document above what 200,000 documents need; fingerprints are 136 bytes.

    One gigabyte so holds 100 million documents.
    """
    code = """
import resource, sys
from pathlib import Path
import numpy as np
from fastgpt.data.dedup import DedupPart, DedupSettings, Fingerprints, find
folder, count = Path(sys.argv[1]), int(sys.argv[2])
rng = np.random.default_rng(0)
for i in range(count // 100_000):
    bands = np.asfortranarray(rng.integers(1, 2**63, (100_000, 14), dtype=np.uint64))
    exact = rng.integers(1, 2**63, (100_000, 2), dtype=np.uint64)
    exact[:1000] = np.arange(2000).reshape(1000, 2)  # one of a hundred is in every part
    bands[1000:1010, 0] = np.arange(1, 11)  # and a few look alike
    Fingerprints(exact, bands, np.full(100_000, 20)).save(folder / f"{count}-{i:03}")
parts = [DedupPart(f"{i:03}", "s", "train", folder / f"{count}-{i:03}") for i in range(count // 100_000)]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = find(parts, lambda part, rows: [f"some words of row {row}" for row in rows],
             DedupSettings(rows_in_memory=50_000), folder)
kept = sum(int(found.keep(part).sum()) for part in parts)
assert found.counts["s", "s"].exact == 1000 * (len(parts) - 1) == count - kept - found.counts["s", "s"].near
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    peaks = [
        1024
        * int(
            subprocess.run([sys.executable, "-c", code, str(tmp_path), str(n)], capture_output=True, check=True).stdout
        )
        for n in (200_000, 2_000_000)
    ]
    assert peaks[1] - peaks[0] < 10 * 1_800_000 + (1 << 20), peaks
