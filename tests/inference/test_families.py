"""Greedy texts of every family equal those of transformers: prompts of different lengths in one batch (transformers
pads on the left), sliding windows, and positions past the rotary base context."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hf_models
import pytest
import torch
from draws import generator

from fastgpt.inference import Generator, Request
from fastgpt.models.weights import load_pretrained

LENGTHS = (12, 3, 7)
TABLES = ("GPT2", "GPTNeo", "GPTJ")  # transformers holds a table of max_position_embeddings rows
ERROR = 1e-5  # of a logit, as a share of the largest: what the tests of fastgpt.models.weights allow


def theirs(model: Any, prompts: list[list[int]], new: int) -> tuple[list[list[int]], torch.Tensor]:
    """Return transformers' greedy continuations, and how sure each token is: the distance of the two largest logits as
    a share of the largest, (B, new)."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    model.generation_config.eos_token_id = None
    options: dict[str, Any] = dict(do_sample=False, pad_token_id=0, output_logits=True, return_dict_in_generate=True)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, **options)
    logits = torch.stack(out.logits, 1)  # (B, new, V)
    top = logits.topk(2).values
    return out.sequences[:, longest:].tolist(), (top[..., 0] - top[..., 1]) / logits.abs().amax(-1)


@pytest.mark.parametrize("name", hf_models.CASES)
def test_greedy_text_equals_transformers(name: str, tmp_path: Path) -> None:
    """A token counts if it is sure: the reference in fp64 has a margin of ten times the error that fp32 may have. After
    the first one that is not, texts may differ."""
    reference = hf_models.make(name)
    reference.save_pretrained(tmp_path)
    ours = Generator(load_pretrained(tmp_path), context=None if hf_models.CASES[name][0] in TABLES else 64)
    new = 20 if hf_models.CASES[name][0] in TABLES else 50
    prompts = [torch.randint(3, 97, (n,), generator=generator(n)).tolist() for n in LENGTHS]
    results = ours.generate([Request(p, new, temperature=0, seed=0) for p in prompts])
    together = "dynamic" not in name  # in transformers its frequencies depend on the longest text of the batch
    parts = [theirs(reference.double(), batch, new) for batch in ([prompts] if together else [[p] for p in prompts])]
    counted = 0
    rows = [(ids, sure) for texts, margins in parts for ids, sure in zip(texts, margins)]
    for result, (ids, margin) in zip(results, rows, strict=True):
        unsure = (margin < 10 * ERROR).nonzero()
        n = int(unsure[0]) if len(unsure) else new
        assert result.ids[:n] == ids[:n], (result.ids, ids)
        counted += n
    assert counted >= new * len(LENGTHS) / 2
