"""Small files of the benchmarks in the schemas of the official downloads and of the hub's copies, same rows in both."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

WORDS = "a the cat dog tree house runs sees red old big under over stone river with and then slowly café".split()
SUBJECTS = ("abstract_algebra", "anatomy", "world_religions")
PARADIGMS = ("adjunct_island", "wh_island")


class Texts:
    """Random sentences; the seed decides them."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def __call__(self, least: int = 2, most: int = 6) -> str:
        return " ".join(self.random.choices(WORDS, k=self.random.randint(least, most)))

    def pick(self, n: int) -> int:
        return self.random.randrange(n)


def jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow
    from pyarrow import parquet as files

    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_table(pyarrow.Table.from_pylist(rows), path)


def labels(path: Path, values: list[Any]) -> None:
    path.write_text("".join(f"{value}\n" for value in values), encoding="utf-8")


def hellaswag(data: Path, hub: bool, n: int) -> None:
    for split, seed, size in (("val", 1, n), ("train", 2, 14)):
        t, rows = Texts(seed), []
        for i in range(size):
            row = {"ind": i, "activity_label": t(1, 2), "ctx_a": t(), "ctx_b": t(1, 2), "ctx": "", "label": t.pick(4)}
            rows.append(row | {"endings": [t() for _ in range(4)], "split_type": "indomain", "source_id": str(i)})
        if hub:
            name = {"val": "validation", "train": "train"}[split]
            parquet(
                data / "hellaswag" / "data" / f"{name}-00000-of-00001.parquet",
                [row | {"label": str(row["label"])} for row in rows],
            )
        else:
            jsonl(data / f"hellaswag_{split}.jsonl", rows)


def winogrande(data: Path, hub: bool, n: int) -> None:
    for split, seed, size in (("dev", 3, n), ("train_xl", 4, 8)):
        t, rows = Texts(seed), []
        for _ in range(size):
            one, other = t.random.sample(WORDS, 2)
            answer = str(1 + t.pick(2))
            rows.append({"sentence": f"{t()} _ {t()}", "option1": one, "option2": other, "answer": answer})
        if hub:
            name = {"dev": "validation", "train_xl": "train"}[split]
            parquet(data / "winogrande" / "winogrande_xl" / f"{name}-00000-of-00001.parquet", rows)
            parquet(data / "winogrande" / "winogrande_s" / f"{name}-00000-of-00001.parquet", rows[:1])
        elif split == "dev":
            jsonl(data / "winogrande_1.1" / "dev.jsonl", [{k: v for k, v in r.items() if k != "answer"} for r in rows])
            labels(data / "winogrande_1.1" / "dev-labels.lst", [row["answer"] for row in rows])
        else:
            jsonl(data / "winogrande_1.1" / "train_xl.jsonl", rows)


def mmlu(data: Path, hub: bool, n: int) -> None:
    for number, subject in enumerate(SUBJECTS):
        for split, size in (("test", n + number % 3), ("dev", 5)):
            t, rows = Texts(10 * number + size), []
            for _ in range(size):
                rows.append({"question": t(), "choices": [t(1, 2) for _ in range(4)], "answer": t.pick(4)})
            if hub:
                path = data / "mmlu" / subject / f"{split}-00000-of-00001.parquet"
                parquet(path, [row | {"subject": subject} for row in rows])
                continue
            path = data / "mmlu" / "data" / split / f"{subject}_{split}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = [",".join([r["question"], *r["choices"], "ABCD"[r["answer"]]]) for r in rows]
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")

    if not hub:  # training questions of other kinds, whose names look like those of a subject
        (data / "mmlu" / "data" / "auxiliary_train").mkdir()
        (data / "mmlu" / "data" / "auxiliary_train" / "mc_test.csv").write_text("a,b,c,d,e,A\n", encoding="utf-8")


def lambada(data: Path, hub: bool, n: int) -> None:
    t = Texts(5)
    rows = [{"text": t(6, 12)} for _ in range(n)]
    if hub:
        parquet(data / "lambada" / "test-00000-of-00001.parquet", rows)
    else:
        jsonl(data / "lambada_test.jsonl", rows)


def questions(data: Path, hub: bool, n: int) -> None:
    """Write ARC and OpenBookQA, which have the same form; two ARC questions have 3 choices and digits as labels."""
    for name, seed in (("ARC-Easy", 6), ("ARC-Challenge", 7), ("openbookqa", 8)):
        t, official, flat = Texts(seed), [], []
        for i in range(n):
            names = ["1", "2", "3"] if i < 2 and name != "openbookqa" else list("ABCD")
            stem, texts, key = t(), [t(1, 3) for _ in names], names[t.pick(len(names))]
            choices = [{"text": text, "label": label} for text, label in zip(texts, names, strict=True)]
            official.append({"id": str(i), "question": {"stem": stem, "choices": choices}, "answerKey": key})
            stem_key = "question_stem" if name == "openbookqa" else "question"
            flat.append({"id": str(i), stem_key: stem, "choices": {"text": texts, "label": names}, "answerKey": key})
        if hub:
            folder = data / ("openbookqa/main" if name == "openbookqa" else f"arc/{name}")
            parquet(folder / "test-00000-of-00001.parquet", flat)
        elif name == "openbookqa":
            jsonl(data / "OpenBookQA-V1-Sep2018" / "Data" / "Main" / "test.jsonl", official)
        else:
            jsonl(data / "ARC-V1-Feb2018-2" / name / f"{name}-Test.jsonl", official)


def piqa(data: Path, hub: bool, n: int) -> None:
    t = Texts(9)
    rows = [{"goal": t(), "sol1": t(), "sol2": t(), "label": t.pick(2)} for _ in range(n)]
    if hub:
        parquet(data / "piqa" / "validation-00000-of-00001.parquet", rows)
    else:
        jsonl(data / "piqa" / "valid.jsonl", [{k: v for k, v in row.items() if k != "label"} for row in rows])
        labels(data / "piqa" / "valid-labels.lst", [row["label"] for row in rows])


def blimp(data: Path, hub: bool, n: int) -> None:
    for number, paradigm in enumerate(PARADIGMS):
        t = Texts(20 + number)
        rows = [{"sentence_good": t(), "sentence_bad": t(), "field": "syntax", "UID": paradigm} for _ in range(n)]
        if hub:
            parquet(data / "blimp" / paradigm / "train-00000-of-00001.parquet", rows)
        else:
            jsonl(data / "blimp" / "data" / f"{paradigm}.jsonl", rows)


def boolq(data: Path, hub: bool, n: int) -> None:
    t, rows = Texts(30), []
    for i in range(n):
        rows.append({"question": t(), "passage": f"{t()} -- {t()}", "idx": i, "label": t.pick(2)})
    if hub:
        parquet(data / "boolq" / "default" / "validation" / "0000.parquet", rows)
        return
    official = []
    for row in rows:
        title, passage = row["passage"].split(" -- ")
        official.append({"question": row["question"], "title": title, "passage": passage, "answer": bool(row["label"])})
    jsonl(data / "boolq" / "dev.jsonl", official)


def write_all(data: Path, hub: bool = False, n: int = 6) -> Path:
    """Write each benchmark with n questions (MMLU: 3 subjects, BLiMP: 2 paradigms) below `data`; return it."""
    data.mkdir(parents=True, exist_ok=True)
    for write in (hellaswag, winogrande, mmlu, lambada, questions, piqa, blimp, boolq):
        write(data, hub, n)
    return data
