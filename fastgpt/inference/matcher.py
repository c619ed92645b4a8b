"""Which tokens may come next in the text of a grammar.

Before a token is chosen, the parser of the grammar says which tokens may come next, a bit for each, and the others are
removed. The parser is llguidance: it compiles a schema in about a millisecond, where xgrammar 0.2.9 took tens of them,
and refuses keywords that it cannot enforce (`not`, `uniqueItems`), which xgrammar ignores.

A special token is never written, except one that ends the text, where the grammar may end. Where the grammar leaves one
text, its tokens are those into which the tokenizer cuts it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastgpt.core.errors import UserError
from fastgpt.inference.grammar import Grammar
from fastgpt.inference.requests import TextTokenizer

LACKING = "no token of the tokenizer continues the text"
MOST = 64  # compiled grammars that are kept
# of the library, for each grammar and each step; what is larger would hold up the other rows of a batch
LIMITS: dict[str, Any] = dict(
    initial_lexer_fuel=50_000, step_lexer_fuel=50_000, max_lexer_states=50_000, verbose_errors=False
)
# A weak model would go on with blanks for ever. `lenient` would ignore what cannot be enforced.
JSON_OPTIONS = dict(whitespace_pattern=r"[ \t\r\n]{0,20}", whitespace_flexible=True, lenient=False, coerce_one_of=False)


class Grammars:
    """Compiler of grammars for one tokenizer, which keeps the last ones. Several threads may use it.

    Args:
        tokenizer: of the model.
        ends: ids that end a text.
        vocab_size: ids of the model; those that the tokenizer lacks are never allowed.

    Raises:
        UserError: llguidance is not installed.
        ValueError: no id ends a text.
    """

    def __init__(self, tokenizer: TextTokenizer, ends: Iterable[int], vocab_size: int) -> None:
        try:
            import llguidance
        except ImportError:
            raise UserError("grammars need llguidance, expected `pip install fastgpt[serve]`") from None
        self.ends = sorted(i for i in ends if 0 <= i < tokenizer.n_vocab)
        if not self.ends:
            raise ValueError("grammar: the model has no end-of-text token, expected one, where a text may end")
        self.vocab_size = vocab_size
        self._specials = sorted({*tokenizer.specials.values(), *self.ends})
        library: Any = llguidance
        tokens = _Vocabulary(tokenizer, self._specials, self.ends[0])
        self._vocabulary = library.LLTokenizer(tokens, eos_token=self.ends)
        self._parsers, self._limits = library.LLMatcher, library.LLParserLimits(**LIMITS)
        self._kept: OrderedDict[Grammar, Any] = OrderedDict()  # a parser at its beginning, or why there is none
        self._lock = threading.Lock()

    def start(self, grammar: Grammar, ends: Collection[int] = ()) -> Matcher:
        """Return what follows a text from its beginning on.

        Args:
            ends: further special tokens that may end this text.

        Raises:
            ValueError: the grammar cannot be compiled, has what the library cannot enforce, or begins with characters
                that the tokenizer lacks.
        """
        with self._lock:
            if grammar not in self._kept:
                self._kept[grammar] = self._compile(grammar)
            self._kept.move_to_end(grammar)
            if len(self._kept) > MOST:
                self._kept.popitem(last=False)
            found = self._kept[grammar]
            if isinstance(found, str):
                raise ValueError(f"grammar: {found}")
            parser = found.deep_copy()
        matcher = Matcher(parser, self._ordinary(), self.ends, ends)
        if matcher.error:
            raise ValueError(matcher.error)
        return matcher

    def _ordinary(self) -> Tensor:
        """Return the bits of all tokens but the special ones that do not end a text."""
        allowed = torch.ones(-(-self.vocab_size // 32) * 32, dtype=torch.bool)
        allowed[self._vocabulary.vocab_size :] = False
        allowed[[i for i in self._specials if i < self.vocab_size and i not in self.ends]] = False
        return pack(allowed)

    def _compile(self, grammar: Grammar) -> Any:
        """Return a parser, or why there is none."""
        parsers = self._parsers
        try:
            if grammar.kind == "lark":
                source = parsers.grammar_from_lark(grammar.text)
            elif grammar.kind in ("regex", "choice"):
                source = parsers.grammar_from_regex(_expression(grammar))
            else:
                schema = grammar.text if grammar.kind == "json_schema" else '{"type": "object"}'
                source = parsers.grammar_from_json_schema(schema, overrides=JSON_OPTIONS)
            parser = parsers(self._vocabulary, source, log_level=0, limits=self._limits)
        except (ValueError, UnicodeError) as e:
            return f"the {grammar.kind} cannot be used ({_sentence(str(e))})"
        if not parser.is_error():
            parser.compute_bitmask()  # the first step builds most of the lexer
        if parser.is_error():
            return f"the {grammar.kind} cannot be used ({_sentence(parser.get_error())})"
        return parser


class Matcher:
    """What may follow the text of one request.

    Attributes:
        allowed: (ceil(V / 32),) int32, a bit for each token, lowest first: it may come next.
        complete: nothing may follow.
        error: why no text can be found any more; empty as long as it can.
    """

    def __init__(self, parser: Any, ordinary: Tensor, ends: Sequence[int], more_ends: Collection[int]) -> None:
        self._parser, self._ordinary, self._ends = parser, ordinary, list(ends)
        self._more = torch.zeros(len(ordinary) * 32, dtype=torch.bool)
        self._more[list(more_ends)] = True
        self._more = pack(self._more)
        self.allowed, self.complete, self.error = ordinary, False, ""
        self._fill()

    def accept(self, token: int) -> None:
        """Append a token that was allowed."""
        if self._parser.consume_token(token):
            self.complete = self._parser.is_stopped()
            if not self.complete:
                self._fill()
        if self._parser.is_error():
            self._fail(self._parser.get_error())

    def _fill(self) -> None:
        bits = torch.frombuffer(bytearray(self._parser.compute_bitmask()), dtype=torch.int32)
        self.allowed = torch.zeros_like(self._ordinary)
        n = min(len(bits), len(self.allowed))
        self.allowed[:n] = bits[:n] & self._ordinary[:n]
        if self._parser.is_error():
            self._fail(self._parser.get_error())
        elif not self.allowed.any():
            self._fail(LACKING)
        elif any(int(self.allowed[i // 32]) >> i % 32 & 1 for i in self._ends):
            self.allowed |= self._more

    def _fail(self, why: str) -> None:
        self.error = f"grammar: the text cannot be continued ({_sentence(why)})"


class _Vocabulary:
    """A tokenizer as the library reads it."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: TextTokenizer, specials: Sequence[int], end: int) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id, self.special_token_ids = end, specials
        self.tokens = [tokenizer.decode_bytes([i]) for i in range(tokenizer.n_vocab)]
        self._ids: dict[bytes, int] = {}
        for i in sorted(set(range(len(self.tokens))) - set(specials), reverse=True):
            self._ids[self.tokens[i]] = i
        self._longest = max(map(len, self._ids), default=0)

    def __call__(self, text: str) -> list[int]:
        """Return the ids of a text, whose bytes are exactly those of the text.

        A tokenizer may add a space in front, or change a text. So the text is encoded once more behind another
        character, and what then does not end in the ids of these bytes is cut into the longest tokens.
        """
        data = text.encode()
        for before in ("", "\x01"):
            ids = [int(i) for i in self._tokenizer.encode(before + text)]
            rest = b""
            for at in range(len(ids) - 1, -1, -1):
                rest = self.tokens[ids[at]] + rest
                if rest == data:
                    return ids[at:]
        return self._greedy(data)

    def _greedy(self, data: bytes) -> list[int]:
        found, at = list[int](), 0
        while at < len(data):
            sizes = range(min(self._longest, len(data) - at), 0, -1)
            size = next((n for n in sizes if data[at : at + n] in self._ids), 0)
            if not size:
                break
            found.append(self._ids[data[at : at + size]])
            at += size
        return found


def pack(flags: Tensor) -> Tensor:
    """Return flags (n,) bool, n a multiple of 32, as (n / 32,) int32, the first one in the lowest bit."""
    bits = flags.view(-1, 32).long() << torch.arange(32)
    return bits.sum(1).to(torch.int32)  # the highest bit wraps to the sign


def _expression(grammar: Grammar) -> str:
    """Return the regular expression of "regex" or "choice"."""
    if grammar.kind == "regex":
        return grammar.text
    return "|".join("".join(c if c.isascii() and c.isalnum() else f"\\x{{{ord(c):x}}}" for c in one)
                    for one in grammar.choices)  # fmt: skip


def _sentence(text: str) -> str:
    """Return the reason in an error of the library, which shows the place in several lines and its own state."""
    if "NoExtension" in text:
        return LACKING
    reason = text.partition("error: ")[2] if "error: " in text and "\n" in text else text
    reason = reason.partition("<")[0] if "verbose" in reason or "<state>" in reason else reason
    return " ".join(reason.split("\n   1 |")[0].split())[:300].rstrip(". ") or "unknown"
