"""Ids and labels equal those of TRL's SFTTrainer where it trains on what the model sees at inference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from chat_rows import MARKED, TURNS, chat_tokenizer, write_rows

from fastgpt.data import IGNORE
from fastgpt.finetune.examples import Rows, load_examples
from fastgpt.inference.chat import Template

trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")


def theirs(rows: list[dict[str, Any]], folder: Path, **options: Any) -> list[tuple[list[int], list[int]]]:
    """Return the ids and the labels that TRL makes of rows."""
    chat_tokenizer().save(folder / "tokenizer.json")
    processing = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    processing.chat_template = MARKED
    config = transformers.GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=300)
    args = trl.SFTConfig(
        str(folder / "out"), bf16=False, use_cpu=True, report_to=[], gradient_checkpointing=False, **options
    )
    model, data = transformers.GPT2LMHeadModel(config), datasets.Dataset.from_list(rows)
    made = trl.SFTTrainer(model, args, train_dataset=data, processing_class=processing).train_dataset
    return [(row["input_ids"], row["labels"]) for row in made]


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        ([{"text": "the cat sat"}, {"text": "on<|endoftext|>"}], {}),
        ([{"prompt": "a: the cat", "completion": " sat on"}, {"prompt": "a:\n", "completion": "the"}], {}),
        ([{"prompt": "a:", "completion": " the"}], {"completion_only_loss": False}),
        ([{"messages": TURNS}, {"messages": TURNS[1:3]}], {"assistant_only_loss": True}),
        # without this option TRL also learns the line end behind the end mark, which nothing ever generates
        ([{"prompt": TURNS[:4], "completion": TURNS[4:]}], {"assistant_only_loss": True}),
    ],
)
def test_ids_and_labels_equal_trl(rows: list[dict[str, Any]], options: dict[str, Any], tmp_path: Path) -> None:
    rows_as = Rows(loss="all" if options.get("completion_only_loss") is False else "completions")
    path = write_rows(tmp_path / "rows.jsonl", *rows)
    loaded = load_examples(path, chat_tokenizer(), Template(MARKED, "x"), 1000, rows_as)
    for example, (ids, labels) in zip(loaded.items, theirs(rows, tmp_path, **options), strict=True):
        assert example.ids.tolist() == ids
        ours = [int(i) if learned else IGNORE for i, learned in zip(example.ids, example.learned)]
        assert ours[1:] == labels[1:]  # the first label is never used
