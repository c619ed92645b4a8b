"""`fastgpt bench COMMAND ...`: one op, training steps, the whole report, and commands that process the rows."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable

from fastgpt.bench import OPS
from fastgpt.core.errors import UserError

COMMANDS = {  # name -> (module, the question it answers)
    "throughput": ("throughput", "training steps against plain PyTorch: tokens/s, MFU, memory, losses overlaid"),
    "roofline": ("roofline", "share of a step spent in matmuls, attention, memory-bound kernels, idle"),
    "host": ("host", "microseconds of an op call, launches of a step, import and compile times"),
    "launches": ("launches", "launches of a training step by layer and phase, counted without a GPU"),
    "codegen": ("codegen", "registers, spills, shared memory and occupancy of every kernel, without a GPU"),
    "model": ("model.command", "a model of every kernel and of a step on A100, H100 and H200, without a GPU"),
    "scaling": ("scaling", "a model of steps and runs of days on 1 to 1,024 GPUs; --check: steps in processes here"),
    "memory": ("memory", "largest batch and longest context that fit a card"),
    "coordinates": ("coordinates", "size of activations after a few steps by width, with µP and without"),
    "training": ("training", "a 60-step run of the trainer that is stopped and resumed"),
    "tiles": ("tiles", "launch shapes of attention's Triton kernels, by time"),
    "patching": ("patching", "a step of ten families of transformers before and after fastgpt.patch"),
    "generate": ("generate", "generated tokens/s against transformers and llama.cpp; share of what memory allows"),
    "adapters": ("adapters", "a decode step with LoRA adapters in the batch against the base's"),
    "muon": ("muon", "Muon's Newton-Schulz iteration against a loop over torch.optim.Muon's own"),
    "data": ("data", "text to token shards against tiktoken, datasketch and datatrove: MB/s of one core, memory"),
    "finetune": ("finetune", "fine-tuning steps against transformers, TRL and PEFT: tokens/s, memory"),
    "evaluate": ("evaluate", "log-likelihoods of benchmarks against lm_eval's own model: requests/s"),
    "serve": ("serve", "the server with 1 and 16 clients against llama.cpp's: tokens/s, first token, memory, cost"),
    "watch": ("watch", "what flags cost the server for each token"),
    "all": ("cpu", "all benchmarks that need no GPU, in under 15 minutes, then the report"),
    "gpu": (
        "gpu",
        "all benchmarks that need a GPU, in a checkout; same as `make gpu`, with --check as `make gpu-check`",
    ),
    "report": ("report", "tables and plots of rows: REPORT.md and REPORT.html"),
    "compare": ("compare", "is B slower than A? Exit code 1 if so"),
    "ab": ("ab", "is this install slower than another one? Their runs alternate"),
}


def listing() -> str:
    """Return a list of the commands, one per line."""
    lines = [f"  {name:<12}{about}" for name, (_, about) in COMMANDS.items()]
    ops = "\n".join(f"  {op}" for op in OPS)
    example = "fastgpt bench layer_norm --dtype bf16 --shape 8192x768"
    return "\n".join(
        [
            f"usage: fastgpt bench COMMAND ..., as in\n  {example}\n\none op, on every backend and baseline:",
            ops,
            "",
            *lines,
        ]
    )


def command(name: str) -> Callable[[list[str]], int]:
    """Return the main function of a command; it is called with the arguments.

    Raises:
        UserError: there is no command of this name.
    """
    if name in OPS:
        from fastgpt.bench import _command, _op

        return functools.partial(_command.main, _op.bench_of(name))
    if name not in COMMANDS:
        raise UserError(f"bench: there is no {name!r}, expected an op ({', '.join(OPS)}) or {', '.join(COMMANDS)}")
    main: Callable[[list[str]], int] = importlib.import_module(f"fastgpt.bench.{COMMANDS[name][0]}").main
    return main


def main(argv: list[str] | None = None) -> int:
    """Run a command; without arguments list all commands."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        print(listing())
        return 0
    return command(arguments[0])(arguments[1:])
