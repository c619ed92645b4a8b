"""Train a GPT, to be read from top to bottom: settings, data, model, optimizer, then the loop.

Run it with `fastgpt train --config tiny --data my.txt`, or with `python -m fastgpt.train` and the same options.

A copy of this file runs unchanged with the installed package: `python train.py --data tokens.bin`.
"""

from __future__ import annotations

import gc
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor

from fastgpt.core import backend
from fastgpt.core.device import default_device, keep_freed_memory
from fastgpt.distributed.mesh import Mesh, connected, find_mesh
from fastgpt.distributed.parallelize import Spread
from fastgpt.evaluate import hook
from fastgpt.ops._upstream import expected_gradient, run_backward
from fastgpt.optim import AdamW
from fastgpt.optim.muon import MuonAdamW
from fastgpt.training import initial, plan
from fastgpt.training.build import build_loader, build_model, build_optimizer, open_data, spread_over
from fastgpt.training.config import TrainConfig, load_config
from fastgpt.training.evaluation import EVALUATIONS, finish, sample, validate
from fastgpt.training.metric import check, value_of
from fastgpt.training.profiling import Energy, Profile
from fastgpt.training.run import Run
from fastgpt.training.runlog import Log
from fastgpt.training.schedule import learning_rate
from fastgpt.training.stability import LossScale, SpikeGuard
from fastgpt.training.start import start_log
from fastgpt.training.steplog import StepLog
from fastgpt.training.stop import Stop
from fastgpt.training.task import Batch, NextToken, Task

__all__ = ["EVALUATIONS", "Run", "drive", "forward_backward", "loop", "main", "optimizer_step", "prepare", "train"]


def prepare(cfg: TrainConfig) -> Run:
    """Prepare data, model and optimizer of a new run, without writing to the run's folder."""
    cfg, mesh = initial.settle(cfg), find_mesh()
    device = mesh.device(default_device(cfg.device))
    if device.type == "cuda":
        torch.cuda.set_device(device)  # for calls without a device: events, streams, kernels of other libraries
    torch.manual_seed(cfg.seed + mesh.rank)

    data, val_sources = open_data(cfg)
    vocab_size = cfg.model.vocab_size or data.n_vocab
    cfg = plan.settle(cfg, vocab_size, device)  # a number for micro_batch auto

    keep_freed_memory()
    with plan.explain_out_of_memory(cfg, vocab_size, device):
        model = build_model(cfg, vocab_size, device, mesh)
        task = spread_over(mesh, cfg, NextToken(), model)
        optimizer = build_optimizer(cfg, model, mesh)
    loader = build_loader(cfg, data, device, mesh)
    return hook.attach(Run(cfg, device, data, val_sources, model, optimizer, loader, task, mesh))


# The two halves of a step. CUDA graphs can record them, since they only take and return tensors and never wait for the
# device.


def forward_backward(
    model: Any, task: Task, scaling: LossScale | None, total: Tensor | None, counted: Tensor, *batch: Any
) -> Tensor:
    """Add the gradients of one micro-batch; return `total` plus its share of the step's loss and figures, all
    (1 + figures,) fp32.

    Args:
        total: of the earlier micro-batches of the step, or None.
        counted: () int64, the tokens of the whole step that count. The step's loss is the mean over them, so a token
            has the same weight in any micro-batch.
        batch: the parts of a Batch; ids and targets are (B, T) int64.
    """
    share = counted.reciprocal().view(1)
    upstream = share if scaling is None else share * scaling.scale
    with expected_gradient(upstream):
        sums = task.loss(model, Batch(*batch))
    run_backward(sums, upstream.expand_as(sums))  # figures have no gradient
    sums = sums.detach()
    return sums * share if total is None else torch.addcmul(total, sums, share)


def optimizer_step(
    optimizer: AdamW | MuonAdamW, guard: SpikeGuard | None, scaling: LossScale | None, loss: Tensor
) -> Tensor:
    """Clip and update, unless the loss is a spike or a gradient is not finite; return (loss, gradient norm, spike,
    figures)."""
    loss, figures = loss[:1], loss[1:]
    spike = torch.zeros_like(loss) if guard is None else guard(loss)
    optimizer.found_inf = spike  # a flagged step changes nothing
    if scaling is not None:
        assert isinstance(optimizer, AdamW), "the settings take fp16 with AdamW only"
        optimizer.grad_scale = scaling.scale
    optimizer.step()
    if scaling is not None:
        scaling.update(optimizer.grad_norm)
    optimizer.zero_grad(set_to_none=True)
    return torch.cat((loss, optimizer.grad_norm, spike, figures))


def accumulate(task: Task, mesh: Mesh, batches: Sequence[Batch], micro_step: Callable[..., Tensor]) -> Tensor:
    """Add the gradients of the micro-batches of a step; return its loss and figures, (1 + figures,) fp32.

    Args:
        micro_step: called with the number of a micro-batch and the arguments of `forward_backward` from `total` on.
    """
    counted = mesh.sum(reduce(torch.add, map(task.counted, batches)))
    loss: Tensor | None = None
    for i, batch in enumerate(batches):
        if isinstance(task, Spread):  # several processes sum the gradients once in a step
            task.reduces(i + 1 == len(batches))
        loss = micro_step(i, loss, counted, *batch.parts())
    assert loss is not None, "a step has at least one micro-batch"
    return loss


def loop(run: Run, log: Log, stop: Stop) -> None:
    """Train until the run reaches its length or time limit, or a signal stops it.

    The host launches steps without waiting for their results; it stays at most two steps ahead (see StepLog).
    """
    cfg, p, optimizer, graphs, task, mesh = run.cfg, run.progress, run.optimizer, run.graphs, run.task, run.mesh
    model = torch.compile(run.model) if cfg.compile else run.model
    one_batch = partial(forward_backward, model, task, run.scaling)
    micro_step = lambda i, *batch: graphs("accumulate" if i else "forward_backward", one_batch, *batch)  # noqa: E731
    update = partial(optimizer_step, optimizer, run.guard, run.scaling)
    steps, profile = StepLog(run, log), Profile(cfg.profile, cfg.profiler, run.folder, run.device)

    while p.step < p.last_step and not steps.ended(stop):
        profile.before(p.step + 1)
        rate = learning_rate(cfg, p.step, p.last_step)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["lr_ratio"]
        graphs.begin(optimizer)  # graphs("name", f, x) is f(x), or the replay of a CUDA graph that was recorded from it

        # Forward and backward: the first micro-batch writes the gradients, the others add to them.
        batches = [Batch(*next(run.loader)) for _ in range(cfg.accumulation // mesh.world)]
        loss = accumulate(task, mesh, batches, micro_step)

        # Optimizer step. Loss, gradient norm and spike flag stay on the device; `steps` logs them when they arrive.
        values = graphs("optimizer_step", update, steps.summed(loss, stop))
        p.step += 1
        p.tokens += cfg.batch_tokens
        log.say(graphs.note())
        log.say(profile.after(p.step))
        log.checkpoints(run.writer.finished())
        steps.put(rate, values)

        # Evaluation, checkpoint and samples. After the last step, `train` runs them.
        evaluates, samples = p.due(cfg.eval_every), p.due(cfg.sample_every)
        saves = p.due(cfg.save_every) or steps.save_due()
        if evaluates or saves or samples:
            steps.wait()
            if evaluates:
                value = value_of(validate(run, log, cfg.eval_batches), cfg.metric, run.evaluations)
                best = value is not None and p.record_validation(value, cfg.rises, cfg.patience)
                saves = saves or (best and cfg.patience > 0)
                if 0 < cfg.patience <= p.waited:
                    than = "" if p.best is None else f" than {p.best:.4f} at step {p.best_step}"
                    log.say(f"stopping: {p.waited} validations without a better {cfg.metric}{than}")
            if saves:
                run.save()  # in the background; `run.writer` returns the path when it is written
                steps.saved()
            if samples:
                log.sample(p.step, sample(run, cfg.prompt))
            steps.restart()

    steps.wait()
    log.checkpoints(run.writer.finished(wait=True))
    if run.too_slow():
        log.say(f"the run ends with step {p.step} of {p.last_step}: steps have become slower (max_minutes)")
    log.say(profile.close())


def train(cfg: TrainConfig, command: str = "run the same command again") -> int:
    """Train, or resume a run that was stopped.

    Args:
        command: the command that resumes the run; it is printed when a signal stops it.

    Returns:
        0 as the exit code, or 1 if check_baseline is set and the model is too close to a unigram model.
    """
    backend.use(**backend.parse_choices(cfg.kernels))
    mesh = find_mesh()
    with connected(mesh, mesh.device(default_device(cfg.device))):
        return drive(prepare(cfg), finish, command)


def drive(run: Run, end: Callable[[Run, Log], int], command: str) -> int:
    """Start or resume a run, train, save, and return the exit code of `end(run, log)`, which evaluates the result."""
    changed = run.resume()
    check(run, [*EVALUATIONS, *run.evaluations])
    first = run.progress.step
    gc.freeze()
    with Stop() as stop, closing(start_log(run, changed)) as log, closing(run.writer):
        energy = Energy(run.device)
        with plan.explain_out_of_memory(run.cfg, run.model.vocab_size, run.device):
            loop(run, log, stop)
        done = run.progress.step - first
        figures, text = energy.figures(done, run.cfg.batch_tokens)
        if figures:
            log.row({"step": run.progress.step, **figures})
        log.say(text)
        if done:
            run.save()
            log.checkpoints(run.writer.finished(wait=True))
        log.say(run.best())
        if stop.asked:
            log.say(f"stopped at step {run.progress.step}; to resume: {command}")
            return 0
        return end(run, log)


def main(argv: list[str] | None = None) -> int:
    """Run `fastgpt train` with settings from `argv` (default: the command line); the default `--config` depends
    on whether the machine has a GPU."""
    default = "gpt2-124m-demo" if torch.cuda.is_available() else "tiny"
    arguments = sys.argv[1:] if argv is None else argv
    if "--plan" in arguments:
        return plan.main(arguments, default)
    cfg = load_config(arguments, default)
    program = ["python", sys.argv[0]] if __name__ == "__main__" and __spec__ is None else ["fastgpt", "train"]
    again = [] if cfg.resume == "auto" else ["--resume", "auto"]
    return train(cfg, shlex.join([*program, *arguments, *again]))


if __name__ == "__main__":
    from fastgpt.core.command import run_command

    sys.exit(run_command(main))
