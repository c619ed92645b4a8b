"""Build data, model and optimizer from the settings."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from fastgpt.core.device import dtype_of
from fastgpt.core.errors import UserError
from fastgpt.data.loader import TokenLoader
from fastgpt.data.packed import PackedLoader
from fastgpt.data.shards import Tokens
from fastgpt.data.source import Source, open_source, open_validation
from fastgpt.distributed.mesh import ALONE, Mesh
from fastgpt.models.gpt import GPT
from fastgpt.nn import keep_gradients
from fastgpt.optim import AdamW
from fastgpt.optim.muon import MuonAdamW
from fastgpt.training.config import TrainConfig
from fastgpt.training.task import Task


def open_data(cfg: TrainConfig) -> tuple[Source, dict[str, Tokens]]:
    """Open the training and validation tokens, and by name those of the data set's sources and of val_sources.

    Raises:
        UserError: unreadable data, fewer than two validation tokens, or more token ids than model.vocab_size.
    """
    data = open_source(
        cfg.data,
        data_dtype=cfg.data_dtype,
        val_data=cfg.val_data,
        tokenizer=cfg.tokenizer,
        vocab_size=cfg.vocab_size,
        val_fraction=cfg.val_fraction,
    )
    vocab_size = cfg.model.vocab_size or data.n_vocab
    if vocab_size < data.n_ids:
        raise UserError(f"model.vocab_size is {vocab_size}, but {data.name} has {data.n_ids} token ids")
    if cfg.model.vocab_size is not None:
        data = dataclasses.replace(data, n_vocab=min(vocab_size, data.n_vocab), said="")
    if len(data.val) < 2:
        raise UserError(f"{data.name} has {len(data.val)} validation tokens, expected at least 2")
    return data, {**data.val_sources, **open_validation(cfg.val_sources, data, cfg.data_dtype)}


def build_loader(cfg: TrainConfig, data: Source, device: torch.device, mesh: Mesh = ALONE) -> TokenLoader:
    """Return the training batches of this process.

    Raises:
        UserError: packing or doc_masks where nothing says how documents begin, or too little text.
    """
    options: dict[str, Any] = dict(seed=cfg.seed, device=device, shuffle=data.shuffle, rank=mesh.rank, world=mesh.world)
    method = data.packing if cfg.packing == "auto" else cfg.packing
    if method == "concatenate":
        eot = data.eot if cfg.doc_masks else None
        return TokenLoader(data.train, cfg.sequences, cfg.block_size, eot=eot, **options)
    return PackedLoader(data.train, cfg.sequences, cfg.block_size, method, data.eot, cfg.doc_masks, **options)


def build_model(cfg: TrainConfig, vocab_size: int, device: torch.device, mesh: Mesh = ALONE) -> GPT:
    """Build an initialised model; a seed determines its weights, whatever the kernels and the device."""
    settings = dataclasses.replace(cfg.model, vocab_size=vocab_size)
    model = GPT(settings, generator=torch.Generator().manual_seed(cfg.seed))
    model.recompute, model.epilogues = cfg.recompute, cfg.epilogues
    model.to(device=device, dtype=dtype_of(cfg.dtype, device.type))
    if not cfg.compile and mesh.world == 1:  # hooks of DDP and FSDP2 see no gradient that is kept
        keep_sums(model, cfg.accumulation)
    return model


def keep_sums(model: GPT, micro_batches: int) -> None:
    """Keep the gradients that a step adds up in the same buffers: those of several micro-batches, or of a tied head."""
    if micro_batches > 1 or model.config.tied:
        keep_gradients(model if micro_batches > 1 else model.wte)


def spread_over(mesh: Mesh, cfg: TrainConfig, task: Task, model: GPT) -> Task:
    """Spread a model over the processes of a mesh before its optimizer is built; return the task with its loss there.

    Raises:
        UserError: a step has fewer micro-batches than processes, or settings need one process.
    """
    if mesh.world == 1:
        return task
    if cfg.accumulation % mesh.world:
        rows = mesh.world * cfg.sequences * cfg.block_size
        raise UserError(
            f"batch_tokens is {cfg.batch_tokens}, expected a multiple of processes * micro_batch * block_size = {rows}"
        )
    alone = {"dtype": cfg.dtype == "fp16", "evals": bool(cfg.evals)}
    for name in (name for name, given in alone.items() if given):
        raise UserError(f"{name} is {getattr(cfg, name)!r}, which works in one process only")
    from fastgpt.distributed.parallelize import Spread

    compiled: Any = torch.compile(model) if cfg.compile else None
    return Spread(task, model, mesh, cfg.parallel, torch.float32 if cfg.reduce_dtype == "fp32" else None, compiled)


def build_optimizer(cfg: TrainConfig, model: GPT, mesh: Mesh = ALONE) -> AdamW | MuonAdamW:
    """Build AdamW, or Muon for the matrices of the blocks and AdamW for the rest.

    Raises:
        UserError: an expression in lr_ratios matches no parameter.
    """
    try:
        groups = model.param_groups(cfg.weight_decay, cfg.lr_ratios, muon=cfg.optimizer == "muon")
    except ValueError as e:
        raise UserError(str(e)) from e
    settings: dict[str, Any] = dict(
        lr=cfg.lr,
        betas=(cfg.beta1, cfg.beta2),
        eps=cfg.eps,
        master=None if cfg.master == "none" else cfg.master,
        max_norm=cfg.clip if cfg.clip > 0 else math.inf,
        seed=cfg.seed,
    )
    if cfg.optimizer == "adamw":
        return AdamW(groups, **settings)
    replicated = mesh.world > 1 and cfg.parallel == "ddp"
    return MuonAdamW(groups, momentum=cfg.momentum, replicated=replicated, **settings)
