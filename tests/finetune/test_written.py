"""Sequence-level distillation: what a teacher writes, what a student learns, and what an interrupted run repeats."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from fastgpt import train
from fastgpt.core.errors import UserError
from fastgpt.finetune import written
from fastgpt.finetune.command import main
from fastgpt.inference import Generator

BASE = (
    "--vocab-size 300 --model.n-layers 2 --model.n-heads 2 --model.width 32 --block-size 48 --micro-batch 2 "
    "--batch-tokens 96 --max-steps 2 --max-minutes null --eval-every 0 --save-every 0 --sample-tokens 1 --device cpu"
).split()
FAST = "--block-size 48 --micro-batch 4 --batch 16 --eval-every 0 --save-every 0 --device cpu".split()
DISTIL = "--task distil --level sequence --base base --teacher teacher --data rows.jsonl --max-new-tokens 6".split()
FILE = Path("run/teacher-0.jsonl")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a base, and a teacher that answers " yes" and ends."""
    folder = tmp_path_factory.mktemp("written")
    rows = [{"prompt": f"Is {a} more than {b}?", "completion": " yes"} for a in range(8) for b in range(5)]
    chats = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]
    for name, lines in {"rows": rows, "chats": chats}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "text.txt").write_text("\n".join(row["prompt"] for row in rows) * 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert train.main([*BASE, "--data", "text.txt", "--out", "base"]) == 0
        sft = "--base base --data rows.jsonl --out teacher --max-steps 40 --lr 0.02".split()
        assert main([*sft, *FAST]) == 0
    return folder


@pytest.fixture(autouse=True)
def here(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in files.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)


def go(*more: str, out: str = "run") -> list[float]:
    """Run; return the losses of the steps."""
    assert main([*DISTIL, *FAST, "--max-steps", "4", "--out", out, *more]) == 0
    rows = map(json.loads, (Path(out) / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


def lines() -> list[dict[str, Any]]:
    return [json.loads(line) for line in FILE.read_text().splitlines()]


def test_a_student_learns_what_the_teacher_writes_as_sft_does(capsys: pytest.CaptureFixture[str]) -> None:
    losses = go("--temperature", "0")
    header, *rows = lines()
    assert header["teacher"] == {"name": "teacher", "revision": "step 40"} and len(rows) == 40
    assert all(row["ended"] and row["completion"] == " yes" for row in rows)
    assert "[[ yes<|endoftext|>]]" in capsys.readouterr().out
    sft = [*"--task sft --base base --data rows.jsonl --max-steps 4 --out sft".split(), *FAST]
    assert main(sft) == 0  # the data's completions are what the teacher writes
    expected = [json.loads(line) for line in Path("sft/metrics.jsonl").read_text().splitlines()]
    assert losses == [row["loss"] for row in expected if "loss" in row]


def test_an_interrupted_run_writes_only_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    losses, whole = go("--temperature", "2"), FILE.read_bytes()
    asked: list[int] = []
    generate = Generator.generate

    def counted(self: Generator, requests: Any) -> Any:
        asked.append(len(requests))
        return generate(self, requests)

    monkeypatch.setattr(Generator, "generate", counted)
    monkeypatch.setattr(written, "CHUNK", 16)
    cut = b"".join(whole.splitlines(keepends=True)[:13])
    Path("again").mkdir()
    (Path("again") / FILE.name).write_bytes(cut + b'{"prompt": "Is 2 mo')  # killed while it wrote a line
    assert go("--temperature", "2", out="again") == losses
    assert asked == [16, 12] and (Path("again") / FILE.name).read_bytes() == whole
    go("--temperature", "2", "--max-steps", "6")
    assert asked == [16, 12], "all completions were there"


def test_prompts_of_messages_and_validation_data() -> None:
    go("--data", "{chats.jsonl: 1, rows.jsonl: 1}", "--val-data", "chats.jsonl", "--temperature", "0")
    assert sorted(path.name for path in Path("run").glob("teacher-*")) == [f"teacher-{i}.jsonl" for i in range(3)]
    rows = [json.loads(line) for line in Path("run/teacher-2.jsonl").read_text().splitlines()]
    assert all("Is " in row["prompt"] and row["ids"] for row in rows[1:])


def test_a_completion_that_does_not_end_teaches_no_end(capsys: pytest.CaptureFixture[str]) -> None:
    go("--max-new-tokens", "1", "--temperature", "0")
    said = capsys.readouterr().out
    assert "run/teacher-0.jsonl: 40 completions of the teacher, 0 ended within 1 tokens" in said
    shown = re.search(r"\[\[(.+)\]\]", said)
    assert shown is not None and " yes".startswith(shown[1])


@pytest.mark.parametrize(
    "more, message",
    [
        ("--temperature 0.5", "teacher-0.jsonl has completions for temperature 1.0, not 0.5; choose another --out"),
        ("--data chats.jsonl", "teacher-0.jsonl has completions for other prompts; choose another --out"),
        ("--teacher base", "teacher-0.jsonl has completions for teacher {'name': 'teacher'.*'base'"),
    ],
)
def test_completions_of_other_settings_are_refused(more: str, message: str) -> None:
    go("--max-steps", "1")
    with pytest.raises(UserError, match=message):
        go(*more.split())


def test_a_damaged_file_is_one_sentence() -> None:
    go("--max-steps", "1")
    FILE.write_bytes(FILE.read_bytes().replace(b'"ids"', b'"isd"'))
    with pytest.raises(UserError, match="teacher-0.jsonl is damaged .*, expected completions of a teacher; delete it"):
        go()
