import json
import random
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as HFTokenizer

from fastgpt.core.errors import UserError
from fastgpt.data import EOT, Tokenizer, default_corpus, train_tokenizer
from fastgpt.data import tokenizer as module

from .conftest import sentences

ODD = {
    "empty": "",
    "unicode": "naïve Ελληνικά עברית 中文字符 👩‍👩‍👧‍👦 🇩🇪 e\u0301 ﷽ \u202eabc \U0010ffff",
    "control": "".join(map(chr, range(0x20))) + "\x7f\x85\xa0\u2028\u2029\ufeff\u180e\u200b",
    "blanks": "a  b\t\t c \n\n\n  d\r\n\r\n e   ",
    "contractions": "I'm you're it's we'll they'd I've 'sup 'S ''t can't",
    "digits": "1234567890 ١٢٣ ½ Ⅷ 1e-5 0x7fff",
    "long letters": "a" * 20_000,
    "long blanks": " " * 20_000 + "x",
    "long line": "x = " + ", ".join(str(i * i) for i in range(5000)),
    "mark": f"one{EOT}two",
}


def hf_encode(hf: HFTokenizer, text: str) -> list[int]:
    return hf.encode(text, add_special_tokens=False).ids


@pytest.fixture(scope="module")
def hf(tokenizer: Tokenizer) -> HFTokenizer:
    spec = json.loads(tokenizer.text)
    spec["added_tokens"] = []  # data never holds specials
    return HFTokenizer.from_str(json.dumps(spec))


@pytest.mark.parametrize("name", ODD)
def test_same_ids_as_tokenizers_on_odd_text(tokenizer: Tokenizer, hf: HFTokenizer, name: str):
    ids = tokenizer.encode(ODD[name])
    assert ids.dtype == np.uint32 and ids.tolist() == hf_encode(hf, ODD[name])
    assert tokenizer.decode(ids) == ODD[name]
    assert tokenizer.eot not in ids


def test_same_ids_as_tokenizers_around_every_character(tokenizer: Tokenizer, hf: HFTokenizer):
    assigned = [
        i for i in range(0x33500) if unicodedata.category(chr(i)) not in ("Cs", "Co", "Cn", "Lo") or i % 16 == 0
    ]
    for start in range(0, len(assigned), 1 << 12):
        block = [chr(i) for i in assigned[start : start + (1 << 12)] if not 0xD800 <= i < 0xE000]
        text = "".join(f"a{c}b {c}\n{c}1{c}{c}." for c in block)
        assert tokenizer.encode(text).tolist() == hf_encode(hf, text), f"U+{ord(block[0]):04X} and following"


def test_same_ids_as_tokenizers_on_real_text(tokenizer: Tokenizer, hf: HFTokenizer):
    for file in default_corpus().files[::8]:
        text = file.path.read_text(encoding="utf-8")
        assert tokenizer.encode(text).tolist() == hf_encode(hf, text), file.name


def test_any_text_comes_back(tokenizer: Tokenizer, hf: HFTokenizer):
    rng = random.Random(1)
    pools = ["ab '\n\t  ", "".join(map(chr, range(0x250))), "\U0001f600\u200d\ufe0f e\u0301中 "]
    for _ in range(300):
        pool = rng.choice([*pools, None])
        n = rng.randrange(80)
        if pool:
            text = "".join(rng.choices(pool, k=n))
        else:
            text = "".join(chr(c) for c in (rng.randrange(0x110000) for _ in range(n)) if not 0xD800 <= c < 0xE000)
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert ids.tolist() == hf_encode(hf, text)


def test_pieces_change_no_id(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    text = sentences(300) + "\n\n    x\n\ty\n's\n" * 50 + "\x1c\nz\n\x1c\n" * 20
    whole = tokenizer.encode(text)
    for size in (1, 10):
        monkeypatch.setattr(module, "PIECE", size)
        assert len(module.pieces(text)) > 300 and "".join(module.pieces(text)) == text
        assert np.array_equal(tokenizer.encode(text), whole)


def test_a_run_of_blanks_that_overflows_the_pattern_still_encodes(tokenizer: Tokenizer, hf: HFTokenizer):
    text = "a" + "\n" * 1_200_000 + EOT
    with pytest.raises(ValueError, match="stack"):
        tokenizer._bpe.encode_to_numpy(text, disallowed_special=())
    assert tokenizer.encode(text).tolist() == hf_encode(hf, text)


def test_documents_on_threads_equal_one_by_one(tokenizer: Tokenizer):
    texts = [sentences(20, i) for i in range(20)]
    for ids, text in zip(tokenizer.encode_documents(texts, 3), texts, strict=True):
        assert np.array_equal(ids, tokenizer.encode(text))


def test_broken_bytes_and_foreign_ids(tokenizer: Tokenizer):
    ids = tokenizer.encode("é")
    first_byte = tokenizer._bpe.encode_single_token(b"\xc3")
    assert tokenizer.decode([first_byte]) == "\ufffd" and tokenizer.decode(ids) == "é"
    assert tokenizer.decode([tokenizer.eot]) == EOT
    for bad in (-1, tokenizer.n_vocab):
        with pytest.raises(ValueError, match=rf"\[0, {tokenizer.n_vocab}\), got {bad}"):
            tokenizer.decode([0, bad])
    with pytest.raises(UserError, match="character 2 is a surrogate"):
        tokenizer.encode("ab\ud800")


def test_training_is_deterministic_and_tells_tokenizers_apart(tokenizer: Tokenizer):
    a, b, c = (train_tokenizer([sentences(100, s)], 300) for s in (0, 0, 1))
    assert a.text == b.text and a.fingerprint == b.fingerprint != c.fingerprint
    assert a.n_vocab == 300 and tokenizer.n_vocab == 700
    assert train_tokenizer(["ab ab"], 5000).n_vocab < 270
    with pytest.raises(UserError, match="vocab_size is 256; .* at least 257"):
        train_tokenizer(["x"], 256)


def test_saved_and_loaded_is_the_same(tokenizer: Tokenizer, tmp_path: Path):
    tokenizer.save(tmp_path / "tokenizer.json")
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.json"]
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        assert Tokenizer.load(path).fingerprint == tokenizer.fingerprint
    assert HFTokenizer.from_file(str(tmp_path / "tokenizer.json")).get_vocab_size() == tokenizer.n_vocab
    laid_out = json.dumps(json.loads(tokenizer.text), indent=4)
    assert Tokenizer(laid_out).fingerprint == tokenizer.fingerprint
    with pytest.raises(UserError, match="cannot write .*no/tokenizer.json: No such file"):
        tokenizer.save(tmp_path / "no" / "tokenizer.json")


def damaged(text: str, how: str) -> str:
    spec = json.loads(text)
    if how == "truncated":
        return text[: len(text) // 2]
    if how == "list":
        return "[]"
    if how == "no eot":
        spec["added_tokens"] = []
        del spec["model"]["vocab"][EOT]
        spec["model"]["vocab"] = {t: i - 1 for t, i in spec["model"]["vocab"].items()}
    if how == "hole":
        spec["model"]["vocab"].popitem()
    if how == "merges shuffled":
        spec["model"]["merges"].reverse()
    if how == "merge lost":
        del spec["model"]["merges"][5]
    if how == "normalizer":
        spec["normalizer"] = {"type": "NFC"}
    if how == "prefix space":
        spec["pre_tokenizer"]["add_prefix_space"] = True
    if how == "not bpe":
        spec["model"]["type"] = "WordPiece"
    return json.dumps(spec)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("truncated", "is damaged or not a byte-level BPE"),
        ("list", "is damaged or not a byte-level BPE"),
        ("no eot", r"has no <\|endoftext\|> token"),
        ("hole", "is damaged"),
        ("merges shuffled", "merges in id order"),
        ("merge lost", "merges in id order"),
        ("normalizer", "has another normalizer than"),
        ("prefix space", "has another pre_tokenizer than"),
        ("not bpe", "has another model.type than"),
    ],
)
def test_damaged_tokenizer_file(tokenizer: Tokenizer, tmp_path: Path, how: str, said: str):
    path = tmp_path / "tokenizer.json"
    path.write_text(damaged(tokenizer.text, how), encoding="utf-8")
    with pytest.raises(UserError, match=said) as e:
        Tokenizer.load(path)
    assert str(path) in str(e.value)


def test_missing_tokenizer_file(tmp_path: Path):
    with pytest.raises(UserError, match=f"tokenizer file {tmp_path / 'tokenizer.json'} does not exist"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b"{\xff")
    with pytest.raises(UserError, match="not UTF-8 at byte 1"):
        Tokenizer.load(tmp_path)
