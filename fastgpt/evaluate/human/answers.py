"""Answers of a model to prompts: generated once and kept in a JSONL file, or read from a user's file."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgpt.core import progress
from fastgpt.core.errors import UserError, counted
from fastgpt.evaluate.human.files import Prompt, append, prompt_of, read
from fastgpt.evaluate.results import item_id
from fastgpt.evaluate.target import Target, open_target
from fastgpt.inference import Request, Result
from fastgpt.inference.terminal import generator_of, request_of

BATCH = 16  # texts generated at a time


@dataclass(frozen=True)
class Question:
    """A prompt with its id."""

    id: str
    prompt: Prompt


@dataclass(frozen=True)
class Answers:
    """Answers of one model.

    Attributes:
        model: its name.
        texts: key of a prompt -> answer.
    """

    model: str
    texts: dict[str, str]


def read_prompts(path: Path) -> list[Question]:
    """Read prompts: of a .jsonl file the field `prompt` (a text or messages) and the optional `id` of each line; of
    another file each line that is not empty.

    Raises:
        UserError: the file cannot be read, a line has no prompt, or two lines have the same prompt or id.
    """
    if path.suffix == ".jsonl":
        rows = list(read(path))
    else:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"{path} cannot be read ({e})") from None
        rows = [(i, {"prompt": line}) for i, line in enumerate(lines, 1) if line.strip()]
    found: list[Question] = []
    seen: dict[str, int] = {}
    for number, row in rows:
        prompt = prompt_of(row, f"{path}, line {number}")
        question = Question(str(row.get("id", item_id(prompt))), prompt)
        for what, key in (("id", f"id {question.id}"), ("prompt", item_id(prompt))):
            if seen.setdefault(key, number) != number:
                raise UserError(f"{path}, line {number} has the {what} of line {seen[key]}, expected each {what} once")
        found.append(question)
    if not found:
        raise UserError(f"{path} has no prompts, expected one or more")
    return found


def read_answers(path: Path) -> tuple[Answers, list[Question]]:
    """Read a user's answers: `prompt`, `answer` and the optional `id` and `model` of each line.

    Raises:
        UserError: a line lacks a prompt or an answer, or two lines have different models.
    """
    texts: dict[str, str] = {}
    questions: list[Question] = []
    models: set[str] = set()
    for number, row in read(path):
        where = f"{path}, line {number}"
        prompt, answer = prompt_of(row, where), row.get("answer")
        if not isinstance(answer, str):
            raise UserError(f"{where}: answer is {answer!r:.60}, expected a text")
        if item_id(prompt) not in texts:
            questions.append(Question(str(row.get("id", item_id(prompt))), prompt))
        texts[item_id(prompt)] = answer
        models.add(str(row.get("model", path)))
    if not texts:
        raise UserError(f"{path} has no answers, expected one or more")
    if len(models) > 1:
        raise UserError(f"{path} has answers of {', '.join(sorted(models))}, expected one model")
    return Answers(models.pop(), texts), questions


class Generation:
    """A model's answers to generate. All checks are made here, before the first text is generated.

    Args:
        path: of the model, as for `open_target`.
        cache: JSONL that has answers, and gets those that it lacks; those of other weights or settings do not count.
        args: with the options of `terminal.add_options`.

    Raises:
        UserError: there is no model, a prompt does not fit into the context, or is a conversation and the model has no
            chat template.
    """

    def __init__(self, path: str, questions: list[Question], cache: Path, args: argparse.Namespace) -> None:
        self.path, self.questions, self.cache, self.args = path, questions, cache, args
        self.target = open_target(path, device=args.device)
        self.settings = _settings(self.target, args)
        self.requests = {item_id(q.prompt): _encoded(self.target, q.prompt, args, f"prompt {q.id}") for q in questions}
        self.texts: dict[str, str] = {}
        for number, row in read(cache) if cache.exists() else ():
            key = item_id(prompt_of(row, f"{cache}, line {number}"))
            if row.get("settings") == self.settings and key in self.requests:
                self.texts[key] = row["answer"]

    def run(self) -> Answers:
        """Generate what is missing, each answer written as soon as it is complete; return all answers."""
        missing = [q for q in self.questions if item_id(q.prompt) not in self.texts]
        there = counted(len(self.texts), "answer")
        print(f"{self.path}: {there} in {self.cache}, {len(missing)} to generate", flush=True)
        if missing:
            generator = generator_of(self.target.model, self.target.tokenizer, self.args, BATCH)
            shown = progress.bar(len(missing), unit=" answers")
            try:
                for piece in generator.stream([self.requests[item_id(q.prompt)] for q in missing]):
                    if piece.result is not None:
                        self._keep(missing[piece.number], piece.result)
                        shown.update()
            except ValueError as e:
                raise UserError(f"{self.path}: {e}") from None
            finally:
                shown.close()
        return Answers(self.path, self.texts)

    def _keep(self, question: Question, result: Result) -> None:
        # a template writes what separates messages; a text is continued as it is
        answer = result.text if isinstance(question.prompt, str) else result.text.strip()
        row = {"id": question.id, "prompt": question.prompt, "answer": answer, "model": self.path}
        append(self.cache, row | {"seed": result.seed, "settings": self.settings})
        self.texts[item_id(question.prompt)] = answer


def _settings(target: Target, args: argparse.Namespace) -> dict[str, Any]:
    """Return all that decides an answer: the weights and the options."""
    names = ("tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "stop", "seed", "context")
    return {"fingerprint": target.about["fingerprint"], "weights": args.weights} | {n: getattr(args, n) for n in names}


def _encoded(target: Target, prompt: Prompt, args: argparse.Namespace, where: str) -> Request:
    """Return the request of a prompt; its seed depends on the prompt and --seed alone."""
    tokenizer, stop = target.tokenizer, tuple(args.stop)
    if isinstance(prompt, str):
        ids = tokenizer.prompt(prompt)
    elif target.chat is None:
        raise UserError(f"{where} is a conversation and {target.name} has no chat template, expected a text")
    else:
        for message in prompt:
            if special := next((s for s in tokenizer.specials if s in message["content"]), None):
                raise UserError(f"{where} contains {special}, expected messages without special tokens")
        prefix = tokenizer.prefix if target.chat.default else ()  # another template writes its bos_token
        ids = [*prefix, *(int(i) for i in tokenizer.encode(target.chat.render(prompt), specials=True))]
        stop += (target.chat.stop,) if target.chat.stop else ()
    context = args.context or target.model.block_size
    if not 0 < len(ids) <= context:
        raise UserError(f"{where} has {counted(len(ids), 'token')} for {target.name}, expected 1 to {context}")
    seed = (int(item_id(prompt), 16) + args.seed) % 2**53  # exact in JSON readers that have doubles only
    return request_of(args, ids, stop=stop, seed=seed)
