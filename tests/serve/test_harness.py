"""The stock client of the LM Evaluation Harness on a server: the scores of the direct adapter, and so of HFLM."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("lm_eval")
pytest.importorskip("tenacity")

from serve.servers import CONTEXT, TEXT, server, write_model

from fastgpt.evaluate.engine import Engine
from fastgpt.evaluate.target import open_target


@pytest.mark.slow
def test_a_server_gives_the_scores_of_the_direct_adapter(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from fastgpt.evaluate.adapter import HarnessModel

    caplog.set_level(logging.ERROR)
    write_model(tmp_path)
    direct = HarnessModel(Engine(open_target(str(tmp_path), device="cpu")))
    contexts = ["the cat", "the cat ", TEXT, TEXT * 4, "ünï 日本"]
    texts = [(c, e) for c in contexts for e in (" sat", " ran to it and on", "\nx", " 漢字")]

    def ask(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
        return [Instance(kind, {}, a, i) for i, a in enumerate(arguments)]  # type: ignore[arg-type]

    with server(tmp_path) as (_, client):
        options: dict[str, Any] = dict(base_url=f"{client.base_url}/v1/completions".replace("//v1", "/v1"), model="m")
        remote = LocalCompletionsAPI(**options, max_length=CONTEXT, batch_size=4)
        assert remote.tokenizer_backend == "remote"
        scored = ask("loglikelihood", texts)
        ours, theirs = direct.loglikelihood(scored), remote.loglikelihood(scored, disable_tqdm=True)
        # the client drops one token more from the left of a context that does not fit
        fits = [len(direct.tok_encode(c + e)) < CONTEXT for c, e in texts]
        assert sum(fits) > 10
        for fit, (a, a_greedy), (b, b_greedy) in zip(fits, ours, theirs):
            assert not fit or (abs(a - b) < 1e-4 and a_greedy == b_greedy)
        rolled = ask("loglikelihood_rolling", [("the cat ran to it",), ("ünï",)])
        rolling = zip(direct.loglikelihood_rolling(rolled), remote.loglikelihood_rolling(rolled, disable_tqdm=True))
        assert all(abs(a - b) < 1e-4 for a, b in rolling)
        settings = {"until": ["\n"], "max_gen_toks": 12, "do_sample": False}
        written = ask("generate_until", [(text, dict(settings)) for text in ("the cat", "and on")])
        assert direct.generate_until(written) == remote.generate_until(written, disable_tqdm=True)
