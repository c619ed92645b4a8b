"""fastgpt import and fastgpt export: runs, tokenizers, cards, other formats, and errors."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hf_models import GQA, OLD_SIZES, distance, ids, logits
from sentencepiece_models import MODELS, sentencepiece_folder

from fastgpt.convert import exporting, importing
from fastgpt.core.command import run_command
from fastgpt.core.errors import UserError
from fastgpt.data import Tokenizer, train_tokenizer
from fastgpt.data.load import load_tokenizer
from fastgpt.inference import Generator, Request
from fastgpt.inference.chat import Conversation, Template
from fastgpt.models.config import ModelConfig
from fastgpt.models.gpt import GPT
from fastgpt.train import train
from fastgpt.training import checkpoint
from fastgpt.training.config import load_config
from fastgpt.training.load import load_run

transformers = pytest.importorskip("transformers")
TEXT = "the cat sat on the mat; the dog's 12 cats ran  to it\nand on. "
CPU = torch.device("cpu")
BRIEF = (
    "--data text.txt --block-size 16 --micro-batch 1 --batch-tokens 16 --max-steps 1 --device cpu --dtype fp32".split()
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([TEXT * 20], 280)


@pytest.fixture
def run(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    """A run folder with an untrained GPT-2 of fastgpt, as train writes it."""
    c = ModelConfig(n_layers=2, n_heads=4, width=32, vocab_size=tokenizer.n_vocab, block_size=32)
    model = GPT(c, generator=torch.Generator().manual_seed(2))
    state = {"progress": {"tokens": 640}, "model": dataclasses.asdict(c), "tokenizer": tokenizer.fingerprint}
    checkpoint.save(tmp_path / "run", 5, model.state_dict(), {}, {**state, "config": {}, "loader": {}}, keep=0)
    tokenizer.save(tmp_path / "run" / "tokenizer.json")
    (tmp_path / "run" / "chat_template.jinja").write_text("{{ messages }}")
    return tmp_path / "run"


def test_a_run_goes_out_with_its_tokenizer_and_comes_back(run: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert exporting.main([str(run), "--out", str(tmp_path / "hf")]) == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    ours = load_run(run, CPU)[0]
    assert distance(logits(theirs, ids()), logits(ours, ids())) < 1e-5
    read = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in (TEXT, "  two  spaces ", "ünïcödé 漢字 \U0001f600", ""):
        assert read(text)["input_ids"] == tokenizer.encode(text).tolist()
    assert (read.eos_token_id, read.bos_token_id, read.model_max_length) == (tokenizer.eot, tokenizer.eot, 32)
    assert read.chat_template == "{{ messages }}"
    settings = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "GPT2Tokenizer"
    assert theirs.config.eos_token_id == tokenizer.eot and theirs.config.n_ctx == 32
    prompt = read("the cat", return_tensors="pt")["input_ids"]
    greedy = theirs.double().generate(prompt, max_new_tokens=20, do_sample=False)[0, prompt.shape[1] :]
    results = Generator(load_run(run, CPU)[0].double(), tokenizer).generate([Request("the cat", 20, temperature=0)])
    assert results[0].ids == greedy.tolist() and len(greedy) > 3

    assert importing.main([str(tmp_path / "hf"), str(tmp_path / "back")]) == 0
    back, kept, path = load_run(tmp_path / "back", CPU)
    assert torch.equal(logits(back, ids()), logits(ours, ids()))
    assert kept.fingerprint == tokenizer.fingerprint
    assert checkpoint.read_state(path)["source"]["revision"] is None
    assert exporting.main([str(tmp_path / "back"), "--out", str(tmp_path / "again"), "--dtype", "bf16"]) == 0
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16" and config["eos_token_id"] == tokenizer.eot


def test_training_starts_from_imported_weights(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exporting.main([str(run), "--out", "hf"])
    importing.main(["hf", "start"])
    np.arange(600, dtype=np.uint16).__mod__(97).tofile("data.bin")
    options = "--data data.bin --block-size 16 --batch-tokens 16 --max-steps 1 --lr 1e-30 --out trained"
    options += " --device cpu --dtype fp32 --warmup-steps 0"
    cfg = load_config(["--config", "start/config.yaml", *options.split()])
    assert train(cfg) == 0
    trained = load_run("trained", CPU)[0]
    assert distance(logits(trained, ids()), logits(load_run("start", CPU)[0], ids())) < 1e-6


def test_the_card_says_what_is_not_recorded(run: Path, tmp_path: Path) -> None:
    rows = [{"step": 4, "loss": 5.25}, {"step": 5, "val_loss": 5.5}]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"step": 6, "lo')
    exporting.main([str(run), "--out", str(tmp_path / "hf")])
    card = (tmp_path / "hf" / "README.md").read_text()
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["library_name"] == "transformers"
    assert "| trained on | 640 tokens in 5 steps |" in card and "| last validation loss | 5.5000 |" in card
    assert "| licences of the data | not recorded |" in card and "| training data | not recorded |" in card
    assert "| alignment | none |" in card and "| safety evaluation | none |" in card
    assert all(f"## {part}" in card for part in ("Intended use", "Out-of-scope use", "Limits"))


def test_the_card_says_what_is_recorded(run: Path, tmp_path: Path) -> None:
    record = dict(data="web.bin: 5 tokens", licences="CC0-1.0", alignment="DPO on 3 pairs")
    record |= dict(safety_evaluation="none yet")
    (run / "run.json").write_text(json.dumps(record))
    exporting.main([str(run), "--out", str(tmp_path / "hf")])
    card = (tmp_path / "hf" / "README.md").read_text()
    for row in ("training data | web.bin: 5 tokens", "licences of the data | CC0-1.0", "alignment | DPO on 3 pairs"):
        assert f"| {row} |" in card
    assert "| safety evaluation | none yet |" in card
    importing.main([str(tmp_path / "hf"), str(tmp_path / "in")])
    exporting.main([str(tmp_path / "in"), "--out", str(tmp_path / "again")])
    card = (tmp_path / "again" / "README.md").read_text()
    assert "hf (revision not recorded)" in card and "| alignment | not recorded |" in card
    assert "| trained on | not recorded |" in card


def test_nanogpt_gets_linear_weights(run: Path, tmp_path: Path) -> None:
    exporting.main([str(run), "--format", "nanogpt", "--out", str(tmp_path / "out")])
    content = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)
    ours = load_run(run, CPU)[0].state_dict()
    tensors = content["model"]
    assert torch.equal(tensors["transformer.h.1.attn.c_attn.weight"], ours["blocks.1.attn.qkv.weight"])
    assert torch.equal(tensors["lm_head.weight"], tensors["transformer.wte.weight"])
    assert content["model_args"] | {"bias": 1} == dict(
        n_layer=2,
        n_head=4,
        n_embd=32,
        block_size=32,
        vocab_size=tensors["lm_head.weight"].shape[0],
        bias=1,
        dropout=0.0,
    )


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_llmc_gets_a_header_and_all_layers_of_each_kind(dtype: str, run: Path, tmp_path: Path) -> None:
    exporting.main([str(run), "--format", "llmc", "--dtype", dtype, "--out", str(tmp_path / "out")])
    content = (tmp_path / "out" / "gpt2.bin").read_bytes()
    model = load_run(run, CPU)[0]
    version, rows = {"fp32": 3, "bf16": 5}[dtype], 384
    header = np.frombuffer(content[:1024], "<i4")
    assert header[:8].tolist() == [20240326, version, 32, model.vocab_size, 2, 4, 32, rows]
    kind = torch.float32 if dtype == "fp32" else torch.bfloat16
    values = torch.frombuffer(bytearray(content[1024:]), dtype=kind)
    ours = model.state_dict()
    first = rows * 32 + 32 * 32 + 2 * 32 + 2 * 32  # wte, wpe, norm1
    qkv = torch.stack([ours[f"blocks.{i}.attn.qkv.weight"] for i in range(2)]).to(kind)
    assert torch.equal(values[first : first + qkv.numel()], qkv.view(-1))
    count = sum(p.numel() for p in model.parameters()) + (rows - ours["wte.weight"].shape[0]) * 32
    assert len(values) == count
    assert torch.equal(values[-32:], ours["norm_f.bias"].to(kind))


def test_bad_calls_are_one_sentence_with_exit_code_2(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    used = tmp_path / "used"
    used.mkdir()
    (used / "file").touch()
    for main, argv, message in [
        (importing.main, ["./nowhere", str(tmp_path / "x")], "./nowhere is not a folder"),
        (importing.main, [str(used), str(tmp_path / "x")], "config.json does not exist"),
        (exporting.main, [str(tmp_path), "--out", "x"], "neither a checkpoint nor a run folder"),
        (exporting.main, [str(run), "--out", str(used)], "exists, expected a new or empty folder"),
        (exporting.main, [str(run), "--out", "x", "--max-shard-size", "5 apples"], "expected a size like 5GB"),
        (exporting.main, [str(run), "--out", "x", "--format", "onnx"], "invalid choice: 'onnx'"),
    ]:
        assert run_command(lambda main=main, argv=argv: main(argv)) == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1, said
    assert not (tmp_path / "x").exists()


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**OLD_SIZES))
    model.save_pretrained(tmp_path / "hf")
    tokenizer.save(tmp_path / "hf" / "tokenizer.json")
    with pytest.raises(UserError, match=r"the tokenizer in .* has \d+ tokens, but the model's vocab_size is 97"):
        importing.import_model(tmp_path / "hf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_of_another_kind_is_kept_and_said(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Plain
    from tokenizers import models

    transformers.GPT2LMHeadModel(transformers.GPT2Config(**OLD_SIZES)).save_pretrained(tmp_path / "hf")
    Plain(models.WordLevel({"a": 0, "b": 1}, unk_token="a")).save(str(tmp_path / "hf" / "tokenizer.json"))
    assert "sample and chat cannot read text, because" in importing.import_model(tmp_path / "hf", tmp_path / "run")
    exporting.main([str(tmp_path / "run"), "--out", str(tmp_path / "out")])
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").encode("b") == [1]


def test_another_byte_level_bpe_is_read(tmp_path: Path) -> None:
    """As in Llama 3 and Qwen: another word pattern, NFC, special tokens behind the others."""
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Plain

    plain = Plain(models.BPE())
    split = pre_tokenizers.Split(Regex(r"\p{N}{1,3}| ?\p{L}+|[^\p{L}\p{N}]+"), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    plain.pre_tokenizer = pre_tokenizers.Sequence([split, as_bytes])
    plain.normalizer, plain.decoder = normalizers.NFC(), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    plain.train_from_iterator([TEXT * 20], trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet))
    plain.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    options = OLD_SIZES | dict(vocab_size=300)
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**options)).save_pretrained(tmp_path / "hf")
    plain.save(str(tmp_path / "hf" / "tokenizer.json"))
    (tmp_path / "hf" / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|im_end|>"}}')
    assert "cannot read" not in importing.import_model(tmp_path / "hf", tmp_path / "run")
    tokenizer = load_run(tmp_path / "run", CPU)[1]
    for text in (TEXT, "12345 \u00fc \U0001f600"):
        got = tokenizer.encode(text)
        assert got.tolist() == plain.encode(text).ids and tokenizer.decode(got) == text
    assert tokenizer.eot == tokenizer.specials["<|im_end|>"]
    assert tokenizer.encode("a<|im_end|>", specials=True)[-1] == tokenizer.eot
    assert tokenizer.eot not in tokenizer.encode("a<|im_end|>")


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A Llama with SentencePiece's tokenizer, a BOS, two EOS tokens and a chat template, as it lies on the hub."""
    folder = tmp_path / "llama"
    options = GQA | dict(vocab_size=324, max_position_embeddings=64)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**options))
    model.generation_config.eos_token_id = [2, 5]
    model.save_pretrained(folder)
    sentencepiece_folder(folder, **MODELS["bpe, as Llama 2"])
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_several_eos_tokens_and_a_bos_go_through(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Import, sample, chat, training and export know them; transformers gets the same ids from the export."""
    monkeypatch.chdir(tmp_path)
    assert "cannot read" not in importing.import_model(llama, tmp_path / "run")
    (tmp_path / "text.txt").write_text(TEXT * 50)
    cfg = load_config(["--init", "run", "--out", "tuned", *BRIEF])
    assert train(cfg) == 0 and train(cfg) == 0  # the second one resumes
    for name in ("run", "tuned"):
        model, tokenizer, path = load_run(name, CPU)
        assert Generator(model, tokenizer).eos == {2, 5} and tokenizer.prompt("cat")[0] == 1
        template = Template.of_run(path, "</s>", tokenizer.bos)
        assert Conversation(template, tokenizer, 60).ask("cat")[0] == [*tokenizer.prompt("cat"), 2]
        assert Conversation(Template(), tokenizer, 60).ask("cat")[0] == tokenizer.prompt("User: cat\nAssistant:")
        exporting.main([name, "--out", f"{name}-out"])
        theirs = transformers.AutoTokenizer.from_pretrained(f"{name}-out")
        for text in (TEXT, "  two  spaces ", "\u00fcn\u00efc 漢字 \U0001f600\n\n\tx", "a</s>b"):
            ids = theirs(text)["input_ids"]
            assert ids == [1, *tokenizer.encode(text, specials=True).tolist()]
            assert theirs.decode(ids) == tokenizer.decode(ids) and ("</s>" in text or theirs.decode(ids[1:]) == text)
        assert (theirs.eos_token_id, theirs.bos_token_id) == (2, 1) and "bos_token" in theirs.chat_template
        assert transformers.GenerationConfig.from_pretrained(f"{name}-out").eos_token_id == [2, 5]
        settings = json.loads((tmp_path / f"{name}-out" / "tokenizer_config.json").read_text())
        assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_a_run_starts_with_the_weights_of_another(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a run, a checkpoint or a folder of transformers; text is encoded with the tokenizer that comes along."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT * 50)
    exporting.main([str(run), "--out", "hf"])
    before, tokenizer, _ = load_run(run, CPU)
    for i, init in enumerate((run, run / "step_00000005", tmp_path / "hf")):
        extra = f"--lr 1e-30 --warmup-steps 0 --init {init} --out new{i}"
        assert train(load_config([*BRIEF, *extra.split()])) == 0
        after, kept, path = load_run(f"new{i}", CPU)
        assert (
            distance(logits(after, ids()), logits(before, ids())) < 1e-6 and kept.fingerprint == tokenizer.fingerprint
        )
        state = checkpoint.read_state(path)
        assert state["progress"]["step"] == 1
        assert state["init"] == {"name": "hf", "revision": None} if i == 2 else {"name": "run", "revision": "step 5"}
    data = next((tmp_path / "data").iterdir())
    assert load_tokenizer(data).fingerprint == tokenizer.fingerprint
    train_tokenizer([TEXT], 260).save(tmp_path / "other.json")
    tokenizer.save(tmp_path / "tokenizer.json")
    np.arange(600, dtype=np.uint16).__mod__(97).tofile("data.bin")
    for more, message in [
        (f"--init {run} --tokenizer other.json", "tokenizer is 'other.json', expected that of init"),
        ("--init nowhere", "init is 'nowhere', expected a run, a checkpoint or a folder with a model"),
        (f"--init {tmp_path}", "config.json does not exist"),
        (f"--init {run} --block-size 64 --batch-tokens 64", "block_size is 64, expected at most model.block_size 32"),
        ("--data data.bin --tokenizer other.json", "tokenizer.json is another tokenizer than other.json"),
    ]:
        with pytest.raises(UserError, match=message):
            train(load_config([*BRIEF, "--out", "x", *more.split()]))
