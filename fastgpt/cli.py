"""The `fastgpt` command; COMMANDS lists its subcommands."""

from __future__ import annotations

import argparse
import sys

from fastgpt.core.command import Parser, number, run_command


def sample(argv: list[str]) -> int:
    """Run `fastgpt sample`: continue a prompt with a trained model."""
    from fastgpt.inference import terminal

    parser = Parser(prog="fastgpt sample", description="Continue a prompt with a trained model.")
    parser.add_argument("--run", default="runs/tiny", help="run folder or checkpoint (default: runs/tiny)")
    parser.add_argument("--prompt", default="def ", help="text to continue")
    terminal.add_options(parser, "largest number of tokens to add (default: 200)")
    parser.add_argument("--n", type=number(int, 1), default=1, help="samples, with seeds from --seed on (default: 1)")
    parser.add_argument(
        "--logprobs",
        type=number(int, 0),
        metavar="N",
        help="print the log-probability of each token, and the N most likely tokens",
    )
    terminal.add_grammar_options(parser)
    args = parser.parse_args(argv)
    grammar = terminal.grammar_of(args)

    from fastgpt.core.device import default_device
    from fastgpt.training.adapters import require_tokenizer
    from fastgpt.training.load import load_run

    model, tokenizer, _ = load_run(args.run, default_device(args.device))
    if args.adapter is not None:
        require_tokenizer(args.adapter, tokenizer)
    return terminal.sample(model, tokenizer, args, grammar)


def chat(argv: list[str]) -> int:
    """Run `fastgpt chat`: hold a conversation with a trained model."""
    from fastgpt.inference import terminal

    parser = Parser(prog="fastgpt chat", description="Hold a conversation with a trained model, in the terminal.")
    parser.add_argument("run", metavar="RUN", help="run folder or checkpoint; its chat_template.jinja is used, if any")
    parser.add_argument("--system", default="", metavar="TEXT", help="system message (default: none)")
    terminal.add_options(parser, "largest number of tokens of a reply (default: 200)")
    args = parser.parse_args(argv)

    from fastgpt.core.device import default_device
    from fastgpt.inference.chat import Template
    from fastgpt.training.adapters import require_tokenizer, template_of
    from fastgpt.training.load import load_run

    model, tokenizer, path = load_run(args.run, default_device(args.device))
    template = None
    if args.adapter is not None:
        require_tokenizer(args.adapter, tokenizer)
        template = template_of(args.adapter, tokenizer)
    eos = tokenizer.decode_bytes([tokenizer.eot]).decode()
    return terminal.chat(model, tokenizer, template or Template.of_run(path, eos, tokenizer.bos), args)


def doctor(argv: list[str]) -> int:
    """Run `fastgpt doctor`: print what is installed and built, which backend serves each op, and why."""
    Parser(prog="fastgpt doctor", description="Print what is built, which backend serves each op, and why.").parse_args(
        argv
    )

    import torch

    from fastgpt import ops  # noqa: F401 (the import registers the ops)
    from fastgpt.core import backend, native
    from fastgpt.core.device import default_device, describe_machine

    device = default_device()
    for name, value in describe_machine(device).items():
        print(f"{name:<12} {value}")
    print(*native.describe(), sep="\n")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    print(f"\nop on {device} in {dtype}: backend (why)")
    for op in backend.ops():
        picked, why = backend.explain(op, device.type, dtype)
        if why == "measured" and (entry := backend.tuned(op, device.type, dtype)):
            why = f"measured {entry['date']} ({entry['note']})"
        print(f"  {op:<22} {picked:<7} {why}")
    return 0


def tune(argv: list[str]) -> int:
    """Run `fastgpt tune`; see bench/tune.py."""
    about = "Time every backend of every op at a model's shapes on this machine; from then on, the fastest is used."
    parser = Parser(prog="fastgpt tune", description=about)
    parser.add_argument("--config", help="NAME or file.yaml, as for train (default: chosen for the machine)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="default: as in the configuration")
    parser.add_argument(
        "--batch", type=number(int, 1), help="sequences B (default: as in the configuration; fewer on a CPU)"
    )
    parser.add_argument(
        "--block", type=number(int, 1), help="tokens T of a sequence (default: as in the configuration)"
    )
    parser.add_argument("--ops", nargs="+", metavar="OP", help="ops to time (default: all)")
    parser.add_argument("--seconds", type=number(float, 0), default=1.0, help="seconds of samples per op")
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would be timed, without timing or writing anything"
    )
    args = parser.parse_args(argv)

    from fastgpt.bench.tune import run

    return run(args)


def train(argv: list[str]) -> int:
    """Run `fastgpt train`; see fastgpt/train.py, and with --find-lr fastgpt/sweep/find_lr.py."""
    if "--find-lr" in argv:
        from fastgpt.sweep.find_lr import main as find_lr_main

        return find_lr_main(argv)

    from fastgpt.train import main as train_main

    return train_main(argv)


def sweep(argv: list[str]) -> int:
    """Run `fastgpt sweep`; see fastgpt/sweep/command.py."""
    from fastgpt.sweep.command import main as sweep_main

    return sweep_main(argv)


def init(argv: list[str]) -> int:
    """Run `fastgpt init`; see fastgpt/finetune/goal.py."""
    from fastgpt.finetune.goal import main as init_main

    return init_main(argv)


def data(argv: list[str]) -> int:
    """Run `fastgpt data`; see fastgpt/data/command.py."""
    from fastgpt.data.command import main as data_main

    return data_main(argv)


def tokenizer(argv: list[str]) -> int:
    """Run `fastgpt tokenizer`; see fastgpt/data/tokenizer_command.py."""
    from fastgpt.data.tokenizer_command import main as tokenizer_main

    return tokenizer_main(argv)


def finetune(argv: list[str]) -> int:
    """Run `fastgpt finetune`; see fastgpt/finetune/command.py."""
    from fastgpt.finetune.command import main as finetune_main

    return finetune_main(argv)


def serve(argv: list[str]) -> int:
    """Run `fastgpt serve`; see fastgpt/serve/command.py."""
    from fastgpt.serve.command import main as serve_main

    return serve_main(argv)


def store(argv: list[str]) -> int:
    """Run `fastgpt store`; see fastgpt/serve/watch/store_command.py."""
    from fastgpt.serve.watch.store_command import main as store_main

    return store_main(argv)


def deploy(argv: list[str]) -> int:
    """Run `fastgpt deploy`; see fastgpt/serve/rollout/command.py."""
    from fastgpt.serve.rollout.command import main as deploy_main

    return deploy_main(argv)


def feedback(argv: list[str]) -> int:
    """Run `fastgpt feedback`; see fastgpt/serve/feedback/command.py."""
    from fastgpt.serve.feedback.command import main as feedback_main

    return feedback_main(argv)


def import_(argv: list[str]) -> int:
    """Run `fastgpt import`; see fastgpt/convert/importing.py."""
    from fastgpt.convert.importing import main as import_main

    return import_main(argv)


def export(argv: list[str]) -> int:
    """Run `fastgpt export`; see fastgpt/convert/exporting.py."""
    from fastgpt.finetune.exporting import main as export_main

    return export_main(argv)


def evaluate(argv: list[str]) -> int:
    """Run `fastgpt eval`; see fastgpt/evaluate/command.py."""
    from fastgpt.evaluate.command import main as evaluate_main

    return evaluate_main(argv)


def report(argv: list[str]) -> int:
    """Run `fastgpt report`; see fastgpt/report/command.py."""
    from fastgpt.report.command import main as report_main

    return report_main(argv)


def watch(argv: list[str]) -> int:
    """Run `fastgpt watch`; see fastgpt/report/watch.py."""
    from fastgpt.report.watch import main as watch_main

    return watch_main(argv)


def patch_report(argv: list[str]) -> int:
    """Run `fastgpt patch-report`; see fastgpt/patching/command.py."""
    from fastgpt.patching.command import main as patch_report_main

    return patch_report_main(argv)


def parity(argv: list[str]) -> int:
    """Run `fastgpt parity`; see fastgpt/parity."""
    from fastgpt.parity import main as parity_main

    return parity_main(argv)


def bench(argv: list[str]) -> int:
    """Run `fastgpt bench`; see bench/commands.py."""
    from fastgpt.bench.commands import main as bench_main

    return bench_main(argv)


COMMANDS = {
    "train": train,
    "sweep": sweep,
    "init": init,
    "finetune": finetune,
    "watch": watch,
    "report": report,
    "sample": sample,
    "chat": chat,
    "eval": evaluate,
    "serve": serve,
    "store": store,
    "deploy": deploy,
    "feedback": feedback,
    "data": data,
    "tokenizer": tokenizer,
    "import": import_,
    "export": export,
    "patch-report": patch_report,
    "doctor": doctor,
    "tune": tune,
    "parity": parity,
    "bench": bench,
}
HELP = """commands:
  train         train a model, resume a run, plan one (--plan), or find its learning rate (--find-lr)
  sweep         train with many settings, and find the best
  init          write a recipe for fine-tuning from a goal
  finetune      train a model further: on instructions, preferences, labels, or a teacher
  watch         show a run in the terminal while it trains
  report        write a page that shows runs and compares them
  sample        continue a prompt with a trained model
  chat          hold a conversation with a trained model
  eval          evaluate a model on benchmarks, texts, suites, safety and people's ratings
  serve         answer requests over HTTP, as OpenAI's API does
  store         show, export and delete what a server has kept
  deploy        roll out a new version of a served model, and roll it back
  feedback      make preference pairs from thumbs of a server's users
  data          make data sets from raw text, check and inspect them, erase documents
  tokenizer     train, show and check tokenizers
  import        make a run from a model of another project
  export        write a run in the format of another project
  patch-report  list what fastgpt.patch would replace in a Hugging Face model
  doctor        print what is built, which backend serves each op, and why
  tune          time every backend and use the fastest from then on
  parity        print the errors of the ops against fp64
  bench         measure ops and training steps

`fastgpt COMMAND --help` explains a command."""


def main() -> int:
    """Run the console command."""
    about = "Train GPT models, use them, and check the kernels."
    parser = Parser(
        prog="fastgpt",
        usage="fastgpt [-h] COMMAND ...",
        description=f"{about}\n\n{HELP}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, help=argparse.SUPPRESS)
    argv = sys.argv[1:]

    def command() -> int:
        name = parser.parse_args(argv[:1]).command

        from fastgpt import ops  # noqa: F401 (the import registers the ops and reads FASTGPT_KERNELS)
        from fastgpt.core.backend import check_environment

        check_environment()
        return COMMANDS[name](argv[1:])

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
