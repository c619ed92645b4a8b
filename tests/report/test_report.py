"""`fastgpt report`: what its page says of runs, that it stays small, and that its script draws in Chromium."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from run_folders import STEP, write_run

from fastgpt.core.errors import UserError
from fastgpt.report.command import POINTS, main
from fastgpt.report.command import read as read_all
from fastgpt.report.metrics import Metrics
from fastgpt.report.page import render
from fastgpt.report.rows import Tail
from fastgpt.report.run import RunFiles, names
from fastgpt.report.series import MOST, Buckets


def cells(page: str) -> dict[str, list[str]]:
    """Return the rows of all tables by their first cell; of equal ones the first."""
    found: dict[str, list[str]] = {}
    for row in re.findall(r"<tr[^>]*>(.*?)</tr>", page):
        head, *rest = [html.unescape(cell) for cell in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row)]
        found.setdefault(head, rest)
    return found


def data(page: str) -> dict[str, Any]:
    """Return what the script draws."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page)
    assert found is not None
    return dict(json.loads(found[1]))


def read(folder: Path, name: str = "") -> RunFiles:
    run = RunFiles.open(folder, name)
    run.refresh()
    return run


def test_buckets_keep_means_and_extremes_of_any_number_of_rows() -> None:
    buckets, values = Buckets(8), [float(7 * i % 101) for i in range(1000)]
    for i, value in enumerate(values):
        buckets.put((i, 10 * i, i / 2), {"loss": value, **({"late": 1.0} if i > 900 else {})})
    points, width = list(buckets.points("loss")), buckets.width
    assert width == 128 and len(points) == 8 and buckets.ends[0] == (127, 1270, 63.5) and buckets.ends[-1][0] == 999
    for i, point in enumerate(points):
        part = values[i * width : (i + 1) * width]
        steps = range(i * width, i * width + len(part))
        assert (point.low, point.high) == (min(part), max(part))
        assert point.mean == pytest.approx(sum(part) / len(part)) and point.step == sum(steps) / len(part)
    assert [p.mean for p in buckets.points("late")] == [1.0]
    few = Buckets(8)
    few.put((1, 1, 1), {"loss": 2.0})
    assert list(few.points("loss")) == [(1, 2.0, 2.0, 2.0)]


def test_damaged_and_half_written_lines_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\nnonsense\n[1]\n{"loss": 2}\n\xff\n{"step": 2}\n{"step": 3, "lo')
    tail = Tail(path)
    assert [row["step"] for row in tail.read()] == [1, 2] and (tail.damaged, tail.half) == (4, True)
    with path.open("ab") as file:
        file.write(b'ss": 1.5}\n')
    assert list(tail.read()) == [{"step": 3, "loss": 1.5}] and not tail.half and not list(tail.read())


def test_a_file_that_was_replaced_or_cut_is_read_from_its_start(tmp_path: Path) -> None:
    path, other = tmp_path / "metrics.jsonl", tmp_path / "metrics.tmp"
    path.write_text('{"step": 1}\n{"step": 2}\n')
    tail = Tail(path)
    assert not tail.replaced() and len(list(tail.read())) == 2 and not tail.replaced()
    other.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n')
    other.replace(path)
    assert tail.replaced() and len(list(tail.read())) == 3 and not tail.replaced()
    path.write_text('{"step": 1}\n')
    assert tail.replaced() and list(tail.read()) == [{"step": 1}] and not tail.replaced()


def test_metrics_know_the_best_validation_and_skipped_steps() -> None:
    metrics = Metrics()
    for step, loss in ((1, 4.0), (2, float("nan")), (3, 9.0), (4, 3.0)):
        metrics.add({**STEP, "step": step, "loss": loss, **({"skipped": 1} if step == 3 else {})})
    for step, loss, accuracy in ((2, 3.5, 0.2), (4, 3.1, 0.6), (3, 3.0, 0.4)):
        metrics.add({"step": step, "val_loss": loss, "val_accuracy": accuracy})
    assert (metrics.count, metrics.skipped, metrics.last_skip) == (4, 2, 3)
    assert [p.mean for p in metrics.steps.points("loss")] == [4.0, 9.0, 3.0]
    assert metrics.best({}) == ("val_loss", 3.0, 3) and metrics.best({"metric": "accuracy"}) == ("val_accuracy", 0.6, 4)
    assert metrics.best({"metric": "val_loss", "metric_goal": "max"}) == ("val_loss", 3.5, 2)
    assert metrics.best({"metric": "reward"}) is None
    assert [p.step for p in metrics.points("val_loss")] == [2, 3, 4], "the last row may be of the best step"


def test_steps_that_are_repeated_replace_the_earlier_ones() -> None:
    """A run that was killed and began again at a checkpoint, in a file that has kept what came after it."""
    metrics = Metrics(8)
    for row, step in enumerate((1, 2, 3, 4, 5, 3, 4, 5, 6)):
        metrics.add({**STEP, "step": step, "loss": 10.0 * row + step})
    found = [(p.step, p.mean) for p in metrics.steps.points("loss")]
    assert found == [(1, 1), (2, 12), (3, 53), (4, 64), (5, 75), (6, 86)]
    assert [row["step"] for row in metrics.recent] == [1, 2, 3, 4, 5, 6] and metrics.last["step"] == 6
    assert metrics.count == 6
    for step in (*range(7, 30), 18):
        metrics.add({**STEP, "step": step})
    steps = [p.step for p in metrics.steps.points("loss")]
    assert steps == sorted(set(steps)) and metrics.steps.ends[-1][0] == 18 and metrics.count <= 18
    assert metrics.tokens_per_second() == pytest.approx(STEP["tokens_per_second"])


def test_the_page_compares_runs(tmp_path: Path) -> None:
    write_run(tmp_path / "a" / "run", lr=6e-4, text="</script><b>bold")
    write_run(tmp_path / "b" / "run", lr=1e-3, steps=30)
    out = tmp_path / "new" / "page.html"
    assert main([str(tmp_path / "a" / "run"), str(tmp_path / "b" / "run"), "--out", str(out)]) == 0
    page, drawn = out.read_text(), data(out.read_text())
    assert "2 runs" in page and [run["name"] for run in drawn["runs"]] == ["a/run", "b/run"]
    assert "<b>bold" not in page and "&lt;/script&gt;&lt;b&gt;bold" in page
    found = cells(page)
    assert found["steps"] == ["20 of 20", "30 of 30"] and found["skipped steps"] == ["1", "1"]
    assert found["val_loss, last"] == ["2.0500", "2.0333"] and found["energy (kWh)"] == ["1", "1"]
    assert found["best value of the run's metric"][0] == "val_loss 2.0500 at step 20 (step_00000020)"
    assert found["base.task.acc"] == ["0.5 at step 20", "0.5 at step 30"] and "base.task/part.acc" not in found
    assert found["lr"] == ["0.0006", "0.001"] and found["model.width"] == ["64", "64"]
    assert found["licences"] == ["MIT", "MIT"] and found["commit"] == ["abc", "abc"]
    differ = page.split("Settings that differ")[1].split("</table>")[0]
    assert "<td>lr</td>" in differ and "model.width" not in differ and "<td>out</td>" not in differ
    assert re.findall(r'<tr class="marked"><td>(.*?)</td>', page) == ["max_steps", "lr"]
    assert page.count("<summary>a/run, step ") == 2 and "a/run, at the end" in page
    assert ["loss", "val_loss"] in drawn["charts"] and ["", "base.task.acc"] in drawn["charts"]
    assert not any("seconds" in name or "/" in name for pair in drawn["charts"] for name in pair if name[:4] == "base")
    assert drawn["runs"][0]["steps"]["loss"][0] == list(range(1, 21)), "a short run keeps every step"


class Balanced(HTMLParser):
    """Fails on an element that is not closed, and collects the ids."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value for name, value in attrs if name == "id" and value]
        if tag not in ("meta", "input", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_loads_nothing_and_is_accessible(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    page = render([read(tmp_path / "run", "</script>")])
    parser = Balanced()
    parser.feed(page)
    assert not parser.open and len(set(parser.ids)) == len(parser.ids)
    assert not re.search(r'https?:|\bsrc=|<link|url\(|@import|fetch\(|href="[^#]', page)
    plots = re.findall(r'<div class="plot" role="img" tabindex="0" aria-label="(.*?)">', page)
    assert len(plots) == page.count("<figure") > 5
    assert "Loss (lines: training, circles: validation): &lt;/script&gt; from 3 to 2.05" in plots
    assert data(page)["runs"][0]["name"] == "</script>"
    assert page.count("<label") == len(re.findall(r"<(?:input|select)", page)), "every field stands in its label"
    assert "prefers-color-scheme: dark" in page and 'name="viewport"' in page and '<html lang="en">' in page


def contrast(a: str, b: str) -> float:
    """Return the contrast of two colours as WCAG 2 defines it."""

    def light(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        r, g, b = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    low, high = sorted((light(a), light(b)))
    return (high + 0.05) / (low + 0.05)


def test_values_and_lines_can_be_told_from_the_paper(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    bright, dark = render([read(tmp_path / "run")]).split("prefers-color-scheme: dark")
    for css, paper in ((bright, "#ffffff"), (dark.split("</style>")[0], "#0d1117")):
        colours = re.findall(r"--c\d: (#\w{6})", css)
        assert len(colours) == 10 and all(contrast(c, paper) >= 4.5 for c in colours)


def test_a_page_of_many_long_runs_stays_small(tmp_path: Path) -> None:
    """The points of ten runs of any length are bounded, at twice the number of figures that a run has."""
    most = POINTS // 10
    metrics = Metrics(most)
    figures = {f"figure_{i}": 1234.5678 for i in range(16)}
    for step in range(1, 3 * most + 1):
        metrics.add({**STEP, **{k: v + step / 7 for k, v in figures.items()}, "step": step})
    folders = [tmp_path / f"run{i}" for i in range(10)]
    for folder in folders:
        write_run(folder)
    runs = read_all(folders)
    assert {run.metrics.most for run in runs} == {most} and read_all(folders[:1])[0].metrics.most == MOST
    for run in runs:
        run.metrics = metrics
    page = render(runs)
    assert len(page) < 2e6 and "a point is the mean of up to 4 steps" in page
    assert len(data(page)["runs"][9]["steps"]["figure_3"]) == 4, "extremes too"


def test_a_validation_that_is_not_finite_is_shown_as_such(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    write_run(folder)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "loss": NaN, "grad_norm": NaN}\n{"step": 21, "val_loss": NaN}\n')
    run = read(folder)
    found = cells(render([run]))
    assert found["val_loss, last"] == ["nan"] and found["skipped steps"] == ["2"]
    assert run.best() is not None and run.best()[:3] == ("val_loss", 2.05, 20)
    assert [p.step for p in run.metrics.points("val_loss")] == [10, 20]


def test_finetuning_figures_have_charts(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    write_run(folder)
    with (folder / "metrics.jsonl").open("w") as file:
        for step in (1, 2):
            file.write(json.dumps({**STEP, "step": step, "loss": 0.7, "accuracy": 0.5, "margin": -0.1}) + "\n")
        file.write(json.dumps({"step": 2, "val_loss": 0.6, "val_accuracy": 0.75, "val_f1": 0.7}) + "\n")
    page = render([read(folder)])
    pairs = data(page)["charts"]
    assert ["accuracy", "val_accuracy"] in pairs and ["margin", ""] in pairs
    assert cells(page)["val_f1, last"] == ["0.7000"], "one value is no curve"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, r"is no run \(there is no such folder\)"),
        (lambda path: path.mkdir(), r"is no run \(it has no metrics.jsonl\)"),
        (lambda path: write_run(path, steps=0), "has no row of a step, expected a run that has begun"),
    ],
)
def test_what_is_no_run_is_refused(tmp_path: Path, make: Any, message: str) -> None:
    make(tmp_path / "run")
    write_run(tmp_path / "good")
    with pytest.raises(UserError, match=message):
        main([str(tmp_path / "good"), str(tmp_path / "run")])
    assert not (tmp_path / "good" / "report.html").exists()


def test_a_run_without_settings_has_a_page(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    write_run(folder)
    (folder / "run.json").write_text('{"config"')
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "los')
    assert main([str(folder)]) == 0
    page = (folder / "report.html").read_text()
    assert cells(page)["data"] == ["not recorded"] and "1 damaged or half-written line was skipped" in page


def test_names_are_as_short_as_they_can_be() -> None:
    assert names([Path("x/a"), Path("x/b")]) == ["a", "b"]
    assert names([Path("x/a"), Path("y/a")]) == ["x/a", "y/a"]
    with pytest.raises(UserError, match="x/a is given twice"):
        names([Path("x/a"), Path("x/b/../a")])


PLAY = """<script>
window.requestAnimationFrame = (call) => setTimeout(call, 0);  // there are no frames without a window
window.cancelAnimationFrame = clearTimeout;
const put = (input, key, value) => { input[key] = value; input.dispatchEvent(new Event("input")); };
const paths = () => [...document.querySelectorAll(".first .line")].map((line) => line.getAttribute("d"));
const drawn = () => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(paths()))));
(async () => {
  const said = {start: paths()};
  for (const [name, input, key, value, back] of [["hours", x, "value", "hours", "steps"],
      ["log", log, "checked", true, false], ["smooth", smooth, "value", "0.9", "0"],
      ["hidden", document.querySelector("[data-run='1']"), "checked", false, true]]) {
    put(input, key, value);
    said[name] = await drawn();
    put(input, key, back);
    said.back = await drawn();
  }
  const plot = document.querySelector(".first .plot");
  for (const key of ["ArrowRight", "ArrowRight"]) plot.dispatchEvent(new KeyboardEvent("keydown", {key}));
  said.values = document.querySelector(".first .values").textContent;
  document.title = JSON.stringify(said);
})();
</script></body>"""


@pytest.fixture
def browser() -> Iterator[str]:
    found = shutil.which("chromium")
    if found is None:
        pytest.skip("no chromium")
    yield found


@pytest.mark.slow
def test_the_script_draws_and_its_controls_work(tmp_path: Path, browser: str) -> None:
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", steps=30)
    path = tmp_path / "page.html"
    path.write_text(render([read(tmp_path / "a"), read(tmp_path / "b")]).replace("</body>", PLAY))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--dump-dom"]
    done = subprocess.run([browser, *options, path.as_uri()], capture_output=True, text=True, timeout=120)
    title = re.search(r"<title>(\{.*?)</title>", done.stdout)
    assert title is not None, done.stderr[-2000:]
    said = json.loads(html.unescape(title[1]))
    assert len(said["start"]) == 4 and said["back"] == said["start"], "loss and validation of two runs"
    assert said["start"][0].count("L") == 19
    assert len(said["hidden"]) == 2
    for name in ("hours", "log", "smooth"):
        assert said[name] != said["start"], name
    assert said["values"] == "step 2 a 2.5 b 2.5 ", "no validation is near"
