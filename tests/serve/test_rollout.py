"""Deployments: a gate decides, one command goes back, and damaged or contested states lose nothing."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path

import pytest
from serve.servers import write_model
from small_models import model_of, run_of

from fastgpt.core.errors import UserError
from fastgpt.evaluate.results import Items, Results, mean
from fastgpt.evaluate.target import open_target
from fastgpt.serve.rollout import actions
from fastgpt.serve.rollout.command import main
from fastgpt.serve.rollout.state import read

RIGHT, WRONG = [1.0] * 40, [0.0] * 40


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {"old": write_model(folder / "old"), "new": write_model(folder / "new", seed=1)}


@pytest.fixture(scope="module")
def evaluations(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Results of the old model, of the new one, and bad ones of the new one."""
    folder = tmp_path_factory.mktemp("evaluations")
    prints = {name: open_target(str(path), device="cpu").about["fingerprint"] for name, path in models.items()}
    found = {}
    for name, model, values in (("old", "old", RIGHT), ("new", "new", RIGHT), ("bad", "new", WRONG)):
        results = Results({"name": name, "step": 1, "fingerprint": prints[model]}, "base")
        results.figures.append(mean("arc", "acc", values))
        results.items.append(Items("arc", "acc", [f"{i:016x}" for i in range(40)], values))
        results.save(folder / f"{name}.json")
        found[name] = str(folder / f"{name}.json")
    return found


@pytest.fixture
def deployment(models: dict[str, Path], tmp_path: Path) -> Path:
    folder = tmp_path / "chat"
    assert main(["init", str(folder), "--model", str(models["old"]), "--by", "ann"]) == 0
    return folder


def test_out_and_back(
    deployment: Path, models: dict[str, Path], evaluations: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    gate = ["--gate", evaluations["old"], evaluations["new"]]
    assert main(["propose", str(deployment), str(models["new"]), *gate]) == 0
    assert "version 2: gate passed against version 1, 0 of 1 test worse" in capsys.readouterr().out
    assert read(deployment).current.number == 1
    assert main(["roll-out", str(deployment), "2"]) == 0
    assert read(deployment).current.number == 2
    with pytest.raises(UserError, match="version 2 is served already"):
        main(["roll-out", str(deployment), "2"])
    assert main(["roll-back", str(deployment), "--reason", "slow", "--by", "bob"]) == 0
    state = read(deployment)
    assert state.current.number == 1
    assert [(e.action, e.version, e.before) for e in state.history] == [
        ("init", 1, None),
        ("propose", 2, 1),
        ("roll-out", 2, 1),
        ("roll-back", 1, 2),
    ]
    assert (state.history[0].by, state.history[3].by, state.history[3].reason) == ("ann", "bob", "slow")
    assert state.history[2].fingerprint == open_target(str(models["new"]), device="cpu").about["fingerprint"]
    with pytest.raises(UserError, match="version 1 is the first one of"):
        main(["roll-back", str(deployment)])
    assert main(["status", str(deployment)]) == 0
    shown = capsys.readouterr().out
    assert "* 1  " in shown and "bob  roll-back 1: slow" in shown
    assert main(["status", str(deployment), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["served"] == [1]


def test_a_gate_refuses(
    deployment: Path, models: dict[str, Path], evaluations: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["propose", str(deployment), str(models["new"]), "--gate", evaluations["old"], evaluations["bad"]]) == 1
    assert "FAIL arc acc: 1.0000 -> 0.0000" in capsys.readouterr().out
    assert main(["propose", str(deployment), str(models["new"])]) == 0
    for number, why in ((2, "the gate of version 2 failed: arc acc: 1.0000 -> 0.0000"), (3, "version 3 has no gate")):
        with pytest.raises(UserError, match=why):
            main(["roll-out", str(deployment), str(number)])
    with pytest.raises(UserError, match="has no version 9, expected one of 1, 2, 3"):
        main(["roll-out", str(deployment), "9"])
    assert read(deployment).current.number == 1
    with pytest.raises(UserError, match="--force is empty"):
        main(["roll-out", str(deployment), "2", "--force", " "])
    assert main(["roll-out", str(deployment), "2", "--force", "arc is broken"]) == 0
    assert read(deployment).history[-1].reason == "arc is broken"


def test_a_gate_is_of_these_weights_and_of_the_served_version(
    deployment: Path, models: dict[str, Path], evaluations: dict[str, str]
) -> None:
    propose = ["propose", str(deployment), str(models["new"]), "--gate"]
    with pytest.raises(UserError, match="old.json is an evaluation of other weights, expected those of .*/new$"):
        main([*propose, evaluations["old"], evaluations["old"]])
    with pytest.raises(UserError, match="of other weights, expected those of version 1, which is served"):
        main([*propose, evaluations["new"], evaluations["new"]])
    assert list(read(deployment).versions) == [1]
    for _ in range(2):
        assert main([*propose, evaluations["old"], evaluations["new"]]) == 0
    assert main(["roll-out", str(deployment), "2"]) == 0
    with pytest.raises(UserError, match="version 3 held it against version 1, and version 2 is served; propose it"):
        main(["roll-out", str(deployment), "3"])
    with pytest.raises(UserError, match="--force has no effect: the gate of version 2 passed"):
        main(["roll-back", str(deployment)])
        main(["roll-out", str(deployment), "2", "--force", "why not"])


def test_two_gates_share_alpha(deployment: Path, models: dict[str, Path], evaluations: dict[str, str]) -> None:
    pair = (evaluations["old"], evaluations["new"])
    version = actions.propose(deployment, str(models["new"]), [pair, pair], alpha=0.02)
    assert version.gate is not None and version.gate.tests == 2 and version.gate.alpha == 0.02
    with pytest.raises(UserError, match="--alpha is for --gate"):
        main(["propose", str(deployment), str(models["new"]), "--alpha", "0.1"])


def test_a_version_outlives_its_run(deployment: Path, models: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(models["new"], tmp_path / "run")
    version = actions.propose(deployment, str(tmp_path / "run"))
    (tmp_path / "run" / "model.safetensors").write_bytes(b"in place")
    shutil.rmtree(tmp_path / "run")
    kept = open_target(str(deployment / version.folder), device="cpu")
    assert kept.about["fingerprint"] == version.fingerprint
    assert not list(deployment.glob("versions/.*"))


def test_weights_of_a_checkpoint_are_linked(deployment: Path, tmp_path: Path) -> None:
    run = Path(run_of(model_of(vocab_size=257).float(), str(tmp_path / "run")))
    version = actions.propose(deployment, str(run))
    kept = deployment / version.folder / "model.safetensors"
    assert kept.samefile(next(run.glob("step_*")) / "model.safetensors")
    assert open_target(str(kept.parent), device="cpu").about["fingerprint"] == version.fingerprint


def test_proposals_at_the_same_time_have_numbers_of_their_own(deployment: Path, models: dict[str, Path]) -> None:
    (deployment / "versions" / "2").mkdir()  # of a command that was killed
    (deployment / "versions" / "2" / "half").touch()
    found: list[int] = []
    threads = [
        threading.Thread(target=lambda: found.append(actions.propose(deployment, str(models["new"])).number))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    state = read(deployment)
    assert sorted(found) == [2, 3, 4, 5] == sorted(state.versions)[1:] and len(state.history) == 5
    assert all((deployment / v.folder / "config.json").is_file() for v in state.versions.values())
    assert not (deployment / "versions" / "2" / "half").exists()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"format": 1', "Expecting"),
        ('{"format": 2}', "format 2, expected 1"),
        ('{"format": 1, "served": [1], "history": []}', "'versions' is missing"),
        ('{"format": 1, "served": [7], "versions": {}, "history": []}', "version 7 is served and not listed"),
        ('{"format": 1, "served": [], "versions": {}, "history": []}', "no version is served"),
        ("[]", "list indices"),
    ],
)
def test_a_damaged_state_is_one_sentence(deployment: Path, text: str, why: str) -> None:
    (deployment / "deployment.json").write_text(text)
    for words in (["status"], ["roll-back"], ["roll-out", "1"]):
        with pytest.raises(UserError, match=rf"deployment.json is damaged \({why}.*\), expected the file that"):
            main([words[0], str(deployment), *words[1:]])
    assert (deployment / "deployment.json").read_text() == text


def test_wrong_commands(deployment: Path, models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exists, expected a new or empty folder"):
        main(["init", str(deployment), "--model", str(models["new"])])
    with pytest.raises(UserError, match="is not a deployment, expected a folder that `fastgpt deploy init` made"):
        main(["roll-back", str(tmp_path)])
    assert not os.path.exists(tmp_path / ".lock")
    with pytest.raises(UserError, match="is not a folder"):
        main(["propose", str(deployment), str(tmp_path / "none")])
    assert list(read(deployment).versions) == [1]
