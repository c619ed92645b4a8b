"""A fine-tuning run: a Run whose checkpoints hold what it trains, and which ends with files that others can use."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgpt.core.device import default_device, dtype_of, keep_freed_memory
from fastgpt.core.errors import UserError
from fastgpt.core.folders import new_folder
from fastgpt.core.tensorfile import Deferred
from fastgpt.data.load import load_tokenizer
from fastgpt.data.tokenizer import Tokenizer
from fastgpt.distributed.mesh import find_mesh
from fastgpt.evaluate import hook
from fastgpt.finetune.adapter import load_adapter, save_adapter
from fastgpt.finetune.base import Teaching, named, open_base, open_teacher
from fastgpt.finetune.config import FinetuneConfig
from fastgpt.finetune.data import Data, open_data
from fastgpt.finetune.freeze import freeze, freeze_first, layer_decay
from fastgpt.finetune.grpo import GRPO
from fastgpt.finetune.head_files import write_model
from fastgpt.finetune.heads import HeadConfig, attach
from fastgpt.finetune.lora import add_lora, read_merged
from fastgpt.finetune.plan import block_of, lora_of
from fastgpt.finetune.rewarded import open_rewards
from fastgpt.finetune.rollouts import Reward, RolloutLoader
from fastgpt.finetune.tuned import Tuned, build_task, head_config
from fastgpt.finetune.written import Teacher
from fastgpt.inference.chat import FILE, Template
from fastgpt.models.config import ModelConfig
from fastgpt.models.gpt import GPT
from fastgpt.models.weights.fingerprint import fingerprint
from fastgpt.training import checkpoint
from fastgpt.training.build import build_optimizer, keep_sums
from fastgpt.training.evaluation import validate
from fastgpt.training.initial import Initial, load_start
from fastgpt.training.run import Run
from fastgpt.training.runlog import Log


class FinetuneRun(Run):
    """A training run of fastgpt/finetune.

    Attributes:
        finetune: its settings.
        head: the task head; None for the LM head.
        adapters: whether it trains adapters alone; checkpoints then hold nothing else.
        start, taught_by: the base, and the teacher if there is one.
        base: fingerprint of the base, for its adapters; None where it is not known.
    """

    task: Tuned

    def __init__(
        self,
        cfg: FinetuneConfig,
        model: GPT,
        data: Data,
        head: HeadConfig | None,
        start: Initial,
        block: int,
        taught_by: Teaching | None = None,
        base: str | None = None,
    ) -> None:
        device = model.wte.weight.device
        self.finetune, self.head, self.adapters, self.start = cfg, head, cfg.adapted, start
        self.taught_by, self.base = taught_by, base
        rewards = open_rewards(cfg.reward, data.tokenizer, device)
        loader: Any = None if cfg.task == "grpo" else data.loader(cfg, block, device)
        task = build_task(cfg, data, model, head, block, Path(cfg.out), taught_by, rewards, loader)
        if isinstance(task.task, GRPO):
            loader, epoch = _rollouts(cfg, model, data, task.task, start, block, rewards), _draws(cfg, data)
        else:
            epoch = len(loader) / (cfg.batch // cfg.micro_batch)
        steps = cfg.max_steps or max(1, round(cfg.epochs * epoch))
        if cfg.layer_decay != 1:
            cfg = dataclasses.replace(cfg, lr_ratios={**cfg.lr_ratios, **layer_decay(model, cfg.layer_decay)})
        train = cfg.to_train(model.config, block, steps)
        source: Any = data
        super().__init__(train, device, source, {}, model, build_optimizer(train, model), loader, task)

    def settings(self) -> dict[str, Any]:
        steps = {"max_steps": self.cfg.max_steps, "max_minutes": None, "optimizer": "adamw"}
        return {**dataclasses.asdict(self.finetune), **steps}

    def weights(self) -> dict[str, Tensor]:
        tensors = self.model.state_dict()
        if not self.adapters:
            return tensors
        trained = {name for name, p in self.model.named_parameters() if p.requires_grad}
        return {name: t for name, t in tensors.items() if name in trained}

    def load_weights(self, tensors: dict[str, Tensor]) -> None:
        expected = self.weights()
        if tensors.keys() != expected.keys() or any(t.shape != expected[name].shape for name, t in tensors.items()):
            raise UserError(
                f"{self.folder} has checkpoints of other adapters or of another head, expected those of these settings"
            )
        self.model.load_state_dict(tensors, strict=False)

    def begin(self) -> None:
        self.origin = self.start.origin

    def more_state(self) -> dict[str, Any]:
        head = None if self.head is None else self.head.to_dict()
        more = {} if self.taught_by is None else {"teacher": self.taught_by.origin}
        return {"base": self.finetune.base, "adapters": self.adapters, "head": head, **more}


def prepare(cfg: FinetuneConfig) -> FinetuneRun:
    """Open the base, read the data, and build the model that trains. The run's folder gets only what the data and the
    reference need: augmented rows, paraphrases, completions of a teacher, log-probabilities.

    Raises:
        UserError: what does not fit, before training starts.
    """
    if (world := find_mesh().world) > 1:
        raise UserError(f"finetune was started in {world} processes, expected one: it does not share a model yet")
    device = default_device(cfg.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.manual_seed(cfg.seed)
    keep_freed_memory()
    start = open_base(cfg)
    if start.tokenizer is None:
        raise UserError(f"base: {cfg.base} has no tokenizer, expected one beside its weights")
    tokenizer = load_tokenizer(start.tokenizer)
    block = block_of(cfg, start.config)
    if (cfg.task == "grpo" or cfg.written) and cfg.max_new_tokens >= block:
        raise UserError(f"max_new_tokens is {cfg.max_new_tokens}, expected less than block_size, {block}")
    template = open_template(cfg, tokenizer)
    teacher, write = open_teacher(cfg, tokenizer), None
    if teacher is not None and teacher.start is not None and cfg.written:
        write = Teacher(cfg, teacher.start, tokenizer, block, dtype_of(cfg.dtype, device.type), device)
    data = open_data(cfg, tokenizer, str(start.tokenizer), template, block, write)
    del write  # the teacher's weights with it
    head = head_config(cfg, data)
    model = load_base(cfg, start, device)
    base = fingerprint(model) if cfg.adapted else None
    model = adapted(cfg, model, head, base)
    print(*data.said, sep="\n", flush=True)
    return hook.attach(FinetuneRun(cfg, model, data, head, start, block, teacher, base))


def open_template(cfg: FinetuneConfig, tokenizer: Tokenizer) -> Template:
    """Return the chat template of the settings, from now on the one of the tokenizer, or that of the tokenizer."""
    if cfg.template is not None:
        try:
            given = Path(cfg.template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"template: {cfg.template} cannot be read ({e}), expected a Jinja file") from None
        tokenizer.companions = {**tokenizer.companions, FILE: given}
    eos, text = tokenizer.decode_bytes([tokenizer.eot]).decode(), tokenizer.companions.get(FILE)
    if text is None:
        return Template(eos_token=eos)
    return Template(text, cfg.template or f"the chat template of {cfg.base}", eos, tokenizer.bos)


def load_base(cfg: FinetuneConfig, start: Initial, device: torch.device) -> GPT:
    """Build the base with its weights. Raises UserError for weights that are not finite."""
    dropout: dict[str, Any] = dict(attn_dropout=cfg.dropout, resid_dropout=cfg.dropout, embed_dropout=cfg.dropout)
    config: ModelConfig = dataclasses.replace(start.config, **dropout)
    return load_start(start, config, dtype_of(cfg.dtype, device.type), device)


@torch.no_grad()
def adapted(cfg: FinetuneConfig, model: GPT, head: HeadConfig | None, base: str | None) -> GPT:
    """Freeze a base, adapt it and give it a head as the settings say.

    Args:
        base: its fingerprint; None if it is not known.

    Raises:
        UserError: settings or adapters that do not fit the model.
    """
    generator = torch.Generator().manual_seed(cfg.seed)
    model.recompute = cfg.recompute
    if head is not None:
        attach(model, head, generator)
    if cfg.quantise != "none":
        from fastgpt.finetune.quantised import quantise_base

        quantise_base(model, cfg.quantise)
    if cfg.adapter:
        load_adapter(model, cfg.adapter, base=base)
    elif cfg.lora.rank:
        add_lora(model, lora_of(cfg), generator=generator)
    else:
        freeze_first(model, cfg.freeze_first)
        freeze(model, cfg.freeze)
    if head is not None:
        model.head.requires_grad_(True)
    keep_sums(model, cfg.batch // cfg.micro_batch)
    return model.train()


def _draws(cfg: FinetuneConfig, data: Data) -> float:
    """Return the optimizer steps in which each prompt is used once."""
    return sum(map(len, data.train.values())) * cfg.group / cfg.batch * cfg.iterations


def _rollouts(
    cfg: FinetuneConfig, model: GPT, data: Data, task: GRPO, start: Initial, block: int, rewards: list[Reward]
) -> RolloutLoader:
    """Return the loader that lets the model write; with beta, also the model of the start."""
    p = model.wte.weight
    reference = load_start(start, start.config, p.dtype, p.device).eval() if cfg.held else None
    prompts = [prompt for items in data.train.values() for prompt in items]
    options: dict[str, Any] = dict(accumulation=cfg.batch // cfg.micro_batch, iterations=cfg.iterations)
    options |= dict(group=cfg.group, reference=reference, seed=cfg.seed, pad=data.tokenizer.eot)
    return RolloutLoader(model, data.tokenizer, prompts, rewards, task, block, batch=cfg.micro_batch, **options)


def write_merged(run: FinetuneRun) -> Path:
    """Write run folder `merged` with the adapters merged into the weights, as an imported model."""
    read, p = read_merged(run.model), next(run.model.parameters())
    shapes = shapes_of(run.model.config)
    tensors = {name: Deferred(p.dtype, shape, partial(_merged, read, name, p.dtype)) for name, shape in shapes.items()}
    progress = {"step": run.progress.step, "tokens": run.progress.tokens}
    state: dict[str, Any] = {"progress": progress, "config": {}, "loader": {}, "tokenizer": run.data.fingerprint}
    state |= {"model": dataclasses.asdict(run.model.config), "source": {"name": str(run.folder), "revision": None}}
    with new_folder(_fresh(run.folder / "merged")) as aside:
        checkpoint.save(aside, run.progress.step, tensors, {}, state, keep=0)
        run.data.tokenizer.save(aside / "tokenizer.json")  # type: ignore[union-attr]
    return run.folder / "merged"


def write_with_head(run: FinetuneRun, head: HeadConfig) -> str:
    """Write folder `model` with the model, its head and its tokenizer for transformers; return a sentence on it."""
    folder = run.folder / "model"
    read, p, tokenizer = read_merged(run.model), next(run.model.parameters()), run.data.tokenizer
    assert tokenizer is not None, "the data of fine-tuning have one"
    try:
        with new_folder(_fresh(folder)) as aside:
            write_model(aside, run.model.config, read, head, tokenizer, dtype=p.dtype)
    except UserError as e:
        return f"no model for transformers was written: {e}"
    return f"model for transformers: {folder}"


def _merged(read: Callable[[str], Tensor], name: str, dtype: torch.dtype) -> Tensor:
    return read(name).detach().to("cpu", dtype)


def shapes_of(config: ModelConfig) -> dict[str, torch.Size]:
    """Return the shapes of the parameters of a model by name."""
    with torch.device("meta"):
        return {name: p.shape for name, p in GPT(config).named_parameters()}


def _fresh(folder: Path) -> Path:
    """Remove what an earlier end of the run wrote."""
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def restore_best(run: FinetuneRun) -> str:
    """Take the weights of the best checkpoint, if patience keeps one and it is not the last; return a sentence."""
    p = run.progress
    path = run.folder / f"step_{p.best_step:08d}"
    if not run.cfg.patience or p.best_step == p.step or not path.is_dir():
        return ""
    run.load_weights(checkpoint.read_tensors(path, checkpoint.MODEL, checkpoint.read_state(path)))
    best = p.best_step  # last_step too, so that evaluations of the end are due
    run.progress = dataclasses.replace(p, step=best, last_step=best, tokens=best * run.cfg.batch_tokens)
    return f"what follows is of the best checkpoint, {path}"


def end(run: Run, log: Log) -> int:
    """Validate, and write what others can use: adapters in the form of PEFT, a merged run, a model with its head. With
    patience these are of the best checkpoint."""
    assert isinstance(run, FinetuneRun)
    log.say(restore_best(run))
    validate(run, log, None)
    for report in run.task.reports():
        log.say(report)
    folder = run.folder
    if run.adapters:
        save_adapter(run.model, _fresh(folder / "adapter"), *named(run.finetune, run.start), base=run.base)
        log.say(f"adapters in PEFT's format: {folder / 'adapter'}")
    if run.head is not None:
        log.say(write_with_head(run, run.head))
    elif run.adapters and run.finetune.merge:
        log.say(f"run with the adapters merged: {write_merged(run)}")
    log.say(f"loss curve: {log.plot()}; metrics: {log.path}")
    return 0
