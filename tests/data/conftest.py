import random
from pathlib import Path

import pytest

from fastgpt.data import Tokenizer, train_tokenizer


def sentences(n: int, seed: int = 0) -> str:
    """Return about n lines of text that depend on the seed."""
    rng = random.Random(seed)
    words = [f"{rng.choice(['def', 'return', 'the', 'value', 'naïve', 'of'])}_{i}" for i in range(40)]
    return "\n".join(" ".join(rng.choices(words, k=8)) + "." for _ in range(n)) + "\n"


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer([Path(random.__file__).read_text(encoding="utf-8"), sentences(200)], 700)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a corpus folder of 30 files of similar size, one of them in a subfolder."""
    root = tmp_path / "texts"
    (root / "deep").mkdir(parents=True)
    for i in range(29):
        (root / f"a{i:02}.txt").write_text(sentences(40, i), encoding="utf-8")
    (root / "deep" / "b.py").write_text(sentences(40, 99), encoding="utf-8")
    return root
