"""`fastgpt bench`: its commands, the plan of `make bench`, and the report, which must contain nothing that was not
measured."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgpt import cli
from fastgpt.bench import OPS, commands, cpu, report, results
from fastgpt.bench._harness import provenance
from fastgpt.core.cards import datasheet_bandwidth
from fastgpt.core.errors import UserError
from fastgpt.core.page import markdown_table, number

ROOT = Path(__file__).resolve().parent.parent
COMMITTED = ROOT / "bench" / "results" / "2026-11-21-epyc-2-cores.jsonl"
VENDOR = "2.11.0a0+git123.nv25.12"


def bench(*arguments: str) -> int:
    return commands.main(list(arguments))


def test_without_arguments_everything_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench() == 0
    out = capsys.readouterr().out
    assert all(f"\n  {name}" in out for name in (*OPS, *commands.COMMANDS))
    for name in ("compare", "ab", "report", "all", "throughput", "layer_norm"):
        assert callable(commands.command(name))
    with pytest.raises(UserError, match="there is no 'layernorm', expected an op"):
        bench("layernorm")


@pytest.mark.parametrize(
    "arguments", [["nothing"], ["compare", "a", "b"], ["report", "no*.jsonl"], ["all", "--only", "x"]]
)
def test_errors_are_one_sentence(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fastgpt", "bench", *arguments])
    assert cli.main() == 2
    err = capsys.readouterr().err
    assert err.startswith("fastgpt: error: ") and err.count("\n") == 1


@pytest.mark.parametrize("device", ["cuda", "tpu"])
def test_an_absent_device_is_said(device: str) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("a GPU is here")
    with pytest.raises(UserError, match=f"^layer_norm: --device is '{device}'"):
        bench("layer_norm", "--device", device)


@pytest.fixture
def vendor(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Set the versions that a vendor's container shows."""
    provenance.cache_clear()
    monkeypatch.setattr(torch, "__version__", VENDOR)
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton, "__version__", "3.6.0+git9844da95.nvinternal")
    yield
    provenance.cache_clear()


def test_one_op_from_measuring_to_the_page_with_a_vendors_versions(
    vendor: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    quick = ["--device", "cpu", "--shape", "16x32", "--seconds", "0.05", "--phase", "both"]
    for name in ("a", "b"):
        assert bench("layer_norm", "--dtype", "fp32", *quick, "--json", f"{name}.jsonl") == 0
    rows = results.read_rows(["a.jsonl"])
    assert {r["machine"]["torch"] for r in rows} == {VENDOR} and "triton" in rows[0]["machine"]
    ours = next(r for r in rows if r["backend"])
    assert ours["reference"] == "torch" and ours["relative_q20"] <= ours["relative"] <= ours["relative_q80"]
    assert ours["relative_low"] > 0
    assert bench("compare", "a.jsonl", "a.jsonl") == 0
    assert "1 figures compared: 0 regressions, 0 improvements" in capsys.readouterr().out
    assert bench("compare", "a.jsonl", "b.jsonl", "--floor", "9") == 0
    assert bench("report", "*.jsonl", "--out", "out") == 0
    assert (
        VENDOR in (tmp_path / "out" / "REPORT.md").read_text()
        and VENDOR in (tmp_path / "out" / "REPORT.html").read_text()
    )


class Links(HTMLParser):
    """Collects what a page would load, and counts the tags left open."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.stack: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.loads += [value for key, value in attrs if key in ("src", "href") and not value.startswith("#")]
        if tag not in ("meta", "img"):
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag


@pytest.fixture(scope="module")
def committed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report")
    assert bench("report", str(COMMITTED), "--out", str(out)) == 0
    return out


def test_the_page_is_whole_by_itself(committed: Path) -> None:
    text = (committed / "REPORT.html").read_text()
    links = Links()
    links.feed(text)
    assert not links.stack and len(links.loads) >= 5
    assert all(link.startswith("data:image/png;base64,iVBOR") for link in links.loads)
    assert "<script" not in text and "@import" not in text and "url(" not in text


def test_markdown_shows_every_plot(committed: Path) -> None:
    named = re.findall(r"!\[[^\]]+\]\((plots/[^)]+)\)", (committed / "REPORT.md").read_text())
    assert sorted(named) == sorted(f"plots/{p.name}" for p in (committed / "plots").iterdir())
    assert all((committed / name).read_bytes().startswith(b"\x89PNG") for name in named)


def test_what_was_not_measured_says_so(committed: Path) -> None:
    text = (committed / "REPORT.md").read_text()
    assert "A100, H100, H200: not measured." in text
    row = (
        r"\| layer_norm \| 4096 × 768 \| float32 \| [\d.]+ [^|]*cpu \| not measured \| not measured \| not measured \|"
    )
    assert re.search(row, text)
    assert re.search(r"## Codegen\n\n[^#]*Codegen: not measured\.", text)  # no committed row has any
    rows = [r for r in results.read_rows([str(COMMITTED)]) if r["bench"] in OPS]
    about = {s.title: " ".join(s.about) for s in report.sections_of(rows)}
    assert all(f"{section}: not measured." in about[section] for section in ("Memory", "Host", "Codegen"))
    empty = report.sections_of([])
    assert all("not measured" in " ".join(s.about) and not s.tables and not s.plots for s in empty)


def machine(name: str, **more: Any) -> dict[str, Any]:
    about = {"fastgpt": "0.1.0", "commit": "c1", "sources": "s", "torch": "2.13.0", "threads": 2, "device": "cpu"}
    return {**about, "device_name": name, "date": "2026-11-21T10:00:00+00:00", **more}


def test_a_gpus_rows_fill_its_column_and_datasheet() -> None:
    about = {"bench": "layer_norm", "shape": [65536, 768], "dtype": "bfloat16", "phase": "both", "provider": "cuda"}
    about |= {
        "backend": "cuda",
        "ms": 1.0,
        "ms_q20": 0.9,
        "ms_q80": 1.1,
        "gb_s": 1675.0,
        "pct_of_copy": 55.0,
        "pct_of_datasheet": 50.0,
    }
    about |= {"reference": "torch", "relative": 0.5, "relative_q20": 0.4, "relative_q80": 0.8, "host_us": 12.0}
    row = about | {"machine": machine("NVIDIA H100 80GB HBM3", device="cuda:0"), "gpu": {"driver": "570.1"}}
    red = row | {"provider": "triton", "backend": "triton", "red": "error 3, allowed 1"}
    section = report.ops_section([row, red])
    (head, line), detail = section.tables[0].rows, section.tables[1].rows
    assert head[3:] == ["NVIDIA H100 80GB HBM3", "A100", "H200"]
    assert line[3:] == ["2.00 (1.25 .. 2.50) cuda", "not measured", "not measured"]
    assert detail[1][5] == "1 (0.9 .. 1.1)" and detail[1][8] == "50"
    assert "driver 570.1" in " ".join(section.about) and "not measured: error 3, allowed 1" in detail[2]


def test_bandwidth_by_a_devices_own_name() -> None:
    names = {"NVIDIA A100-SXM4-80GB": 2039e9, "NVIDIA H100 PCIe": 2000e9, "NVIDIA H200": 4800e9, "Tesla T4": None}
    assert {name: datasheet_bandwidth(name) for name in names} == names
    assert datasheet_bandwidth("NVIDIA A100") is None, "40 or 80 GB: two bandwidths"


def test_the_newest_row_counts_and_every_commit_is_named() -> None:
    old = {"bench": "host", "figure": "call", "op": "rope", "provider": "cpu", "us": 9.0, "machine": machine("X")}
    new = {**old, "us": 8.0, "machine": machine("X", commit="c2", date="2026-11-22T10:00:00+00:00")}
    other = {**old, "op": "adamw", "us": 7.0}
    assert report.newest([new, old, other]) == [new, other]
    section = report.other_section("host", report.newest([new, old, other]))
    assert section.title == "Host" and [t.rows for t in section.tables] == [
        [["op", "provider", "us"], ["rope", "cpu", "8"], ["adamw", "cpu", "7"]]
    ]
    assert "commit c1" in " ".join(section.about) and "commit c2" in " ".join(section.about)


def test_numbers_are_short() -> None:
    shown = [number(v) for v in (0.0438992, 3.0212, 123.456, 27661.2, 12, 4096, None, "cpu", True)]
    assert shown == ["0.0439", "3.02", "123.5", "27,661", "12", "4,096", "-", "cpu", "True"]
    assert markdown_table([["a"], ["x|y"]]) == "| a |\n| --- |\n| x\\|y |"


def test_readmes_figures_are_the_rows() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"<!-- bench:(\w+)", readme)) == {"ops", "steps", "gpus"}
    assert report.update_readme(readme, ROOT) == readme, "fastgpt bench report --readme README.md"
    for name in ("generation", "evaluation_engine", "serving"):
        page = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
        assert report.update_readme(page, ROOT / "docs") == page, f"fastgpt bench report --readme docs/{name}.md"


def test_a_readme_is_updated_from_the_files_that_it_names(tmp_path: Path) -> None:
    results.append_rows(
        tmp_path / "new.jsonl",
        [
            {"bench": "throughput", "shape": "gpt2-124m", "batch": 64, "block": 1024, "dtype": "bf16", "variant": name}
            | {"ms": 1.0, "tokens_per_s": speed, "machine": machine("NVIDIA H200", device="cuda")}
            for name, speed in (("fastgpt", 512345.6), ("torch compile", 498141.0))
        ],
    )
    text = "before\n<!-- bench:gpus new.jsonl -->\nold\n<!-- /bench -->\nafter\n"
    made = report.update_readme(text, tmp_path)
    assert made.startswith("before\n<!-- bench:gpus new.jsonl -->\n") and made.endswith("<!-- /bench -->\nafter\n")
    assert "| NVIDIA H200 | 512,346 | 498,141 |" in made and "A100" not in made
    assert report.update_readme(text.replace("new.jsonl ", ""), tmp_path) == (
        "before\n<!-- bench:gpus -->\n<!-- /bench -->\nafter\n"
    )
    assert "old" not in made and report.update_readme(made, tmp_path) == made
    with pytest.raises(UserError, match="marker bench:speed"):
        report.update_readme(text.replace("gpus", "speed"), tmp_path)


def test_the_cpu_plan_fits_its_budget(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    planned = cpu.plan(tmp_path / "rows", tmp_path)
    assert sum(s.guess for s in planned) <= cpu.BUDGET < 900 and all(s.guess <= s.limit for s in planned)
    assert {"doctor", *OPS, "small", "medium", "gpt2-124m", "host", "memory", "codegen"} < {s.name for s in planned}
    assert planned[-1].name == "report"
    known = {f"fastgpt.bench.{module}" for module, _ in commands.COMMANDS.values()} | {
        f"fastgpt.bench.{op}" for op in OPS
    }
    assert {s.command[2] for s in planned} <= known | {"fastgpt.cli"}
    assert bench("all", "--dry-run", "--out", str(tmp_path / "out")) == 0
    assert "guesses, not measured" in capsys.readouterr().out and not (tmp_path / "out").exists()


def test_stages_leave_rows_and_a_report(tmp_path: Path) -> None:
    """Run `fastgpt bench all` for real, with two of its stages."""
    command = [sys.executable, "-m", "fastgpt.cli", "bench", "all", "--only", "adamw", "--only", "report"]
    done = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {r["bench"] for r in results.read_rows([str(tmp_path / "rows.jsonl")])} == {"adamw"}
    assert "adamw" in (tmp_path / "REPORT.html").read_text() and (tmp_path / "cpu.json").exists()


def test_ops_are_pytest_benchmarks(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--benchmark-only",
        "-k",
        "host and cpu-both",
    ]
    command += ["--benchmark-max-time=0.01", "--benchmark-warmup=off", f"--benchmark-json={tmp_path / 'out.json'}"]
    alone = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}  # under xdist it times nothing
    done = subprocess.run([*command, "bench/layer_norm.py"], capture_output=True, text=True, cwd=ROOT, env=alone)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr
    (case,) = json.loads((tmp_path / "out.json").read_text())["benchmarks"]
    assert case["name"].startswith("test_layer_norm[") and case["stats"]["rounds"] >= 5
