"""See the answers of a server as they are given: flag them piece by piece, and hand complete ones to the recorder."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

from prometheus_client import CollectorRegistry

from fastgpt.inference import Piece, Request, Result
from fastgpt.serve.errors import ApiError
from fastgpt.serve.watch.asked import Call, prompt_of, text_of, user_of
from fastgpt.serve.watch.flags import Scan
from fastgpt.serve.watch.recorder import Answered, Recorder
from fastgpt.serve.watch.reports import Reports
from fastgpt.serve.watch.settings import Watch

Pieces = AsyncIterator[tuple[int, Piece]]


class Watcher:
    """Sees every answer. Without one, a server does nothing for watching, not even per answer.

    Args:
        registry: of the server's metrics, to which the watcher's are added.
    """

    def __init__(self, watch: Watch, registry: CollectorRegistry) -> None:
        self.watch = watch
        self.reports = Reports(registry, watch.webhook, watch.secret)
        self.recorder = Recorder(watch, self.reports)

    async def seen(self, call: Call, requests: Sequence[Request], pieces: Pieces) -> Pieces:
        """Yield the pieces of a call's requests, of flagged answers fewer if flags stop them.

        Raises:
            ApiError: a prompt is flagged, and flags stop answers; or as `pieces`.
        """
        async with aclosing(pieces):  # type: ignore[type-var]
            answers = [Answer(self, call, i, request) for i, request in enumerate(requests)]
            left = len(answers)
            async for i, piece in pieces:
                for out in answers[i].push(piece):
                    left -= out.result is not None
                    yield i, out
                if not left:
                    return

    def close(self) -> None:
        """Finish what waits."""
        self.recorder.close()
        self.reports.close()


class Answer:
    """One answer that is being given.

    With stop, a piece waits until it is certain that no match lies within the text that ends with it, so that no
    complete match is ever sent.

    Args:
        i: number of the request within the call.

    Raises:
        ApiError: the prompt is flagged, and flags stop answers.
    """

    def __init__(self, watcher: Watcher, call: Call, i: int, request: Request) -> None:
        self.watcher, self.call, self.i, self.request = watcher, call, i, request
        watch = watcher.watch
        self.scan = Scan(watch.flags)
        self.asked: dict[str, Any] = {}
        if watch.prompts or watch.keep_texts or watch.scorers:
            self.asked = prompt_of(call, i)
        self.prompt_flags = self._flag_prompt() if watch.prompts else []
        self._waiting = deque[tuple[int, Piece]]()  # pieces with the characters of the text up to their end
        self._sent = list[Piece]()
        self._stopped = False

    def _flag_prompt(self) -> list[str]:
        text = text_of(self.asked)
        found = [flag.name for flag in self.watcher.watch.flags if flag.found(text)]
        if self.i % max(1, getattr(self.call.body, "n", 1)) == 0:  # once for all answers to a prompt
            self._report(found, "prompt")
        if found and self.watcher.watch.stop:
            raise ApiError(400, "the prompt was flagged by this server's rules", code="content_filter")
        return found

    def push(self, piece: Piece) -> list[Piece]:
        """Take a piece; return those that are to be sent now."""
        if self._stopped:
            return []
        found = self.scan.push(piece.text)
        if piece.result is not None:
            found += self.scan.end()
        self._report(found, "answer")
        if self.watcher.watch.stop:
            return self._held(piece, bool(found))
        if piece.result is not None:
            self._complete(piece.result)
        return [piece]

    def _held(self, piece: Piece, flagged: bool) -> list[Piece]:
        self._waiting.append((len(self.scan.text), piece))
        if flagged:
            self._stopped = True
            self._waiting.clear()
            result = self._cut()
            self._complete(result)
            return [Piece(piece.number, None, "", result)]
        ready = []
        while self._waiting and self._waiting[0][0] <= self.scan.clear:
            ready.append(self._waiting.popleft()[1])
        self._sent += ready
        if piece.result is not None:
            self._complete(piece.result)
        return ready

    def _cut(self) -> Result:
        """Return the result of an answer that ends with what has been sent."""
        tokens = [piece for piece in self._sent if piece.id is not None]
        logprobs = [p.logprob for p in tokens if p.logprob is not None]
        top = [p.top_logprobs for p in tokens if p.top_logprobs is not None]
        return Result(
            [p.id for p in tokens if p.id is not None],
            "".join(piece.text for piece in self._sent),
            "content_filter",
            len(self.request.prompt),
            self.request.seed or 0,
            logprobs if self.request.logprobs is not None else None,
            top if self.request.logprobs is not None else None,
        )

    def _report(self, names: list[str], where: str) -> None:
        for name in names:
            self.watcher.reports.flagged(name, where, model=self.call.served.name, id=self.call.id)

    def _complete(self, result: Result) -> None:
        call, scan = self.call, self.scan
        self.watcher.recorder.put(
            Answered(
                id=call.id,
                index=self.i,
                model=call.served.name,
                user=user_of(call),
                asked=self.asked,
                text=result.text,
                flags=list(scan.found),
                prompt_flags=self.prompt_flags,
                prompt_tokens=result.prompt_tokens,
                answer_tokens=len(result.ids),
                finish_reason=result.finish_reason,
            )
        )
