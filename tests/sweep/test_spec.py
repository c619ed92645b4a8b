"""A sweep's file: what it means, and that mistakes are refused with one sentence before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastgpt.core.errors import UserError
from fastgpt.sweep import interval, space
from fastgpt.sweep.check import candidates
from fastgpt.sweep.command import main
from fastgpt.sweep.spec import Spec, load

GRID = "config: tiny\nsampler: grid\nvariants: {a: {}, b: {lr: 1e-4}}\n"
SEARCH = "config: tiny\ntrials: 4\n"


def spec(tmp_path: Path, text: str) -> Spec:
    path = tmp_path / "sweep.yaml"
    path.write_text(text)
    return load(path)


def test_a_grid_has_its_variants_over_the_options(tmp_path: Path) -> None:
    text = "options: {max-steps: 300, model: {n-layers: 2}}\nseeds: [1, 2, 3]\n" + GRID
    found = candidates(spec(tmp_path, text))
    assert [(one.name, one.given) for one in found] == [("a", {}), ("b", {"lr": "1e-4"})]
    assert [one.cfg.lr for one in found] == [6e-3, 1e-4]
    assert all((one.cfg.max_steps, one.cfg.max_minutes, one.cfg.model.n_layers) == (300, None, 2) for one in found)


def test_a_grid_of_lists_runs_every_combination(tmp_path: Path) -> None:
    text = "config: tiny\nsampler: grid\nsearch: {optimizer: [adamw, muon], lr: {low: 0.1, high: 0.3, step: 0.1}}\n"
    names = [one.name for one in candidates(spec(tmp_path, text))]
    assert names[:3] == ["optimizer=adamw,lr=0.1", "optimizer=adamw,lr=0.2", "optimizer=adamw,lr=0.3"]
    assert len(names) == 6


def test_a_search_has_ranges_and_lists(tmp_path: Path) -> None:
    search = "search: {lr: {low: 1e-4, high: 1e-2, log: true}, warmup-steps: {low: 0, high: 20, step: 5}, "
    found = spec(tmp_path, SEARCH + search + "model: {width: [96, 192]}, lr_ratios: [{wte: 0.3}, {}]}\n")
    lr, warmup, width, ratios = found.dimensions
    assert lr == space.Range("lr", 1e-4, 1e-2, None, True) and warmup == space.Range("warmup_steps", 0, 20, 5)
    assert width == space.Choices("model.width", ("96", "192"))
    assert ratios.points() == ('{"wte": "0.3"}', "{}")
    corners = candidates(found)
    assert {one.cfg.lr for one in corners} == {1e-4, 1e-2} and {one.cfg.model.width for one in corners} == {96, 192}
    assert {str(one.cfg.lr_ratios) for one in corners} == {"{'wte': 0.3}", "{}"}


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("trials: 3\n", "config is '', expected a YAML file or the name of a configuration"),
        ("config: tiny\ntrails: 3\n", "trails is not a setting (did you mean trials?)"),
        (SEARCH, "search is {}, expected settings to try, or else variants"),
        (GRID + "trials: 3\n", "trials is 3, expected no number with sampler grid"),
        (GRID + "pruner: median\n", "pruner is 'median', expected none with sampler grid"),
        (GRID.replace("grid", "tpe"), "sampler is 'tpe', expected grid with variants"),
        (GRID + "seeds: [1, 1]\n", "seeds is [1, 1], expected different numbers of 0 or more"),
        (GRID + "options: {seed: 3}\n", "options sets seed, which seeds sets in a sweep"),
        (GRID + "options: {out: x}\n", "options sets out, which --out sets in a sweep"),
        (GRID + "options: {max-steps: 3, max_steps: 3}\n", "options sets max_steps twice"),
        (GRID + "options: {learning-rate: 3}\n", "options: learning_rate is not a setting"),
        (GRID + "metric: mood\n", "goal is 'auto', expected min or max: the name 'mood' does not tell"),
        (GRID + "options: {optimizer: adamw, momentum: 0.9}\n", "momentum has no effect here: it only applies with"),
        (GRID + "options: {lr: fast}\n", "lr is 'fast', expected a number"),
        (GRID.replace("b:", "b/c:"), "variants is 'b/c', expected names of letters"),
        (GRID + "devices: [cpu]\noptions: {device: cpu}\n", "devices and the setting device are both given"),
        ("config: tiny\nsampler: grid\nvariants: {a: {}}\n", "there is one run, a, expected several"),
        (SEARCH + "search: {lr: {low: 1, high: 0.1}}\n", "search.lr is 1.0 to 0.1, expected low below high"),
        (SEARCH + "search: {lr: {low: 0, high: 0.1, log: true}}\n", "and low above 0 with log"),
        (SEARCH + "search: {lr: {low: 0.1, high: 1, log: true, step: 0.1}}\n", "false with step"),
        (SEARCH + "search: {lr: {low: 0.1, heigh: 1}}\n", "search.lr.heigh is unknown"),
        (SEARCH + "search: {lr: 0.1}\n", "search.lr is '0.1', expected a list or {low: ..., high: ...}"),
        (SEARCH + "search: {warmup-steps: {low: 0, high: 5, step: 2}}\n", "expected low plus a multiple of step 2"),
        (SEARCH + "search: {optimizer: {low: 1, high: 2}}\n", "search.optimizer.low is '1', expected one of adamw"),
        (SEARCH + "search: {model.width: [96, 100]}\n", "search with width=100: model.n_heads is 6"),
        (SEARCH + "search: {lr: [1, 1]}\n", "search.lr has a value twice"),
        (SEARCH + "pruner: median\noptions: {max-steps: 9}\nsearch: {lr: [1, 2]}\n", "expected none, or an eval_every"),
        (SEARCH + "pruner: median\nmetric: loss\nsearch: {lr: [1, 2]}\n", "which is no figure of a validation"),
    ],
)
def test_mistakes_are_refused(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(UserError) as e:
        candidates(spec(tmp_path, text))
    assert sentence in str(e.value) and "\n" not in str(e.value)


def test_a_metric_that_no_validation_has_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my.txt").write_text("def f(x):\n    return x + 1\n\n" * 400)
    Path("sweep.yaml").write_text(GRID + "options: {data: my.txt, vocab-size: 300}\nmetric: val_loss.web\n")
    with pytest.raises(UserError, match="metric is 'val_loss.web' .*expected one of val_loss, loss"):
        main(["sweep.yaml"])
    assert not Path("runs").exists()


def test_a_search_without_optuna_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(SEARCH + "search: {lr: [1e-3, 1e-2]}\n")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'fastgpt\[sweep\]'"):
        main([str(path)])


def test_a_dry_run_prints_the_space_and_trains_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("sweep.yaml").write_text(
        "config: tiny\noptions: {max-steps: 100}\nsearch: {lr: {low: 1e-3, high: 1e-2, log: true}}\n"
        "trials: 6\nseeds: [1, 2]\nparallel: 2\n"
    )
    assert main(["sweep.yaml", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "6 trials with 2 seeds, sampler tpe, pruner none:" in said
    assert "  lr: 0.001 to 0.01 on a logarithmic scale" in said and "for 12 runs, 2 at a time" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sweep.yaml"]


def test_intervals_are_those_of_students_t() -> None:
    """Quantiles from the table in Abramowitz and Stegun, 26.10."""
    quantiles = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 10: 2.228, 30: 2.042, 120: 1.980}
    for freedom, quantile in quantiles.items():
        assert interval.t_quantile(freedom) == pytest.approx(quantile, abs=5e-4)
    found = interval.mean([1.0, 2.0, 3.0])
    assert found.value == 2.0 and found.reach == pytest.approx(4.303 / 3**0.5, abs=1e-3)
    assert interval.mean([1.5]) == (1.5, None)
