"""Token files without a tokenizer: which vocabulary they imply, and what is refused."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastgpt.core.errors import UserError
from fastgpt.data.shards import ShardWriter
from fastgpt.data.source import open_source, open_validation, read_vocab_size
from fastgpt.training.config import load_config

IDS = np.random.default_rng(0).integers(0, 65, 4000)  # characters, as in nanoGPT's shakespeare_char


def raw(folder: Path, dtype: str = "<u2", ids: Any = IDS) -> str:
    ids.astype(dtype).tofile(folder / "train.bin")
    return str(folder / "train.bin")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_meta_pkl_says_the_vocabulary(tmp_path: Path, protocol: int) -> None:
    data = raw(tmp_path)
    source = open_source(data)
    assert (source.n_vocab, source.n_ids, source.tokenizer) == (50257, 65, None)
    assert "vocabulary of GPT-2; the largest id is 64, so --model.vocab-size 65 is enough" in source.describe()
    meta = {"vocab_size": 66, "itos": {i: chr(i) for i in range(66)}, "stoi": {chr(i): i for i in range(66)}}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta, protocol))
    source = open_source(data)
    assert (source.n_vocab, source.n_ids) == (66, 65) and "meta.pkl" in source.describe()


class Runs:
    """A class whose pickle creates a folder when it is loaded."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (pickle.dumps({"vocab_size": 60}), "says vocab_size 60, but the largest token id in its folder is 64"),
        (pickle.dumps({"vocab_size": "65"}), "has no whole number as vocab_size: .* pass --model.vocab-size"),
        (pickle.dumps({"vocab_size": Runs()}), "has no whole number as vocab_size"),
        (pickle.dumps({"vocab_size": True}), "has no whole number as vocab_size"),
        (pickle.dumps([Runs(), 65]), "has no whole number as vocab_size"),
        (b"text", "cannot be read"),
        (b"", "cannot be read"),
    ],
)
def test_a_foreign_meta_pkl_is_refused_and_never_run(
    content: bytes, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = raw(tmp_path)
    (tmp_path / "meta.pkl").write_bytes(content)
    with pytest.raises(UserError, match=f"meta.pkl.* {said}"):
        open_source(data)
    assert not Path("ran").exists()
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 65, "more": Runs()}))
    assert read_vocab_size(tmp_path / "meta.pkl") == 65 and not Path("ran").exists()


def test_the_dtype_of_raw_ids(tmp_path: Path) -> None:
    data = raw(tmp_path, "<u4", IDS * 1000)
    with pytest.raises(UserError, match="--data-dtype uint32"):
        open_source(data)
    source = open_source(data, data_dtype=load_config(["--data-dtype", "uint32"]).data_dtype)
    assert source.n_ids == source.n_vocab == 64001 and len(source.train) + len(source.val) == 4000
    assert len(open_validation({"more": data}, source, "uint32")["more"]) == 4000
    raw(tmp_path, "<u4")
    assert open_source(data, data_dtype="uint16").n_ids == 65, "as it stands: every second one is 0"
    with ShardWriter(tmp_path / "header.bin", 300) as shard:
        shard.write(IDS)
    with pytest.raises(UserError, match=r"header.bin has a header that says uint16, expected uint32 \(data_dtype\)"):
        open_source(str(tmp_path / "header.bin"), data_dtype="uint32")
    with pytest.raises(UserError, match="data_dtype is 'uint32', but data is text"):
        open_source("my.txt", data_dtype="uint32")


def test_licences_come_from_the_manifest(tmp_path: Path) -> None:
    np.arange(100, dtype=np.uint16).tofile(tmp_path / "train.bin")
    source = open_source(str(tmp_path / "train.bin"))
    assert source.licences is None
    manifest = {"sources": {"web": {"license": "CC0-1.0"}, "books": {"license": "unknown"}}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert source.licences == "web CC0-1.0, books unknown"
