"""Validation losses, custom evaluations, samples, and the summary at the end of a run."""

from __future__ import annotations

from collections.abc import Callable

from fastgpt.data import unigram_nats
from fastgpt.inference import Generator, Request
from fastgpt.training.run import Run
from fastgpt.training.runlog import Log

# name -> evaluation(run), which returns figures by name. Every validation calls them and logs each figure as
# "name.figure". A script adds its functions here before it calls train.main(). The model is in training mode when they
# are called, and must be in training mode afterwards.
EVALUATIONS: dict[str, Callable[[Run], dict[str, float]]] = {}


def validate(run: Run, log: Log, batches: int | None) -> dict[str, float]:
    """Log the validation of the run's task over the first `batches` batches (None: all) and every evaluation, those of
    the run that are due included; return the figures."""
    figures = run.task.validate(run, batches)
    for name, evaluation in EVALUATIONS.items():
        figures |= {f"{name}.{what}": float(value) for what, value in evaluation(run).items()}
    figures = run.mesh.share(figures)
    log.row({"step": run.progress.step, **figures})
    more = "".join(f", {name} {value:.4f}" for name, value in figures.items() if name != "val_loss")
    unit = "nats per token" if run.task.unit == "token" else f"per {run.task.unit}"
    log.say(f"step {run.progress.step}: validation loss {figures['val_loss']:.4f} {unit}{more}")
    for name, preset in run.evaluations.items():
        found = {f"{name}.{what}": value for what, value in preset(run, log).items()}
        if found:
            log.row({"step": run.progress.step, **found})
        figures |= found
    return figures


def sample(run: Run, prompt: str) -> str:
    """Continue `prompt`, or begin a document if it is empty; the run's seed is used, so a repeated run returns the same
    text."""
    cfg, tokenizer = run.cfg, run.data.tokenizer
    if tokenizer is None:
        return "no samples: the data has no tokenizer (pass --tokenizer tokenizer.json)"
    request = Request(prompt or [tokenizer.eot], cfg.sample_tokens, temperature=0.8, top_k=50, seed=cfg.seed)
    model = run.whole_model()
    return "" if model is None else prompt + Generator(model, tokenizer, graphs=False).generate([request])[0].text


def finish(run: Run, log: Log) -> int:
    """Validate against a unigram model, write samples and the loss curve, and return the exit code of the run."""
    cfg = run.cfg
    loss = validate(run, log, None if run.device.type == "cuda" else 40 * cfg.eval_batches)["val_loss"]
    prompts = cfg.prompt.split("|") if run.data.tokenizer is not None else [cfg.prompt]
    texts = [sample(run, prompt) for prompt in prompts]
    unigram = run.mesh.share(unigram_nats(run.data.train, run.data.val, run.data.n_vocab) if run.mesh.main else 0.0)
    if run.mesh.main:
        (run.folder / "samples.txt").write_text("\n\n=====\n\n".join(texts), encoding="utf-8")
        for text in texts:
            log.say(f"--- sample ---\n{text}")
        log.say(f"loss curve: {log.plot()}; samples: {run.folder / 'samples.txt'}; metrics: {log.path}")
    log.say(f"validation loss {loss:.4f} nats per token, unigram model of the same tokens {unigram:.4f}")
    if cfg.check_baseline and loss > unigram - 1.0:
        log.say(f"the model is {unigram - loss:.2f} nats per token below the unigram model, expected at least 1")
        return 1
    return 0
