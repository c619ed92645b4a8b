"""The model card of an export: what the run has recorded about itself, and 'not recorded' for the rest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

UNKNOWN = "not recorded"
GENERATION = ("text-generation", "A language model", "text generation")
HEADS = {  # kind of a task head -> pipeline, model, use
    "classification": ("text-classification", "A text classifier", "labels of texts"),
    "regression": ("text-classification", "A model that gives a number to a text", "numbers"),
    "tags": ("token-classification", "A token classifier", "labels of words"),
    "reward": ("text-classification", "A reward model", "comparisons of texts"),
}


def model_card(path: Path, state: dict[str, Any], form: str, dtype: str) -> str:
    """Return README.md for the export of checkpoint `path`, whose state.json is `state`.

    run.json may say `licences` of the data, and which `alignment` and `safety_evaluation` were done.
    """
    pipeline, model, use = HEADS[state["head"]["kind"]] if state.get("head") else GENERATION
    source, run = state.get("source"), _json(path.parent / "run.json")
    c, losses = state["model"], _losses(path.parent / "metrics.jsonl")
    tokens = state.get("progress", {}).get("tokens") or None
    trained = f"{tokens:,} tokens in {state['step']:,} steps" if tokens else UNKNOWN
    start = source or state.get("init")
    made = "Imported from" if source else "Its training started with the weights of"
    made = f"{made} {start['name']} (revision {start['revision'] or UNKNOWN})." if start else ""
    nothing = UNKNOWN if start else "none"  # fastgpt pretrains, and records what else it does
    rows = {
        "layers, heads, width": f"{c['n_layers']}, {c['n_heads']}, {c['width']}",
        "context": f"{c['block_size']} tokens",
        "vocabulary": f"{c['vocab_size']} tokens",
        "weights": f"{dtype}, format {form}",
        "training data": run.get("data") or UNKNOWN,
        "licences of the data": run.get("licences") or UNKNOWN,
        "trained on": trained,
        "last training loss": losses.get("loss", UNKNOWN),
        "last validation loss": losses.get("val_loss", UNKNOWN),
        "alignment": run.get("alignment") or nothing,
        "safety evaluation": run.get("safety_evaluation") or nothing,
    }
    table = "\n".join(f"| {what} | {value} |" for what, value in rows.items())
    return f"""---
library_name: {"transformers" if form == "hf" else form}
pipeline_tag: {pipeline}
tags: [fastgpt]
---

# {path.parent.resolve().name}

{model} exported by fastgpt. {made}

| what | value |
|---|---|
{table}

## Intended use

Research on language models, and {use} that a person checks.

## Out-of-scope use

Decisions about people, advice on health, law or money, and any use where wrong, biased or copied text does harm.

## Limits

The model repeats what its training data says, facts and biases alike, and invents the rest. Losses are in nats per
token of its own tokenizer, so they do not compare with those of another one. Text past its context is not read.
"""


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def _losses(path: Path) -> dict[str, str]:
    """Return the last loss and val_loss of a run's log."""
    found: dict[str, str] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return found
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue  # the last line of a run that was killed
        found |= {key: f"{row[key]:.4f}" for key in ("loss", "val_loss") if isinstance(row.get(key), float)}
    return found
