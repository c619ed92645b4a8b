"""Fine-tune a small GPT to classify text, and compare it with its base and with a bag of words.

Shows: fastgpt.finetune's heads, tasks and metrics. A passage of the standard library's code is as it was written, or
the words of each line are in reverse order. Both classes have the same words, so that only a reader of their order can
tell them apart. No file gives passages to both sides: a quarter of the files is held out from pretraining, fine-tuning
and the bag of words, and the latter two see the same passages.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt import train
from fastgpt.data import default_corpus
from fastgpt.finetune.batches import LabelledLoader
from fastgpt.finetune.classify import Classify
from fastgpt.finetune.examples import load_labelled
from fastgpt.finetune.heads import HeadConfig, attach
from fastgpt.models.gpt import GPT
from fastgpt.optim import AdamW
from fastgpt.training.load import load_run

LINES, BATCH = 6, 32
ORDERS = ("as written", "reversed")
BASE = (
    "--model.n-layers 3 --model.n-heads 4 --model.width 128 --block-size 128 --micro-batch 16 --batch-tokens 2048 "
    "--vocab-size 2048 --lr 3e-3 --warmup-steps 50 --min-lr-ratio 0.1 --eval-every 0 --eval-batches 1 "
    "--sample-tokens 8 --log-every 100 --device cpu"
).split()
Row = dict[str, str]
Found = dict[str, float]


def split(folder: Path) -> tuple[list[list[str]], list[list[str]]]:
    """Return the lines that are not blank of training and held-out files; write the training files into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    sides: tuple[list[list[str]], list[list[str]]] = ([], [])
    for file in default_corpus().files:
        held_out = hashlib.sha256(file.name.encode()).digest()[0] % 4 == 0
        text = file.path.read_text(encoding="utf-8", errors="ignore")
        if not held_out and text.strip():
            (folder / file.name.replace("/", "-")).write_text(text, encoding="utf-8")
        lines = [line for line in text.splitlines() if line.strip()]
        if len(lines) >= LINES:
            sides[held_out].append(lines)
    return sides


def rows(files: list[list[str]], n: int, seed: int) -> list[Row]:
    """Draw n passages, every line of a file with the same chance to begin one, and an order for each."""
    rng = random.Random(seed)
    found: list[Row] = []
    sizes = [len(lines) for lines in files]
    while len(found) < n:
        lines = rng.choices(files, sizes)[0]
        start = rng.randrange(len(lines) - LINES + 1)
        passage = lines[start : start + LINES]
        if sum(map(len, passage)) <= 240:
            label = rng.choice(ORDERS)
            if label == "reversed":
                passage = [line[: len(line) - len(line.lstrip())] + " ".join(line.split()[::-1]) for line in passage]
            found.append({"text": "\n".join(passage) + "\n", "label": label})
    return found


def fine_tune(model: GPT, task: Classify, loader: LabelledLoader, epochs: int, rate: float) -> None:
    """Train the parameters that require gradients; the learning rate rises over 20 steps, then falls to 0."""
    optimizer = AdamW(model.param_groups(0.01), lr=rate, max_norm=1.0)
    steps = epochs * len(loader)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 20) * (1 - step / steps)
        batch = next(loader)
        (task.loss(model, batch)[0] / task.counted(batch)).backward()
        optimizer.step()
        optimizer.zero_grad()


def bag_of_words(data: list[Row], held_out: list[Row], labels: tuple[str, ...]) -> float:
    """Return the accuracy of logistic regression on word counts 1 + log n, with the best of three weight decays on the
    held-out rows, which favours it."""
    words = [[Counter(re.findall(r"\w+|[^\w\s]", row["text"])) for row in side] for side in (data, held_out)]
    seen = Counter(word for counts in words[0] for word in counts)
    vocabulary = {word: i for i, word in enumerate(word for word, n in seen.items() if n > 1)}

    def features(side: list[Counter[str]]) -> Tensor:
        x = torch.zeros(len(side), len(vocabulary))
        for i, counts in enumerate(side):
            for word in counts.keys() & vocabulary.keys():
                x[i, vocabulary[word]] = counts[word]
        return torch.where(x > 0, 1 + x.clamp(min=1).log(), 0.0)

    x, x_held_out = features(words[0]), features(words[1])
    y, y_held_out = (torch.tensor([labels.index(row["label"]) for row in side]) for side in (data, held_out))
    best = 0.0
    for decay in (1e-1, 1e-2, 1e-3):
        w = torch.zeros(len(vocabulary), len(labels), requires_grad=True)
        optimizer = torch.optim.LBFGS([w], max_iter=60)

        def closure(w: Tensor = w, decay: float = decay, optimizer: Any = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(x @ w, y) + decay * (w**2).sum()
            loss.backward()
            return loss

        optimizer.step(closure)  # type: ignore[no-untyped-call]
        best = max(best, float(((x_held_out @ w).argmax(1) == y_held_out).float().mean()))
    return best


def compare(folder: Path, sides: tuple[list[list[str]], list[list[str]]], seed: int, n: int, epochs: int) -> Found:
    """Return held-out accuracies for one seed, which decides the passages, the head's first weights and the order."""
    drawn = {"train": rows(sides[0], n, seed), "held-out": rows(sides[1], 600, 1000 + seed)}
    found: Found = {}
    for name in ("frozen base, trained head", "fine-tuned"):
        model, tokenizer, _ = load_run(folder / "base", torch.device("cpu"))
        loaders, labels = {}, tuple(ORDERS)
        for side, part in drawn.items():
            file = folder / f"{side}-{seed}.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
            loaded = load_labelled(file, tokenizer, 128, "classification", labels)
            loaders[side] = LabelledLoader([loaded.items], BATCH, 128, seed=seed, pad=tokenizer.eot)
        head = HeadConfig("classification", labels, pad_id=tokenizer.eot)
        attach(model, head, torch.Generator().manual_seed(seed))
        task, run = Classify(head, loaders["held-out"].once), SimpleNamespace(model=model)
        found["base, untrained head"] = task.validate(run, None)["accuracy"]
        if name != "fine-tuned":
            model.requires_grad_(False)
            model.head.requires_grad_(True)
        fine_tune(model, task, loaders["train"], epochs, 1e-3 if name == "fine-tuned" else 1e-2)
        found[name] = task.validate(run, None)["accuracy"]
        print(f"seed {seed}, {name}\n{task.report}\n", flush=True)
    return {"bag of words": bag_of_words(drawn["train"], drawn["held-out"], labels), **found}


def main(out: str = "runs/order", seeds: int = 3, n: int = 2400, epochs: int = 2, steps: int = 400) -> list[Found]:
    """Pretrain a base unless it is there, then compare; return the accuracies of each seed."""
    folder = Path(out)
    sides = split(folder / "code")
    if not list((folder / "base").glob("step_*")):
        settings = ["--data", str(folder / "code"), "--out", str(folder / "base"), "--max-steps", str(steps)]
        if code := train.main([*BASE, *settings]):
            sys.exit(code)
    found = [compare(folder, sides, seed, n, epochs) for seed in range(seeds)]
    (folder / "accuracies.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return found


if __name__ == "__main__":
    for seed, accuracies in enumerate(main(sys.argv[1] if sys.argv[1:] else "runs/order")):
        print(f"seed {seed}: " + ", ".join(f"{name} {value:.3f}" for name, value in accuracies.items()))
