"""What happens to answers after they were given, in a thread: they are scored, compared with the baseline and kept."""

from __future__ import annotations

import queue
import re
import threading
from dataclasses import dataclass
from datetime import date, datetime, timezone
from typing import Any

from fastgpt.evaluate.safety.refusal import DEFAULT, refuses
from fastgpt.serve.watch.asked import text_of
from fastgpt.serve.watch.drift import REPEATED, Values, repeats
from fastgpt.serve.watch.reports import Reports
from fastgpt.serve.watch.settings import Watch
from fastgpt.serve.watch.store import Record, Store, now

QUEUE, BATCH = 4096, 64  # answers that may wait, and that are taken at a time
HOUR = 3600.0
REFUSALS = [re.compile(p) for p in DEFAULT]


@dataclass
class Answered:
    """An answer that is complete.

    Attributes:
        id, index: of the answer, and of the choice within it.
        user: as the client named them.
        asked: the prompt or messages; empty if neither a scorer nor the store needs them.
        flags, prompt_flags: names of those found so far.
        toxicity: False if a scorer failed, so that it is not known whether the answer is toxic.
    """

    id: str
    index: int
    model: str
    user: str | None
    asked: dict[str, Any]
    text: str
    flags: list[str]
    prompt_flags: list[str]
    prompt_tokens: int
    answer_tokens: int
    finish_reason: str
    toxicity: bool = True

    def record(self, store: Store, texts: bool) -> Record:
        """Return what is kept of it."""
        user = None if self.user is None else store.hash(self.user)
        record = {"id": self.id, "index": self.index, "time": now(), "user": user, "model": self.model}
        if texts:
            record |= {**self.asked, "answer": self.text}
        counts = {"prompt_tokens": self.prompt_tokens, "answer_tokens": self.answer_tokens}
        return {
            **record,
            "flags": self.flags,
            "prompt_flags": self.prompt_flags,
            **counts,
            "finish": self.finish_reason,
        }


class Recorder:
    """The thread. A full queue or a failure is counted, and never delays or breaks an answer."""

    def __init__(self, watch: Watch, reports: Reports) -> None:
        self.watch, self.reports = watch, reports
        self._queue = queue.Queue[Answered | None](QUEUE)
        self._expired: date | None = None
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def put(self, answer: Answered) -> None:
        """Hand over an answer; never waits."""
        try:
            self._queue.put_nowait(answer)
        except queue.Full:
            self.reports.failed("queue")

    def close(self, seconds: float = 10.0) -> None:
        """Finish what waits, for some seconds at most."""
        try:
            self._queue.put(None, timeout=seconds)
        except queue.Full:
            return
        self._thread.join(seconds)

    def _run(self) -> None:
        while True:
            self._expire()
            batch = self._take()
            answers = [answer for answer in batch if answer is not None]
            for step in (self._score, self._compare, self._keep) if answers else ():
                try:
                    step(answers)
                except Exception as e:  # whatever it is, the next answers are to be watched
                    self.reports.failed(step.__name__.strip("_"), e)
            if len(answers) < len(batch):
                return

    def _take(self) -> list[Answered | None]:
        """Return the answers that wait, or after an hour none."""
        found = list[Answered | None]()
        try:
            found.append(self._queue.get(timeout=HOUR))
            while found[-1] is not None and len(found) < BATCH:
                found.append(self._queue.get_nowait())
        except queue.Empty:
            pass
        return found

    def _score(self, answers: list[Answered]) -> None:
        prompts, texts = [text_of(a.asked) if a.asked else "" for a in answers], [a.text for a in answers]
        for scorer in self.watch.scorers:
            try:
                values = scorer.rate(prompts, texts)
            except Exception as e:  # a user's function may raise anything
                self.reports.failed(f"scorer {scorer.name}", e)
                for answer in answers:
                    answer.toxicity = False
                continue
            for answer, value in zip(answers, values, strict=True):
                if value >= scorer.threshold:
                    answer.flags.append(scorer.name)
                    self.reports.flagged(scorer.name, "answer", model=answer.model, id=answer.id)

    def _compare(self, answers: list[Answered]) -> None:
        if self.watch.baselines is None:
            return
        for answer in answers:
            try:
                found = self.watch.baselines.add(answer.model, self._measures(answer))
            except OSError as e:
                self.reports.failed("baseline", e)
                continue
            window = self.watch.baselines.window(answer.model)
            self.reports.recorded(answer.model, max(map(len, window.baseline.values())))
            for finding in found:
                self.reports.drift(answer.model, finding)

    def _measures(self, answer: Answered) -> Values:
        values: Values = {
            "refusal": float(refuses(answer.text, REFUSALS)),
            "repetition": float(repeats(answer.text) > REPEATED),
            "prompt_tokens": float(answer.prompt_tokens),
            "answer_tokens": float(answer.answer_tokens),
        }
        if self.watch.toxic and answer.toxicity:
            values["toxicity"] = float(not self.watch.toxic.isdisjoint(answer.flags))
        return values

    def _keep(self, answers: list[Answered]) -> None:
        store, texts = self.watch.store, self.watch.keep_texts
        kept = [a for a in answers if texts or a.flags or a.prompt_flags]
        if store is None or not kept:
            return
        try:
            store.add(*(a.record(store, texts) for a in kept))
        except OSError as e:
            self.reports.failed("store", e)

    def _expire(self) -> None:
        """Delete old records, once a day."""
        today = datetime.now(timezone.utc).date()
        if self.watch.store is None or self._expired == today:
            return
        self._expired = today
        try:
            self.watch.store.expire(self.watch.keep_days, today)
        except OSError as e:
            self.reports.failed("store", e)
