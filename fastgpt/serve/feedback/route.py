"""/v1/feedback: a thumb on an answer, or which of two texts is better. Kept with prompt and answer in a store."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import FastAPI
from pydantic import Field, model_validator

from fastgpt.serve.errors import ApiError
from fastgpt.serve.routes import Server
from fastgpt.serve.schemas import MAX_N, Message, Strict, Text
from fastgpt.serve.watch.store import Record, Store, now

KIND = "feedback"  # of the records


class Thumb(Strict):
    """Body of /v1/feedback. A second one of the same user on the same answer replaces the first."""

    id: Annotated[str, Field(min_length=1, max_length=200)]
    index: int = Field(0, ge=0, lt=MAX_N)
    rating: Literal["up", "down", "none"] | None = None
    chosen: Text | None = None
    rejected: Text | None = None
    comment: str | None = Field(None, max_length=10_000)
    user: str | None = Field(None, max_length=512)
    model: str | None = Field(None, max_length=512)
    prompt: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    answer: Text | None = None

    @model_validator(mode="after")
    def _agrees(self) -> Thumb:
        sides = (self.chosen is not None) + (self.rejected is not None)
        if (self.rating is not None) + (sides == 2) != 1 or sides == 1:
            raise ValueError("expected either rating, or chosen and rejected")
        if sides and self.chosen == self.rejected:
            raise ValueError("chosen and rejected are equal, expected two texts")
        if self.prompt is not None and self.messages is not None:
            raise ValueError("prompt and messages are both given, expected one of them")
        if sides and self.answer is not None:
            raise ValueError("answer is for rating, expected none beside chosen and rejected")
        return self


@dataclass(frozen=True)
class Feedback:
    """Where feedback is kept, and where answers are found.

    Attributes:
        store: takes the records.
        answers: stores that may have the answer.
    """

    store: Store
    answers: tuple[Store, ...] = ()

    def add(self, app: FastAPI, server: Server) -> None:
        """Add the route."""
        server.feedback = True

        @app.post("/v1/feedback")
        async def feedback(body: Thumb) -> dict[str, Any]:
            """Keep what a user says about an answer."""
            record = await asyncio.to_thread(self.keep, body)
            return {"object": "feedback", "id": body.id, "index": body.index, "rating": record.get("rating")}

    def keep(self, body: Thumb) -> Record:
        """Add a record to the store and return it.

        Raises:
            ApiError: prompt or answer are neither known nor given.
        """
        record = {**self._about(body), "id": body.id, "index": body.index, "time": now()}
        record["user"] = None if body.user is None else self.store.hash(body.user)
        said = {name: getattr(body, name) for name in ("rating", "chosen", "rejected", "comment")}
        record |= {name: value for name, value in said.items() if value is not None}
        try:
            self.store.add(record, kind=KIND)
        except OSError as e:
            raise ApiError(503, f"the feedback cannot be kept ({e.strerror})", kind="server_error") from None
        return record

    def _about(self, body: Thumb) -> Record:
        """Return model, prompt and answer: of the store that has them, else of the body."""
        names = ("model", "prompt", "messages") + (("answer",) if body.rating else ())
        for store in self.answers:
            found = store.find(body.id, index=body.index) or {}
            if isinstance(found.get("answer"), str):
                about = {name: found[name] for name in names if found.get(name) is not None}
                if store is self.store and found.get("user"):
                    about["author"] = found["user"]  # so that the store forgets the copy with the user
                return about
        given = {name: getattr(body, name) for name in names if getattr(body, name) is not None}
        if body.messages is not None:
            given["messages"] = [message.plain for message in body.messages]
        if not given.keys() & {"prompt", "messages"} or (body.rating and body.answer is None):
            what = "prompt or messages" + (", and answer" if body.rating else "")
            raise ApiError(404, f"the server has no answer {body.id!r}, expected {what} with the feedback", param="id")
        return given
