"""`fastgpt sample` and `fastgpt chat` in a terminal: options, streamed text, a conversation."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastgpt.core.command import number
from fastgpt.core.errors import UserError, cause_of
from fastgpt.inference.chat import ChatTokenizer, Conversation, Template
from fastgpt.inference.generator import Generator
from fastgpt.inference.grammar import Grammar
from fastgpt.inference.requests import Request, Result, TextTokenizer, bytes_of
from fastgpt.inference.weights import KINDS

ADAPTER = "adapter"  # name of the one that --adapter loads


def add_options(parser: argparse.ArgumentParser, tokens_help: str) -> None:
    """Add the options that both commands have."""
    add = parser.add_argument
    add("--adapter", metavar="DIR", help="use this LoRA adapter: a folder in PEFT's format, or a run with adapters")
    add("--tokens", type=number(int, 0), default=200, help=tokens_help)
    add("--temperature", type=number(float, 0), default=0.8, help="0: always the most likely token (default: 0.8)")
    add("--top-k", type=number(int, 0), default=50, help="sample from the k most likely tokens; 0: all (default: 50)")
    add(
        "--top-p",
        type=number(float, 0, 1, open_least=True),
        default=1.0,
        help="sample from the most likely tokens whose probabilities sum to p (default: 1, all)",
    )
    add(
        "--min-p",
        type=number(float, 0, 1),
        default=0.0,
        help="sample from tokens at least this many times as likely as the most likely one (default: 0, all)",
    )
    add(
        "--repetition-penalty",
        type=number(float, 0, open_least=True),
        default=1.0,
        help="above 1, tokens already in the text become less likely (default: 1)",
    )
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="seed of the sampled text (default: 0)")
    add("--context", type=number(int, 1), help="tokens that the model reads at most (default: its block_size)")
    add("--weights", choices=KINDS, help="convert the weights, on a CPU: fewer bits are faster (default: as stored)")
    add(
        "--no-graphs",
        action="store_true",
        help="on a GPU, launch the kernels of a step one by one, without CUDA graphs",
    )
    add("--device", default="auto", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")


def request_of(args: argparse.Namespace, prompt: str | Sequence[int], **changes: Any) -> Request:
    """Return a request with the options of the command line.

    Raises:
        UserError: --stop is an empty text.
    """
    if "" in args.stop:
        raise UserError("--stop is an empty text, expected at least one character")
    settings: dict[str, Any] = dict(
        max_new_tokens=args.tokens,
        temperature=args.temperature,
        top_k=args.top_k or None,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        stop=tuple(args.stop),
        seed=args.seed,
    )
    return Request(prompt, **{**settings, **changes})


def generator_of(
    model: Any, tokenizer: TextTokenizer, args: argparse.Namespace, max_batch: int = 1, adapter: str | None = None
) -> Generator:
    """Return a generator, with an adapter named ADAPTER if the path of one is given.

    Raises:
        UserError: the model cannot read --context tokens, --weights needs a model on a CPU, or --adapter does not fit.
    """
    options: dict[str, Any] = dict(context=args.context, weights=args.weights, graphs=not args.no_graphs)
    options["adapters"] = None if adapter is None else {ADAPTER: adapter}
    try:
        return Generator(model, tokenizer, max_batch=max_batch, **options)
    except ValueError as e:
        raise UserError(f"--{e}" if str(e).startswith("weights ") else f"--context: {e}") from None


def add_grammar_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what a text must be."""
    some = parser.add_mutually_exclusive_group()
    some.add_argument("--json-schema", type=Path, metavar="FILE", help="write JSON that this schema describes")
    some.add_argument("--regex", metavar="TEXT", help="write a text that this expression matches as a whole")


def grammar_of(args: argparse.Namespace) -> Grammar | None:
    """Return the grammar that the options name, if any.

    Raises:
        UserError: the file cannot be read, or the text is too long.
    """
    try:
        if args.json_schema is not None:
            return Grammar("json_schema", args.json_schema.read_text(encoding="utf-8"))
        return None if args.regex is None else Grammar("regex", args.regex)
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"--json-schema: {args.json_schema} cannot be read ({cause_of(e)})") from None
    except ValueError as e:
        raise UserError(f"sample: {str(e).removeprefix('Grammar: ')}") from None


def sample(model: Any, tokenizer: TextTokenizer, args: argparse.Namespace, grammar: Grammar | None = None) -> int:
    """Print --n continuations of --prompt; a single one as it comes."""
    if not tokenizer.prompt(args.prompt):
        raise UserError("sample: --prompt is empty, expected at least one token")
    generator = generator_of(model, tokenizer, args, min(args.n, 16), args.adapter)
    options: dict[str, Any] = dict(logprobs=args.logprobs, grammar=grammar, adapter=_adapter(args))
    requests = [request_of(args, args.prompt, seed=(args.seed + i) % 2**63, **options) for i in range(args.n)]
    if args.n == 1:
        print(args.prompt, end="", flush=True)
    try:
        results = generator.generate(requests, _show if args.n == 1 else None)
    except ValueError as e:
        raise UserError(f"sample: {e}") from None
    for i, result in enumerate(results):
        print(f"--- sample {i + 1}, seed {result.seed} ---\n{args.prompt}{result.text}" if args.n > 1 else "")
        _show_logprobs(tokenizer, result)
    return 0


def _adapter(args: argparse.Namespace) -> str | None:
    return None if args.adapter is None else ADAPTER


def _show(number: int, text: str) -> None:
    print(text, end="", flush=True)


def _show_logprobs(tokenizer: TextTokenizer, result: Result) -> None:
    """Print a line for each token: its log-probability, the token, the most likely ones."""

    def name(token: int) -> str:
        return repr(bytes_of(tokenizer, token).decode("utf-8", errors="backslashreplace"))

    for token, logprob, top in zip(result.ids, result.logprobs or (), result.top_logprobs or ()):
        others = ", ".join(f"{name(i)} {value:.4f}" for i, value in top)
        print(f"{logprob:9.4f}  {name(token)}" + (f"  of {others}" if others else ""))


HELP = "a message, /reset (forget the conversation), /quit"


def chat(model: Any, tokenizer: ChatTokenizer, template: Template, args: argparse.Namespace) -> int:
    """Hold a conversation on stdin and stdout, until /quit or the end of input; remarks go to stderr."""
    generator = generator_of(model, tokenizer, args, adapter=args.adapter)
    reply = min(args.tokens, generator.context // 2)  # tokens kept free for it
    conversation = Conversation(template, tokenizer, generator.context - reply, args.system)
    typed = sys.stdin.isatty()
    if typed:
        _say(f"{HELP}; {template.where}")
    asked = 0
    while (line := _read(typed)) is not None:
        if line == "/quit":
            break
        if line == "/reset":
            conversation.reset()
            asked = 0
            _say("the conversation is forgotten")
        elif line.startswith("/"):
            _say(f"{line.split()[0]} is not a command, expected {HELP}")
        elif line:
            asked += _turn(generator, conversation, args, line, asked)
    return 0


def _say(remark: str) -> None:
    print(f"({remark})", file=sys.stderr, flush=True)


def _read(typed: bool) -> str | None:
    """Return the next line of input, None at its end."""
    try:
        return input("> " if typed else "").strip()
    except EOFError:
        return None
    except UnicodeDecodeError as e:
        raise UserError(f"chat: the input is not UTF-8 (byte {e.start})") from None


def _turn(generator: Generator, conversation: Conversation, args: argparse.Namespace, line: str, asked: int) -> int:
    """Ask and print the reply; return 1, or 0 if the message was refused."""
    try:
        ids, dropped = conversation.ask(line)
    except UserError as e:
        _say(str(e))
        return 0
    if dropped:
        turns = "the oldest turn was" if dropped == 1 else f"the {dropped} oldest turns were"
        _say(f"{turns} dropped, because the conversation exceeds the context of {generator.context} tokens")
    stop = (*args.stop, *filter(None, [conversation.template.stop]))
    most = min(args.tokens, generator.context - len(ids))
    seed = (args.seed + asked) % 2**63
    request = request_of(args, ids, max_new_tokens=most, stop=stop, seed=seed, adapter=_adapter(args))
    said, reason = "", ""
    try:
        for piece in generator.stream([request]):
            text = piece.text if said else piece.text.lstrip()
            said += text
            print(text, end="", flush=True)
            reason = reason if piece.result is None else piece.result.finish_reason
    except KeyboardInterrupt:
        reason = "interrupted"
    except ValueError as e:
        raise UserError(f"chat: {e}") from None
    print(flush=True)
    if reason in ("length", "interrupted"):
        _say(f"cut after {most} token{'' if most == 1 else 's'}" if reason == "length" else reason)
    conversation.answer(said.rstrip())
    return 1
