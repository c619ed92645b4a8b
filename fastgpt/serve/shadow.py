"""A shadow: a candidate that answers a share of the live requests of a model after they have been answered, to compare.

Clients never wait for it, and no text is kept. Its engine has the lowest priority of the processor. When it is
busy, calls are dropped. It is asked how likely it finds both answers, which costs the live engine nothing:

    agreement         share of the tokens of live answers that the candidate finds most likely at their place
    logprob_per_byte  mean log-probability of a byte, of live answers and of its own ones, by the candidate
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from prometheus_client import Counter as Metric

from fastgpt.core.errors import cause_of
from fastgpt.core.folders import write_text
from fastgpt.inference import Piece, Request, Result
from fastgpt.serve.errors import ApiError
from fastgpt.serve.metrics import Metrics
from fastgpt.serve.routes import Answered, Server
from fastgpt.serve.running import collect, run
from fastgpt.serve.served import Served

log = logging.getLogger("fastgpt")
NICE = 19  # the lowest priority
SECONDS = 10.0  # between writes of the report
Flags = Callable[[str], list[str]]  # from the text of an answer to the names of what is wrong with it


@dataclass
class Side:
    """Sums over the answers of one of the two models.

    Attributes:
        tokens, bytes: of the answers.
        seconds, first: to the last and to the first token of a call.
        logprob: of answers, by the candidate.
        scored: bytes of the answers that are in `logprob`.
        reasons: why answers ended.
    """

    answers: int = 0
    tokens: int = 0
    bytes: int = 0
    seconds: float = 0.0
    first: float = 0.0
    logprob: float = 0.0
    scored: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    flags: Counter[str] = field(default_factory=Counter)

    def add(self, answered: Answered, flags: Flags | None) -> None:
        """Count the answers of a call."""
        self.seconds += answered.seconds
        self.first += answered.first
        for result in answered.results:
            self.answers += 1
            self.tokens += len(result.ids)
            self.bytes += len(result.text.encode())
            self.reasons[result.finish_reason] += 1
            self.flags.update(flags(result.text) if flags else ())

    def report(self, calls: int) -> dict[str, Any]:
        """Return means over answers, and over calls."""
        return {
            "tokens": _mean(self.tokens, self.answers),
            "bytes": _mean(self.bytes, self.answers),
            "finish_reasons": dict(self.reasons),
            "flags": dict(self.flags),
            "seconds": _mean(self.seconds, calls),
            "first_token_seconds": _mean(self.first, calls),
            "logprob_per_byte": _mean(self.logprob, self.scored),
        }


@dataclass(frozen=True)
class Scoring:
    """A request that scores an answer of one side, whose tokens begin at a place."""

    side: str
    at: int
    text: str
    request: Request


class Shadow:
    """A candidate beside a live model.

    Args:
        candidate: the model, with an engine of its own.
        live: name of the model whose calls it gets.
        share: of the calls, 0 to 1.
        timeout: seconds after which a call of the candidate is given up.
        file: gets the report; None: no file.
        flags: finds what is wrong with an answer; None: as the server's own flags, if it has some.
        draw: returns a number from 0 to 1 for each call, which is taken if it is less than `share`.
    """

    def __init__(
        self,
        candidate: Served,
        live: str,
        share: float,
        timeout: float,
        file: Path | None = None,
        flags: Flags | None = None,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self.candidate, self.live, self.share, self.timeout = candidate, live, share, timeout
        self.file, self.flags, self.draw = file, flags, draw
        self.counts = Counter[str]()
        self.sides = {"live": Side(), "candidate": Side()}
        self.equal = self.agreed = self.judged = 0
        self.started = time.time()
        self.metrics = Metrics()  # its tokens are not those of clients
        self.tasks: set[asyncio.Task[None]] = set()

    def add(self, app: FastAPI, server: Server) -> None:
        """Look at the answered calls of a server, and add the route of the report."""
        registry = server.metrics.registry
        self.total = Metric("fastgpt_shadow_calls", "Calls of the shadow by outcome.", ["outcome"], registry=registry)
        self.same = Metric("fastgpt_shadow_equal_answers", "Answers equal to the live ones.", registry=registry)
        if server.watcher is not None and self.flags is None:
            watched = server.watcher.watch.flags
            self.flags = lambda text: [flag.name for flag in watched if flag.found(text)]
        server.observers.append(self.see)
        server.background.append(self._run)

        @app.get("/v1/shadow")
        async def shadow() -> dict[str, Any]:
            """Return how the candidate compares."""
            return self.report()

    def see(self, answered: Answered) -> None:
        """Take a share of the calls, unless the candidate is busy."""
        if answered.call.served.name != self.live or self.draw() >= self.share:
            return
        link = self.candidate.link
        if len(self.tasks) + link.load.requests >= link.model.rows:
            self._count("dropped")
            return
        task = asyncio.create_task(self._compare(answered))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def report(self) -> dict[str, Any]:
        """Return what is known so far, as JSON values."""
        n = self.sides["live"].answers
        calls = self.counts["compared"]
        return {
            "live": self.live,
            "candidate": self.candidate.link.model.path,
            "share": self.share,
            "since": int(self.started),
            "calls": {name: self.counts[name] for name in ("compared", "dropped", "refused", "failed")},
            "answers": n,
            "equal_answers": _mean(self.equal, n),
            "agreement": _mean(self.agreed, self.judged),
            "sides": {name: side.report(calls) for name, side in self.sides.items()},
        }

    async def _run(self) -> None:
        """Write the report now and then; end the engine with the server."""
        try:
            while True:
                await asyncio.sleep(SECONDS)
                await self._write()
        finally:
            for task in self.tasks:
                task.cancel()
            await asyncio.gather(*self.tasks, return_exceptions=True)
            await self._write()
            await asyncio.to_thread(self.candidate.link.close)

    async def _write(self) -> None:
        if self.file is None:
            return
        text = json.dumps(self.report(), indent=1) + "\n"
        try:
            await asyncio.to_thread(write_text, self.file, text)
        except OSError as e:
            log.error("--shadow-report: %s cannot be written (%s)", self.file, cause_of(e))

    async def _compare(self, answered: Answered) -> None:
        """Let the candidate answer a call and score both answers, and count what differs."""
        try:
            requests, own = await self._answer(answered)
            scorings = [*self._scorings("live", requests, answered), *self._scorings("candidate", requests, own)]
            scored = await self._run_all([scoring.request for scoring in scorings])
        except ApiError as e:
            self._count("refused" if e.status == 400 else "failed")
            return
        self._count("compared")
        for name, one in (("live", answered), ("candidate", own)):
            self.sides[name].add(one, self.flags)
        equal = sum(a.text == b.text for a, b in zip(answered.results, own.results))
        self.equal += equal
        self.same.inc(equal)
        for scoring, result in zip(scorings, scored):
            self._score(scoring, result)

    async def _answer(self, answered: Answered) -> tuple[list[Request], Answered]:
        """Return the requests of a call, as the candidate's tokenizer and template make them, and its answer."""
        call = replace(answered.call, served=self.candidate)
        requests = await asyncio.to_thread(call.requests)
        start, first = time.perf_counter(), 0.0

        async def timed() -> AsyncIterator[tuple[int, Piece]]:
            nonlocal first
            async for i, piece in run(self.candidate.link, requests, self.metrics, self.timeout):
                first = first or time.perf_counter() - start
                yield i, piece

        results = await collect(timed(), len(requests))
        return requests, Answered(call, results, first, time.perf_counter() - start)

    async def _run_all(self, requests: list[Request]) -> list[Result]:
        return await collect(run(self.candidate.link, requests, self.metrics, self.timeout), len(requests))

    def _scorings(self, side: str, requests: list[Request], answered: Answered) -> list[Scoring]:
        """Return what scores answers after the candidate's prompts; not of empty answers, and of those that do not
        fit."""
        found = []
        for request, result in zip(requests, answered.results):
            prompt = [int(i) for i in request.prompt]
            ids = [*prompt, *(int(i) for i in self.candidate.tokenizer.encode(result.text))]
            if prompt and len(prompt) < len(ids) <= self.candidate.context:
                found.append(Scoring(side, len(prompt), result.text, Request(ids, 0, prompt_logprobs=1)))
        return found

    def _score(self, scoring: Scoring, scored: Result) -> None:
        """Count how likely the candidate finds an answer."""
        values = (scored.prompt_logprobs or [])[scoring.at :]
        tops = (scored.prompt_top_logprobs or [])[scoring.at :]
        side = self.sides[scoring.side]
        side.logprob += sum(value for value in values if value is not None)
        side.scored += len(scoring.text.encode())
        if scoring.side == "live":
            self.judged += len(values)
            self.agreed += sum(bool(top) and value == top[0][1] for value, top in zip(values, tops))

    def _count(self, outcome: str) -> None:
        self.counts[outcome] += 1
        self.total.labels(outcome).inc()


def _mean(total: float, n: int) -> float | None:
    return total / n if n else None
