"""Text metrics: BLEU, chrF, TER, ROUGE, word F1, exact match and BERTScore of predictions against references.

BLEU, chrF and TER are sacrebleu's, in percent. ROUGE is rouge-score's F-measure, 0 to 1. F1 and exact match are
SQuAD's (Rajpurkar et al., arXiv 1606.05250), 0 to 1. With several references an item has the best value of them, as the
libraries do. BLEU stops at the longest n-gram that a text has (effective order): without it, identical texts of three
words score 0.

The words of a text come from a tokenizer: the metric's default, "unicode", or "char". The default of ROUGE keeps a-z
and 0-9 alone, so Chinese, Greek or Cyrillic texts have no words; `TextScore.notes` says where that happens. "unicode"
keeps the letters, marks and digits of every script, and each character of a script without spaces is a word.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastgpt.core.errors import UserError, counted
from fastgpt.core.options import did_you_mean
from fastgpt.data.dedup.words import UNSPACED, lowered, split
from fastgpt.evaluate.results import mean

SACREBLEU = ("bleu", "chrf", "chrf++", "ter")
ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")
METRICS = (*SACREBLEU, *ROUGE, "f1", "exact_match", "bertscore")
RESAMPLES = 1000
SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])")
ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)

References = Sequence[str | Sequence[str]]


@dataclass(frozen=True)
class TextScore:
    """A text metric of several predictions.

    Attributes:
        value: of the whole; BLEU, chrF and TER add up the counts of all items first, other metrics are means.
        stderr: standard error over items: of the mean, or by 1000 bootstrap samples; None for one item.
        items: the metric of each item alone, in order.
        notes: sentences for the reader, about texts in which the tokenizer finds nothing.
    """

    metric: str
    value: float
    stderr: float | None
    items: list[float]
    notes: list[str] = field(default_factory=list)


def score(metric: str, predictions: Sequence[str], references: References, **options: Any) -> TextScore:
    """Return a text metric.

    Args:
        metric: one of METRICS.
        predictions: one text per item.
        references: one text per item, or several.
        options: tokenizer: "default", "unicode" or "char", for BLEU also each of sacrebleu's, such as "zh" (BLEU, TER,
            ROUGE, F1); stemmer: Porter's, in English (ROUGE); sentences: "newline", or "punctuation" (rougeLsum);
            normalize: lower case, without punctuation and articles, default True (F1, exact match); lowercase (BLEU,
            chrF); model, num_layers: folder of an encoder and the layer to compare (BERTScore).

    Raises:
        UserError: an unknown metric or option, an option of another metric, a missing library, no items, or not as many
            references as predictions.
    """
    check(metric, options)
    if len(predictions) != len(references) or not predictions:
        raise UserError(
            f"{metric}: got {counted(len(predictions), 'prediction')} and {counted(len(references), 'reference')}, "
            "expected as many, at least one"
        )
    several = [[r] if isinstance(r, str) else list(r) for r in references]
    if at := next((i for i, r in enumerate(several, 1) if not r), 0):
        raise UserError(f"{metric}: item {at} has no reference, expected at least one")
    value, stderr, items = FUNCTIONS[metric](metric, list(predictions), several, options)
    notes = _notes(metric, [*predictions, *(r for rs in several for r in rs)], options)
    return TextScore(metric, value, stderr, items, notes)


def check(metric: str, options: dict[str, Any]) -> None:
    """Raise UserError unless the metric exists, takes these options, and its library is installed."""
    if metric not in METRICS:
        raise UserError(
            f"metric is {metric!r}, expected one of {', '.join(METRICS)}{did_you_mean(str(metric), METRICS)}"
        )
    for name in options:
        if name not in OPTIONS[metric]:
            takes = ", ".join(OPTIONS[metric]) or "none"
            raise UserError(f"metric {metric} has no option {name!r}, expected one of: {takes}")
    tokenizer = options.get("tokenizer", "default")
    known = ["default", "unicode", "char"]
    if metric == "bleu":
        known += [t for t in _sacrebleu().BLEU.TOKENIZERS if t not in known]
    if tokenizer not in known:
        raise UserError(f"tokenizer of {metric} is {tokenizer!r}, expected one of {', '.join(known)}")
    if metric in ROUGE:
        _rouge()
        if options.get("stemmer") and tokenizer != "default":
            raise UserError(f"{metric}: stemmer has no effect with tokenizer {tokenizer}, expected one of the two")
        if options.get("sentences", "newline") not in ("newline", "punctuation"):
            raise UserError(f"sentences of {metric} is {options['sentences']!r}, expected newline or punctuation")
    elif metric in SACREBLEU:
        _sacrebleu()
    elif metric == "bertscore":
        _check_bertscore(options)


def normalized(text: str) -> str:
    """Return the text in lower case without ASCII punctuation, English articles and repeated spaces, as SQuAD does."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def exact_match(prediction: str, references: Sequence[str], normalize: bool = True) -> float:
    """Return 1 if the prediction is one of the references, else 0; SQuAD's unless `normalize` is off."""
    form = normalized if normalize else str
    return float(any(form(prediction) == form(r) for r in references))


def f1(prediction: str, references: Sequence[str], tokenizer: str = "default", normalize: bool = True) -> float:
    """Return the best F1 of the words of a prediction, as bags. Two texts without words match, one alone does not."""
    form = normalized if normalize else str
    words = Counter(words_of(form(prediction), tokenizer))
    return max(_f1(words, Counter(words_of(form(r), tokenizer))) for r in references)


def _f1(a: Counter[str], b: Counter[str]) -> float:
    if not a or not b:
        return float(a == b)
    return 2 * sum((a & b).values()) / (sum(a.values()) + sum(b.values()))


def words_of(text: str, tokenizer: str) -> list[str]:
    """Return the words of a text: "default" splits at white space, "unicode" and "char" are in lower case."""
    if tokenizer == "unicode":
        return split(text)
    if tokenizer == "char":
        return [c for c in lowered(text) if not c.isspace()]
    return text.split()


Found = tuple[float, float | None, list[float]]


def _mean(items: list[float]) -> Found:
    figure = mean("", "", items)
    return figure.value, figure.stderr, items


def _words(metric: str, predictions: list[str], references: list[list[str]], options: dict[str, Any]) -> Found:
    function: Callable[..., float] = f1 if metric == "f1" else exact_match
    return _mean([function(p, r, **options) for p, r in zip(predictions, references)])


def _corpus(metric: str, predictions: list[str], references: list[list[str]], options: dict[str, Any]) -> Found:
    """Return a metric of sacrebleu, with the standard error of its bootstrap over items."""
    tokenizer = options.get("tokenizer", "default")
    library, lower = _sacrebleu(), {k: bool(v) for k, v in options.items() if k == "lowercase"}
    if metric == "bleu":
        named = {"default": None, "unicode": "none"}.get(tokenizer, tokenizer)
        scorer = library.BLEU(tokenize=named, effective_order=True, **lower)
    elif metric == "ter":
        scorer = library.TER()
    else:
        scorer = library.CHRF(word_order=2 if metric == "chrf++" else 0, **lower)
    if tokenizer == "unicode" or (metric == "ter" and tokenizer == "char"):
        predictions = [" ".join(words_of(p, tokenizer)) for p in predictions]
        references = [[" ".join(words_of(r, tokenizer)) for r in rs] for rs in references]
    items = [scorer.sentence_score(p, rs).score for p, rs in zip(predictions, references)]
    most = max(map(len, references))
    columns = [[rs[i] if i < len(rs) else None for rs in references] for i in range(most)]
    value = scorer.corpus_score(predictions, columns).score
    if len(items) == 1:
        return value, None, items
    # sacrebleu resamples in Python; the sums of its statistics over a sample are a product with the counts of items
    statistics = np.array(scorer._extract_corpus_statistics(predictions, columns), np.float64)  # (n, K)
    n = len(items)
    counts = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), RESAMPLES)  # (R, n)
    samples = [scorer._compute_score_from_stats(row).score for row in (counts @ statistics).tolist()]
    return value, float(np.std(samples, ddof=1)), items


def _rouge_scores(metric: str, predictions: list[str], references: list[list[str]], options: dict[str, Any]) -> Found:
    tokenizer = options.get("tokenizer", "default")
    own = {} if tokenizer == "default" else {"tokenizer": _Words(tokenizer)}
    scorer = _rouge().RougeScorer([metric], use_stemmer=bool(options.get("stemmer", False)), **own)
    form = _sentences if options.get("sentences") == "punctuation" else str
    items = [
        float(scorer.score_multi([form(r) for r in rs], form(p))[metric].fmeasure)
        for p, rs in zip(predictions, references)
    ]
    return _mean(items)


class _Words:
    """A tokenizer in the form of rouge-score."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def tokenize(self, text: str) -> list[str]:
        return words_of(text, self.kind)


def _sentences(text: str) -> str:
    """Return the text with a line for each sentence, which ends at a full stop, '!' or '?'."""
    return "\n".join(part for line in text.split("\n") for part in SENTENCE_END.split(line) if part)


def _bertscore(metric: str, predictions: list[str], references: list[list[str]], options: dict[str, Any]) -> Found:
    from bert_score import score as bert_score

    # F of each prediction with the best of its references; the model is a folder, so nothing is downloaded
    model = str(options["model"])
    try:
        _, _, found = bert_score(predictions, references, model_type=model, num_layers=options["num_layers"])
    except OverflowError:  # bert-score truncates to the largest length, which is 10^30 if the tokenizer has none
        raise UserError(f"bertscore: the tokenizer of {model} has no model_max_length, expected the context") from None
    return _mean([float(v) for v in found.tolist()])


def _check_bertscore(options: dict[str, Any]) -> None:
    for name, expected in (("model", "the folder of an encoder"), ("num_layers", "the layer whose output to compare")):
        if name not in options:
            raise UserError(f"bertscore needs the option {name}: {expected}")
    if not (Path(str(options["model"])) / "config.json").is_file():
        raise UserError(f"model of bertscore is {options['model']}, expected a folder with config.json and weights")
    layers = options["num_layers"]
    if not isinstance(layers, int) or layers < 1:
        raise UserError(f"num_layers of bertscore is {layers!r}, expected a whole number of 1 or more")
    try:
        import bert_score  # noqa: F401
    except ImportError:
        raise UserError("bertscore needs bert-score: pip install fastgpt[bertscore]") from None


def _notes(metric: str, texts: list[str], options: dict[str, Any]) -> list[str]:
    """Return what a reader must know of the words that the tokenizer found."""
    notes = []
    tokenizer = options.get("tokenizer", "default")
    if tokenizer == "default" and metric in ROUGE:
        lost = [bool(split(t)) and any(c.isalnum() for c in t if not c.isascii()) for t in texts]
        empty = sum(bool(split(t)) and not re.search(r"[a-z0-9]", t.lower()) for t in texts)
        if sum(lost):
            notes.append(
                f"{metric}: the default tokenizer keeps a-z and 0-9 alone: it ignores letters in {sum(lost)} of "
                f"{counted(len(texts), 'text')} and finds nothing in {empty}; use tokenizer: unicode"
            )
    elif tokenizer == "default" and metric in ("bleu", "ter", "f1"):
        unspaced = sum(any(a <= ord(c) <= b for c in t if ord(c) >= UNSPACED[0][0] for a, b in UNSPACED) for t in texts)
        if unspaced:
            better = "zh or unicode" if metric == "bleu" else "unicode"
            notes.append(
                f"{metric}: {unspaced} of {counted(len(texts), 'text')} are in scripts without spaces, of which the "
                f"default tokenizer makes one word; use tokenizer: {better}"
            )
    elif tokenizer == "unicode" and (empty := sum(bool(t.strip()) and not split(t) for t in texts)):
        notes.append(f"{metric}: {empty} of {counted(len(texts), 'text')} have neither letters nor digits")
    if metric == "rougeLsum" and options.get("sentences", "newline") == "newline" and not any("\n" in t for t in texts):
        notes.append(
            "rougeLsum: sentences end at newlines and no text has one, so it is rougeL; use sentences: punctuation"
        )
    return notes


def _sacrebleu() -> Any:
    try:
        from sacrebleu import metrics
    except ImportError:
        raise UserError("BLEU, chrF and TER need sacrebleu: pip install fastgpt[eval]") from None
    return metrics


def _rouge() -> Any:
    try:
        from rouge_score import rouge_scorer
    except ImportError:
        raise UserError("ROUGE needs rouge-score: pip install fastgpt[eval]") from None
    return rouge_scorer


FUNCTIONS: dict[str, Callable[[str, list[str], list[list[str]], dict[str, Any]], Found]] = {
    **dict.fromkeys(SACREBLEU, _corpus),
    **dict.fromkeys(ROUGE, _rouge_scores),
    "f1": _words,
    "exact_match": _words,
    "bertscore": _bertscore,
}
OPTIONS: dict[str, tuple[str, ...]] = {
    "bleu": ("tokenizer", "lowercase"),
    "chrf": ("lowercase",),
    "chrf++": ("lowercase",),
    "ter": ("tokenizer",),
    **dict.fromkeys(ROUGE, ("tokenizer", "stemmer")),
    "rougeLsum": ("tokenizer", "stemmer", "sentences"),
    "f1": ("tokenizer", "normalize"),
    "exact_match": ("normalize",),
    "bertscore": ("model", "num_layers"),
}
