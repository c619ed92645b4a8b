"""Models by name: import and --push against a hub on this machine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fake_hub import COMMITS, Hub
from hf_models import make
from safetensors.torch import load_file

from fastgpt.convert import exporting, importing
from fastgpt.core.command import run_command
from fastgpt.core.errors import UserError
from fastgpt.training import checkpoint

transformers = pytest.importorskip("transformers")
hub_constants = pytest.importorskip("huggingface_hub.constants")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make("gpt2").save_pretrained(folder)
    return folder


@pytest.fixture
def hub(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with someone/tiny at two revisions, to which huggingface_hub talks."""
    hub = Hub()
    hub.add("someone/tiny", model)
    hub.add("someone/tiny", model, "v1")
    with hub.reached(monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        yield hub


def test_a_model_comes_by_name_at_one_commit(hub: Hub, model: Path) -> None:
    for revision in (COMMITS["v1"], "v1", "main"):
        out = f"run-{revision[:4]}"
        assert importing.main(["someone/tiny", out, "--revision", revision]) == 0
        source = checkpoint.read_state(checkpoint.find(out))["source"]
        assert (source["name"], source["revision"]) == ("someone/tiny", COMMITS.get(revision, revision))
        assert source["config"]["model_type"] == "gpt2"
    hub.requests.clear()
    with pytest.raises(UserError, match="run-v1 exists"):  # before anything is downloaded
        importing.main(["someone/tiny", "run-v1"])
    assert not hub.requests


def test_a_download_that_was_cut_resumes(hub: Hub) -> None:
    hub.cut["model.safetensors"] = 0.5
    assert importing.main(["someone/tiny", "run"]) == 0
    assert hub.ranges == ["bytes=49152-"]  # three whole chunks of the half that came


def fetched(hub: Hub) -> set[str]:
    """Return the names of the files that were asked for."""
    return {request.rpartition("/")[2] for request in hub.requests if request.startswith("GET /someone/tiny/resolve")}


def test_a_second_import_downloads_only_what_is_missing(hub: Hub) -> None:
    hub.failing.add("model.safetensors")
    with pytest.raises(UserError, match="the hub failed .HfHubHTTPError"):
        importing.main(["someone/tiny", "run"])
    assert not Path("run").exists()
    first = fetched(hub)
    hub.failing.clear()
    hub.requests.clear()
    assert importing.main(["someone/tiny", "run"]) == 0
    # threads download the files, so one may not have begun when another failed
    assert fetched(hub) & first == {"model.safetensors"} and "config.json" in fetched(hub) | first


def test_copies_of_the_weights_are_left_and_old_ones_are_read(hub: Hub, model: Path, tmp_path: Path) -> None:
    files = hub.repos["someone/tiny"][COMMITS["main"]]
    files |= {"consolidated.safetensors": b"a copy", "model.fp16.safetensors": b"a copy", "pytorch_model.bin": b"too"}
    assert importing.main(["someone/tiny", "run"]) == 0
    assert not [
        request for request in hub.requests if "consolidated" in request or "fp16" in request or ".bin" in request
    ]
    (tmp_path / "old").mkdir()
    torch.save(load_file(model / "model.safetensors"), tmp_path / "old" / "pytorch_model.bin")
    (tmp_path / "old" / "config.json").write_bytes((model / "config.json").read_bytes())
    hub.add("someone/old", tmp_path / "old")
    assert importing.main(["someone/old", "old-run"]) == 0
    sums = [(checkpoint.find(run) / checkpoint.MODEL).read_bytes() for run in ("run", "old-run")]
    assert sums[0] == sums[1]


def test_what_the_hub_refuses_is_one_sentence(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    hub.repos["someone/gated"] = {}
    hub.gated.add("someone/gated")
    cases = [
        (["someone/none"], "the hub has no model of this name; if it is private, log in with `hf auth login`"),
        (["someone/gated"], "accept its terms at huggingface.co/someone/gated, then log in with `hf auth login`"),
        (["someone/tiny", "--revision", "v9"], "the hub has no revision 'v9' of it"),
        (["not a name"], "the hub failed (HFValidationError"),
    ]
    for argv, message in [*cases, (["someone/other"], "is not a folder, and the hub cannot be reached")]:
        if argv == ["someone/other"]:
            monkeypatch.setattr(hub_constants, "ENDPOINT", "http://127.0.0.1:9")
        assert run_command(lambda argv=argv: importing.main([argv[0], "out", *argv[1:]])) == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1, said
    assert not Path("out").exists()


def test_an_export_is_pushed_as_a_private_model(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    importing.main(["someone/tiny", "run"])
    assert exporting.main(["run", "--out", "out", "--push", "someone/new"]) == 0
    assert f"/someone/new/commit/{COMMITS['main']}" in capsys.readouterr().out
    assert hub.private == {"someone/new": True}
    assert hub.uploaded["someone/new"] == {p.name: p.read_bytes() for p in Path("out").iterdir()}
    assert json.loads(hub.uploaded["someone/new"]["config.json"])["model_type"] == "gpt2"
    card = hub.uploaded["someone/new"]["README.md"].decode()
    assert f"someone/tiny (revision {COMMITS['main']})" in card
    hub.repos["someone/new"] = {COMMITS["main"]: hub.uploaded["someone/new"]}
    assert importing.main(["someone/new", "again"]) == 0
    monkeypatch.setattr(hub_constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        UserError, match="someone/new was not uploaded, because the hub cannot be reached; b is complete"
    ):
        exporting.main(["run", "--out", "b", "--push", "someone/new"])
    assert transformers.AutoModelForCausalLM.from_pretrained("b").config.model_type == "gpt2"
