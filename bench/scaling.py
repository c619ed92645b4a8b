"""A model of training on 1 to 1,024 GPUs: `fastgpt bench scaling --config gpt2-350m --cluster a100`.

A step is simulated by fastgpt/bench/timeline.py over the collectives of fastgpt/bench/network.py. Each GPU computes at
--mfu of its peak; its computing time has a log-normal distribution (--jitter), and every step waits for the slowest. By
default each GPU has the same tokens a step (--accumulate micro-batches of --micro-batch sequences). With --batch-tokens
all of them share so many, in micro-batches that are as large as then possible.

The second table is of a run of days: failures, checkpoints and the share of the time that trains, by the formulas of
fastgpt/training/interruptions.py.

--check 2 4 measures steps of a small model in so many processes here, counts their collectives, and prints the same
simulation with constants of this machine.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

from fastgpt.bench.network import CLUSTERS, SOURCES, Cluster
from fastgpt.bench.timeline import Part, Work, collectives, parts_of, simulate, slowest
from fastgpt.core.command import Parser, number, run_command
from fastgpt.core.page import markdown_table
from fastgpt.distributed.parallelize import Parallel
from fastgpt.training.config import load_config
from fastgpt.training.interruptions import FAILURES_PER_GPU_DAY, STORAGE, Interruptions
from fastgpt.training.plan import MFU, with_vocabulary

GPUS = (1, 8, 64, 1024)
PARALLEL: tuple[Parallel, ...] = ("ddp", "fsdp")
JITTER = 0.02  # assumed
STATE = 14  # bytes of a parameter in a checkpoint: bf16, and fp32 master and two moments
STEPS = ["GPUs", "", "tokens a step", "ms a step", "computing", "network", "exposed", "MB sent by a GPU"]
STEPS += ["tokens/s", "efficiency"]
RUNS = ["GPUs", "failures a day", "checkpoint", "written in", "one every", "goodput", "billion tokens a day"]


def work_of(args: argparse.Namespace, parts: list[Part], cluster: Cluster, gpus: int) -> Work | None:
    """Return the step of one of the GPUs; None if the tokens of a step do not divide among them."""
    block, rows, micro_batches = args.block_size, args.micro_batch, args.accumulate
    if args.batch_tokens is not None:
        each = args.batch_tokens // (gpus * block)
        if each * gpus * block != args.batch_tokens:
            return None
        rows = next(size for size in range(min(rows, each), 0, -1) if each % size == 0)
        micro_batches = each // rows
    rate = cluster.peak * args.mfu
    return Work(parts, 2, rows * block, micro_batches, rate, bandwidth=cluster.memory)


def step_rows(args: argparse.Namespace, parts: list[Part], cluster: Cluster) -> list[list[str]]:
    """Return the table of steps."""
    lines, one = [STEPS], 0.0
    for gpus in args.gpus:
        work = work_of(args, parts, cluster, gpus)
        if work is None:
            lines.append([f"{gpus:,}", "", "does not divide", *["-"] * (len(STEPS) - 3)])
            continue
        for kind in PARALLEL if gpus > 1 else PARALLEL[:1]:
            step = simulate(work, cluster, kind, gpus, slowest(gpus, args.jitter))
            each = work.tokens * work.micro_batches / step.seconds
            one = one or each
            sent = sum(call.sent(gpus) for call in collectives(work, kind, gpus)) / 1e6
            cells = [f"{gpus:,}", kind if gpus > 1 else "", f"{gpus * work.tokens * work.micro_batches:,}"]
            cells += [f"{1e3 * s:,.1f}" for s in (step.seconds, step.compute, step.network, step.exposed)]
            lines.append([*cells, f"{sent:,.0f}", f"{gpus * each:,.0f}", f"{each / one:.1%}"])
    return lines


def run_rows(args: argparse.Namespace, parts: list[Part], cluster: Cluster) -> list[list[str]]:
    """Return the table of a run of days, with the faster kind of step."""
    lines = [RUNS]
    for gpus in args.gpus:
        work = work_of(args, parts, cluster, gpus)
        if work is None:
            continue
        state = STATE * work.parameters
        run = Interruptions.of(state, gpus * FAILURES_PER_GPU_DAY, storage=args.storage)
        step = min(simulate(work, cluster, kind, gpus, slowest(gpus, args.jitter)) for kind in PARALLEL)
        tokens = 86400 / step.seconds * gpus * work.tokens * work.micro_batches * run.goodput()
        cells = [f"{gpus:,}", f"{run.failures:.2g}", f"{state / 1e9:.1f} GB", f"{run.write:.1f} s"]
        lines.append([*cells, f"{run.interval / 60:.0f} min", f"{run.goodput():.2%}", f"{tokens / 1e9:,.2f}"])
    return lines


def tables(args: argparse.Namespace) -> str:
    """Return both tables and their assumptions, as markdown."""
    cfg = with_vocabulary(load_config(["--config", args.config], args.config))
    cluster = CLUSTERS[args.cluster]
    args.block_size, parts = cfg.block_size, parts_of(cfg.model, cfg.block_size)
    tokens = "the same tokens on each GPU"
    if args.batch_tokens is not None:
        tokens = f"{args.batch_tokens:,} tokens a step"
    head = f"{args.config} on {cluster.name}, {tokens} (model, nothing measured)"
    assumed = f"{args.mfu:.0%} of {cluster.peak / 1e12:g} TFLOP/s (datasheet; the share is assumed); computing times "
    assumed += f"with a log-normal deviation of {args.jitter:.0%} (assumed); {SOURCES[args.cluster]}"
    steps, runs = (markdown_table(f(args, parts, cluster)) for f in (step_rows, run_rows))
    return "\n\n".join([head, steps, runs, assumed])


def options() -> Parser:
    """Return the parser of the command."""
    parser = Parser(
        prog="fastgpt bench scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="gpt2-350m", help="configuration of the model (default: gpt2-350m)")
    parser.add_argument("--cluster", choices=CLUSTERS, default="a100", help="machines of 8 GPUs (default: a100)")
    parser.add_argument("--gpus", type=number(int, 1), nargs="+", default=GPUS, help="(default: 1 8 64 1024)")
    parser.add_argument("--micro-batch", type=number(int, 1), default=16, help="sequences (default: 16)")
    parser.add_argument("--accumulate", type=number(int, 1), default=4, help="micro-batches of a step (default: 4)")
    parser.add_argument("--batch-tokens", type=number(int, 1), help="tokens of a step, which the GPUs share")
    parser.add_argument("--mfu", type=number(float, 0, 1, open_least=True), default=MFU, help="share of the peak")
    parser.add_argument("--jitter", type=number(float, 0, 1), default=JITTER, help=f"(default: {JITTER})")
    parser.add_argument("--storage", type=number(float, 0, open_least=True), default=STORAGE, help="bytes/s")
    parser.add_argument("--check", type=number(int, 2), nargs="+", metavar="N", help="measure N processes here")
    return parser


def check(counts: list[int]) -> int:
    """Measure steps in so many processes of this machine; return 1 if their collectives are not those of the model."""
    status = 0
    for count in counts:
        for kind in PARALLEL:
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
            command += ["-m", "fastgpt.bench.throughput", "--device", "cpu", "--shape", "small", "--parallel", kind]
            status |= int(subprocess.run(command).returncode != 0)
    return status


def main(argv: list[str] | None = None) -> int:
    """Print the tables of the model, or with --check what is measured."""
    parser = options()
    args = parser.parse_args(argv)
    given = {name for name, value in vars(args).items() if value != parser.get_default(name)}
    if args.check:
        if other := sorted(given - {"check"}):
            parser.error(f"--{other[0].replace('_', '-')} has no effect with --check")
        return check(args.check)
    if args.batch_tokens is not None and "accumulate" in given:
        parser.error("--accumulate has no effect with --batch-tokens")
    print(tables(args))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
