"""`fastgpt train --find-lr`: a range test of the learning rate, on the data and the model of a run.

    rate of step i     r_i = first (last / first)^(i / (n - 1))                          i = 0 ... n - 1
    average            a_i = a'_i / (1 - beta^(i+1)),  a'_i = beta a'_(i-1) + (1 - beta) loss_i,  a'_(-1) = 0
    smoothed loss      s_i = (a_i + a_i of the losses from the last to the first) / 2      has no lag
    steepest descent   the rate where s falls fastest over log r
    tenth of minimum   a tenth of the rate where s is lowest

The test ends early once the loss diverges: it is not finite, or a has risen above its lowest value by half of what it
had fallen, and by a twentieth of where it began. Warm-up and schedule are not used. Source: Smith 2017 (Cyclical
Learning Rates for Training Neural Networks); the average in both directions is ours.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastgpt.core import backend, page, progress
from fastgpt.core.command import Parser, number
from fastgpt.core.device import default_device, describe_machine
from fastgpt.core.errors import UserError
from fastgpt.core.folders import write_text
from fastgpt.distributed.mesh import find_mesh
from fastgpt.train import accumulate, forward_backward, optimizer_step, prepare
from fastgpt.training import plan
from fastgpt.training.config import TrainConfig, load_config
from fastgpt.training.run import Run
from fastgpt.training.task import Batch

BETA = 0.9
FIRST, LAST = 1e-4, 1e3  # times the learning rate of the settings
STEPS, FEWEST = 200, 20


@dataclass(frozen=True)
class Curve:
    """The losses of a range test, up to where it ended.

    Attributes:
        rates, losses, smoothed: of each step, (n,) fp64.
        diverged: whether the loss diverged before the last rate.
    """

    rates: np.ndarray
    losses: np.ndarray
    smoothed: np.ndarray
    diverged: bool

    def steepest(self) -> float:
        """Return the rate where the smoothed loss falls fastest, before its minimum."""
        slope = np.gradient(self.smoothed, np.log(self.rates))
        return float(self.rates[np.argmin(slope[: self.lowest() + 1])])

    def lowest(self) -> int:
        """Return the step with the lowest smoothed loss."""
        return int(np.argmin(self.smoothed))


def main(argv: Sequence[str]) -> int:
    """Run `fastgpt train --find-lr` and return 0."""
    default = "gpt2-124m-demo" if torch.cuda.is_available() else "tiny"
    args, rest = arguments(argv)
    cfg = load_config(rest, default)
    if find_mesh().world > 1:
        raise UserError("--find-lr works in one process, expected no torchrun")
    first = cfg.lr * FIRST if args.lr_first is None else args.lr_first
    last = cfg.lr * LAST if args.lr_last is None else args.lr_last
    if not first < last:
        raise UserError(f"--lr-first is {first:g}, expected less than --lr-last {last:g}")
    rates = np.geomspace(first, last, args.steps)

    # no checkpoint of an earlier run, no evaluations, and no step that is skipped because its loss is high
    test = replace(cfg, resume="never", evals={}, spike_sigmas=0.0, graphs=False, patience=0)
    backend.use(**backend.parse_choices(cfg.kernels))
    run = prepare(test)
    run.begin()
    with plan.explain_out_of_memory(run.cfg, run.model.vocab_size, run.device):
        curve = range_test(run, rates)
    return report(cfg, curve, run)


def arguments(argv: Sequence[str]) -> tuple[Any, list[str]]:
    """Parse the options of --find-lr; return them and the rest of the command line, which holds the settings.

    Raises:
        UserError: an invalid value.
    """
    about = "Raise the learning rate step by step until the loss diverges, and suggest one. Other options are those of "
    about += "fastgpt train. The run's folder is not touched: results go to the folder of that name and -find-lr."
    parser = Parser(prog="fastgpt train --find-lr", description=about, allow_abbrev=False, usage="%(prog)s [options]")
    parser.add_argument("--find-lr", action="store_true", required=True, help="do this test instead of training")
    parser.add_argument("--find-lr-steps", dest="steps", type=number(int, FEWEST), default=STEPS, metavar="N",
                        help=f"steps of the test (default: {STEPS})")  # fmt: skip
    rate = number(float, 0, open_least=True)
    parser.add_argument("--lr-first", type=rate, metavar="LR", help=f"lowest rate (default: {FIRST:g} times --lr)")
    parser.add_argument("--lr-last", type=rate, metavar="LR", help=f"highest rate (default: {LAST:g} times --lr)")
    return parser.parse_known_args(argv)


def range_test(run: Run, rates: np.ndarray) -> Curve:
    """Train one step at each of the rates, (n,), until the loss diverges, and return the losses."""
    cfg, task, optimizer = run.cfg, run.task, run.optimizer
    model: Any = torch.compile(run.model) if cfg.compile else run.model
    micro_step = lambda i, *batch: forward_backward(model, task, run.scaling, *batch)  # noqa: E731
    losses: list[float] = []
    bar = progress.bar(total=len(rates), unit="step", dynamic_ncols=True)
    for rate in rates:
        for group in optimizer.param_groups:
            group["lr"] = float(rate) * group["lr_ratio"]
        batches = [Batch(*next(run.loader)) for _ in range(cfg.accumulation)]
        total = accumulate(task, run.mesh, batches, micro_step)
        loss = float(optimizer_step(optimizer, None, run.scaling, total)[0])
        bar.update(1)
        if not math.isfinite(loss):
            break
        losses.append(loss)
        if diverged(averages(losses)):
            break
    bar.close()
    n, both = len(losses), (averages(losses), averages(losses[::-1])[::-1])
    ended = n < len(rates) or diverged(both[0])
    return Curve(rates[:n], np.array(losses), (np.array(both[0]) + np.array(both[1])) / 2, ended)


def averages(losses: Sequence[float]) -> list[float]:
    """Return the exponential averages of losses, corrected at their start."""
    found, total = [], 0.0
    for i, loss in enumerate(losses, 1):
        total = BETA * total + (1 - BETA) * loss
        found.append(total / (1 - BETA**i))
    return found


def diverged(average: Sequence[float]) -> bool:
    """Return whether the last of the averages shows that training diverges."""
    if not average:
        return True
    start, best = average[0], min(average)
    return average[-1] > best + max(0.5 * (start - best), 0.05 * abs(start))


def report(cfg: TrainConfig, curve: Curve, run: Run) -> int:
    """Write find_lr.json and find_lr.png, print the suggestions, and return 0.

    Raises:
        UserError: no rate lowered the loss.
    """
    folder = Path(f"{cfg.out.rstrip('/')}-find-lr")
    tested = f"{len(curve.rates)} steps"
    if len(curve.rates) < FEWEST or curve.smoothed.min() > curve.smoothed[0] - 0.005 * abs(curve.smoothed[0]):
        at = f" up to {curve.rates[-1]:.2e}" if len(curve.rates) else ""
        raise UserError(f"the loss did not fall in {tested}{at}, expected another --lr-first or --lr-last")
    steepest, tenth = curve.steepest(), float(curve.rates[curve.lowest()]) / 10
    values = {
        "steepest_descent": steepest,
        "tenth_of_minimum": tenth,
        "diverged": curve.diverged,
        "rates": curve.rates.tolist(),
        "losses": curve.losses.tolist(),
        "smoothed": curve.smoothed.tolist(),
        "machine": describe_machine(default_device(run.cfg.device)),
    }
    write_text(folder / "find_lr.json", json.dumps(values, indent=1))
    picture = folder / "find_lr.png"
    picture.write_bytes(page.figure(lambda ax: draw(ax, curve, steepest, tenth), 8, 4.5))
    print(f"tested {tested}, {curve.rates[0]:.2e} to {curve.rates[-1]:.2e}")
    if not curve.diverged:
        print(f"the loss did not diverge: its minimum may lie above {curve.rates[-1]:.2e} (--lr-last)")
    print(f"steepest descent of the smoothed loss: --lr {steepest:.2e}")
    print(f"a tenth of the rate of its minimum:    --lr {tenth:.2e}")
    print(f"{picture}, find_lr.json")
    return 0


def draw(ax: Any, curve: Curve, steepest: float, tenth: float) -> None:
    """Draw the losses over the rates on matplotlib's axes."""
    ax.plot(curve.rates, curve.losses, color="0.7", linewidth=1, label="loss")
    ax.plot(curve.rates, curve.smoothed, label=f"smoothed ({BETA:g})")
    ax.axvline(steepest, color="C1", linestyle="--", label=f"steepest descent {steepest:.2e}")
    ax.axvline(tenth, color="C2", linestyle=":", label=f"a tenth of the minimum's {tenth:.2e}")
    ax.set(xscale="log", xlabel="learning rate", ylabel="loss")
    ax.grid(alpha=0.3)
    ax.legend()
