"""Settings of a fine-tuning run: a dataclass, read from YAML and overridden on the command line, as for `train`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from fastgpt.core import options
from fastgpt.core.errors import UserError
from fastgpt.finetune.augment.steps import steps_of
from fastgpt.finetune.effects import EFFECTS
from fastgpt.models.config import ModelConfig, require, require_sizes
from fastgpt.training.config import TrainConfig, require_evals
from fastgpt.training.metric import Goal, goal_of

TaskName = Literal["sft", "dpo", "kto", "orpo", "reward", "classify", "regress", "tag", "distil", "grpo"]
HEADS = ("reward", "classify", "regress", "tag")
LEARNING_RATES = {"sft": 2e-5, "distil": 2e-5, "dpo": 1e-6, "kto": 1e-6, "orpo": 5e-6, "grpo": 1e-6} | dict.fromkeys(
    HEADS, 2e-5
)
# settings that mean the same as in TrainConfig
SHARED = (
    *("out", "resume", "seed", "device", "dtype", "kernels", "recompute", "micro_batch", "schedule", "lr_ratios"),
    *("weight_decay", "beta1", "beta2", "eps", "clip", "master", "eval_every", "eval_batches", "save_every", "keep"),
    *("save_minutes", "evals", "eval_data", "eval_limit"),
    *("patience", "metric", "metric_goal", "log_every", "track"),
)
LOSSES = {"dpo": ("sigmoid", "robust", "ipo", "ipo-mean"), "grpo": ("dapo", "grpo", "bnpo", "dr_grpo")}
LORA_FACTOR = 10  # an adapter learns best at about ten times the rate of all weights


# settings, the values they may have apart from null, and what is expected
RANGES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("micro_batch batch block_size max_steps epochs lr eps epsilon", lambda v: 0 < v < math.inf, "more than 0"),
    ("group max_new_tokens iterations log_every", lambda v: v >= 1, "1 or more"),
    (
        "beta teacher_top_k eval_every eval_batches save_every save_minutes keep",
        lambda v: 0 <= v < math.inf,
        "0 or more",
    ),
    ("patience seed weight_decay clip", lambda v: 0 <= v < math.inf, "0 or more"),
    ("val_fraction dropout beta1 beta2 warmup replay_share", lambda v: 0 <= v < 1, "0 to less than 1"),
    ("hard_share", lambda v: 0 <= v <= 1, "0 to 1"),
)


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters.

    Attributes:
        rank: rank r of the adapters; 0 trains the weights themselves.
        alpha: the adapters' product is scaled by alpha / r; null is 2 r.
        rslora: scale by alpha / sqrt(r) instead.
        dropout: dropout of the adapters' input.
        targets: regular expressions found in the names of the layers to adapt; empty is all linear layers.
    """

    rank: int = 0
    alpha: float | None = None
    rslora: bool = False
    dropout: float = 0.0
    targets: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class FinetuneConfig:
    """All settings of a fine-tuning run.

    Attributes:
        task: sft learns to write the texts, completions or replies of the data; dpo, kto and orpo learn from
            preferences; reward, classify, regress and tag train a head in place of the LM head; distil learns the
            distributions of a teacher; grpo learns from rewards of what the model itself writes.
        base: run, checkpoint or folder of a model (config.json and weights) to start from, or a model of the hub,
            ORG/NAME or ORG/NAME@REVISION.
        data: file, folder or glob of rows; or {PATH: WEIGHT} to mix several.
        val_data: validation data, like data; null splits val_fraction off each file.
        val_fraction: share of the rows held out for validation.
        format: format of the rows; auto detects it by the columns of each file.
        columns: column of the format -> column of the files, where they differ.
        template: chat template of conversations (a Jinja file); null is that of the base.
        learn: completions learns completions, replies and plain texts; all learns prompts as well.
        too_long: what to do with rows longer than block_size; cut their end, skip them, or error. Plain text is split.
        defects: what to do with defective rows; fail at the first, or skip and count them.
        augment: steps that make more training rows, each with swap (a file of terms), paraphrase (a model) or hook
            (FILE.py:FUNCTION); and name, share and others.
        packing: best-fit puts several documents into a row, none puts one.
        replay: corpus (as data of fastgpt train) to mix in, so that the model does not forget it.
        replay_share: share of rows from the replay corpus.
        out: folder of the run; empty is runs/ and the name of the configuration.
        resume: auto (from the newest checkpoint in the run folder), never (start a new run) or a checkpoint's path.
        seed: seed of new heads and adapters, data order and dropout.
        device: auto, cpu, cuda, cuda:1, ...; with --plan also a card, as in a100.
        dtype: type of parameters and activations; auto is bf16 on a GPU, fp32 on a CPU.
        kernels: backend of each op, as in 'attention=torch,adamw=triton'; empty chooses the best available.
        recompute: activations to recompute in backward instead of keeping them; as for fastgpt train.
        block_size: tokens T of a row, at most the positions of the base; null is those, at most 1024.
        micro_batch: rows, pairs or texts in one forward and backward.
        batch: rows, pairs or texts of one optimizer step; a multiple of micro_batch.
        epochs: passes over the data; ignored with max_steps.
        max_steps: optimizer steps to train for; null is epochs.
        lr: highest learning rate; null chooses one for the task (2e-5; orpo 5e-6; dpo, kto and grpo 1e-6), ten times as
            high for adapters.
        lr_ratios: regular expression found in a parameter's name -> factor of its learning rate.
        layer_decay: factor of the learning rate from each block to the one below it; 1 is the same for all.
        schedule: shape of the learning rate after warm-up.
        warmup: share of the steps for linear warm-up.
        weight_decay: decoupled weight decay of matrices.
        beta1: first decay rate of AdamW.
        beta2: second decay rate of AdamW.
        eps: epsilon of AdamW.
        clip: largest gradient norm; 0 turns clipping off.
        master: how the optimizer keeps the precision that 16-bit parameters lose; as for fastgpt train.
        dropout: dropout in the residual stream and in attention.
        lora: low-rank adapters.
        adapter: folder of adapters in PEFT's format to continue with; it decides lora.*.
        merge: at the end, also write a run with the adapters merged into the weights.
        quantise: keep the weights of the base in 8 bits, or in 4 (nf4); needs adapters.
        freeze: regular expressions found in the names of parameters that stay as they are.
        freeze_first: number of blocks, from the embeddings on, that stay as they are.
        beta: how strongly dpo, kto and grpo hold the model to the base; weight of orpo's preference; null is 0.1, and 0
            for grpo.
        loss_type: loss of dpo, sigmoid, robust (to wrong labels), ipo (of sums) or ipo-mean (per token), or how grpo
            averages, dapo, grpo, bnpo or dr_grpo; null is the first.
        label_smoothing: probability that a preference is wrong (dpo); share of a label spread over all (classify, tag).
        length_norm: whether dpo divides log-probabilities by the number of tokens.
        good_weight: weight of good examples (kto).
        bad_weight: weight of bad examples (kto).
        labels: names of the classes; empty is those of the data, sorted.
        class_weights: balanced weighs each class by the inverse of its frequency.
        pooling: what a head reads of a text; the last token or the mean of all.
        teacher: model to learn from, named like the base (distil).
        level: what distil learns; token: the teacher's distribution at each token of the data; sequence: completions
            that the teacher writes of the data's prompts.
        teacher_top_k: keep this many of the teacher's most likely tokens at each position in a file of the run, instead
            of the teacher in memory (distil with level token); 0 keeps the teacher.
        divergence: forward_kl, reverse_kl or jsd between teacher and student (distil).
        temperature: temperature of both distributions (distil), or of what is written (grpo, distil with level
            sequence, where 0 is the most likely tokens).
        hard_share: share of the loss on the data's own tokens (distil); the rest is the divergence.
        reward: what rates completions, FILE.py:FUNCTION or the folder of a reward model; their sum counts (grpo).
        group: samples of each prompt, which are compared with one another (grpo).
        max_new_tokens: longest completion (grpo, distil with level sequence).
        epsilon: how far a token's probability may move in a step before its gradient is cut off (grpo).
        iterations: steps on the same samples (grpo).
        eval_every: steps between validations; 0 is only at the end.
        eval_batches: micro-batches of a validation.
        evals: preset or file of `fastgpt eval` -> steps between its evaluations, as in {safety: 500}; a multiple of
            eval_every, or 0 for only at the end.
        eval_data: folder with the files of evals.
        eval_limit: items of each task in evals; null is all.
        save_every: steps between checkpoints; 0 is only at the end.
        save_minutes: also write a checkpoint when the last one is this many minutes old; 0 is off.
        keep: number of latest checkpoints to keep; 0 keeps all.
        patience: end the run after this many validations without a better metric, and keep the best checkpoint; 0 is
            off.
        metric: figure of a validation that patience watches, as in accuracy or macro_f1 (val_ may be left out).
        metric_goal: whether the metric should fall or rise; auto knows it of losses, accuracies and the like.
        log_every: steps between lines on the console.
        track: tensorboard, trackio or wandb; separate several by commas.
    """

    task: TaskName = "sft"
    base: str = ""
    data: str | dict[str, float] = ""
    val_data: str | None = None
    val_fraction: float = 0.05
    format: str = "auto"
    columns: dict[str, str] = field(default_factory=dict)
    template: str | None = None
    learn: Literal["completions", "all"] = "completions"
    too_long: Literal["cut", "skip", "error"] = "cut"
    defects: Literal["fail", "skip"] = "fail"
    augment: list[dict[str, Any]] = field(default_factory=list)
    packing: Literal["best-fit", "none"] = "best-fit"
    replay: str | None = None
    replay_share: float = 0.1
    out: str = ""
    resume: str = "auto"
    seed: int = 1337
    device: str = "auto"
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    kernels: str = ""
    recompute: Literal["none", "norms", "block"] = "none"
    block_size: int | None = None
    micro_batch: int = 4
    batch: int = 16
    epochs: float = 1.0
    max_steps: int | None = None
    lr: float | None = None
    lr_ratios: dict[str, float] = field(default_factory=dict)
    layer_decay: float = 1.0
    schedule: Literal["cosine", "linear", "constant"] = "linear"
    warmup: float = 0.03
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    clip: float = 1.0
    master: Literal["fp32", "remainder", "stochastic", "none"] = "fp32"
    dropout: float = 0.0
    lora: LoraSettings = field(default_factory=LoraSettings)
    adapter: str = ""
    merge: bool = True
    quantise: Literal["none", "int8", "nf4"] = "none"
    freeze: list[str] = field(default_factory=list)
    freeze_first: int = 0
    beta: float | None = None
    loss_type: Literal["sigmoid", "robust", "ipo", "ipo-mean", "dapo", "grpo", "bnpo", "dr_grpo"] | None = None
    label_smoothing: float = 0.0
    length_norm: bool = False
    good_weight: float = 1.0
    bad_weight: float = 1.0
    labels: list[str] = field(default_factory=list)
    class_weights: Literal["none", "balanced"] = "none"
    pooling: Literal["last", "mean"] = "last"
    teacher: str = ""
    level: Literal["token", "sequence"] = "token"
    teacher_top_k: int = 0
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    temperature: float = 1.0
    hard_share: float = 0.5
    reward: list[str] = field(default_factory=list)
    group: int = 8
    max_new_tokens: int = 64
    epsilon: float = 0.2
    iterations: int = 1
    eval_every: int = 100
    eval_batches: int = 20
    evals: dict[str, int] = field(default_factory=dict)
    eval_data: str | None = None
    eval_limit: int | None = None
    save_every: int = 500
    save_minutes: float = 0.0
    keep: int = 2
    patience: int = 0
    metric: str = "val_loss"
    metric_goal: Goal = "auto"
    log_every: int = 1
    track: str = ""

    def __post_init__(self) -> None:
        require(self.base != "", "base", "", "a run, a checkpoint, the folder of a model or a name on the hub")
        require(bool(self.data), "data", self.data, "a file, a folder or a glob")
        for names, right, expected in RANGES:
            for name in names.split():
                value = getattr(self, name)
                require(value is None or right(value), name, value, expected)
        require(self.lora.rank >= 0, "lora.rank", self.lora.rank, "0 or more")
        for path, weight in self.paths.items():
            require(0 < weight < math.inf, f"data.{path}", weight, "a weight above 0")
        self._check_combinations()
        require_evals(self)
        self._refuse_what_has_no_effect()
        require_sizes(self)

    def _check_combinations(self) -> None:
        """Check settings that depend on one another."""
        warm = self.temperature > 0 or (self.written and self.temperature == 0)
        require(warm and self.temperature < math.inf, "temperature", self.temperature, "more than 0")
        known = LOSSES.get(self.task, ())
        right = self.loss_type is None or not known or self.loss_type in known
        require(right, "loss_type", self.loss_type, f"one of {', '.join(known)} with task {self.task}")
        require(self.task != "grpo" or bool(self.reward), "reward", [], "at least one FILE.py:FUNCTION or reward model")
        whole = self.batch % self.micro_batch == 0
        require(whole, "batch", self.batch, f"a multiple of micro_batch, {self.micro_batch}")
        require(self.task != "distil" or self.teacher != "", "teacher", "", "the model to learn from")
        adapted = self.lora.rank > 0 or self.adapter != ""
        require(self.quantise == "none" or adapted, "quantise", self.quantise, "none, or lora.rank above 0")
        paraphrased = any(step.paraphrase for step in steps_of(self.augment))
        require(self.task != "tag" or not paraphrased, "augment", "paraphrase", "swap or hook with task tag")
        told = goal_of(self.metric, self.metric_goal) is not None
        require(told, "metric_goal", "auto", f"min or max: the name {self.metric!r} does not tell")

    @property
    def held(self) -> float:
        """beta as a number."""
        return self.beta if self.beta is not None else 0.0 if self.task == "grpo" else 0.1

    @property
    def loss_name(self) -> Any:
        """loss_type, or the first of the task's."""
        return self.loss_type or LOSSES[self.task][0]

    def _refuse_what_has_no_effect(self) -> None:
        """Refuse settings that would be ignored: a run that silently does something else costs more than an error."""
        given = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) != _default(f)]
        for key, clause in options.without_effect(self, given, EFFECTS):
            raise UserError(f"{key} is {getattr(self, key)!r}, but it {clause}")

    @property
    def written(self) -> bool:
        """Whether a teacher writes what is learned."""
        return self.task == "distil" and self.level == "sequence"

    @property
    def adapted(self) -> bool:
        """Whether the run trains adapters."""
        return self.lora.rank > 0 or bool(self.adapter)

    @property
    def paths(self) -> dict[str, float]:
        """Paths of the data with their weights."""
        return {self.data: 1.0} if isinstance(self.data, str) else self.data

    def to_train(self, model: ModelConfig, block_size: int, steps: int) -> TrainConfig:
        """Return the settings of the loop, for a model and a number of steps."""
        lr = self.lr or LEARNING_RATES[self.task] * (LORA_FACTOR if self.adapted else 1)
        return TrainConfig(
            model=model,
            block_size=block_size,
            batch_tokens=self.batch * block_size,
            max_steps=steps,
            lr=lr,
            warmup_steps=round(self.warmup * steps),
            graphs=False,
            **{name: getattr(self, name) for name in SHARED},
        )


def _default(f: dataclasses.Field[Any]) -> Any:
    return f.default if f.default_factory is dataclasses.MISSING else f.default_factory()


def load_config(argv: Sequence[str]) -> FinetuneConfig:
    """Read settings from a command line: `[RECIPE]` or `--config RECIPE` (a YAML file), then overrides in order.

    Raises:
        UserError: names the key, the value received and the value expected.
    """
    words = list(argv)
    if words and not words[0].startswith("-"):
        words[:1] = ["--config", words[0]]
    usage = "fastgpt finetune [RECIPE.yaml] [--plan] [--SETTING VALUE] ... (or fastgpt finetune make-pairs --help)"
    settings, name, typed = options.from_command_line(FinetuneConfig, words, None, usage)
    for one, other in (("max_steps", "epochs"), ("epochs", "max_steps")):
        if one in typed and other not in typed:  # the command line overrides the length of the recipe
            settings.pop(other, None)
    if not settings.get("out"):
        settings["out"] = "runs/" + (Path(name).stem if name else settings.get("task", "sft"))
    return build(settings)


def build(settings: dict[str, Any]) -> FinetuneConfig:
    """Return the settings from nested plain values."""
    lora = settings.get("lora", {})
    return FinetuneConfig(**{**settings, "lora": LoraSettings(**lora) if isinstance(lora, dict) else lora})


TASKS = get_args(TaskName)
