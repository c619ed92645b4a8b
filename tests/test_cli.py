"""The console commands: sample, doctor, parity, and how errors reach a person."""

from pathlib import Path

import pytest

from fastgpt import cli, train
from fastgpt.core import native
from fastgpt.core.backend import ops as registry
from fastgpt.core.errors import UserError

SMALL = (
    "--model.n-layers 1 --model.n-heads 2 --model.width 16 --block-size 16 --micro-batch 2 --batch-tokens 32 "
    "--max-minutes null --max-steps 2 --warmup-steps 1 --vocab-size 300 --sample-tokens 4 --device cpu --out run"
).split()


def run(monkeypatch: pytest.MonkeyPatch, *argv: str) -> int:
    monkeypatch.setattr("sys.argv", ["fastgpt", *argv])
    return cli.main()


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(Path(train.__file__).read_text())
    assert run(monkeypatch, "train", *SMALL, "--data", "text.txt") == 0
    return tmp_path / "run"


def test_sample_continues_the_prompt(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    texts = []
    for seed in ("1", "1", "2"):
        assert run(monkeypatch, "sample", "--run", "run", "--prompt", "import ", "--tokens", "12", "--seed", seed) == 0
        texts.append(capsys.readouterr().out)
    assert all(t.startswith("import ") for t in texts) and texts[0] == texts[1] != texts[2]


def test_sample_refuses_a_foreign_tokenizer_and_missing_runs(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = trained / "tokenizer.json"
    file.write_text(file.read_text().replace("<|endoftext|>", "<|endoftexd|>"))
    assert run(monkeypatch, "sample", "--run", "run") == 2
    assert "tokenizer" in capsys.readouterr().err
    file.unlink()
    assert run(monkeypatch, "sample", "--run", "run") == 2
    assert "tokenizer.json" in capsys.readouterr().err
    assert run(monkeypatch, "sample", "--run", "nowhere") == 2
    assert "nowhere is neither a checkpoint nor a run folder" in capsys.readouterr().err
    assert run(monkeypatch, "sample", "--run", "run", "--prompt", "") == 2
    assert run(monkeypatch, "sample", "--tokens", "many") == 2


def test_doctor_names_every_op_and_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "doctor") == 0
    out = capsys.readouterr().out
    assert all(op in out for op in registry()) and "torch" in out
    for backend, built in native.BUILT.items():
        assert built or native.reason(backend) in out


def test_unknown_commands_and_user_errors_exit_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for argv in (["trian"], [], ["train", "--lrr", "1"], ["train", "--lr", "fast"]):
        assert run(monkeypatch, *argv) == 2
        err = capsys.readouterr().err
        assert err.startswith("fastgpt: error: ") and len(err.splitlines()) == 1 and "Traceback" not in err

    def fails() -> int:
        raise UserError("what, where, expected")

    def interrupted() -> int:
        raise KeyboardInterrupt

    assert cli.run_command(fails) == 2 and cli.run_command(interrupted) == 130
