"""Distillation: losses and gradients equal those of TRL over 10 steps; teachers, the cache, memory, errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from preference_rows import VOCAB, T, rated_batch, rows
from small_models import model_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastgpt.core.errors import UserError
from fastgpt.data.batch import Batch
from fastgpt.finetune.distil import Distil
from fastgpt.finetune.teacher import GPTTeacher, TransformersTeacher
from fastgpt.finetune.teacher_cache import TeacherCache, keys_of, write_teacher_cache
from fastgpt.models.gpt import GPT
from fastgpt.ops.divergence import divergence_ref

LIMIT = 2e-5  # relative, of fp32 sums in another order


def model(**options: Any) -> GPT:
    return model_of(vocab_size=VOCAB, block_size=T, **options)


def teacher() -> GPT:
    """Return a model of another width and family, with another padding of its vocabulary."""
    return model(width=48, n_heads=2, positions="rope", tied=False, vocab_multiple=1)


def whole(student: GPT, frozen: GPT, batch: Batch, temperature: float, kind: str, beta: float) -> tuple[Tensor, Tensor]:
    """Return the sums of the cross-entropies and the divergences, each document by itself, from whole logits."""
    ce = divergence = torch.zeros((), dtype=torch.float64)
    assert batch.doc_ids is not None
    for row in range(len(batch.ids)):
        for doc in batch.doc_ids[row].unique():
            on = batch.doc_ids[row] == doc
            ids, targets = batch.ids[row, on][None], batch.targets[row, on]
            z, z_t = student(ids)[0], frozen(ids)[0].detach()
            ce = ce + F.cross_entropy(z, targets, reduction="sum")
            kl = divergence_ref(z, z_t, kind, beta, temperature)
            divergence = divergence + kl[targets != -100].sum()
    return ce, divergence


BATCH = rated_batch(rows(5))
CASES: dict[str, dict[str, Any]] = {
    "forward_kl": {},
    "reverse_kl": dict(kind="reverse_kl", ce=0.0),
    "jsd": dict(kind="jsd", beta=0.3, temperature=2.0, ce=0.25),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("bias", [False, True])
def test_loss_is_the_formula_on_each_document(case: str, bias: bool) -> None:
    """Packing leaks nothing into the teacher or the student; rows without targets add nothing."""
    o = CASES[case]
    student, frozen = model(head_bias=bias, tied=not bias), teacher()
    ce, divergence = whole(
        student, frozen, BATCH, o.get("temperature", 1.0), o.get("kind", "forward_kl"), o.get("beta", 0.5)
    )
    share = o.get("ce", 0.5)
    wanted = share * ce + (1 - share) * o.get("temperature", 1.0) ** 2 * divergence
    wanted.backward()
    grads = [p.grad for p in student.parameters()]
    student.zero_grad()
    task = Distil(GPTTeacher(frozen), **o)
    task.prepare(student)
    values = task.loss(student, BATCH)
    values[0].backward()
    assert len(values) == 1 + len(task.figures) and int(task.counted(BATCH)) == int((BATCH.targets != -100).sum())
    figures = torch.stack([wanted, ce, divergence] if share else [wanted, divergence])
    torch.testing.assert_close(values.double(), figures, rtol=1e-6, atol=0)
    for p, g in zip(student.parameters(), grads):
        torch.testing.assert_close(p.grad, g, rtol=1e-7, atol=1e-9)
    assert all(p.grad is None for p in frozen.parameters())


@pytest.mark.parametrize("kind,beta", [("forward_kl", 0.0), ("reverse_kl", 1.0), ("jsd", 0.5)])
def test_ten_steps_equal_trl(kind: Any, beta: float, tmp_path: Path) -> None:
    """A GPT-2 learns from a Llama: before each of 10 AdamW steps, TRL's loss and ours have one value and gradients."""
    gkd = pytest.importorskip("trl.experimental.gkd", reason="needs trl")
    from hf_models import make
    from trl_trainers import gradients, in_our_layout, models

    theirs, ours = models("gpt2", tmp_path)
    torch.manual_seed(2)
    frozen = make("llama").eval()
    task = Distil(TransformersTeacher(frozen), ce=0.0, kind=kind, beta=beta if kind == "jsd" else None)
    task.prepare(ours)
    optimizer = torch.optim.AdamW(theirs.parameters(), 1e-2)
    trainer = object.__new__(gkd.GKDTrainer)
    trainer.teacher_model, trainer.beta, trainer.use_liger_gkd_loss = frozen, beta, False
    for step in range(10):
        batch, features = unpacked(step)
        ours.load_state_dict(in_our_layout(theirs, theirs.state_dict(), tmp_path))
        theirs.zero_grad()
        expected = trainer.compute_loss(theirs, features)
        expected.backward()
        ours.zero_grad()
        value = task.loss(ours, batch)[0] / task.counted(batch)
        value.backward()
        assert value.item() == pytest.approx(expected.item(), rel=LIMIT)
        wanted = gradients(theirs, tmp_path)
        for name, p in ours.named_parameters():
            assert p.grad is not None
            bound = LIMIT * (wanted[name].norm() + 0.01 * max(w.norm() for w in wanted.values()))
            assert (p.grad - wanted[name]).norm() <= bound, name
        optimizer.step()


def unpacked(step: int) -> tuple[Batch, dict[str, Tensor]]:
    """Return the same sequences as our packed batch and as the padded features of TRL's collator."""
    data = rows(4, seed=step)
    batch = rated_batch(data)
    width = max(len(r.prompt) + len(r.first) for r in data)
    ids, labels, mask = torch.zeros(4, width, dtype=torch.int64), torch.full((4, width), -100), torch.zeros(4, width)
    for i, r in enumerate(data):
        n, text = len(r.prompt), torch.tensor(r.prompt + r.first)
        ids[i, : len(text)], mask[i, : len(text)], labels[i, n : len(text)] = text, 1, text[n:]
    return batch, dict(input_ids=ids, attention_mask=mask.long(), labels=labels)


def test_a_teacher_of_transformers_equals_the_same_gpt(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from trl_trainers import models

    theirs, ours = models("llama", tmp_path)
    got = TransformersTeacher(theirs).hidden(BATCH)
    kept = BATCH.extra["sequence"].reshape(-1) >= 0
    torch.testing.assert_close(got[kept], GPTTeacher(ours).hidden(BATCH)[kept], rtol=1e-4, atol=1e-5)


def test_a_teacher_that_caps_its_logits_is_refused() -> None:
    transformers = pytest.importorskip("transformers")
    shape = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    gemma = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**shape, num_key_value_heads=1, head_dim=16))
    with pytest.raises(UserError, match="Gemma2ForCausalLM scales or caps its logits after the head"):
        TransformersTeacher(gemma)
    gemma.config.final_logit_softcapping = None
    TransformersTeacher(gemma)
    with pytest.raises(UserError, match="the teacher caps its logits at 3"):
        GPTTeacher(model(logit_softcap=3.0))


class LargestStorages(TorchDispatchMode):
    """Records the largest sum of bytes of tensors over `least` bytes that were alive at once."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.most = least, 0
        self.alive: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from torch.multiprocessing.reductions import StorageWeakRef

        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.untyped_storage().nbytes() > self.least:
                self.alive[t.untyped_storage()._cdata] = (
                    StorageWeakRef(t.untyped_storage()),
                    t.untyped_storage().nbytes(),
                )
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        self.most = max(self.most, sum(size for _, size in self.alive.values()))
        return out


def test_a_step_needs_less_than_half_of_two_whole_logit_tensors() -> None:
    """Forward and backward on 1024 tokens: all tensors larger than a weight or a hidden state, at once."""
    v, shape = 4000, dict(n_layers=1, n_heads=1, width=8, block_size=1024, vocab_multiple=1)
    student, frozen = (model_of(vocab_size=v, **shape).float() for _ in range(2))
    ids = torch.randint(0, v, (1, 1024), generator=torch.Generator().manual_seed(0))
    batch, two = Batch(ids, ids.roll(-1, 1)), 2 * 1024 * v * 4
    for task, enough in ((Distil(GPTTeacher(frozen), ce=0.0), True), (None, False)):
        with LargestStorages(least=max(p.numel() for p in student.parameters()) * 4) as seen:
            if task is None:
                divergence_ref(student(ids)[0], frozen(ids)[0].detach(), "forward_kl", 0.5, 1.0).sum().backward()
            else:
                task.loss(student, batch)[0].backward()
        assert (seen.most < two / 2) == enough, seen.most / two


def write(path: Path, frozen: GPT, k: int, temperature: float = 1.0) -> TeacherCache:
    write_teacher_cache(path, GPTTeacher(frozen), [BATCH], k, VOCAB, temperature)
    return TeacherCache(path)


@pytest.mark.parametrize("case", CASES)
def test_the_cache_of_all_tokens_is_the_teacher(case: str, tmp_path: Path) -> None:
    """With k = V the loss and the gradients are those with the teacher itself, whatever the packing."""
    o, student, frozen = CASES[case], model(), teacher()
    cache = write(tmp_path / "t.safetensors", frozen, VOCAB, o.get("temperature", 1.0))
    found = []
    for task, batch in (
        (Distil(GPTTeacher(frozen), **o), BATCH),
        (Distil(cache, **o), repacked(BATCH)),
    ):
        task.prepare(student)
        student.zero_grad()
        values = task.loss(student, batch)
        values[0].backward()
        found.append([values.detach().double(), *(p.grad.clone() for p in student.parameters() if p.grad is not None)])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def repacked(batch: Batch) -> Batch:
    """Return the rows in reverse order, with other numbers of documents."""
    assert batch.doc_ids is not None and batch.positions is not None
    return Batch(batch.ids.flip(0), batch.targets.flip(0), batch.doc_ids.flip(0) + 7, batch.positions.flip(0))


def test_the_cache_of_a_few_tokens_is_a_lower_bound_and_has_a_gradient(tmp_path: Path) -> None:
    student, frozen = model(), teacher()
    wanted = [float(Distil(GPTTeacher(frozen), ce=0.0).loss(student, BATCH)[1])]
    for k in (40, 8, 1):
        task = Distil(write(tmp_path / f"{k}.safetensors", frozen, k), ce=0.0)
        student.zero_grad()
        values = task.loss(student, BATCH)
        values[0].backward()
        assert 0 < float(values[1]) < wanted[-1]
        assert any(bool(p.grad.any()) for p in student.parameters() if p.grad is not None)
        wanted.append(float(values[1]))


def test_keys_depend_on_the_document_up_to_the_token_alone() -> None:
    keys = keys_of(BATCH)
    first = int((BATCH.extra["sequence"][0] == 0).sum())
    second = Batch(BATCH.ids[:1, first:], BATCH.targets[:1, first:], BATCH.doc_ids[:1, first:])  # type: ignore[index]
    assert torch.equal(keys_of(second)[0], keys[0, first:])
    assert torch.equal(keys_of(Batch(BATCH.ids[:1, :first], BATCH.targets))[0], keys[0, :first])
    text = torch.tensor([[5, 6, 7, 8], [6, 5, 7, 8], [5, 6, 8, 7], [5, 5, 5, 5]])
    assert keys_of(Batch(text, text)).unique().numel() == 13, "[5] begins three of them, [5, 6] two"


def test_errors(tmp_path: Path) -> None:
    frozen, path = GPTTeacher(teacher()), tmp_path / "t.safetensors"
    for options, message in (
        (dict(ce=1.0), "ce is 1, expected at least 0 and less than 1"),
        (dict(kind="kl"), "kind is 'kl', expected one of forward_kl, reverse_kl, jsd"),
        (dict(beta=0.5), "beta has no effect with kind forward_kl"),
        (dict(kind="jsd", beta=1.0), "beta is 1, expected a number between 0 and 1"),
        (dict(temperature=0.0), "temperature is 0, expected a number above 0"),
    ):
        with pytest.raises(UserError, match=message):
            Distil(frozen, **options)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="the teacher has 97 tokens, expected the student's 98"):
        Distil(frozen).prepare(model_of(vocab_size=98, block_size=T))
    with pytest.raises(UserError, match="k is 98, expected 1 to 97"):
        write_teacher_cache(path, frozen, [BATCH], 98, VOCAB)
    with pytest.raises(UserError, match="t.safetensors is missing"):
        TeacherCache(path)
    cache = write(path, frozen.model, 4, temperature=2.0)
    with pytest.raises(UserError, match="made at temperature 2, expected 1"):
        Distil(cache)
    with pytest.raises(UserError, match="has nothing for token 1 of row 0 of a batch"):
        Distil(cache, temperature=2.0).loss(model(), rated_batch(rows(5, seed=9)))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t.safetensors"]
