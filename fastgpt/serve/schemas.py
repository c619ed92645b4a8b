"""What clients may send, and how it becomes requests of the engine. Unknown and contradictory settings are errors."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from fastgpt.inference import Grammar
from fastgpt.serve.strict import Strict
from fastgpt.serve.structured import ChatFormat, StructuredOutputs, grammar_of

MAX_N = 64
Text = Annotated[str, Field(max_length=1 << 22)]
TokenId = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class StreamOptions(Strict):
    include_usage: bool = False


class Sampling(Strict):
    """What completions and chat share. Settings of OpenAI's API that change nothing at their default are accepted."""

    model: str | None = None
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    n: int = Field(1, ge=1, le=MAX_N)
    stop: str | list[str] | None = None
    seed: int | None = Field(None, ge=0, lt=1 << 63)
    stream: bool = False
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    user: str | None = Field(None, max_length=512)
    safety_identifier: str | None = Field(None, max_length=512)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: Annotated[dict[TokenId, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)] | None = None
    structured_outputs: StructuredOutputs | None = None

    @model_validator(mode="after")
    def _agree(self) -> Sampling:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for stream, expected stream true")
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stops) > 16 or not all(0 < len(s) <= 1000 for s in stops):
            raise ValueError("stop: expected at most 16 texts of 1 to 1000 characters")
        return self

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    def settings(self, defaults: dict[str, Any]) -> dict[str, Any]:
        """Return the sampling settings of a request, those of the model where the client gave none."""
        names = (
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
        )
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        bias = {int(token): value for token, value in (self.logit_bias or {}).items()}
        return {**defaults, **given, "ignore_eos": self.ignore_eos, "logit_bias": bias or None}

    def grammar(self) -> Grammar | None:
        """Return what the text must be, if the client says so. Raises ApiError."""
        return grammar_of(None, self.structured_outputs)


class Completion(Sampling):
    """Body of /v1/completions."""

    prompt: Text | Ids | Annotated[list[Text], Field(min_length=1)] | Annotated[list[Ids], Field(min_length=1)]
    max_tokens: int = Field(16, ge=0)
    logprobs: int | None = Field(None, ge=0, le=100)
    echo: bool = False
    best_of: Literal[1] | None = None
    suffix: Text | None = None

    @model_validator(mode="after")
    def _streams_what_it_can(self) -> Completion:
        if self.stream and self.echo:
            raise ValueError("echo is not for stream, expected stream false")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens is 0, expected at least 1, or echo true")
        if self.suffix and (self.echo or not isinstance(self.prompt, str)):
            raise ValueError("suffix is for one prompt that is a text, without echo")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, each a text or ids."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]


class Part(Strict):
    type: Literal["text"]
    text: Text


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[Part]
    name: str | None = None

    @property
    def plain(self) -> dict[str, str]:
        """The message as a template takes it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class Chat(Sampling):
    """Body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ChatFormat | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    tools: Annotated[list[Any], Field(max_length=0)] | None = None

    @model_validator(mode="after")
    def _agrees(self) -> Chat:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is for logprobs, expected logprobs true")
        both = self.max_tokens is not None and self.max_completion_tokens is not None
        if both and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ, expected one of them")
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError("add_generation_prompt and continue_final_message are both true, expected one of them")
        if self.continue_final_message and self.messages[-1].role != "assistant":
            raise ValueError("continue_final_message is true, expected a last message of the assistant")
        return self

    def grammar(self) -> Grammar | None:
        """Return what the text must be, if the client says so. Raises ApiError."""
        return grammar_of(self.response_format, self.structured_outputs)

    @property
    def most(self) -> int | None:
        """The largest number of tokens to add, if the client gave one."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class Tokenize(Strict):
    """Body of /tokenize."""

    prompt: Text
    model: str | None = None
    add_special_tokens: bool = True


class Detokenize(Strict):
    """Body of /detokenize."""

    tokens: list[Annotated[int, Field(ge=0)]]
    model: str | None = None
