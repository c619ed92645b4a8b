"""When the settings of fine-tuning have an effect, for those that the task or other settings can disable."""

from __future__ import annotations

from fastgpt.core.options import Effect
from fastgpt.training.config import SHARED_EFFECTS


def _only(*tasks: str) -> Effect:
    return Effect(lambda c: c.task in tasks, f"task {', '.join(tasks)}")


def _without(*tasks: str) -> Effect:
    return Effect(lambda c: c.task not in tasks, f"tasks other than {', '.join(tasks)}")


EFFECTS = SHARED_EFFECTS | {
    "evals": _only("sft", "dpo", "kto", "orpo", "distil", "grpo"),
    "template": _only("sft", "dpo", "kto", "orpo", "reward", "distil", "grpo"),
    "learn": Effect(lambda c: c.task in ("sft", "distil") and not c.written, "task sft, or distil with level token"),
    "replay": _only("sft"),
    "replay_share": Effect(lambda c: c.replay is not None, "replay"),
    "epochs": Effect(lambda c: c.max_steps is None, "no max_steps"),
    "merge": Effect(lambda c: c.adapted, "lora.rank above 0 or adapter"),
    **dict.fromkeys(
        ("freeze", "freeze_first"),
        Effect(lambda c: not c.adapted, "lora.rank 0, since adapters freeze the weights"),
    ),
    "beta": _only("dpo", "kto", "orpo", "grpo"),
    "loss_type": _only("dpo", "grpo"),
    **dict.fromkeys(("reward", "group", "epsilon", "iterations"), _only("grpo")),
    "max_new_tokens": Effect(lambda c: c.task == "grpo" or c.written, "task grpo, or distil with level sequence"),
    "label_smoothing": _only("dpo", "classify", "tag"),
    "length_norm": _only("dpo"),
    **dict.fromkeys(("good_weight", "bad_weight"), _only("kto")),
    **dict.fromkeys(("labels", "class_weights"), _only("classify", "tag")),
    "pooling": _only("reward", "classify", "regress"),
    **dict.fromkeys(("teacher", "level"), _only("distil")),
    **dict.fromkeys(
        ("divergence", "hard_share", "teacher_top_k"),
        Effect(lambda c: c.task == "distil" and not c.written, "task distil with level token"),
    ),
    "temperature": _only("distil", "grpo"),
    "packing": _without("grpo"),
    **dict.fromkeys(
        ("format", "too_long", "augment"),
        Effect(lambda c: c.task != "grpo" and not c.written, "tasks other than grpo, and distil with level token"),
    ),
    "dropout": _without("dpo", "kto", "grpo"),
    "adapter": Effect(lambda c: c.lora == type(c.lora)(), "no lora.* settings, which the adapter decides"),
}
