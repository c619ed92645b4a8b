"""Task heads: pooling in packed rows, and models of transformers in and out with the same scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import CASES
from small_models import model_of
from torch import Tensor

from fastgpt.core.errors import UserError
from fastgpt.data import train_tokenizer
from fastgpt.finetune.head_files import head_of, load_pretrained, save_pretrained, write_tokenizer
from fastgpt.finetune.heads import HeadConfig, attach, last_tokens, sequence_scores, token_scores

transformers = pytest.importorskip("transformers")
PAD = 7
LIMIT = 1e-5  # of the scores' scale
FAMILIES = ["gpt2", "gpt_neo", "gptj", "gpt_neox", "llama", "mistral", "qwen2", "qwen3", "gemma"]
THREE = ("bad", "fair", "good")


def close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= LIMIT * b.abs().max())


def texts() -> list[Tensor]:
    """Return three sequences of different lengths without the padding token, but for one that ends with it."""
    g = torch.Generator().manual_seed(3)
    drawn = [torch.randint(8, 50, (n,), generator=g) for n in (9, 4, 6)]
    drawn[2][-1] = PAD
    return drawn


def padded(sequences: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return ids (S, T), padded on the right, and the mask."""
    ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=PAD)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(s) for s in sequences], batch_first=True)
    return ids, mask


def packed(sequences: list[Tensor]) -> dict[str, Tensor]:
    """Put all sequences into one row of 24 tokens, in another order than their numbers, with padding at the end."""
    order = [2, 0, 1]
    ids, number = torch.full((1, 24), PAD), torch.full((1, 24), -1)
    positions, at = torch.zeros(1, 24, dtype=torch.int64), 0
    for i in order:
        n = len(sequences[i])
        ids[0, at : at + n], number[0, at : at + n] = sequences[i], i
        positions[0, at : at + n] = torch.arange(n)
        at += n
    return dict(ids=ids, sequence=number, positions=positions, doc_ids=number.int())


def headed(kind: Any = "classification", labels: tuple[str, ...] = THREE, **options: Any) -> tuple[Any, HeadConfig]:
    model, head = model_of(block_size=32).eval(), HeadConfig(kind, labels, pad_id=PAD, **options)
    attach(model, head, torch.Generator().manual_seed(1))
    return model, head


def test_last_token_that_is_not_padding() -> None:
    ids = torch.tensor([[5, 5, PAD, 6, 6, PAD, PAD]])
    sequence = torch.tensor([[1, 1, 1, 3, 3, 3, -1]])
    assert last_tokens(ids, sequence, 4, PAD).tolist() == [-1, 1, -1, 4]
    assert last_tokens(ids, sequence, 4, None).tolist() == [-1, 2, -1, 5]


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_packed_sequences_score_as_they_do_alone(pooling: Any) -> None:
    model, head = headed(pooling=pooling)
    scores = sequence_scores(model, head, count=5, **packed(texts()))
    assert scores.shape == (5, 3)
    for i, text in enumerate(texts()):
        alone = sequence_scores(model, head, text[None], torch.zeros(1, len(text), dtype=torch.int64), 1)
        h = model.hidden(text[None])[0]
        own = h.mean(0) if pooling == "mean" else h[len(text) - 1 - int(text[-1] == PAD)]
        assert close(alone[0], (model.head.weight @ own).float())
        assert close(scores[i], alone[0])


def test_no_gradient_comes_from_absent_sequences_or_other_documents() -> None:
    model, head = headed(pooling="last")
    batch = packed(texts())
    embedded: list[Tensor] = []
    model.wte.register_forward_hook(lambda *args: embedded.append(args[2]) or args[2].retain_grad())
    scores = sequence_scores(model, head, count=5, **batch)
    scores[0].sum().backward()
    touched = embedded[0].grad.abs().sum(-1) > 0
    assert torch.equal(touched, batch["sequence"] == 0)


def test_the_model_returns_scores_of_tokens() -> None:
    model, _ = headed("tags", ("O", "B-x", "I-x"))
    ids = texts()[0][None]
    assert model(ids).shape == (1, 9, 3) and torch.equal(model(ids).float(), token_scores(model, ids))
    assert {n for n, _ in model.named_parameters() if n.startswith("head")} == {"head.weight", "head.bias"}


def theirs(case: str, kind: str, **options: Any) -> Any:
    """Return a model of transformers with a head, with weights that make every detail count."""
    name, sizes = CASES[case]
    config = getattr(transformers, f"{name}Config")(**sizes, bos_token_id=1, eos_token_id=2, pad_token_id=PAD)
    config.id2label = dict(enumerate(options.get("labels", THREE)))
    config.label2id = {label: i for i, label in config.id2label.items()}
    torch.manual_seed(0)
    model = getattr(transformers, f"AutoModelFor{kind}").from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("case", FAMILIES)
def test_sequence_classification_of_transformers_in_and_out(case: str, tmp_path: Path) -> None:
    there = theirs(case, "SequenceClassification")
    there.save_pretrained(tmp_path / "in")
    ids, mask = padded(texts())
    expected = there(ids, attention_mask=mask).logits
    model, head = load_pretrained(tmp_path / "in")
    assert head == HeadConfig("classification", THREE, pad_id=PAD)
    scores = sequence_scores(model, head, count=3, **packed(texts()))
    assert close(scores, expected)
    save_pretrained(model, tmp_path / "out", head, model_type=case)
    back, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert type(back) is type(there) and not any(info.values())
    assert torch.equal(back(ids, attention_mask=mask).logits, expected)
    assert back.config.id2label == dict(enumerate(THREE)) and back.config.label2id["good"] == 2
    assert back.config.pad_token_id == PAD and back.config.problem_type == "single_label_classification"


@pytest.mark.parametrize("case", [f for f in FAMILIES if f != "gptj"])
def test_token_classification_of_transformers_in_and_out(case: str, tmp_path: Path) -> None:
    there = theirs(case, "TokenClassification")
    there.save_pretrained(tmp_path / "in")
    ids, mask = padded(texts())
    expected = there(ids, attention_mask=mask).logits
    model, head = load_pretrained(tmp_path / "in")
    assert head == HeadConfig("tags", THREE, pad_id=PAD)
    assert close(token_scores(model, ids)[mask.bool()], expected[mask.bool()])
    save_pretrained(model, tmp_path / "out", head, model_type=case)
    back, info = transformers.AutoModelForTokenClassification.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert type(back) is type(there) and not any(info.values())
    assert torch.equal(back(ids, attention_mask=mask).logits, expected)


@pytest.mark.parametrize("kind", ["regression", "reward"])
@pytest.mark.parametrize("tied", [True, False])
def test_one_output_goes_out_as_regression(kind: Any, tied: bool, tmp_path: Path) -> None:
    model, head = model_of(tied=tied, block_size=32).float().eval(), HeadConfig(kind, pad_id=PAD)
    attach(model, head, torch.Generator().manual_seed(1))
    save_pretrained(model, tmp_path / "out", head)
    back = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    ids, mask = padded(texts())
    assert back.config.num_labels == 1
    scores = sequence_scores(model, head, count=3, **packed(texts()))
    assert close(back(ids, attention_mask=mask).logits, scores)
    assert head_of(json.loads((tmp_path / "out/config.json").read_text())).kind == "regression"


def test_a_pipeline_of_transformers_classifies_several_texts_at_once(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["to be or not to be"], 260)
    model = model_of(vocab_size=tokenizer.n_vocab, block_size=32).float().eval()
    head = HeadConfig("classification", ("no", "yes"), pad_id=tokenizer.eot)
    attach(model, head, torch.Generator().manual_seed(1))
    save_pretrained(model, tmp_path / "out", head)
    write_tokenizer(tmp_path / "out", tokenizer, head, 32)
    said = transformers.pipeline("text-classification", model=str(tmp_path / "out"), device="cpu")
    spoken = ["to be", "not to be or to be"]
    for text, answer in zip(spoken, said(spoken, batch_size=2, top_k=None), strict=True):
        ids = torch.from_numpy(tokenizer.encode(text).astype("int64"))[None]
        scores = sequence_scores(model, head, ids, torch.zeros_like(ids), 1)[0].softmax(0).detach()
        given = {a["label"]: a["score"] for a in answer}
        assert given == pytest.approx({"no": float(scores[0]), "yes": float(scores[1])}, abs=1e-5)


def test_the_seed_decides_the_head_and_its_record_returns() -> None:
    a, head = headed()
    b, _ = headed()
    assert torch.equal(a.head.weight, b.head.weight) and a.head.weight.std() > 0
    assert HeadConfig.from_dict(json.loads(json.dumps(head.to_dict()))) == head


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(kind="choice"), "kind is 'choice', expected one of classification, regression"),
        (dict(kind="classification", labels=("one",)), "has 1 labels, expected at least 2"),
        (dict(kind="classification", labels=("a", "b", "a")), "label 'a' is given twice"),
        (dict(kind="regression", labels=("a", "b")), "regression has labels a, b, expected none"),
        (dict(kind="tags", labels=("a", "b"), pooling="mean"), "no effect on tags"),
    ],
)
def test_a_head_that_makes_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        HeadConfig(**options)


def test_exports_that_transformers_cannot_hold(tmp_path: Path) -> None:
    model, head = headed(pooling="mean")
    with pytest.raises(UserError, match="pools by mean"):
        save_pretrained(model, tmp_path / "out", head)
    with pytest.raises(UserError, match="no pad_token_id"):
        save_pretrained(model, tmp_path / "out", HeadConfig("classification", THREE))
    assert not list(tmp_path.iterdir())


def test_folders_whose_head_does_not_fit(tmp_path: Path) -> None:
    theirs("gpt2", "SequenceClassification").save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    faults: list[tuple[dict[str, Any], str]] = [
        ({"architectures": ["GPT2LMHeadModel"]}, "expected ...ForSequenceClassification or"),
        ({"id2label": {"0": "a", "1": "b"}}, r"another shape score.weight \[3, 32\] for \[2, 32\]"),
        ({"architectures": ["GPT2ForTokenClassification"]}, "score.weight"),
        ({"problem_type": "multi_label_classification"}, "expected single_label_classification or regression"),
    ]
    for fault, message in faults:
        (tmp_path / "config.json").write_text(json.dumps(settings | fault))
        with pytest.raises(UserError, match=message):
            load_pretrained(tmp_path)
