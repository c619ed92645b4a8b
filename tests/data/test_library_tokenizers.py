"""Tokenizers of other models: the ids that transformers and SentencePiece give, and exact texts back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from sentencepiece_models import MODELS, PLAIN, SAMPLE, sentencepiece_folder
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as HFTokenizer

from fastgpt.core.errors import UserError
from fastgpt.data import Tokenizer, train_tokenizer
from fastgpt.data.byte_level import ByteLevelTokenizer
from fastgpt.data.load import load_tokenizer
from fastgpt.data.pieces import PieceTokenizer

TEXTS = (
    SAMPLE,
    "",
    " ",
    "  two  spaces\tand a tab",
    "x = [1, 22, 333]\n    return  x\n\n",
    "ünïcödé e\u0301 漢字 \U0001f600\u200d\U0001f469 na\u00efve",
    "line\r\n\x00 \ufeff\u3000wide \u00a0",
    "<s> </s> <unk> <0x41> <|endoftext|> ▁mark",
)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_sentencepiece(name: str, tmp_path: Path) -> None:
    """The same ids as SentencePiece, and as transformers from the tokenizer.json that is made of it."""
    transformers = pytest.importorskip("transformers")
    theirs = sentencepiece_folder(tmp_path, **MODELS[name])
    ours = load_tokenizer(tmp_path)
    assert isinstance(ours, PieceTokenizer)
    assert (ours.eot, ours.prefix, ours.bos) == (theirs.eos_id(), (theirs.bos_id(),), "<s>")
    assert ours.n_vocab == theirs.get_piece_size()
    ours.save(tmp_path / "tokenizer.json")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    # the text "<0x41>" is a byte to the library's Unigram
    for text in TEXTS if "unigram" not in name else [t.replace("<0x41>", "") for t in TEXTS]:
        ids = ours.encode(text).tolist()
        assert ids == theirs.encode(text), text
        assert ours.encode(text, specials=True).tolist() == fast(text, add_special_tokens=False)["input_ids"]
        assert ours.prompt(text) == [theirs.bos_id(), *ids]
        if MODELS[name].get("byte_fallback") and "normalised" not in name:
            assert ours.decode(ids) == text.replace("\u2581", " ")
    assert fast("the cat")["input_ids"] == ours.prompt("the cat")
    again = load_tokenizer(tmp_path)
    assert again.fingerprint == ours.fingerprint and again.prefix == ours.prefix


def test_a_symbol_of_the_user_behind_an_added_space_is_refused(tmp_path: Path) -> None:
    sentencepiece_folder(tmp_path, model_type="bpe", vocab_size=320, user_defined_symbols=["<u>"], **PLAIN)
    with pytest.raises(UserError, match="has symbols of its user and adds a space in front"):
        load_tokenizer(tmp_path)


def test_a_damaged_model_of_sentencepiece_is_one_sentence(tmp_path: Path) -> None:
    for content in (b"", b"\x0a\xff", b"hello, world", bytes(100)):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(UserError, match="tokenizer.model is .*SentencePiece") as error:
            load_tokenizer(tmp_path)
        assert "\n" not in str(error.value)


def as_transformers(folder: Path, ours: Tokenizer) -> None:
    """Check ids and texts against transformers' tokenizer of the same tokenizer.json."""
    transformers = pytest.importorskip("transformers")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    for text in TEXTS:
        ids = ours.encode(text, specials=True).tolist()
        assert ids == fast(text, add_special_tokens=False)["input_ids"], text
        assert [*ours.prefix, *ids] == fast(text)["input_ids"], text
        assert not set(ours.encode(text).tolist()) & set(ours.specials.values()) - {ours.specials.get("<unk>")}


def test_llama_as_transformers_writes_it(tmp_path: Path) -> None:
    """Metaspace before the first word, byte fallback, a BOS by the post-processor."""
    transformers = pytest.importorskip("transformers")
    sentencepiece_folder(tmp_path, **MODELS["bpe, as Llama 2"])
    spec = json.loads(load_tokenizer(tmp_path).text)["model"]
    merges = [tuple(m) for m in spec["merges"]]
    theirs = transformers.LlamaTokenizer(vocab=spec["vocab"], merges=merges, add_bos_token=True)
    (tmp_path / "tokenizer.model").unlink()
    theirs.save_pretrained(tmp_path)
    ours = load_tokenizer(tmp_path)
    assert isinstance(ours, PieceTokenizer) and ours.prefix == (1,) and ours.eot == 2
    as_transformers(tmp_path, ours)
    text = "two cats sat\n  on the mat"
    assert ours.decode(ours.encode(text)) == text == theirs.decode(ours.encode(text))


def test_pythias_runs_of_spaces_are_tokens_of_every_text(tmp_path: Path) -> None:
    """Added tokens that are not special, NFC, and ids after those of the BPE."""
    plain = HFTokenizer(models.BPE())
    plain.normalizer, plain.decoder = normalizers.NFC(), decoders.ByteLevel()
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options: dict[str, Any] = dict(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    plain.train_from_iterator([SAMPLE] * 20, trainers.BpeTrainer(special_tokens=["<|endoftext|>"], **options))
    plain.add_tokens([AddedToken(" " * n, normalized=True, special=False) for n in (4, 3, 2)])
    plain.save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(tmp_path)
    assert isinstance(ours, ByteLevelTokenizer) and ours.specials == {"<|endoftext|>": ours.eot}
    as_transformers(tmp_path, ours)
    text = "def f():\n    return  1\n"
    ids = ours.encode(text)
    assert plain.token_to_id("    ") in ids.tolist() and ours.decode(ids) == text


@pytest.mark.parametrize("prefix_space", [False, True])
def test_gpt2s_old_files(prefix_space: bool, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    spec = json.loads(train_tokenizer([SAMPLE * 20], 290).text)
    merges = [" ".join(m) if isinstance(m, list) else m for m in spec["model"]["merges"]]
    (tmp_path / "vocab.json").write_text(json.dumps(spec["model"]["vocab"]))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    n = len(spec["model"]["vocab"])
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_end|>": n}))
    settings = {"add_prefix_space": prefix_space, "add_bos_token": prefix_space, "tokenizer_class": "GPT2Tokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    theirs = transformers.GPT2Tokenizer.from_pretrained(tmp_path)
    ours = load_tokenizer(tmp_path)
    assert isinstance(ours, ByteLevelTokenizer)  # "<|im_end|>" is in no list of special tokens
    assert ours.n_vocab == n + 1 and ours.eot == 0
    for text in TEXTS:
        assert [*ours.prefix, *ours.encode(text, specials=True).tolist()] == theirs(text)["input_ids"], text


def test_what_begins_and_ends_a_text(tmp_path: Path) -> None:
    tokenizer = train_tokenizer([SAMPLE * 20], 280)
    spec = json.loads(tokenizer.text)
    n = tokenizer.n_vocab
    for i, token in enumerate(("<|bot|>", "<|eot|>")):
        spec["added_tokens"].append(spec["added_tokens"][0] | {"id": n + i, "content": token})
    begin = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<|bot|>", "type_id": 0}}], "pair": []}
    begin["single"].append({"Sequence": {"id": "A", "type_id": 0}})
    begin["special_tokens"] = {"<|bot|>": {"id": "<|bot|>", "ids": [n], "tokens": ["<|bot|>"]}}
    spec["post_processor"] = {"type": "Sequence", "processors": [spec["post_processor"] or begin, begin][1:]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|eot|>"}}')
    found = load_tokenizer(tmp_path)
    assert (found.prefix, found.bos, found.eot, found.ends) == ((n,), "<|bot|>", n + 1, (n + 1,))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>", "bos_token": "<|eot|>"}')
    (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": [{n}, {n + 1}]}}')
    found = load_tokenizer(tmp_path)
    assert (found.prefix, found.bos, found.eot, found.ends) == ((n,), "<|eot|>", 0, (n, n + 1))
    (tmp_path / "copy").mkdir()
    found.save(tmp_path / "copy" / "tokenizer.json")
    again = load_tokenizer(tmp_path / "copy" / "tokenizer.json")
    assert (again.prefix, again.bos, again.eot, again.ends) == (found.prefix, found.bos, found.eot, found.ends)
    named = [{"name": "tools", "template": "x"}, {"name": "default", "template": "{{ y }}"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert load_tokenizer(tmp_path).companions["chat_template.jinja"] == "{{ y }}"
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|other|>"}')
    with pytest.raises(UserError, match="has no special token '<|other|>', which tokenizer_config.json names"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(UserError, match="tokenizer_config.json is damaged"):
        load_tokenizer(tmp_path)


def test_no_merge_gives_a_special_token(tmp_path: Path) -> None:
    """A special token whose text the BPE has learned too: in a text it is ordinary text."""
    plain = HFTokenizer(models.BPE())
    plain.pre_tokenizer, plain.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=258, initial_alphabet=alphabet, show_progress=False)
    plain.train_from_iterator(["</> </>"] * 20, trainer)
    plain.add_special_tokens(["</>"])
    plain.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</>"}')
    ours = load_tokenizer(tmp_path)
    assert ours.eot == 257 and ours.encode("</>", specials=True).tolist() == [257] == plain.encode("</>").ids
    assert ours.encode("</>").tolist() != [257] and ours.decode(ours.encode("</>")) == "</>"
