"""Log-probabilities that a linear head gives to chosen classes: the negated loss of linear_cross_entropy.

    z = x W^T + b,   y_i = log softmax(z_i / temperature)[target_i]      (softcap applies to z, before the division)

Preference and policy losses (DPO, KTO, ORPO, GRPO) are functions of these values, so every row has an upstream gradient
of its own. No raw op of its own: backends, chunks, gradients and determinism are those of linear_cross_entropy with
reduction "none". In chunks, backward recomputes the logits and nothing of size N V is kept.
"""

from __future__ import annotations

from torch import Tensor

from fastgpt.ops.linear_cross_entropy import linear_cross_entropy


def linear_log_probs(
    x: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float = 0.0,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    chunk: int | str = "auto",
) -> Tensor:
    """Compute the log-probability of each row's target under the softmax of a linear layer's outputs.

    Args:
        x: (N, C) fp32, bf16, fp16 (fp64 on the reference).
        linear_weight: (V, C) in x's dtype. Rows from vocab_size on are padding.
        target: (N,) int64 in [0, vocab_size) or ignore_index.
        linear_bias: (V,) in x's dtype, or None.
        ignore_index, softcap, vocab_size: as in `cross_entropy`.
        temperature: divides the logits; other than 1 it divides x (and the bias), which rounds them once more.
        chunk: rows of logits in memory at a time, as in `linear_cross_entropy`. "auto" keeps all of them for backward
            while they fit its budget; a number below N keeps none, for one product more.

    Returns:
        (N,) in fp32 (fp64 for fp64 input); 0, with a zero gradient, where target is ignore_index.

    Raises:
        ValueError, TypeError: with the argument, the value received and the value expected, as in
            `linear_cross_entropy`.

    Example:
        >>> import torch
        >>> from fastgpt import ops
        >>> x, head = torch.randn(6, 32, requires_grad=True), torch.randn(1000, 32)
        >>> log_probs = ops.linear_log_probs(x, head, torch.randint(1000, (6,)), chunk=2)
        >>> (log_probs[:3].sum() - log_probs[3:].sum()).backward()  # chosen minus rejected
        >>> bool((log_probs <= 0).all())
        True
    """
    if not temperature > 0:
        raise ValueError(f"linear_log_probs: temperature is {temperature}, expected a number above 0")
    if temperature != 1:  # softcap tanh(z / softcap) / t = s tanh((z / t) / s) with s = softcap / t
        x, softcap = x / temperature, softcap / temperature
        linear_bias = None if linear_bias is None else linear_bias / temperature
    return -linear_cross_entropy(
        x,
        linear_weight,
        target,
        linear_bias=linear_bias,
        ignore_index=ignore_index,
        softcap=softcap,
        vocab_size=vocab_size,
        reduction="none",
        chunk=chunk,
    )
