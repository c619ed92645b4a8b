"""Training batches whose windows are packed documents."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fastgpt.core.errors import UserError
from fastgpt.data.documents import document_starts
from fastgpt.data.loader import IGNORE, TokenLoader
from fastgpt.data.packing import PADDING, Method, plan_windows
from fastgpt.data.shards import Tokens


class PackedLoader(TokenLoader):
    """A TokenLoader whose windows are packed documents: see `fastgpt.data.packing`.

    An epoch has the same windows, in another order. Every token but the first of the corpus is a target once in an
    epoch: the target of a document's last token is the end-of-text token that the next one begins with. What a window
    has left is filled with `eot`, whose targets are IGNORE and which attends to nothing else.

    Args:
        tokens: a Tokens whose documents begin with `eot`.
        method: best-fit or pad.
        masks: whether attention sees a token's own document only; then batches are of type Batch.
        options: further arguments of TokenLoader.
    """

    def __init__(
        self, tokens: Tokens, batch: int, block: int, method: Method, eot: int, masks: bool = False, **options: Any
    ) -> None:
        self.plan = plan_windows(document_starts(tokens, eot), block, method)
        self.fill = eot
        super().__init__(tokens, batch, block, eot=eot if masks else None, **options)
        self._identity["packing"] = method

    def _count(self) -> int:
        if not len(self.plan):
            raise UserError("the corpus has no tokens, expected at least one document")
        return len(self.plan)

    def _gather(self, sample: int) -> torch.Tensor:
        out = self._rows()
        rows, plan, n = out.numpy(), self.plan, len(self.tokens)
        rows[0], rows[1] = self.fill, IGNORE
        if self.eot is not None:
            rows[2], rows[3] = PADDING, 0
        for i, (_, window) in enumerate(self._windows(sample + self.rank * self.batch, self.batch)):
            at = 0
            for number, piece in enumerate(plan.of(window)):
                start, size = int(plan.start[piece]), int(plan.size[piece])
                ids = self.tokens.read(start, min(size + 1, n - start))
                rows[0, i, at : at + size], rows[1, i, at : at + len(ids) - 1] = ids[:size], ids[1:]
                if self.eot is not None:
                    rows[2, i, at : at + size], rows[3, i, at : at + size] = number, np.arange(size)
                at += size
        return out
