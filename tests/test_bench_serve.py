"""`fastgpt bench serve`: requests and figures that are known, and real servers with a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastgpt.bench import readme, serve, servers, soak
from fastgpt.bench.load import Wave
from fastgpt.bench.results import read_rows
from fastgpt.core.errors import UserError

SHAPE = serve.SHAPES["gpt2-124m"]


def test_requests_are_new_in_every_round_and_share_what_they_should() -> None:
    many = serve.WORKLOADS["many"]
    asks = many.asks(SHAPE, 1)
    assert asks == many.asks(SHAPE, 1) != many.asks(SHAPE, 2)
    assert len(asks) == 48
    prefixes = [ask.prompt[:512] for seed in (1, 2) for ask in serve.WORKLOADS["prefix"].asks(SHAPE, seed)]
    assert all(prefix == prefixes[0] for prefix in prefixes)
    for workload in serve.WORKLOADS.values():
        for ask in workload.asks(SHAPE, 3):
            assert len(ask.prompt) + ask.new <= SHAPE.context <= SHAPE.config().block_size
            assert workload.new[0] <= ask.new <= workload.new[1]


def test_figures_of_waves() -> None:
    ours = [Wave(2.0, 100, [0.1, 0.3], [0.01] * 99 + [0.5]), Wave(1.0, 100, [0.2], [])]
    theirs = [Wave(4.0, 100, [0.4], [0.1]), Wave(4.0, 100, [0.2], [0.1])]
    found = serve.figures(ours)
    assert (found["tokens_per_s"], found["first_p50_ms"], found["token_p50_ms"]) == pytest.approx((75, 200, 10))
    assert found["token_p99_ms"] == pytest.approx(14.9)
    against = serve.ratios(ours, theirs)
    assert against["speed_vs_llama.cpp"] == pytest.approx(3) and against["first_vs_llama.cpp"] == pytest.approx(0.75)


def test_a_program_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a program, expected llama.cpp's llama-server"):
        serve.main(["--quick", "--llama-server", str(tmp_path / "none")])


def test_the_mix_of_a_soak_is_spread() -> None:
    kinds = soak.spread(soak.MIX)
    assert len(kinds) == 64 and all(kinds.count(kind) == n for kind, n in soak.MIX.items())
    assert len(set(kinds[:16])) > 5


@pytest.mark.extended
def test_both_servers_are_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second server of fastgpt takes the place of llama.cpp's."""
    pytest.importorskip("gguf"), pytest.importorskip("fastapi")

    def command(program: str, gguf: Path, port: int, threads: int, rows: int, tokens: int) -> list[str]:
        assert gguf.stat().st_size > 10_000
        return servers.fastgpt_command(gguf.parent.parent / "hf", port, threads, rows)

    monkeypatch.setattr(serve, "find_llama", lambda path: path)
    monkeypatch.setattr(serve, "llama_version", lambda program: "1")
    monkeypatch.setattr(serve, "llama_command", command)
    file = tmp_path / "rows.jsonl"
    quick = ["--quick", "--rounds", "1", "--threads", "1", "--price-per-hour", "3.6", "--workload", "one"]
    assert serve.main([*quick, "--workload", "many", "--llama-server", "x", "--json", str(file)]) == 0
    rows = read_rows([str(file)])
    assert [(r["kind"], r["variant"]) for r in rows] == [
        (k, v) for k in ("one", "many") for v in ("fastgpt", "llama.cpp")
    ]
    for r in rows:
        assert r["cost_per_million"] == pytest.approx(1000 / r["tokens_per_s"])
        assert 0 < r["first_p50_ms"] <= r["first_p99_ms"] and r["memory_mb"] > 10
    assert "times as fast" in capsys.readouterr().out
    head, *lines = readme.readme_serve([r | {"shape": "gpt2-124m"} for r in rows])
    assert len(lines) == 4 and all(len(line) == len(head) for line in lines) and lines[1][-1] == "-" != lines[0][-1]
