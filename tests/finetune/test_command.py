"""`fastgpt finetune` from files to files: every task, stopped and resumed, and what is refused before training."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_hub import COMMITS, Hub
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PhiConfig,
    PhiForCausalLM,
)

from fastgpt import train
from fastgpt.core.errors import UserError
from fastgpt.core.tensorfile import load_file, read_metadata, save_file
from fastgpt.finetune import base as finetune_base
from fastgpt.finetune import exporting
from fastgpt.finetune.command import main
from fastgpt.finetune.heads import HeadConfig, attach, sequence_scores, token_scores
from fastgpt.models.config import model_from_dict
from fastgpt.models.gpt import GPT
from fastgpt.models.weights.fingerprint import fingerprint
from fastgpt.models.weights.peft import BASE as BASE_HASH
from fastgpt.models.weights.peft import FILE as ADAPTER
from fastgpt.training import checkpoint
from fastgpt.training.load import load_run

BASE = (
    "--vocab-size 300 --model.n-layers 2 --model.n-heads 2 --model.width 32 --block-size 48 --micro-batch 2 "
    "--batch-tokens 96 --max-steps 2 --max-minutes null --eval-every 0 --save-every 0 --sample-tokens 1 --device cpu"
).split()
FAST = "--block-size 48 --micro-batch 2 --batch 4 --max-steps 4 --eval-every 2 --eval-batches 1 --device cpu".split()


REWARD = """\
def digits(completions, sum, **columns):
    assert all(0 <= n <= 18 for n in sum)
    return [len(text) / 10 for text in completions]
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a base and the rows of every kind: sums of two digits."""
    folder, draw = tmp_path_factory.mktemp("finetune"), random.Random(0)
    sums = [(f"What is {a} plus {b}?", a + b) for a, b in ((draw.randint(0, 9), draw.randint(0, 9)) for _ in range(40))]
    makers: dict[str, Any] = {
        "sft": lambda q, n: {"prompt": q, "completion": f" {n}"},
        "prompts": lambda q, n: {"prompt": q, "sum": n},
        "chat": lambda q, n: {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": f"{n}"}]},
        "pairs": lambda q, n: {"prompt": q, "chosen": f" {n}", "rejected": f" {n + 1}"},
        "rated": lambda q, n: {"prompt": q, "completion": f" {n}", "label": n > 9},
        "classes": lambda q, n: {"text": q, "label": "large" if n > 9 else "small"},
        "numbers": lambda q, n: {"text": q, "label": float(n)},
        "tags": lambda q, n: {"tokens": q.split(), "tags": ["number" if w[0].isdigit() else "word" for w in q.split()]},
    }
    for name, make in makers.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(make(*s)) + "\n" for s in sums))
    (folder / "reward.py").write_text(REWARD)
    (folder / "terms.txt").write_text("plus, and")
    (folder / "text.txt").write_text("\n".join(f"{q} {n}" for q, n in sums) * 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert train.main([*BASE, "--data", "text.txt", "--out", "base"]) == 0
    return folder


@pytest.fixture(autouse=True)
def here(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(files)


def go(task: str, data: str, out: Path, *more: str) -> list[dict[str, Any]]:
    """Run a task; return the rows of its log."""
    arguments = ["--task", task, "--base", "base", "--data", data, "--out", str(out), *FAST, *more]
    assert main(arguments) == 0
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


GRPO = ("--reward", "[reward.py:digits]", "--max-new-tokens", "3", "--group", "2", "--lr", "1e-3")
MOVED = "c" * 40  # a commit of the hub, after main has moved
CASES = {
    "sft": ("sft", "sft.jsonl", ()),
    "conversations, adapters": ("sft", "chat.jsonl", ("--lora.rank", "2", "--lora.dropout", "0.1")),
    "replay, dropout": ("sft", "sft.jsonl", ("--replay", "text.txt", "--dropout", "0.1")),
    "two files": ("sft", "{sft.jsonl: 3, chat.jsonl: 1}", ("--layer-decay", "0.5", "--freeze-first", "1")),
    "augmented": ("sft", "sft.jsonl", ("--augment", "[{swap: terms.txt, share: 0.5}]")),
    "dpo": ("dpo", "pairs.jsonl", ()),
    "kto, base in 8 bits": ("kto", "rated.jsonl", ("--lora.rank", "2", "--quantise", "int8")),
    "orpo": ("orpo", "pairs.jsonl", ()),
    "reward": ("reward", "pairs.jsonl", ()),
    "classify": ("classify", "classes.jsonl", ("--class-weights", "balanced", "--lora.rank", "2")),
    "regress": ("regress", "numbers.jsonl", ("--pooling", "mean")),
    "tag": ("tag", "tags.jsonl", ()),
    "distil": ("distil", "sft.jsonl", ("--teacher", "base")),
    "distil, cached": ("distil", "sft.jsonl", ("--teacher", "base", "--teacher-top-k", "8", "--packing", "none")),
    "distil, sequences": (
        "distil",
        "sft.jsonl",
        ("--teacher", "base", "--level", "sequence", "--max-new-tokens", "4", "--lora.rank", "2"),
    ),
    "grpo": ("grpo", "prompts.jsonl", (*GRPO, "--iterations", "2", "--beta", "0.1", "--lora.rank", "2")),
}


@pytest.mark.parametrize("name", CASES)
def test_a_resumed_run_is_the_uninterrupted_one(name: str, tmp_path: Path) -> None:
    task, data, more = CASES[name]
    whole = go(task, data, tmp_path / "whole", *more)
    go(task, data, tmp_path / "cut", *more, "--save-every", "2")
    for path in checkpoint.checkpoints(tmp_path / "cut")[1:]:
        path.rename(tmp_path / path.name)  # as if it was killed after step 2
    again = go(task, data, tmp_path / "cut", *more, "--save-every", "2")

    def losses(rows: list[dict[str, Any]]) -> list[tuple[int, Any, Any]]:
        return [(r["step"], r.get("loss"), r.get("val_loss")) for r in rows if "loss" in r or "val_loss" in r]

    assert losses(again) == losses(whole) and len(losses(whole)) == 6
    a, b = (checkpoint.find(tmp_path / run) for run in ("whole", "cut"))
    a, b = (checkpoint.read_tensors(p, checkpoint.MODEL, checkpoint.read_state(p)) for p in (a, b))
    assert all(torch.equal(t, b[name]) for name, t in a.items()) and a.keys() == b.keys()


def test_a_cache_stands_for_the_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all tokens in it, its losses are the teacher's; a second run reads the file and loads no teacher."""
    more = ("--teacher", "base", "--temperature", "2", "--divergence", "jsd", "--max-steps", "6", "--lr", "0.01")
    size = load_run("base", torch.device("cpu"))[0].vocab_size
    expected = go("distil", "sft.jsonl", tmp_path / "whole", *more)
    found = go("distil", "sft.jsonl", tmp_path / "cached", *more, "--teacher-top-k", str(size))
    for row, wanted in zip(found, expected, strict=True):
        figures = [name for name in row if name in ("loss", "divergence") or name.startswith("val_")]
        assert [row[name] for name in figures] == pytest.approx([wanted[name] for name in figures], 1e-4, 1e-8)
    assert found[4]["divergence"] > 1e-4
    assert len(list((tmp_path / "cached").glob("teacher-*.safetensors"))) == 1
    monkeypatch.setattr(finetune_base, "GPTTeacher", None)
    go("distil", "sft.jsonl", tmp_path / "cached", *more, "--teacher-top-k", str(size), "--max-steps", "8")
    with pytest.raises(TypeError, match="not callable"):  # another file
        go("distil", "sft.jsonl", tmp_path / "cached", *more, "--teacher-top-k", str(size - 1))


def test_a_teacher_that_only_transformers_has(tmp_path: Path) -> None:
    """Its tokenizer is the base's; fastgpt has no family for it."""
    size, folder = load_run("base", torch.device("cpu"))[0].vocab_size, tmp_path / "phi"
    shape = dict(vocab_size=size, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    theirs = PhiForCausalLM(PhiConfig(**shape, max_position_embeddings=64))
    theirs.save_pretrained(folder)
    with pytest.raises(UserError, match="has another tokenizer than the base, expected the same"):
        go("distil", "sft.jsonl", tmp_path / "run", "--teacher", str(folder))
    shutil.copy("base/tokenizer.json", folder)
    more = ("--teacher", str(folder), "--hard-share", "0")
    rows = go("distil", "sft.jsonl", tmp_path / "run", *more)
    assert rows[0]["divergence"] > 1e-3 and rows[0]["loss"] == rows[0]["divergence"]
    found = go("distil", "sft.jsonl", tmp_path / "cached", *more, "--teacher-top-k", str(size))
    assert [row["loss"] for row in found if "loss" in row] == pytest.approx(
        [r["loss"] for r in rows if "loss" in r], 1e-4
    )
    with pytest.raises(UserError, match="teacher: fastgpt cannot generate with .*phi, expected level token"):
        go("distil", "sft.jsonl", tmp_path / "no", *more[:2], "--level", "sequence", "--max-new-tokens", "4")
    (folder / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match="teacher: .*phi"):
        go("distil", "sft.jsonl", tmp_path / "no", *more)


def test_dpo_begins_with_ln_2_and_kto_with_a_half(tmp_path: Path) -> None:
    first = go("dpo", "pairs.jsonl", tmp_path / "dpo")[0]
    assert first["loss"] == pytest.approx(0.6931472, abs=1e-6) and first["margin"] == pytest.approx(0, abs=1e-5)
    assert go("kto", "rated.jsonl", tmp_path / "kto")[0]["loss"] == pytest.approx(0.5, abs=1e-6)


def test_adapters_and_the_merged_run_are_one_model(tmp_path: Path) -> None:
    """Compare the logits of the adapters under PEFT, on the exported base, with those of the merged run."""
    go("sft", "sft.jsonl", tmp_path / "run", "--lora.rank", "2", "--lr", "0.05")
    assert exporting.main(["base", "--format", "hf", "--out", str(tmp_path / "hf")]) == 0
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "hf"), tmp_path / "run/adapter")
    merged, tokenizer, _ = load_run(tmp_path / "run" / "merged", torch.device("cpu"))
    ids = torch.tensor([tokenizer.encode("What is 1 plus 1?").tolist()])
    with torch.no_grad():
        found, expected = merged(ids), adapted(ids).logits
        start = load_run("base", torch.device("cpu"))[0](ids)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max() < (found - start).abs().max()
    with pytest.raises(UserError, match="holds adapters of base alone, expected a model, as in .*merged"):
        load_run(tmp_path / "run", torch.device("cpu"))


def test_a_classifier_is_written_for_transformers(tmp_path: Path) -> None:
    go("classify", "classes.jsonl", tmp_path / "run")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model")
    assert model.config.id2label == {0: "large", 1: "small"}
    with pytest.raises(UserError, match="has a head for classification, expected a language model"):
        load_run(tmp_path / "run", torch.device("cpu"))


def test_patience_watches_a_metric_of_the_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With lr near 0 the accuracy never rises after the first validation."""
    more = ("--patience", "2", "--metric", "accuracy", "--max-steps", "20", "--lr", "1e-12", "--save-every", "0")
    go("classify", "classes.jsonl", tmp_path / "run", *more)
    assert re.search(r"stopping: 2 validations without a better accuracy than \S+ at step 2", capsys.readouterr().out)
    assert [p.name for p in checkpoint.checkpoints(tmp_path / "run")] == ["step_00000002", "step_00000006"]


HEADED = {"classify": "classes", "regress": "numbers", "reward": "pairs", "tag": "tags"}


@pytest.mark.parametrize("task", HEADED)
def test_a_run_with_a_head_is_exported_for_transformers(task: str, tmp_path: Path) -> None:
    """Compare the logits of transformers, texts padded, with those of the checkpoint, texts packed."""
    go(task, f"{HEADED[task]}.jsonl", tmp_path / "run", "--max-steps", "1", "--lr", "0.01")
    out = tmp_path / "out"
    assert exporting.main([str(tmp_path / "run"), "--out", str(out)]) == 0
    path = checkpoint.find(tmp_path / "run")
    state = checkpoint.read_state(path)
    model, head = GPT(model_from_dict(state["model"])).eval(), HeadConfig.from_dict(state["head"])
    attach(model, head)
    model.load_state_dict(checkpoint.read_tensors(path, checkpoint.MODEL, state))
    kind = AutoModelForTokenClassification if task == "tag" else AutoModelForSequenceClassification
    given = AutoTokenizer.from_pretrained(out)(["What is 1?", "What is 1 plus 17?"], return_tensors="pt", padding=True)
    with torch.no_grad():
        theirs, kept = kind.from_pretrained(out)(**given).logits, given["attention_mask"].bool()
        if task == "tag":
            ours, theirs = token_scores(model, given["input_ids"])[kept], theirs[kept]
        else:
            numbers = torch.where(kept, torch.tensor([[0], [1]]), -1)
            ours = sequence_scores(model, head, given["input_ids"], numbers, 2)
    assert ours.shape == theirs.shape and (ours - theirs).norm() < 1e-5 * theirs.norm()
    assert (theirs[0] - theirs[1]).norm() > 1e-3 * theirs.norm(), "the texts have one score"
    tag = "token-classification" if task == "tag" else "text-classification"
    assert f"pipeline_tag: {tag}\n" in (out / "README.md").read_text()
    for form in ("gguf", "llmc", "nanogpt"):
        with pytest.raises(UserError, match=f"has a head for {head.kind}, which {form} does not have; expected .* hf"):
            exporting.main([str(tmp_path / "run"), "--out", str(tmp_path / form), "--format", form])
        assert not (tmp_path / form).exists()


def test_a_run_of_adapters_is_exported_merged(tmp_path: Path) -> None:
    go("sft", "sft.jsonl", tmp_path / "run", "--lora.rank", "2", "--save-every", "2", "--lr", "0.05")
    assert exporting.main([str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    merged = load_run(tmp_path / "run" / "merged", torch.device("cpu"))[0]
    ids = torch.tensor([[5, 9, 3]])
    with torch.no_grad():
        expected = merged(ids)
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits
    assert (found - expected).norm() < 1e-5 * expected.norm()
    early = checkpoint.checkpoints(tmp_path / "run")[0]
    with pytest.raises(UserError, match="step_00000002 holds adapters of base alone, expected a model, as in .*merged"):
        exporting.main([str(early), "--out", str(tmp_path / "early")])
    go("reward", "pairs.jsonl", tmp_path / "reward", "--lora.rank", "2", "--max-steps", "1")
    with pytest.raises(UserError, match=r"holds adapters and a head alone; .*reward/model is the model for transf"):
        exporting.main([str(tmp_path / "reward"), "--out", str(tmp_path / "head")])


@pytest.fixture(scope="module")
def published(files: Path) -> Path:
    """Return a folder with the base for transformers, `main`, and another model of its shape, `v1`."""
    folder = files / "published"
    assert exporting.main([str(files / "base"), "--format", "hf", "--out", str(folder / "main")]) == 0
    shutil.copytree(folder / "main", folder / "v1")
    tensors = load_file(folder / "v1" / "model.safetensors")
    save_file({name: 0.5 * t for name, t in tensors.items()}, folder / "v1" / "model.safetensors")
    return folder


@pytest.fixture
def hub(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that has the base as someone/tiny, and another model at revision v1."""
    found = Hub()
    for revision in ("main", "v1"):
        found.add("someone/tiny", published / revision, revision)
    with found.reached(monkeypatch, tmp_path):
        yield found


def test_a_base_comes_from_the_hub_at_one_commit(hub: Hub, tmp_path: Path) -> None:
    """The run is that of the same model in a folder, and goes on from its commit when the branch has moved."""
    more = ("--lora.rank", "2", "--save-every", "2")
    local = go("sft", "sft.jsonl", tmp_path / "local", *more, "--base", "published/main")
    go("sft", "sft.jsonl", tmp_path / "run", *more, "--base", "someone/tiny")
    shutil.rmtree(checkpoint.checkpoints(tmp_path / "run")[-1])  # as if it was killed after step 2
    files = hub.repos["someone/tiny"]
    files[MOVED] = files[COMMITS["v1"]]
    with pytest.MonkeyPatch.context() as moved:
        moved.setitem(COMMITS, "main", MOVED)
        rows = go("sft", "sft.jsonl", tmp_path / "run", *more, "--base", "someone/tiny")
        assert [r["loss"] for r in rows if "loss" in r] == [r["loss"] for r in local if "loss" in r]
        with pytest.raises(
            UserError, match=f"base: someone/tiny@main is commit {MOVED}, but the run began with a{{40}}"
        ):
            go("sft", "sft.jsonl", tmp_path / "run", *more, "--base", "someone/tiny@main")
    state = checkpoint.read_state(checkpoint.find(tmp_path / "run"))
    assert state["init"] == {"name": "someone/tiny", "revision": "a" * 40}
    adapter = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == ("someone/tiny", "a" * 40)


def test_a_teacher_comes_from_the_hub_and_a_plan_downloads_no_weights(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    go("distil", "sft.jsonl", tmp_path / "run", "--teacher", "someone/tiny@v1", "--max-steps", "1")
    state = checkpoint.read_state(checkpoint.find(tmp_path / "run"))
    assert state["teacher"] == {"name": "someone/tiny", "revision": COMMITS["v1"]}
    hub.requests.clear()
    assert main(["--base", "someone/tiny", "--data", "no", "--plan", "--device", "rtx4090"]) == 0
    assert "all weights: micro-batch 4 of 48 tokens" in capsys.readouterr().out
    assert not [request for request in hub.requests if "safetensors" in request]


@pytest.mark.parametrize(
    "base, message",
    [
        ("someone/none", "base: someone/none is not a folder, and the hub has no model of this name"),
        ("someone/tiny@v9", "base: someone/tiny is not a folder, and the hub has no revision 'v9' of it"),
        ("./none", r"base: \./none is not a folder"),
    ],
)
def test_a_base_that_the_hub_lacks_is_one_sentence(base: str, message: str, hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        go("sft", "sft.jsonl", tmp_path / "run", "--base", base)


def test_what_is_written_is_the_best_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a rate that makes the loss rise, the first validation is the best."""
    more = ("--patience", "2", "--max-steps", "20", "--lr", "3", "--schedule", "constant", "--save-every", "0")
    rows = go("sft", "sft.jsonl", tmp_path / "run", *more, "--lora.rank", "2")
    validations = [(row["step"], row["val_loss"]) for row in rows if "val_loss" in row]
    best = min(validations[:-1], key=lambda v: v[1])
    path = tmp_path / "run" / f"step_{best[0]:08d}"
    said = capsys.readouterr().out
    assert best[0] < max(validations)[0] and validations[-1][0] == best[0]
    assert f"what follows is of the best checkpoint, {path}" in said
    state = checkpoint.read_state(path)
    adapters = checkpoint.read_tensors(path, checkpoint.MODEL, state)
    merged = load_run(tmp_path / "run" / "merged", torch.device("cpu"))[0].state_dict()
    start = load_run("base", torch.device("cpu"))[0].state_dict()
    a, b = (adapters[f"blocks.1.mlp.down.lora_{side}"] for side in "AB")
    torch.testing.assert_close(merged["blocks.1.mlp.down.weight"], start["blocks.1.mlp.down.weight"] + 2 * b @ a)
    assert exporting.main([str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    recorded = read_metadata(tmp_path / "run" / "adapter" / ADAPTER)
    assert recorded == {"format": "pt", BASE_HASH: fingerprint(load_run("base", torch.device("cpu"))[0])}
    with pytest.raises(UserError, match="was trained on another base"):  # the merged model has other weights
        more = ("--base", str(tmp_path / "run" / "merged"), "--adapter", str(tmp_path / "run" / "adapter"))
        go("sft", "sft.jsonl", tmp_path / "wrong", *more)
    go("sft", "sft.jsonl", tmp_path / "more", "--adapter", str(tmp_path / "run" / "adapter"), "--max-steps", "1")
    again = read_metadata(tmp_path / "more" / "adapter" / ADAPTER)
    assert again == recorded


def test_a_reward_model_rates_what_grpo_writes(tmp_path: Path) -> None:
    go("reward", "pairs.jsonl", tmp_path / "reward")
    rows = go("grpo", "prompts.jsonl", tmp_path / "run", *GRPO, "--reward", f"[{tmp_path / 'reward' / 'model'}]")
    assert all(row["reward"] not in (0.0, 0.1, 0.2, 0.3) for row in rows if "reward" in row)


def test_a_template_goes_with_the_run(tmp_path: Path) -> None:
    """That of the settings; that of the base, a checkpoint, whose template lies in the folder of its run."""
    shutil.copytree("base", tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").write_text("{% for m in messages %}<{{ m.content }}>{% endfor %}")
    base = checkpoint.find(tmp_path / "base")
    go("sft", "chat.jsonl", tmp_path / "run", "--base", str(base), "--lora.rank", "2")
    for folder in (tmp_path / "run", tmp_path / "run" / "merged"):
        assert "<{{ m.content }}>" in (folder / "chat_template.jinja").read_text()
    Path("own.jinja").write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    go("sft", "chat.jsonl", tmp_path / "own", "--base", str(base), "--template", "own.jinja", "--lora.rank", "2")
    for folder in (tmp_path / "own", tmp_path / "own" / "merged"):
        assert "[{{ m.content }}]" in (folder / "chat_template.jinja").read_text()


def test_augmented_rows_are_marked_in_the_record_of_a_run(tmp_path: Path) -> None:
    go("sft", "sft.jsonl", tmp_path / "run", "--augment", "[{name: and, swap: terms.txt}]", "--max-steps", "1")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    made = len((tmp_path / "run" / "augmented.jsonl").read_text().splitlines())
    assert f"({made} by and)" in record["data"] and made > 10
    state = checkpoint.read_state(checkpoint.find(tmp_path / "run"))
    assert state["config"]["augment"] == [{"name": "and", "swap": "terms.txt"}]
    go("sft", str(tmp_path / "run" / "augmented.jsonl"), tmp_path / "again", "--max-steps", "1")


def test_a_plan_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["--base", "base", "--data", "no", "--out", str(tmp_path / "run"), "--plan", "--device", "rtx4090"]) == 0
    )
    said = capsys.readouterr().out
    assert "all weights: micro-batch 4 of 48 tokens" in said and "base in nf4: micro-batch 64" in said
    assert not (tmp_path / "run").exists()


REFUSED = {
    "--task dpo --data pairs.jsonl --dropout 0.1": "dropout is 0.1, but it has no effect here",
    "--data sft.jsonl --beta 0.2": "beta is 0.2, but it has no effect here: it only applies with task dpo, kto, orpo",
    "--data sft.jsonl --lora.rank 2 --freeze-first 1": "freeze_first is 1, but it has no effect here",
    "--data sft.jsonl --batch 3": "batch is 3, expected a multiple of micro_batch, 2",
    "--data sft.jsonl --quantise int8": "quantise is 'int8', expected none, or lora.rank above 0",
    "--data sft.jsonl --block-size 49": "block_size is 49, expected at most 48, the positions of the base",
    "--data sft.jsonl --val-fraction 0": "val_fraction is 0, expected at least 2 examples and more than 0",
    "--data sft.jsonl --template no.jinja": "template: no.jinja cannot be read",
    "--data sft.jsonl --adapter base": "adapter",
    "--data nothing.jsonl": "nothing.jsonl",
    "--data sft.jsonl --metric accuracy": "metric is 'accuracy', but it has no effect here: .* patience above 0",
    "--data sft.jsonl --metric accuracy --patience 1": "metric is 'accuracy', expected a figure of the .*: val_loss",
    "--task dpo --data sft.jsonl": "sft.jsonl",
    "--task classify --data classes.jsonl --labels [a,b]": "the label '.*' is unknown, expected one of a, b",
    "--task grpo --data prompts.jsonl": "reward is .., expected at least one FILE.py:FUNCTION",
    "--task grpo --data prompts.jsonl --reward [reward.py:digits]": "max_new_tokens is 64, expected less than .* 48",
    "--task grpo --data prompts.jsonl --reward [reward.py:no] --max-new-tokens 3": "reward.py has no function 'no'",
    "--task grpo --data sft.jsonl --reward [reward.py:digits] --loss-type ipo": "loss_type is 'ipo', expected one of",
    "--task distil --teacher base --data sft.jsonl --temperature 0": "temperature is 0.0, expected more than 0",
    "--task distil --teacher base --data sft.jsonl --teacher-top-k 301": "teacher_top_k is 301, expected at most",
    "--task distil --teacher base --data sft.jsonl --max-new-tokens 3": "max_new_tokens is 3, but it has no effect",
    **{
        f"--task distil --teacher base --data sft.jsonl --level sequence {option}": message
        for option, message in {
            "--hard-share 0.1": "hard_share is 0.1, but it has no effect here: .* task distil with level token",
            "--divergence jsd": "divergence is 'jsd', but it has no effect here",
            "--learn all": "learn is 'all', but it has no effect here",
            "--max-new-tokens 48": "max_new_tokens is 48, expected less than block_size, 48",
            "--max-new-tokens 4 --data classes.jsonl": "the field 'prompt' is None, expected a text or messages",
        }.items()
    },
    "--level sequence --data sft.jsonl": "level is 'sequence', but it has no effect here: .* task distil",
    "--task distil --data sft.jsonl": "teacher is '', expected the model to learn from",
}


@pytest.mark.parametrize("options", REFUSED)
def test_what_does_not_fit_is_one_sentence_before_training(options: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=REFUSED[options]) as raised:
        main(["--base", "base", "--out", str(tmp_path / "run"), *FAST, *options.split()])
    assert "\n" not in str(raised.value) and not (tmp_path / "run").exists()


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    model, _, path = load_run("base", torch.device("cpu"))
    state = checkpoint.read_state(path)
    with torch.no_grad():
        model.wte.weight[3, 5] = torch.nan
    plain = {key: state[key] for key in ("progress", "config", "model", "loader", "tokenizer")}
    checkpoint.save(
        tmp_path / "base", 1, model.state_dict(), {}, plain | {"source": {"name": "b", "revision": None}}, 0
    )
    (tmp_path / "base" / "tokenizer.json").write_bytes(Path("base/tokenizer.json").read_bytes())
    with pytest.raises(UserError, match="b: wte.weight has values that are not finite, expected numbers"):
        main(["--base", str(tmp_path / "base"), "--data", "sft.jsonl", "--out", str(tmp_path / "run"), *FAST])
