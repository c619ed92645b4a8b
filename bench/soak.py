"""Clients that behave and clients that do not, all at once, on one server: `fastgpt bench serve --soak SECONDS`.

Ordinary clients ask, whole or as a stream, for greedy answers that are known, and check them. Others read slowly or not
at all, leave in the middle, send too much, too little, or what is not HTTP. In the end every ordinary request must have
been answered once and right, and the server must hold what it held before: requests, file descriptors, threads, memory.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from fastgpt.bench import _http
from fastgpt.bench.servers import held, memory_mb

PROMPTS = [f"the cat {word}" for word in "sat on the mat ran to it and in a hat with an owl".split()]
NEW = 24  # tokens of an answer
GAP = 0.05  # nats between the two most likely tokens of an answer that is checked; rounding is a thousand times less
MIX = {  # clients of 64
    "whole": 20, "stream": 16, "slow": 5, "mute": 2, "leaves": 8, "leaves early": 3,
    "large": 4, "malformed": 4, "cut": 2,
}  # fmt: skip
ORDINARY = ("whole", "stream", "slow")
# bytes, and the status they must get; None: the connection may just end
MALFORMED: list[tuple[bytes, int | None]] = [
    (_http.request("/v1/completions", b'{"prompt": '), 400),
    (_http.request("/v1/completions", b"\xff\xfe\x00"), 400),
    (_http.request("/v1/completions", {"prompt": ["a", 1]}), 400),
    (_http.request("/v1/chat/completions", {"messages": [{"role": "user", "content": None}]}), 400),
    (_http.request("/v1/completions", b"[" * 5_000), 400),
    (_http.request("/v1/nothing", {}), 404),
    (b"not HTTP at all\r\n\r\n", 400),
    (b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: -5\r\n\r\n", 400),
]


@dataclass
class Report:
    """What came of a soak.

    Attributes:
        answered: right answers by kind of client, and what others got.
        busy: answers of status 429, after which the client asked again.
        faults: what went wrong, one sentence each.
        seconds: of each answer of the clients that ask for a whole one.
        held: figures of the server before, and after all clients have left.
        memory_mb: the most resident memory in each half.
    """

    answered: Counter[str] = field(default_factory=Counter)
    busy: int = 0
    faults: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    held: list[dict[str, float]] = field(default_factory=list)
    memory_mb: list[float] = field(default_factory=lambda: [0.0, 0.0])


class Soak:
    """The clients of one server.

    Args:
        port: of the server, on this machine.
        pid: of its process.
        body: bytes above which it refuses a body.
    """

    def __init__(self, port: int, pid: int, body: int) -> None:
        self.port, self.pid, self.body = port, pid, body
        self.expected: dict[str, str] = {}
        self.ids = set[str]()
        self.report = Report()
        self.end = 0.0

    async def learn(self) -> None:
        """Ask for each answer while nobody else does, and keep those that rounding cannot change."""
        for prompt in PROMPTS:
            body = {**greedy(prompt), "logprobs": 2}
            async with _http.asked(self.port, _http.request("/v1/completions", body)) as answer:
                choice = json.loads(await answer.body())["choices"][0]
            tops = [sorted(top.values()) for top in choice["logprobs"]["top_logprobs"]]
            if all(len(top) < 2 or top[-1] - top[-2] > GAP for top in tops):
                self.expected[prompt] = choice["text"]

    async def run(self, seconds: float, clients: int = 64) -> Report:
        """Run the clients, and return what came of it."""
        await self.learn()
        if not self.expected:
            raise ValueError("no answer is certain, expected a model whose most likely token is far ahead")
        self.report.held.append(held(self.pid))
        kinds = list(itertools.islice(itertools.cycle(spread(MIX)), clients))
        self.end = time.monotonic() + seconds
        watch = asyncio.create_task(self._watch(seconds))
        await asyncio.gather(*(self._client(kind, i) for i, kind in enumerate(kinds)))
        await watch
        self.report.held.append(await self._settled())
        return self.report

    async def _watch(self, seconds: float) -> None:
        """Note the memory of the server in each half."""
        while (left := self.end - time.monotonic()) > 0:
            half = int(left < seconds / 2)
            self.report.memory_mb[half] = max(self.report.memory_mb[half], memory_mb(self.pid))
            await asyncio.sleep(0.1)

    async def _settled(self) -> dict[str, float]:
        """Return what the server holds when it has noticed that all have left, or after a minute."""
        for _ in range(600):
            found = held(self.pid)
            found["requests"] = await self.requests()
            if found["requests"] == 0 and found["descriptors"] <= self.report.held[0]["descriptors"]:
                break
            await asyncio.sleep(0.1)
        return found

    async def requests(self) -> float:
        """Return the requests that the server counts as running or waiting."""
        _, text = await _http.get(self.port, "/metrics")
        return float(next(line for line in text.splitlines() if line.startswith("fastgpt_requests ")).split()[1])

    async def _client(self, kind: str, number: int) -> None:
        """Behave as one kind of client until the time is over; each does it once at least."""
        draw = random.Random(number)
        do: dict[str, Callable[[random.Random], Awaitable[Any]]] = {
            "whole": self._whole, "stream": self._stream, "slow": self._slow, "mute": self._mute,
            "leaves": self._leave, "leaves early": self._leave_early,
            "large": self._large, "malformed": self._malformed, "cut": self._cut,
        }  # fmt: skip
        while True:
            try:
                await do[kind](draw)
            except (OSError, EOFError, ValueError, KeyError, AssertionError) as e:
                self.report.faults.append(f"{kind}: {type(e).__name__}: {e}")
            if time.monotonic() >= self.end:
                return

    async def _ask(self, draw: random.Random, kind: str, read: Callable[[_http.Answer], Awaitable[list[Any]]]) -> None:
        """Ask until the server is not busy, and check the answer: texts that give the expected one."""
        prompt = draw.choice(list(self.expected))
        body = {**greedy(prompt), "stream": kind != "whole"}
        while True:
            async with _http.asked(self.port, _http.request("/v1/completions", body)) as answer:
                if answer.status == 429:
                    self.report.busy += 1
                    await asyncio.sleep(0.1)
                    continue
                assert answer.status == 200, f"status {answer.status}: {(await answer.body())[:300]!r}"
                parts = await read(answer)
            break
        assert not [p for p in parts if "error" in p], f"got {parts[-1]}"
        (id,) = {p["id"] for p in parts}
        assert id not in self.ids, f"{id} is the answer of two requests"
        self.ids.add(id)
        text = "".join(p["choices"][0]["text"] for p in parts)
        assert text == self.expected[prompt], f"{prompt!r} got {text!r}, expected {self.expected[prompt]!r}"
        assert sum(p["choices"][0]["finish_reason"] == "length" for p in parts) == 1, "it does not end once"
        self.report.answered[kind] += 1

    async def _whole(self, draw: random.Random) -> None:
        async def read(answer: _http.Answer) -> list[Any]:
            return [json.loads(await answer.body())]

        start = time.monotonic()
        await self._ask(draw, "whole", read)
        self.report.seconds.append(time.monotonic() - start)

    async def _stream(self, draw: random.Random) -> None:
        await self._ask(draw, "stream", _events)

    async def _slow(self, draw: random.Random) -> None:
        async def read(answer: _http.Answer) -> list[Any]:
            await asyncio.sleep(draw.uniform(0.2, 1.0))
            return await _events(answer)

        await self._ask(draw, "slow", read)

    async def _mute(self, draw: random.Random) -> None:
        """Ask for as much as there is, and read nothing of it."""
        body = {**greedy(draw.choice(PROMPTS)), "n": 6, "logprobs": 100, "stream": True}
        async with _http.connection(self.port) as (reader, writer):
            reader._transport.pause_reading()  # type: ignore[attr-defined]
            writer.write(_http.request("/v1/completions", body))
            await asyncio.sleep(min(3.0, max(0.1, self.end - time.monotonic())))
        self.report.answered["mute"] += 1

    async def _leave(self, draw: random.Random) -> None:
        """Leave in the middle of a stream."""
        body = {**greedy(draw.choice(PROMPTS)), "n": 3, "stream": True}
        async with _http.asked(self.port, _http.request("/v1/completions", body)) as answer:
            events = answer.events()
            for _ in range(draw.randrange(5) if answer.status == 200 else 0):
                await anext(events)
            self.report.answered[f"leaves {answer.status}"] += 1
        await asyncio.sleep(draw.uniform(0, 0.2))

    async def _leave_early(self, draw: random.Random) -> None:
        """Leave before anything comes."""
        body = {**greedy(draw.choice(PROMPTS)), "stream": draw.random() < 0.5}
        async with _http.connection(self.port) as (_, writer):
            writer.write(_http.request("/v1/completions", body))
            await asyncio.sleep(draw.uniform(0, 0.05))
        self.report.answered["leaves early"] += 1
        await asyncio.sleep(draw.uniform(0, 0.2))

    async def _large(self, draw: random.Random) -> None:
        """Send a body above the limit; one that says so is refused before it is read."""
        honest = draw.random() < 0.5
        sent = _http.request("/v1/completions", {"prompt": "a" * self.body})
        if not honest:
            sent = sent.split(b"\r\n\r\n", 1)[0].rpartition(b"\r\n")[0] + b"\r\nTransfer-Encoding: chunked\r\n\r\n"
            part = b"a" * 4096
            sent += (b"%x\r\n%s\r\n" % (len(part), part)) * (self.body // len(part) + 2)
        try:
            async with _http.asked(self.port, sent) as answer:
                assert answer.status == 413, f"status {answer.status}"
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # closed while it still sent
        self.report.answered["large"] += 1
        await asyncio.sleep(0.05)

    async def _malformed(self, draw: random.Random) -> None:
        sent, expected = draw.choice(MALFORMED)
        async with _http.asked(self.port, sent) as answer:
            assert answer.status == expected, f"{sent[:200]!r} got status {answer.status}, expected {expected}"
        self.report.answered["malformed"] += 1
        await asyncio.sleep(0.02)

    async def _cut(self, draw: random.Random) -> None:
        """Send half a body, and leave."""
        async with _http.connection(self.port) as (_, writer):
            writer.write(_http.request("/v1/completions", b'{"prompt": "a', length=draw.randrange(100, 10_000)))
            await asyncio.sleep(draw.uniform(0, 0.2))
        self.report.answered["cut"] += 1


def greedy(prompt: str) -> dict[str, Any]:
    """Return the body of a request whose answer does not depend on chance."""
    return {"prompt": prompt, "max_tokens": NEW, "temperature": 0, "ignore_eos": True}


def spread(mix: dict[str, int]) -> list[str]:
    """Return the kinds as often as the mix says, each kind evenly over the list."""
    places = [((i + 0.5) / count, kind) for kind, count in mix.items() for i in range(count)]
    return [kind for _, kind in sorted(places)]


async def _events(answer: _http.Answer) -> list[Any]:
    *parts, last = [event async for event in answer.events()]
    assert last is None, f"the stream ends with {last}"
    return parts


def show(report: Report) -> str:
    """Return the report as text."""
    took = sorted(report.seconds)
    lines = [f"answers {dict(sorted(report.answered.items()))}, {report.busy} times busy"]
    if took:
        p50, p99 = (1e3 * took[min(len(took) - 1, int(len(took) * q))] for q in (0.5, 0.99))
        lines.append(f"a whole answer of {NEW} tokens: p50 {p50:,.0f} ms, p99 {p99:,.0f} ms")
    lines.append(f"held before {report.held[0]}, after {report.held[-1]}")
    lines.append(f"memory {report.memory_mb[0]:,.0f} MB in the first half, {report.memory_mb[1]:,.0f} in the second")
    return "\n".join([*lines, *(f"fault: {fault}" for fault in report.faults[:20])])
