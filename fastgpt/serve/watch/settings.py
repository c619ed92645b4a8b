"""What a server watches for."""

from __future__ import annotations

from dataclasses import dataclass

from fastgpt.serve.watch.baseline import Baselines
from fastgpt.serve.watch.flags import Flag
from fastgpt.serve.watch.scorers import Scorer
from fastgpt.serve.watch.store import Store


@dataclass(frozen=True)
class Watch:
    """What a server watches for.

    Attributes:
        flags: tests of every text, in the order of their names on the command line.
        scorers: raters of complete answers.
        toxic: names of the flags that count as toxicity.
        prompts: whether flags are for prompts, too.
        stop: whether a flag ends an answer.
        baselines: what drift is measured against; None: drift is not measured.
        webhook, secret: where events are sent, and what signs them.
        store: where records are kept; None: nowhere.
        keep_texts, keep_days: whether every answer is kept with its text, and for how many days.
    """

    flags: tuple[Flag, ...] = ()
    scorers: tuple[Scorer, ...] = ()
    toxic: frozenset[str] = frozenset()
    prompts: bool = False
    stop: bool = False
    baselines: Baselines | None = None
    webhook: str | None = None
    secret: bytes = b""
    store: Store | None = None
    keep_texts: bool = False
    keep_days: int = 30
