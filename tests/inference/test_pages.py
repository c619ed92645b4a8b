"""Pages of the cache: shared beginnings are found and nothing else, users are counted, unused pages go when memory is
wanted, and no page is lost whatever requests do."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from small_models import ROPE, model_of

from fastgpt.inference import Generator, Request
from fastgpt.inference.pages import Chain, Pages

A, B, C = ([n] * 8 for n in (1, 2, 3))


def text_in(pages: Pages, text: list[int], tree: str = "") -> Chain:
    """Read a text: take what is known, and enter the rest."""
    chain = Chain(tree)
    pages.match(chain, text)
    assert pages.grow(chain, len(text))
    pages.keep(chain, text)
    return chain


def test_a_text_takes_the_pages_of_its_longest_known_beginning() -> None:
    pages = Pages(9, 8)
    first = text_in(pages, [*A, *B, *C, 4])
    assert first.reused == 0 and first.known == 3 and pages.used == 4
    second = text_in(pages, [*A, *B, 5, 5])
    assert second.reused == 2 and second.pages[:2] == first.pages[:2] and pages.used == 5
    assert text_in(pages, [*B, *A, 5]).reused == 0, "the same pages after others"
    pages.release(first)
    assert pages.used == 6
    assert text_in(pages, [*A, *B, *C, 6]).reused == 3, "pages of a text that has ended"


def test_the_last_token_is_read_again() -> None:
    pages = Pages(9, 8)
    text_in(pages, [*A, *B])
    assert text_in(pages, [*A, *B]).reused == 1, "the page with the last token is not taken"


def test_trees_share_nothing() -> None:
    pages = Pages(9, 8)
    text_in(pages, [*A, 1], "adapter 1")
    assert text_in(pages, [*A, 1], "adapter 2").reused == 0 and text_in(pages, [*A, 1], "adapter 1").reused == 1


def test_a_hash_that_collides_finds_no_other_text() -> None:
    modulus = (1 << 61) - 1  # Python's hash of an int is its rest
    text, other = [5] * 9, [5 + modulus] * 9
    assert hash(("", tuple(text[:8]))) == hash(("", tuple(other[:8])))
    pages = Pages(9, 8)
    text_in(pages, text)
    assert text_in(pages, other).reused == 0 and text_in(pages, text).reused == 1


def test_the_page_that_was_not_used_for_longest_goes_first_and_never_one_that_others_follow() -> None:
    pages = Pages(6, 8)
    for text in ([*A, *B, 0], [*C, *B, 0]):  # two pages of each stay
        pages.release(text_in(pages, text))
    assert pages.used == 0 and pages.available == 6
    pages.release(text_in(pages, [*A, 9]))  # uses A again, not its successor
    large = Chain()
    assert pages.grow(large, 24)  # two free pages, and B after A
    probe = Chain()
    pages.match(probe, [*A, *B, 0])
    assert probe.reused == 1
    pages.release(probe)
    assert not pages.grow(large, 8 * 7) and len(large.pages) == 3, "too many, so nothing changes"
    assert pages.grow(large, 8 * 6) and pages.available == 0
    assert not pages._index


def test_the_end_of_a_text_goes_before_its_beginning() -> None:
    pages = Pages(3, 8)
    pages.release(text_in(pages, [*A, *B, 0]))
    assert pages.grow(Chain(), 16) and pages.counts() == {"used": 2, "kept": 1, "free": 0}
    assert pages.key(Chain(), [*A, 9]) in pages._index, "the beginning"


def test_a_page_that_two_texts_read_at_once_is_kept_once() -> None:
    pages, text = Pages(6, 8), [*A, *B, 0]
    one, two = Chain(), Chain()
    assert pages.grow(one, 17) and pages.grow(two, 17) and pages.used == 6
    assert pages.keep(one, text[:8]) is None and pages.keep(two, text) == 0
    assert two.pages[0] == one.pages[0] and pages.used == 5
    assert pages.keep(one, text) == 1 and one.pages[:2] == two.pages[:2] and pages.used == 4
    pages.release(one)
    pages.release(two)
    assert pages.used == 0 and pages.available == 6


def test_a_forgotten_index_finds_nothing_and_loses_no_page() -> None:
    pages = Pages(5, 8)
    chain = text_in(pages, [*A, *B, 0])
    pages.release(text_in(pages, [*C, 0]))
    pages.forget()
    assert pages.used == 3 and text_in(pages, [*C]).reused == 0
    pages.release(chain)
    assert pages.used == 1 and pages.available == 4


class Traffic(RuleBasedStateMachine):
    """Requests that come, run and are cancelled at any step, with half the pages that all of them want."""

    @initialize(prefill=st.sampled_from([3, 9, 40]), reuse=st.booleans())
    def start(self, prefill: int, reuse: bool) -> None:
        options: dict[str, Any] = dict(max_batch=4, page_size=8, cache_tokens=64, prefill_tokens=prefill, reuse=reuse)
        self.generator = Generator(MODEL, **options)
        self.generator.reserve()
        self.asked: set[int] = set()

    @rule(shared=st.integers(0, 3), own=st.integers(1, 20), new=st.integers(0, 12), scored=st.booleans())
    def add(self, shared: int, own: int, new: int, scored: bool) -> None:
        ids = [7] * 8 * shared + [own] * own
        request = Request(ids, new, seed=0, prompt_logprobs=0 if scored and len(ids) <= 32 else None)
        self.asked.add(self.generator.add(request))

    @rule(which=st.integers(0, 20))
    def cancel(self, which: int) -> None:
        if self.asked:
            number = sorted(self.asked)[which % len(self.asked)]
            self.generator.cancel(number)
            self.asked.discard(number)

    @rule(steps=st.integers(1, 6))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            for piece in self.generator.step():
                if piece.result is not None:
                    self.asked.remove(piece.number)

    @invariant()
    def every_page_is_free_or_in_the_index_or_used(self) -> None:
        schedule = self.generator.schedule
        pages, chains = schedule.pages, [r.chain for r in (*schedule.reading, *schedule.running)]
        users = Counter(page for chain in chains for page in chain.pages)
        assert pages._users == [users[page] for page in range(pages.count)]
        assert sorted([*pages._free, *pages._unused, *users]) == list(range(pages.count))
        assert sorted(pages._index.values()) == [p for p, entry in enumerate(pages._entries) if entry is not None]
        assert all(r.read <= len(r.chain.pages) * pages.size for r in (*schedule.reading, *schedule.running))

    def teardown(self) -> None:
        while self.generator.busy:
            self.step(1)
        assert not self.asked and self.generator.schedule.pages.used == 0, "no request is lost, and no page"


MODEL = model_of(**ROPE, block_size=32, n_layers=1).float().eval()
Traffic.TestCase.settings = settings(
    max_examples=12, stateful_step_count=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
TestTraffic = pytest.mark.filterwarnings("ignore")(Traffic.TestCase)
