"""A model that judges texts, behind a server with OpenAI's chat completions.

Two styles. `score`: the judge rates an answer from 1 to `scale`; the value is (rating - 1) / (scale - 1), the mean over
`votes`. `versus`: the judge compares an answer with the item's reference, once in each order, since judges prefer the
first or the second place (Zheng et al., arXiv 2306.05685); the value is 1, 0.5 or 0 for a win, a tie or a loss, the
mean over both orders and all votes.

A verdict is kept in a file under the hash of everything that was sent, so no question is asked twice. A question
without a readable verdict is a failure: it is counted, and never scored as 0.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from fastgpt.core.errors import UserError, cause_of
from fastgpt.data.read.web import NoRedirect

SCORE = """\
You judge the answer of a language model.

Task:
{prompt}
{reference}
Answer:
{answer}

{rubric}
Rate the answer from 1 (worst) to {scale} (best). Reply with one line: Rating: N"""
VERSUS = """\
You compare two answers of language models to the same task.

Task:
{prompt}

Answer A:
{first}

Answer B:
{second}

{rubric}
Which answer is better? Do not let their order or their length decide. Reply with one line: Verdict: A, Verdict: B or \
Verdict: tie"""
FATAL = (400, 401, 403, 404, 405, 422)  # another try gives the same
AT_ONCE = 8  # questions in flight
LONGEST_WAIT = 60.0  # seconds before another try


@dataclass(frozen=True)
class JudgeSettings:
    """A judge.

    Attributes:
        url: of the server, up to and without /chat/completions.
        model: name of the model there.
        key: name of the environment variable with the key; empty for none.
        style: score or versus.
        rubric: what a good answer is.
        scale: best rating.
        votes: times that a question is asked.
        timeout: seconds for one answer.
        retries: further tries after a failure.
        cache: file of the verdicts; default `.judge.jsonl` beside the suite.
    """

    url: str
    model: str
    key: str = ""
    style: Literal["score", "versus"] = "score"
    rubric: str = "A good answer is correct, complete and does what the task asks."
    scale: int = 5
    votes: int = 1
    timeout: float = 60.0
    retries: int = 4
    cache: str = ".judge.jsonl"

    def __post_init__(self) -> None:
        if urlsplit(self.url).scheme not in ("http", "https") or not urlsplit(self.url).netloc:
            raise ValueError(f"url is {self.url!r}, expected one such as http://localhost:8000/v1")
        if self.scale < 2 or self.votes < 1 or self.timeout <= 0 or self.retries < 0:
            raise ValueError("expected scale of 2 or more, votes of 1 or more, timeout above 0, retries of 0 or more")


@dataclass(frozen=True)
class Question:
    """An answer to judge. reference: empty if there is none."""

    prompt: str
    answer: str
    reference: str = ""


@dataclass
class Verdicts:
    """What a judge said.

    Attributes:
        values: one for each question, 0 to 1; None if a verdict of it failed.
        failures: reason -> verdicts.
        asked, kept: verdicts that the server gave, and that were in the file.
    """

    values: list[float | None]
    failures: Counter[str] = field(default_factory=Counter)
    asked: int = 0
    kept: int = 0


class Judge:
    """A judge with its file of verdicts.

    Args:
        settings: the judge.
        folder: of the suite; `cache` is relative to it.
        sleep: waits for a number of seconds.
    """

    def __init__(self, settings: JudgeSettings, folder: Path, sleep: Callable[[float], object] = time.sleep) -> None:
        self.settings, self.path, self._sleep = settings, folder / settings.cache, sleep
        self._known: dict[str, float] = {}
        if self.path.is_file():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                    self._known[row["question"]] = float(row["value"])
                except (ValueError, KeyError, TypeError):  # the line that a killed run was writing
                    continue

    def check(self) -> None:
        """Raise UserError unless the verdicts can be kept, the key is there and the server answers a request."""
        try:
            self.path.open("a", encoding="utf-8").close()
        except OSError as e:
            raise UserError(f"cannot write the verdicts of the judge to {self.path}: {cause_of(e)}") from None
        request = urllib.request.Request(f"{self.settings.url.rstrip('/')}/models", headers=self._headers())
        try:
            with _open(request, self.settings.timeout):
                return
        except urllib.error.HTTPError as e:
            if e.code in (401, 403):
                raise UserError(f"the judge at {self.settings.url} refuses the key ({e.code} {e.reason})") from None
            if e.code < 400:
                raise UserError(f"the judge at {self.settings.url} is elsewhere ({e.code} {e.reason})") from None
        except OSError as e:
            raise UserError(f"the judge at {self.settings.url} does not answer: {_reason(e)}") from None

    def __call__(self, questions: Sequence[Question]) -> Verdicts:
        """Judge answers.

        Raises:
            UserError: the server refuses a request, or the file of the verdicts cannot be written.
        """
        s = self.settings
        asked = [  # number of the question, vote, text, whether the reference is first
            (i, vote, *text)
            for i, question in enumerate(questions)
            for text in self._texts(question)
            for vote in range(s.votes)
        ]
        verdicts = Verdicts([None] * len(questions))
        values: list[list[float | None]] = [[] for _ in questions]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            answers = pool.map(lambda a: self._verdict(a[2], a[1], a[3]), asked)
            for (i, *_), (key, value, failure, new) in zip(asked, answers):
                values[i].append(value)
                if value is None:
                    verdicts.failures[failure] += 1
                    continue
                verdicts.asked += new
                verdicts.kept += not new
                if new:
                    self._keep(key, value)
        for i, found in enumerate(values):
            given = [v for v in found if v is not None]
            verdicts.values[i] = sum(given) / len(given) if len(given) == len(found) else None
        return verdicts

    def _texts(self, q: Question) -> list[tuple[str, bool]]:
        """Return the texts to send for a question, and whether the reference stands first."""
        s = self.settings
        if s.style == "versus":
            sides = ((q.answer, q.reference, False), (q.reference, q.answer, True))
            form = dict(prompt=q.prompt, rubric=s.rubric)
            return [(VERSUS.format(first=a, second=b, **form), swapped) for a, b, swapped in sides]
        reference = f"\nReference answer:\n{q.reference}\n" if q.reference else ""
        form = dict(prompt=q.prompt, answer=q.answer, reference=reference, rubric=s.rubric)
        return [(SCORE.format(scale=s.scale, **form), False)]

    def _verdict(self, text: str, vote: int, swapped: bool) -> tuple[str, float | None, str, bool]:
        """Return the key of a question, its value or else the failure, and whether the server was asked."""
        s = self.settings
        sent = {"model": s.model, "messages": [{"role": "user", "content": text}], "temperature": float(s.votes > 1)}
        identity = json.dumps([s.url, sent, s.style, s.scale, swapped, vote], sort_keys=True)
        key = hashlib.blake2b(identity.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
        if key in self._known:
            return key, self._known[key], "", False
        try:
            reply = self._post(sent)
        except _Failure as e:
            return key, None, str(e), True
        value = rating(reply, s.scale) if s.style == "score" else verdict(reply, swapped)
        return key, value, "" if value is not None else "no verdict in the reply", True

    def _post(self, sent: dict[str, Any]) -> str:
        """Send a request, again after failures that may pass, and return the text of the reply."""
        s = self.settings
        body = json.dumps(sent).encode()
        failure = ""
        for attempt in range(s.retries + 1):
            wait = min(2.0**attempt, LONGEST_WAIT)
            request = urllib.request.Request(f"{s.url.rstrip('/')}/chat/completions", body, self._headers())
            try:
                with _open(request, s.timeout) as response:
                    return str(json.load(response)["choices"][0]["message"]["content"])
            except urllib.error.HTTPError as e:
                if e.code < 400 or e.code in FATAL:
                    raise UserError(f"the judge at {s.url} refuses a request: {e.code} {e.reason}") from None
                failure = f"status {e.code}"
                after = e.headers.get("Retry-After", "")
                wait = min(float(after), LONGEST_WAIT) if after.isdigit() else wait
            except OSError as e:
                failure = _reason(e)
            except (ValueError, KeyError, IndexError, TypeError):
                failure = "a reply in another form"
            if attempt < s.retries:
                self._sleep(wait)
        raise _Failure(failure)

    def _headers(self) -> dict[str, str]:
        name = self.settings.key
        if not name:
            return {"Content-Type": "application/json"}
        if not os.environ.get(name):
            raise UserError(f"the judge needs a key in the environment variable {name}, which is not set")
        return {"Content-Type": "application/json", "Authorization": f"Bearer {os.environ[name]}"}

    def _keep(self, key: str, value: float) -> None:
        self._known[key] = value
        try:
            with self.path.open("a", encoding="utf-8") as f:  # a new line first: a killed run may have left half of one
                f.write("\n" + json.dumps({"question": key, "value": value}))
        except OSError as e:
            raise UserError(f"cannot write the verdicts of the judge to {self.path}: {cause_of(e)}") from None


def _open(request: urllib.request.Request, timeout: float) -> Any:
    return urllib.request.build_opener(NoRedirect).open(request, timeout=timeout)


class _Failure(Exception):
    """No reply after all tries."""


def _reason(error: OSError) -> str:
    inner = getattr(error, "reason", error)
    return (
        "timeout" if isinstance(inner, TimeoutError) else cause_of(inner) if isinstance(inner, OSError) else str(inner)
    )


def rating(reply: str, scale: int) -> float | None:
    """Return the last rating in a reply as a value from 0 to 1; None if there is none from 1 to `scale`."""
    found = re.findall(r"rating\W*(\d+(?:\.\d+)?)", reply, re.I)
    value = float(found[-1]) if found else 0.0
    return (value - 1) / (scale - 1) if 1 <= value <= scale else None


def verdict(reply: str, swapped: bool) -> float | None:
    """Return 1 if the last verdict in a reply is for the answer of the model, 0.5 for a tie, 0 for the reference."""
    found = re.findall(r"verdict\W*(A|B|tie)\b", reply, re.I)
    if not found:
        return None
    return {"a": float(not swapped), "b": float(swapped), "tie": 0.5}[found[-1].lower()]
