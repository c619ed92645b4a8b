"""The losses of TRL's trainers over fastgpt's linear cross-entropy: `patch_trainer(trainer)`.

DPOTrainer, KTOTrainer, GRPOTrainer, RLOOTrainer and SFTTrainer (TRL 1.16) take the log-probabilities of completions
from a fused head that TRL adds to the model. While the model runs, its op is replaced by fastgpt.ops.linear_log_probs,
over the tokens that count alone, and the rest of TRL's code stays as it is. ORPOTrainer (trl.experimental), which makes
whole logits, gets the fused head first.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastgpt import ops
from fastgpt.core.errors import UserError

ROWS = 1024  # whose logits are in memory at a time for the metrics
FIELDS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")  # in TRL's order, after log_probs
METRICS = ("entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected")


def patch_trainer(trainer: Any, metrics: bool = True) -> None:
    """Let a trainer of TRL compute its loss with fastgpt's kernels; call it before trainer.train().

    The loss and its gradients stay the same but for rounding. `fastgpt.patch(trainer.model)` does the same for the
    layers of the model.

    Args:
        trainer: a DPOTrainer, KTOTrainer, ORPOTrainer, GRPOTrainer, RLOOTrainer or SFTTrainer.
        metrics: keep the metrics that need all logits (entropy, mean_token_accuracy, logits/chosen, logits/rejected),
            for one more product with the head; ORPOTrainer loses logits/* in any case. False drops them from the log.

    Raises:
        UserError: the trainer's settings need gradients or values that fastgpt's op does not have, or TRL is another
            version than 1.16 and has no such head.
    """
    args = trainer.args
    if getattr(trainer, "_entropy_bonus_enabled", False):
        raise UserError("patch_trainer: entropy_coef needs gradients of the entropy, expected 0")
    if not metrics and (getattr(args, "top_entropy_quantile", 1.0) < 1 or getattr(args, "use_weighting", False)):
        raise UserError("patch_trainer: top_entropy_quantile and use_weighting need metrics=True")
    utils = _utils()
    model = trainer.model.get_base_model() if hasattr(trainer.model, "peft_config") else trainer.model
    if hasattr(trainer, "concatenated_forward"):
        if trainer.is_encoder_decoder or trainer.aux_loss_enabled:
            raise UserError("patch_trainer: ORPOTrainer has an encoder or a router, expected a plain language model")
        utils.add_fused_lm_head(model)
        trainer.concatenated_forward = types.MethodType(_orpo_forward, trainer)
        metrics = False
    for m in (model, getattr(trainer, "ref_model", None)):
        if m is not None:
            _patch_forward(m, utils, metrics)
    if not metrics:
        _drop_metrics(trainer)


def _utils() -> Any:
    try:
        from trl.trainer import utils
    except ImportError as e:
        raise UserError("patch_trainer needs TRL: pip install trl==1.16.0") from e
    if not all(hasattr(utils, name) for name in ("_ChunkedLogProbFunction", "_use_triton", "add_fused_lm_head")):
        import trl

        raise UserError(f"patch_trainer: TRL {trl.__version__} has no fused head that fastgpt knows, expected 1.16")
    return utils


def _patch_forward(model: Any, utils: Any, metrics: bool) -> None:
    inner = model.forward
    if getattr(inner, "of_fastgpt", False):
        return

    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not kwargs.get("fused_lm_head"):
            return inner(*args, **kwargs)
        with _op(utils, metrics):
            return inner(*args, **kwargs)

    forward.of_fastgpt = True  # type: ignore[attr-defined]
    model.forward = forward


@contextmanager
def _op(utils: Any, metrics: bool) -> Iterator[None]:
    """Replace the op of TRL's head, and let the head pass on the rows that count alone, as TRL does on a GPU."""
    before = utils._ChunkedLogProbFunction, utils._use_triton
    utils._ChunkedLogProbFunction = types.SimpleNamespace(apply=functools.partial(_log_probs, metrics))
    utils._use_triton = lambda device: True
    try:
        yield
    finally:
        utils._ChunkedLogProbFunction, utils._use_triton = before


def _log_probs(
    metrics: bool,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    chunk_size: int,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    outputs: tuple[str, ...] = FIELDS,
) -> tuple[Tensor | None, ...]:
    """Return what the op of TRL returns: log-probabilities of targets (N,), and the fields in `outputs`."""
    scaled = hidden if logit_scale == 1 else hidden * logit_scale
    offset = bias if bias is None or logit_scale == 1 else bias * logit_scale
    if len(hidden):
        options: dict[str, Any] = dict(linear_bias=offset, softcap=softcap or 0.0, temperature=temperature)
        log_probs = ops.linear_log_probs(scaled, weight, targets, **options)
    else:
        log_probs = hidden.sum(-1).float()
    if not metrics:
        nothing = torch.full_like(log_probs, torch.nan, requires_grad=False)
        values = {name: nothing.bool() & False if name == "is_top1" else nothing for name in FIELDS}
    else:
        values = _statistics(scaled, weight, offset, targets, temperature, softcap)
    return log_probs, *(values[name] if name in outputs else None for name in FIELDS)


@torch.no_grad()
def _statistics(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float, softcap: float | None
) -> dict[str, Tensor]:
    """Return the fields of each row, ROWS rows at a time."""
    parts: list[tuple[Tensor, ...]] = []
    for x, target in zip(hidden.split(ROWS), targets.split(ROWS)):
        z = torch.nn.functional.linear(x, weight, bias).float()
        z = (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature
        log_p = z.log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        parts.append((entropy, (2 * log_p).logsumexp(-1), z.mean(-1), z.argmax(-1) == target))
    return dict(zip(FIELDS, map(torch.cat, zip(*parts))))


def _orpo_forward(self: Any, model: Any, batch: dict[str, Any]) -> tuple[Tensor, ...]:
    """Replace ORPOTrainer.concatenated_forward: log-probabilities per token of both sides, and the chosen sides' NLL;
    the logits that it also returns are for metrics alone."""
    inputs = self.concatenated_inputs(batch, padding_value=self.padding_value, device=self.accelerator.device)
    ids, mask, labels = (inputs[f"concatenated_{name}"] for name in ("input_ids", "attention_mask", "labels"))
    n = len(batch["chosen_labels"])
    whole = ids.masked_fill(mask != 1, -100)
    scored = torch.cat([whole[:n], labels[n:]])
    log_probs = model(ids, attention_mask=mask, labels=scored, fused_lm_head=True).log_probs  # (2 n, T - 1)
    completion = labels[:, 1:] != -100
    means = (log_probs * completion).sum(1) / completion.sum(1)
    nll = -log_probs[:n].sum() / (whole[:n, 1:] != -100).sum()
    nothing = log_probs.detach().new_full((1,), torch.nan)
    return means[:n], means[n:], nothing, nothing, nll


def _drop_metrics(trainer: Any) -> None:
    """Leave the metrics out of the log that are not computed."""
    log = trainer.log

    def without(logs: dict[str, float], *args: Any) -> None:
        for stored in (getattr(trainer, "_metrics", {}), getattr(trainer, "_stored_metrics", {})):
            for values in stored.values():
                for name in (*METRICS, *(f"eval_{name}" for name in METRICS)):
                    values.pop(name, None)
        log(logs, *args)

    trainer.log = without
