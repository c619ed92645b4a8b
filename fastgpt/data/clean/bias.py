"""Bias in the data: rates of group and toxic terms, drops by a scorer, and counterfactual balancing.

Counterfactual balancing (Zhao et al. 2018, arXiv 1804.06876; Lu et al. 2018, arXiv 1807.11714) swaps paired terms, such
as "he" and "she", in a share of the documents, so that the sets meet both in the same contexts.
"""

from __future__ import annotations

import hashlib
import importlib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from fastgpt.core.errors import UserError
from fastgpt.data.clean.features import Features
from fastgpt.data.clean.gopher import over
from fastgpt.data.clean.step import State, Step
from fastgpt.data.clean.terms import WordList, read_terms

# "her" has two counterparts and is treated apart.
PAIRS = (
    "he she, himself herself, man woman, men women, boy girl, boys girls, male female, males females, father mother, "
    "fathers mothers, dad mom, son daughter, sons daughters, brother sister, brothers sisters, husband wife, "
    "husbands wives, "
    "uncle aunt, uncles aunts, nephew niece, grandfather grandmother, grandson granddaughter, king queen, kings "
    "queens, "
    "prince princess, actor actress, actors actresses, waiter waitress, mr ms, sir madam, gentleman lady, "
    "gentlemen ladies"
)
# After these words "her" is an object ("him") unless a noun follows; before these it is always an object.
_AFTER_OBJECT = frozenset(
    "a about after again alone along although always an and any are as at away back because been before but by "
    "can did do does "
    "down even ever every for from had has have he here how i if in into is it just like may might more much "
    "must my never no "
    "not now of off on once one only or our out over she should since so some than that the their them then "
    "there they this "
    "through to today together tomorrow too under until up very was we well were what when where which while "
    "who why will with "
    "without would yesterday yet you your".split()
)
_NEXT_WORD = re.compile(r"[ \n]+([A-Za-z']+)")


@dataclass
class Bias(Step):
    """Measure the rates of group and toxic terms before and after cleaning; drop texts with too many toxic terms.

    Attributes:
        groups: a word list of group terms by category, or "built-in".
        toxic: a word list of toxic terms, or "built-in".
        max_toxic_ratio: largest number of toxic terms per word; None only counts.
    """

    name: ClassVar[str] = "bias"
    rules: ClassVar[tuple[str, ...]] = ("toxic_terms",)
    groups: str = "built-in"
    toxic: str = "built-in"
    max_toxic_ratio: float | None = None

    def __post_init__(self) -> None:
        self._groups = WordList.of(self.groups, "groups")
        self._toxic = WordList.of(self.toxic, "toxic")

    def rates(self, features: Features) -> dict[str, int]:
        """Return the number of words, and of terms by category ("group.<category>", "toxic.<category>")."""
        found = {"words": features.n_words}
        for kind, terms in (("group", self._groups), ("toxic", self._toxic)):
            counts = terms.counts(features).tolist()
            found |= {f"{kind}.{name}": number for name, number in zip(terms.categories, counts) if number}
        return found

    def decide(self, features: Features, state: State) -> str | None:
        if self.max_toxic_ratio is None:
            return None
        ratio = self._toxic.total(features) / max(features.n_words, 1)
        return "toxic_terms" if ratio > self.max_toxic_ratio else None


@dataclass
class Scorer(Step):
    """Drop texts that a function of the user's scores too high or too low.

    Attributes:
        function: "module:function"; the function receives the text and returns a number.
        max_score: largest score that passes.
        min_score: smallest score that passes.
    """

    name: ClassVar[str] = "scorer"
    rules: ClassVar[tuple[str, ...]] = ("scorer",)
    function: str = ""
    max_score: float | None = None
    min_score: float | None = None

    def __post_init__(self) -> None:
        module, colon, name = self.function.partition(":")
        try:
            self._function: Callable[[str], float] = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as e:
            raise UserError(f"function {self.function!r} cannot be imported ({e}), expected module:function") from None

    def decide(self, features: Features, state: State) -> str | None:
        try:
            score = float(self._function(features.text))
        except Exception as e:
            raise UserError(f"scorer {self.function} failed on document {state.document.id}: {type(e).__name__}") from e
        if math.isnan(score):
            raise UserError(f"scorer {self.function} returned NaN for document {state.document.id}, expected a number")
        low = self.min_score is not None and score < self.min_score
        return "scorer" if low or over(score, self.max_score) else None


@dataclass
class Counterfactual(Step):
    """Swap paired terms in a share of the documents, and mark these with meta["counterfactual"].

    Which documents depends on the seed and the id alone. Marked documents are not swapped again. The swap is by word;
    case is kept. Of "her" the next word decides whether it becomes "him" or "his", which is sometimes wrong.

    Attributes:
        share: share of the documents, from 0 to 1.
        seed: seed of the choice.
        pairs: file with lines "category: left right, left right", or "built-in" for gender.
    """

    name: ClassVar[str] = "counterfactual"
    share: float = 0.5
    seed: int = 0
    pairs: str = "built-in"

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise UserError(f"share is {self.share}, expected a number from 0 to 1")
        built_in = self.pairs == "built-in"
        categories = {"gender": PAIRS.split(", ")} if built_in else read_terms(self.pairs)
        self._swaps: dict[str, str] = {"his": "her", "him": "her", "hers": "his", "her": "his"} if built_in else {}
        self._label = ",".join(sorted(categories))
        for term in (term for terms in categories.values() for term in terms):
            pair = term.lower().split()
            if len(pair) != 2:
                raise UserError(f"pairs: {term!r}, expected two words, such as 'he she'")
            self._swaps |= {pair[0]: pair[1], pair[1]: pair[0]}
        self._built_in = built_in
        terms = sorted(self._swaps, key=len, reverse=True)
        self._pattern = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, terms))})(?!\w)", re.I)

    def chosen(self, document_id: str) -> bool:
        """Return whether a document belongs to the share."""
        digest = hashlib.blake2b(f"{self.seed}\0{document_id}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
        return int.from_bytes(digest, "big") < self.share * 2.0**64

    def _swap(self, found: re.Match[str]) -> str:
        word = found[0]
        other = self._swaps.get(word.lower(), word)
        if self._built_in and word.lower() == "her":
            following = _NEXT_WORD.match(found.string, found.end())
            other = "his" if following and following[1].lower() not in _AFTER_OBJECT else "him"
        if word.isupper() and len(word) > 1:
            return other.upper()
        return other.capitalize() if word[0].isupper() else other

    def apply(self, state: State) -> str | None:
        if self.name in state.meta or not self.chosen(state.document.id):
            return None
        text, number = self._pattern.subn(self._swap, state.text)
        if number:
            state.replace(text)
            state.meta = {**state.meta, self.name: self._label}
            state.count("counterfactual.documents")
            state.count("counterfactual.terms", number)
        return None
