"""Settings of a training run: a dataclass, read from YAML and overridden on the command line.

`load_config(argv)` returns a checked TrainConfig or raises UserError: one sentence with the key, the value received and
the value expected. Option names accept hyphens or underscores; model fields are nested: `--model.n-layers 6`.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from fastgpt.core import options
from fastgpt.core.options import Effect
from fastgpt.distributed.mesh import find_mesh
from fastgpt.models.config import ModelConfig, require, require_sizes
from fastgpt.training.metric import Goal, goal_of
from fastgpt.training.trackers import TRACKERS

log = logging.getLogger("fastgpt")

ENDLESS = 10**9  # number of steps of a run that only max_minutes limits


@dataclass(frozen=True)
class TrainConfig:
    """All settings of a training run.

    Attributes:
        model: shape of the model.
        data: text file, folder of text, or .bin shards ('shards_*.bin'); null is Python's standard library.
        data_dtype: type of ids in .bin files without a header; auto is uint16, or uint32 if the name has u32 or uint32.
        val_data: validation data, like data; null splits val_fraction off the training data.
        val_sources: name -> text file or .bin shards whose validation loss is also reported, as in {web: web_val.bin}.
        tokenizer: tokenizer.json, or a folder with a tokenizer, of .bin data (for samples), or to encode text with.
        vocab_size: size of the tokenizer trained on text data (model.vocab_size is the vocabulary size of the model).
        val_fraction: share of text files held out for validation.
        out: folder of the run; empty is runs/ and the name of the configuration.
        resume: auto (from the newest checkpoint in the run folder), never (start a new run) or a checkpoint's path.
        init: run, checkpoint or folder of a model (config.json and weights) whose weights and tokenizer a new run
            starts with; it also decides model.*, except the dropouts.
        seed: seed of initial weights, data order and dropout.
        device: auto, cpu, cuda, cuda:1, ...
        dtype: type of parameters and activations; auto is bf16 on a GPU, fp32 on a CPU; fp16 scales the loss.
        kernels: backend of each op, as in 'attention=torch,adamw=triton'; empty chooses the best available.
        compile: compile the model with torch.compile.
        graphs: replay steps from CUDA graphs (on a GPU, with optimizer adamw); --no-graphs launches every kernel.
        epilogues: apply the MLP's GELU, its slope and the sum of its bias's gradient in fastgpt's own matrix products
            (on a GPU, with model.activation gelu or gelu_tanh) instead of passes after PyTorch's; with
            model.positions learned and PyTorch's attention, also take the gradients of q, k and v apart.
        recompute: activations to recompute in backward instead of keeping them; norms includes the MLP's activation,
            block is everything but the input of a block.
        parallel: how several processes (torchrun) share the model: ddp copies it, fsdp shards parameters, gradients and
            optimizer state.
        checkpoint: with parallel fsdp, sharded lets each process write its shards, whole gathers the tensors for the
            main process to write; auto is sharded.
        reduce_dtype: of the sums of gradients over processes; auto is the dtype of the gradients.
        block_size: tokens T of a training sequence, at most model.block_size.
        micro_batch: sequences B in one forward and backward; auto is the most that fit (fastgpt train --plan).
        packing: how documents share sequences; concatenate cuts them where a sequence ends, best-fit and pad only if
            they are longer than one; auto is what the data set's recipe says, else concatenate.
        doc_masks: let tokens attend within their own document only, with positions that restart in each.
        batch_tokens: tokens of one optimizer step; a multiple of micro_batch * block_size (gradient accumulation).
        max_steps: optimizer steps to train for; null is no limit (then max_minutes is needed).
        max_minutes: end training after this time, unless max_steps is reached first; null is no limit. --max-steps
            without --max-minutes removes the time limit of a built-in configuration.
        optimizer: adamw, or muon for the matrices of the blocks and adamw for the rest (both use one learning rate).
        momentum: momentum of Muon.
        lr: highest learning rate; with model.mup_base_width, that of the model of this width.
        lr_ratios: regular expression found in a parameter's name -> factor of its learning rate, as in {wte: 0.3}.
        min_lr_ratio: final learning rate as a fraction of lr.
        warmup_steps: steps of linear warm-up.
        schedule: shape of the learning rate after warm-up; wsd holds it, then decays linearly.
        decay_fraction: share of the run in which wsd decays.
        weight_decay: decoupled weight decay of matrices and embeddings (norms and biases have none).
        beta1: first decay rate of AdamW.
        beta2: second decay rate of AdamW.
        eps: epsilon of AdamW.
        clip: largest gradient norm; 0 turns clipping off.
        master: how the optimizer keeps the precision that 16-bit parameters lose; fp32 copies, remainders or stochastic
            rounding.
        eval_every: steps between validations; 0 is only at the end.
        eval_batches: micro-batches of a validation.
        evals: preset or file of `fastgpt eval` -> steps between its evaluations, as in {base: 1000}; a multiple of
            eval_every, or 0 for only at the end.
        eval_data: folder with the files of evals.
        eval_limit: items of each task in evals; null is all.
        save_every: steps between checkpoints; 0 is only at the end.
        save_minutes: also write a checkpoint when the last one is this many minutes old; 0 is off.
        keep: number of latest checkpoints to keep; 0 keeps all.
        keep_every: also keep checkpoints at multiples of this many steps; 0 is none.
        patience: end the run after this many validations without a better metric, and keep the best checkpoint; 0 is
            off.
        metric: figure of a validation that patience watches, as in val_loss.web or NAME.FIGURE of an evaluation; val_
            may be left out.
        metric_goal: whether the metric should fall or rise; auto knows it of losses, accuracies and the like.
        spike_sigmas: skip a step whose loss is this many standard deviations above the mean of the last 100; 0 is off.
        log_every: steps between lines on the console.
        track: tensorboard, trackio or wandb; separate several by commas.
        profile: steps FIRST:LAST to profile, with a Chrome trace and a table of kernels.
        profiler: torch writes the profile; nsys marks the steps and their ops (NVTX) for Nsight Systems instead.
        sample_every: steps between samples; 0 is only at the end.
        sample_tokens: length of a sample.
        prompt: text that samples begin with; separate several by `|`.
        check_baseline: exit with 1 unless the final validation loss is at least 1 nat below that of a unigram model.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: str | None = None
    data_dtype: Literal["auto", "uint16", "uint32"] = "auto"
    val_data: str | None = None
    val_sources: dict[str, str] = field(default_factory=dict)
    tokenizer: str | None = None
    vocab_size: int = 4096
    val_fraction: float = 0.05
    out: str = ""
    resume: str = "auto"
    init: str = ""
    seed: int = 1337
    device: str = "auto"
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    kernels: str = ""
    compile: bool = False
    graphs: bool = True
    epilogues: bool = False
    recompute: Literal["none", "norms", "block"] = "none"
    parallel: Literal["ddp", "fsdp"] = "ddp"
    reduce_dtype: Literal["auto", "fp32"] = "auto"
    checkpoint: Literal["auto", "whole", "sharded"] = "auto"
    block_size: int = 1024
    micro_batch: int | Literal["auto"] = 32
    packing: Literal["auto", "concatenate", "best-fit", "pad"] = "auto"
    doc_masks: bool = False
    batch_tokens: int = 524288
    max_steps: int | None = 18865
    max_minutes: float | None = None
    optimizer: Literal["adamw", "muon"] = "adamw"
    momentum: float = 0.95
    lr: float = 6e-4
    lr_ratios: dict[str, float] = field(default_factory=dict)
    min_lr_ratio: float = 0.0
    warmup_steps: int = 700
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    decay_fraction: float = 0.2
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip: float = 1.0
    master: Literal["fp32", "remainder", "stochastic", "none"] = "fp32"
    eval_every: int = 250
    eval_batches: int = 20
    evals: dict[str, int] = field(default_factory=dict)
    eval_data: str | None = None
    eval_limit: int | None = None
    save_every: int = 1000
    save_minutes: float = 0.0
    keep: int = 2
    keep_every: int = 0
    patience: int = 0
    metric: str = "val_loss"
    metric_goal: Goal = "auto"
    spike_sigmas: float = 10.0
    log_every: int = 1
    track: str = ""
    profile: str = ""
    profiler: Literal["torch", "nsys"] = "torch"
    sample_every: int = 0
    sample_tokens: int = 200
    prompt: str = ""
    check_baseline: bool = False

    def __post_init__(self) -> None:
        for name in ("block_size", "micro_batch", "max_steps", "lr", "eps", "max_minutes", "log_every", "eval_batches"):
            value = getattr(self, name)
            require(value in (None, "auto") or 0 < value < math.inf, name, value, "more than 0")
        for name in ("warmup_steps", "weight_decay", "clip", "eval_every", "save_every", "keep", "keep_every", "seed"):
            value = getattr(self, name)
            require(0 <= value < math.inf, name, value, "0 or more")
        for name in ("beta1", "beta2", "momentum", "val_fraction"):
            value = getattr(self, name)
            require(0.0 <= value < 1.0, name, value, "0 to less than 1")
        for name in ("min_lr_ratio", "decay_fraction"):
            value = getattr(self, name)
            require(0.0 <= value <= 1.0, name, value, "0 to 1")
        require(
            self.vocab_size >= 257, "vocab_size", self.vocab_size, "at least 257 (the bytes and an end-of-text token)"
        )
        for name in ("sample_every", "sample_tokens", "patience", "spike_sigmas", "save_minutes"):
            value = getattr(self, name)
            require(0 <= value < math.inf, name, value, "0 or more")
        for name in ("data", "val_data", "tokenizer"):
            require(getattr(self, name) != "", name, "", "a path or null")
        require_evals(self)
        require(self.resume != "", "resume", "", "auto, never or a path")
        endless = self.max_steps is None and self.max_minutes is None
        require(not endless, "max_steps", None, "a number, or one for max_minutes")
        known = goal_of(self.metric, self.metric_goal) is not None
        require(known, "metric_goal", "auto", f"min or max: the name {self.metric!r} does not tell")
        halves = self.dtype == "fp16" and (self.optimizer == "muon" or self.master in ("remainder", "stochastic"))
        require(not halves, "dtype", self.dtype, "bf16 or fp32 with muon, remainder or stochastic masters")
        for pattern, ratio in self.lr_ratios.items():
            require(0 <= ratio < math.inf, f"lr_ratios.{pattern}", ratio, "0 or more")
            require(_compiles(pattern), "lr_ratios", pattern, "a regular expression")
        unknown = set(self.trackers) - set(TRACKERS)
        require(not unknown, "track", self.track, f"some of {', '.join(TRACKERS)}")
        steps = re.fullmatch(r"(\d+):(\d+)", self.profile)
        right = not self.profile or (steps is not None and 1 <= int(steps[1]) <= int(steps[2]))
        require(right, "profile", self.profile, "FIRST:LAST, two steps counted from 1")
        traced = self.compile and self.recompute == "norms"
        require(not traced, "recompute", self.recompute, "none or block with compile, which does not trace it")
        require_sizes(self)
        rows = (1 if self.micro_batch == "auto" else self.micro_batch) * self.block_size
        fits = self.batch_tokens > 0 and self.batch_tokens % rows == 0
        require(fits, "batch_tokens", self.batch_tokens, f"a multiple of micro_batch * block_size = {rows}")
        if self.model.block_size is None:
            object.__setattr__(self, "model", replace(self.model, block_size=self.block_size))
        most = self.model.block_size or self.block_size
        require(self.block_size <= most, "block_size", self.block_size, f"at most model.block_size {most}")

    @property
    def trackers(self) -> list[str]:
        """Names in `track`."""
        return [name for name in self.track.replace(" ", "").split(",") if name]

    @property
    def rises(self) -> bool:
        """Whether the metric should rise."""
        return goal_of(self.metric, self.metric_goal) == "max"

    @property
    def sequences(self) -> int:
        """micro_batch as a number (fastgpt.training.plan.settle replaces auto)."""
        require(self.micro_batch != "auto", "micro_batch", self.micro_batch, "a number here")
        return int(self.micro_batch)

    @property
    def most_steps(self) -> int:
        """max_steps as a number; ENDLESS if it is null."""
        return ENDLESS if self.max_steps is None else self.max_steps

    @property
    def accumulation(self) -> int:
        """Micro-batches of one optimizer step."""
        return self.batch_tokens // (self.sequences * self.block_size)


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def require_evals(c: Any) -> None:
    """Raise UserError for evals that would not run at a validation, in the settings of any run."""
    for preset, every in c.evals.items():
        due = every == 0 or (every > 0 and c.eval_every > 0 and every % c.eval_every == 0)
        require(due, f"evals.{preset}", every, f"0 or a multiple of eval_every, {c.eval_every}")
    require(c.eval_limit is None or c.eval_limit > 0, "eval_limit", c.eval_limit, "more than 0")


def load_config(argv: Sequence[str], default: str = "tiny") -> TrainConfig:
    """Read settings from a command line: `--config NAME_OR_PATH` (a name in fastgpt/configs), then overrides in order.

    Args:
        argv: arguments without the program's name; `--help` prints every option and exits.
        default: configuration to use if argv names none.

    Raises:
        UserError: names the key, the value received and the value expected.
    """
    config, typed = read_config(argv, default)
    for key, clause in options.without_effect(config, typed, EFFECTS):
        log.warning("--%s %s", key, clause)
    return config


def read_config(argv: Sequence[str], default: str = "tiny") -> tuple[TrainConfig, set[str]]:
    """Read settings as `load_config` does, without warnings; return them and the dotted keys that argv sets."""
    settings, name, typed = options.from_command_line(TrainConfig, argv, default)
    if not settings.get("out"):
        settings["out"] = "runs/" + Path(name).name.removesuffix(".yaml").removesuffix(".yml")
    if "max_steps" in typed and "max_minutes" not in typed and name in options.names():
        settings["max_minutes"] = None  # else the demo's four minutes would cut off a run of a given length
    return _build(settings), typed


SHARED_EFFECTS = {  # of `fastgpt finetune` too
    "val_fraction": Effect(lambda c: c.val_data is None, "no val_data"),
    "master": Effect(lambda c: c.dtype != "fp32", "a dtype other than fp32"),
    "patience": Effect(lambda c: c.eval_every > 0, "eval_every above 0"),
    **dict.fromkeys(("eval_data", "eval_limit"), Effect(lambda c: bool(c.evals), "evals")),
    **dict.fromkeys(("metric", "metric_goal"), Effect(lambda c: c.patience > 0, "patience above 0")),
}
EFFECTS = SHARED_EFFECTS | {
    "momentum": Effect(lambda c: c.optimizer == "muon", "optimizer muon"),
    "decay_fraction": Effect(lambda c: c.schedule == "wsd", "schedule wsd"),
    "min_lr_ratio": Effect(lambda c: c.schedule != "constant", "a schedule other than constant"),
    "vocab_size": Effect(
        lambda c: not ((c.data or "").endswith(".bin") or c.tokenizer or c.init),
        "text data and no tokenizer (model.vocab_size sets the size for the model)",
    ),
    "profiler": Effect(lambda c: bool(c.profile), "profile"),
    **dict.fromkeys(
        ("parallel", "reduce_dtype"), Effect(lambda c: find_mesh().world > 1, "several processes (torchrun)")
    ),
    "checkpoint": Effect(
        lambda c: find_mesh().world > 1 and c.parallel == "fsdp", "parallel fsdp in several processes (torchrun)"
    ),
    "graphs": Effect(lambda c: c.optimizer == "adamw" and c.device != "cpu", "optimizer adamw on a GPU"),
    "epilogues": Effect(
        lambda c: c.device != "cpu" and (c.model.activation in ("gelu", "gelu_tanh") or c.model.positions == "learned"),
        "model.activation gelu or gelu_tanh, or model.positions learned, on a GPU",
    ),
    "model.norm_bias": Effect(lambda c: c.model.norm == "layer", "model.norm layer"),
    **{
        f"model.{name}": Effect(lambda c: c.model.positions == "rope", "model.positions rope")
        for name in ("rotary_dim", "rope_theta", "rope_interleaved", "rope_scaling")
    },
}


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """Return the settings as plain values (for JSON in a checkpoint)."""
    return asdict(config)


def from_dict(settings: dict[str, Any]) -> TrainConfig:
    """Rebuild the settings from `to_dict`; missing keys get their defaults.

    Raises:
        UserError: unknown keys, wrong types or invalid values.
    """
    return _build(options.from_mapping(TrainConfig, settings))


def _build(settings: dict[str, Any]) -> TrainConfig:
    return TrainConfig(**{**settings, "model": ModelConfig(**settings.get("model", {}))})
