"""Tokenizers by name, the fast encoder, and `fastgpt tokenizer`."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fastgpt.core.command import run_command
from fastgpt.core.errors import UserError
from fastgpt.data import EOT, Tokenizer, encoder, published, train_tokenizer
from fastgpt.data.encoder import Renewed, sample
from fastgpt.data.load import load_tokenizer
from fastgpt.data.tokenizer import _parse
from fastgpt.data.tokenizer_command import main

tiktoken = pytest.importorskip("tiktoken")
pytest.importorskip("hypothesis")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

TIKTOKEN_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"  # of r50k_base.tiktoken
ENCODER_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"  # of gpt2's encoder.json


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    return published.open_tokenizer("gpt2")


def test_gpt2_is_byte_exact(gpt2: Tokenizer) -> None:
    ranks, specials = _parse(gpt2.text, "gpt2")
    lines = [base64.b64encode(token) + b" %d\n" % i for token, i in sorted(ranks.items(), key=lambda item: item[1])]
    assert hashlib.sha256(b"".join(lines)).hexdigest() == TIKTOKEN_SHA256, "the file that tiktoken downloads"
    vocab = json.loads(gpt2.text)["model"]["vocab"]
    assert hashlib.sha256(json.dumps(vocab).encode()).hexdigest() == ENCODER_SHA256, "the file that GPT-2 came with"
    assert (gpt2.n_vocab, gpt2.eot, specials) == (50257, 50256, {EOT: 50256})
    assert gpt2.encode("Hello world<|endoftext|>").tolist() == [15496, 995, 27, 91, 437, 1659, 5239, 91, 29]


def test_damaged_merges_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lzma

    damaged = tmp_path / "gpt2.bpe.xz"
    damaged.write_bytes(lzma.compress(b"#version: 0.2\na b\n"))
    monkeypatch.setattr(published, "GPT2_MERGES", damaged)
    with pytest.raises(UserError, match="is damaged: its hash is not that of GPT-2's"):
        published.gpt2_json()


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpt2: Tokenizer) -> None:
    with pytest.raises(UserError, match="'gpt5' is unknown, expected gpt2"):
        published.published_tokenizer("gpt5")
    monkeypatch.chdir(tmp_path)
    Path("gpt2").mkdir()
    trained = train_tokenizer(["ab ab"], 300)
    trained.save("gpt2/tokenizer.json")
    assert published.open_tokenizer("gpt2").fingerprint == trained.fingerprint, "a path goes before a name"

    def refuse(name: str) -> None:
        raise ConnectionError(name)

    monkeypatch.setattr(tiktoken, "get_encoding", refuse)
    with pytest.raises(UserError, match="o200k_base cannot be downloaded .*, expected a network or TIKTOKEN_CACHE_DIR"):
        published.published_tokenizer("o200k_base")


PATTERN = r"(?i:'s|'t|'ll)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def test_encoding_of_tiktoken_becomes_a_tokenizer_json(gpt2: Tokenizer, tmp_path: Path) -> None:
    small = train_tokenizer([Path(json.__file__).read_text()], 700)
    ranks, _ = _parse(small.text, "small")
    ranks = {token: i for i, token in enumerate(ranks)}
    marks = {EOT: len(ranks), "<|start|>": len(ranks) + 1}
    encoding = tiktoken.Encoding("other", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=marks)
    found = published.of_encoding(encoding)
    (tmp_path / "tokenizer.json").write_text(found.text)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": EOT}))
    again = load_tokenizer(tmp_path)
    for text in ("I'LL say 12345 words\r\n\n  x", "a<|start|>b"):
        expected = encoding.encode_ordinary(text)
        assert found.encode(text).tolist() == again.encode(text).tolist() == expected
    assert again.eot == marks[EOT] and again.n_vocab == len(ranks) + 2
    unreachable = {**ranks, b"zqzqzq": len(ranks) + 5}
    encoding = tiktoken.Encoding("odd", pat_str=PATTERN, mergeable_ranks=unreachable, special_tokens=marks)
    with pytest.raises(UserError, match="is not the merge of two tokens before it"):
        published.of_encoding(encoding)


# ---- the fast encoder ----


@pytest.fixture(scope="module")
def fast(gpt2: Tokenizer) -> Callable[[str], np.ndarray]:
    pytest.importorskip("gigatoken")
    name, encode = gpt2.fastest()
    assert name == "gigatoken"
    return encode


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.text(), st.text(" \n\t'sdmtlvre<|endoftext|>0aZ\u00a0\u3000\u0301"), st.binary().map(bytes.hex)))
def test_fast_encoder_returns_the_same_ids(gpt2: Tokenizer, fast: Callable[[str], np.ndarray], text: str) -> None:
    ids = gpt2.encode(text)
    assert fast(text).tolist() == ids.tolist()
    assert gpt2.decode_bytes(ids) == text.encode()


def test_fast_encoder_on_bytes_and_sources(gpt2: Tokenizer, fast: Callable[[str], np.ndarray]) -> None:
    rng = np.random.default_rng(3)
    texts = [rng.integers(0, 256, 300, dtype=np.uint8).tobytes().decode("utf-8", "replace") for _ in range(300)]
    texts += [p.read_text() for p in sorted(Path(json.__file__).parent.glob("*.py"))] + [sample()]
    for text, ids in zip(texts, gpt2.encode_documents(texts)):
        assert np.array_equal(ids, gpt2.encode(text))
    with pytest.raises(UserError, match="character 1 is a surrogate"):
        gpt2.encode_documents(["a\ud800"])


def test_fast_encoder_is_renewed(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gigatoken")
    monkeypatch.setattr(encoder, "KEPT_CHARACTERS", 100)
    small = train_tokenizer(["some words"], 270)
    encode = Renewed(small.text, small.encode)
    first = encode._encoder
    assert encode("a" * 60).tolist() == small.encode("a" * 60).tolist()
    assert encode._encoder is first
    assert encode("b" * 60).tolist() == small.encode("b" * 60).tolist()
    assert encode._encoder is not first, "it keeps every word that it has met"


def test_own_encoder_is_used_where_the_fast_one_differs(gpt2: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gigatoken")
    name, encode = encoder.fastest(gpt2.text, lambda text: gpt2.encode(text)[:-1])
    assert "gives other ids" in name and not isinstance(encode, Renewed)
    name, _ = encoder.fastest('{"added_tokens": [], "model": {}}', gpt2.encode)
    assert "does not read this tokenizer" in name
    monkeypatch.setattr(encoder.importlib.util, "find_spec", lambda name: None)
    name, encode = encoder.fastest(gpt2.text, gpt2.encode)
    assert "pip install gigatoken" in name and encode == gpt2.encode


# ---- the command ----


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = run_command(lambda: main(list(argv)))
    said = capsys.readouterr()
    return code, said.out, said.err


def test_train_show_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "new" / "tokenizer.json"
    text.write_text(Path(json.__file__).read_text() * 3)
    code, said, _ = run(capsys, "train", str(text), "--out", str(out), "--vocab-size", "500", "--special", "<|user|>")
    assert code == 0 and "500 ids" in said and "bytes per token" in said
    code, said, _ = run(capsys, "show", str(out))
    assert code == 0 and "ids          500, of which 2 special" in said and "<|user|>" in said
    code, said, _ = run(capsys, "show", str(out), "--text", "json<|user|>")
    assert code == 0 and "b'json'" in said and "<|user|>" not in said
    code, said, _ = run(capsys, "check", str(out), str(text))
    assert code == 0 and said.endswith("0 failed\n") and "MB/s on one core" in said


def test_training_is_the_same_twice_and_bounded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("alpha beta gamma\n" * 5000 + "late words that are cut off\n" * 5000)
    outs = [tmp_path / f"{i}.json" for i in range(3)]
    for out, limit in zip(outs, ("0.05", "0.05", "64")):
        assert run(capsys, "train", str(text), "--out", str(out), "--vocab-size", "400", "--max-mb", limit)[0] == 0
    assert outs[0].read_bytes() == outs[1].read_bytes() != outs[2].read_bytes()
    assert b"late" in outs[2].read_bytes() and b"late" not in outs[0].read_bytes()


@pytest.mark.parametrize(
    "argv, expected",
    [
        ("train text --out t.json --vocab-size 256", "--vocab-size is '256', expected a whole number, 257 or more"),
        ("train text --out t.json --vocab-size 257 --special <|a|>", "has at least 258 ids"),
        ("train text --out t.json --special <|a|> <|a|>", "are empty, repeated, or"),
        ("train text --out .", "is a folder, expected the name of a file"),
        (
            "train text --out tk",
            "--out tk has no suffix, expected the name of a file such as tk.json or tk/tokenizer.json",
        ),
        ("train missing --out t.json", "data path missing does not exist"),
        ("show missing.json", "tokenizer file missing.json does not exist"),
        ("show text", "text is damaged"),
    ],
)
def test_one_sentence(
    argv: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text").write_text("some words\n")
    code, _, said = run(capsys, *argv.split())
    assert code == 2 and expected in said and said.count("\n") == 1
    assert not Path("t.json").exists()


def test_check_finds_a_tokenizer_that_loses_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = train_tokenizer(["some words"], 270)
    small.save(tmp_path / "tokenizer.json")
    monkeypatch.setattr(Tokenizer, "decode_bytes", lambda self, ids: b"x")
    code, said, errors = run(capsys, "check", str(tmp_path))
    assert code == 1 and "decoding its ids does not give the text" in errors


def test_a_file_that_may_not_be_read_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    read = Path.read_text

    def denied(path: Path, *args: str, **options: str) -> str:
        if path.name == "tokenizer_config.json":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path, *args, **options)

    monkeypatch.setattr(Path, "read_text", denied)
    code, _, said = run(capsys, "show", str(tmp_path))
    assert code == 2 and said.endswith(f"cannot read {tmp_path / 'tokenizer_config.json'}: Permission denied\n")
