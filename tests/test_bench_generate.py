"""`fastgpt bench generate`: rows from processes whose times are known, and the real processes on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastgpt.bench import generate, generators, readme
from fastgpt.bench.compare import ours
from fastgpt.bench.generators import MACHINE, SHAPES, Setup, Tokens
from fastgpt.bench.results import read_rows

TINY = SHAPES["tiny"]
PER_STEP = {"fastgpt": 0.25, "transformers": 0.5, "transformers static": 0.375, "llama.cpp": 0.125}
PREFILL = 0.5


class Fake:
    """A process that takes PREFILL and PER_STEP seconds; llama.cpp's tokens differ from the sixth on."""

    def __init__(self, name: str, setup: Setup) -> None:
        if name == "llama.cpp q8_0":
            raise RuntimeError("does not load")
        self.name, self.weight_bytes, self.peak_mb = name, 10**6, 1.5

    def run(self, batch: int, count: int) -> tuple[float, Tokens]:
        if self.name == MACHINE:
            return (0.125, 0.25)[count], []
        tokens = [[0] * 5 + [int(self.name == "llama.cpp")] * (count - 5)] * batch
        return PREFILL + (count - 1) * PER_STEP[self.name], tokens

    def close(self) -> None:
        pass


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    names = [*PER_STEP, "llama.cpp q8_0"]
    monkeypatch.setattr(generate, "available", lambda: (names, {"fastgpt int8": "no such option"}))
    monkeypatch.setattr(generate, "write_models", lambda *_: {"parameters": 250_000, "read": 200_000})
    monkeypatch.setattr(generate, "Process", Fake)
    path = tmp_path / "rows.jsonl"
    assert generate.main(["--quick", "--batch", "2", "--json", str(path), "--threads", "1"]) == 0
    out = capsys.readouterr().out
    assert "RuntimeError: does not load" in out and "fastgpt int8: not measured, no such option" in out
    return read_rows([str(path)])


def test_figures_follow_from_the_times(rows: list[dict[str, Any]]) -> None:
    by = {(r["variant"], r.get("phase")): r for r in rows}
    assert len(rows) == 3 * len(PER_STEP) + 1 and "red" in by["llama.cpp q8_0", None]
    decode, prefill, whole = (by["fastgpt", phase] for phase in ("decode", "prefill", "generate"))
    assert decode["ms"] == 250.0 and decode["tokens_per_s"] == 2 / 0.25
    assert prefill["tokens_per_s"] == 2 * TINY.prompt / PREFILL
    assert whole["tokens_per_s"] == 2 * TINY.new / (PREFILL + (TINY.new - 1) * 0.25)
    # the floor: 4/5 of the 10^6 bytes, at the speed of 4 x 200,000 bytes in 0.125 s
    assert decode["floor_ms"] == pytest.approx(125.0) and decode["share_of_floor"] == pytest.approx(0.5)
    flops = TINY.prefill_flops(2)
    assert prefill["share_of_products"] == pytest.approx(flops / PREFILL / (TINY.product_flops(2) / 0.25))
    # the faster transformers is the peer
    assert decode["speed_vs_transformers"] == 1.5 and decode["speed_vs_llama.cpp"] == 0.5
    assert decode["reference"] == "transformers" and decode["relative"] == 0.5
    cache = 2 * TINY.layers * 2 * (TINY.prompt + TINY.new) * TINY.width * 4
    assert whole["cache_mb"] == cache / 1e6 and whole["peak_share"] == pytest.approx(1.5e6 / (1e6 + cache))
    assert by["llama.cpp", "generate"]["tokens_agree"] == 5 / TINY.new
    assert {r["variant"] for r in rows if ours(r)} == {"fastgpt"}
    table = readme.readme_generation([{**r, "shape": "gpt2-124m"} for r in rows])
    assert len(table) == 1 + len(PER_STEP)
    speeds = ["1.39 (1.39 .. 1.39)", "0.611 (0.611 .. 0.611)"]
    assert table[1][:5] == ["2", "fastgpt", "7.11", "250.0", "50%"] and table[1][-2:] == speeds


def test_other_first_tokens_show_no_speed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(generate, "available", lambda: (["fastgpt", "transformers"], {}))
    monkeypatch.setattr(generate, "write_models", lambda *_: {"parameters": 1, "read": 1})
    monkeypatch.setattr(generate, "Process", Fake)
    right = Fake.run
    wrong: Tokens = [[7] * TINY.new]
    monkeypatch.setattr(
        Fake, "run", lambda self, *a: (right(self, *a)[0], wrong if self.name == "transformers" else right(self, *a)[1])
    )
    path = tmp_path / "rows.jsonl"
    assert generate.main(["--quick", "--batch", "1", "--json", str(path), "--threads", "1"]) == 0
    (red,) = [json.loads(line) for line in path.read_text().splitlines() if '"red"' in line]
    assert red["variant"] == "transformers" and "first tokens differ" in red["red"]


def test_engines_generate_the_same(tmp_path: Path) -> None:
    """Those that are installed; llama.cpp computes GELU in fp16, so only its first tokens need to agree."""
    names, absent = generators.available()
    setup = Setup(TINY, tmp_path, 1)
    sizes = generators.write_models(TINY, tmp_path, names)
    prompts = TINY.prompts(2)
    tokens = {}
    for name in [n for n in names if n != "transformers static"]:  # compiling takes half a minute
        found = generators.engine(name, setup)
        assert name == "llama.cpp q8_0" or name in generators.OWN or found.weight_bytes >= 4 * sizes["read"]
        tokens[name] = found.generate(prompts, TINY.new)
        assert found.generate(prompts, 1) == [row[:1] for row in tokens[name]]
    assert [len(row) for row in tokens["fastgpt"]] == [TINY.new] * 2
    for name, found_tokens in tokens.items():
        if generators.DTYPES[name] == "fp32":
            agree = generate.agreement(found_tokens, tokens["fastgpt"])
            assert agree == 1.0 if name in generators.TRANSFORMERS else agree > 0.25
    assert sizes["parameters"] - sizes["read"] == TINY.context * TINY.width


@pytest.mark.extended
def test_the_command_in_processes(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    names = ["--variant", "fastgpt", "--variant", "transformers"]
    options = ["--quick", "--batch", "2", "--rounds", "1", "--threads", "1"]
    assert generate.main([*options, *names, "--json", str(path)]) == 0
    found = read_rows([str(path)])
    assert {(r["variant"], r["phase"]) for r in found if "red" not in r} >= {("fastgpt", p) for p in generate.PHASES}
    whole = next(r for r in found if r["phase"] == "generate" and r["variant"] == "fastgpt")
    assert whole["peak_mb"] > 0 and whole["tokens_agree"] == 1
