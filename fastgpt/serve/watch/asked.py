"""What a call asks, in the form in which it is watched and kept: texts of prompts, messages, and the user."""

from __future__ import annotations

from typing import Any

from fastgpt.serve.calls import ChatCall, CompletionCall
from fastgpt.serve.messages import Messages, MessagesCall
from fastgpt.serve.responses import ResponsesCall
from fastgpt.serve.schemas import Chat

Call = CompletionCall | ChatCall | ResponsesCall | MessagesCall


def messages_of(call: ChatCall | ResponsesCall | MessagesCall) -> list[dict[str, str]]:
    """Return the messages of a chat, each with role and content."""
    chat = call.body if isinstance(call.body, Chat) else call.body.chat()
    return [message.plain for message in chat.messages]


def prompt_of(call: Call, i: int) -> dict[str, Any]:
    """Return what request i of a call asked, for a record: its prompt, or its messages."""
    return {"prompt": call.prompt(i)} if isinstance(call, CompletionCall) else {"messages": messages_of(call)}


def text_of(asked: dict[str, Any]) -> str:
    """Return the text that a person wrote: of a prompt, or of all messages of the user."""
    if "prompt" in asked:
        return str(asked["prompt"])
    return "\n".join(message["content"] for message in asked["messages"] if message["role"] == "user")


def user_of(call: Call) -> str | None:
    """Return the user whom the client named, if any."""
    if isinstance(call.body, Messages):
        return call.body.metadata.user_id if call.body.metadata else None
    return call.body.user or call.body.safety_identifier
