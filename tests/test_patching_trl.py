"""TRL's trainers give the same losses, metrics and weights with fastgpt's linear cross-entropy under them."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import patched_pairs
import pytest
import torch
from hf_models import make
from patched_pairs import Trial, kinds
from preference_rows import VOCAB
from torch import Tensor
from trl_trainers import LIMIT, PLAIN, words

import fastgpt
from fastgpt.core.errors import UserError
from fastgpt.models.config import ModelConfig
from fastgpt.models.gpt import GPT
from fastgpt.models.weights import save_pretrained
from fastgpt.patching import trl as patching

pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

DATA: dict[str, dict[str, list[Any]]] = {
    "DPO": dict(prompt=["w3 w4", "w5"], chosen=["w5 w6", "w7"], rejected=["w7", "w8 w9"]),
    "KTO": dict(prompt=["w3 w4", "w5"], completion=["w5 w6", "w7 w8"], label=[True, False]),
    "GRPO": dict(prompt=["w3 w4", "w5 w6"]),
    "SFT": dict(prompt=["w3 w4", "w5"], completion=["w5 w6", "w7 w8 w9"]),
}
DATA["ORPO"] = DATA["DPO"]
LLAMA: dict[str, Any] = dict(norm="rms", activation="swiglu", mlp_width=48, positions="rope", tied=False)


def trained(
    kind: str,
    family: str | Path | Callable[[int], Any],
    folder: Path,
    patch: bool,
    metrics: bool = True,
    layers: str = "",
    rows: dict[str, list[Any]] | None = None,
    **options: Any,
) -> tuple[dict[str, Any], list[Any]]:
    """Return the weights and the log of a trainer's steps, two unless max_steps says more, with SGD: AdamW's steps
    depend on the sign of gradients that are rounding alone.

    Args:
        family: of a random model, the folder of one, or a function that makes one from a seed.
        rows: the data; DATA's of the trainer if None.
    """
    import trl
    from trl.experimental import orpo

    where: Any = orpo if kind == "ORPO" else trl
    model = opened(family)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if layers == "before":
        fastgpt.patch(model)
    extra: dict[str, Any] = {}
    if kind in ("DPO", "KTO"):
        extra["ref_model"] = opened(family, seed=1)
    if kind == "GRPO":
        options |= dict(num_generations=2, max_completion_length=4)
        if rows is not None:
            model.generate = writer()
        extra["reward_funcs"] = lambda completions, **_: [float(len(set(text))) for text in completions]
    config = getattr(where, f"{kind}Config")(**dict(
        output_dir=str(folder), max_steps=2, learning_rate=1e-2, logging_steps=1, save_strategy="no", seed=0,
        per_device_train_batch_size=2, disable_tqdm=True, optim="sgd",
        max_grad_norm=0.0, lr_scheduler_type="constant", **PLAIN) | options,
    )  # fmt: skip
    data = datasets.Dataset.from_dict(copy.deepcopy(DATA[kind] if rows is None else rows))
    trainer = getattr(where, f"{kind}Trainer")(
        model, args=config, train_dataset=data, processing_class=words(), **extra
    )
    if patch:
        patching.patch_trainer(trainer, metrics)
    if layers == "after":
        fastgpt.patch(model)
    trainer.train()
    return dict(model.state_dict()), trainer.state.log_history


def opened(family: str | Path | Callable[[int], Any], seed: int = 0) -> Any:
    """Return a random model of a family, the model in a folder, or what a function makes."""
    if callable(family):
        return family(seed)
    if isinstance(family, str):
        return make(family, seed=seed)
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(family)


@contextmanager
def counted() -> Iterator[list[int]]:
    """Count the rows of each call of the op."""
    calls: list[int] = []
    op = patching.ops.linear_log_probs
    with pytest.MonkeyPatch.context() as m:
        m.setattr(patching.ops, "linear_log_probs", lambda x, *a, **k: (calls.append(len(x)), op(x, *a, **k))[1])
        yield calls


def writer() -> Callable[..., Tensor]:
    """Return a generate() whose completions no weights decide, so the samples of two trainers are the same."""
    g = torch.Generator().manual_seed(0)

    def generate(input_ids: Tensor, **_: Any) -> Tensor:
        return torch.cat([input_ids, torch.randint(3, VOCAB, (len(input_ids), 4), generator=g)], 1)

    return generate


SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in (("DPO", "gpt2"), ("KTO", "llama"), ("SFT", "llama"))]


@pytest.mark.parametrize("kind, family", [("DPO", "llama"), ("ORPO", "llama"), ("GRPO", "llama"), *SLOW])
def test_two_steps_are_those_of_the_trainer_alone(kind: str, family: str, tmp_path: Path) -> None:
    options = dict(temperature=0.8) if kind == "GRPO" else {}
    expected, log = trained(kind, family, tmp_path / "a", patch=False, **options)
    with counted() as calls:
        found, ours_log = trained(kind, family, tmp_path / "b", patch=True, **options)
    assert len(calls) >= 2
    start = make(family).state_dict()
    for name, p in expected.items():
        moved = (p - start[name]).norm()
        assert moved > 0 and (found[name] - p).norm() <= 1e-3 * moved + 1e-6 * p.norm(), name
    for row, wanted in zip(ours_log, log, strict=True):
        lost = {"logits/chosen", "logits/rejected"} if kind == "ORPO" else set()
        assert wanted.keys() - row.keys() == lost & wanted.keys()
        for name in row.keys() - {name for name in row if "time" in name or "second" in name}:
            assert row[name] == pytest.approx(wanted[name], rel=1e-3, abs=1e-4), name


@pytest.mark.slow
@pytest.mark.parametrize("layers", ["before", "after"])
def test_the_layers_may_be_patched_too(layers: str, tmp_path: Path) -> None:
    expected, log = trained("DPO", "llama", tmp_path / "a", patch=False)
    found, ours = trained("DPO", "llama", tmp_path / "b", patch=True, layers=layers)
    for name, p in expected.items():
        torch.testing.assert_close(found[name], p, rtol=1e-3, atol=1e-5, msg=name)
    assert [row["loss"] for row in ours[:2]] == pytest.approx([row["loss"] for row in log[:2]], rel=1e-4)


def tiny(kind: str, seed: int = 0) -> Any:
    """Return a tiny model of this type of transformers; of another seed, with other weights."""
    model = patched_pairs.make(kind)
    with torch.no_grad():
        for i, p in enumerate(model.parameters() if seed else ()):
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
    return model


@kinds(others=pytest.mark.extended)
@pytest.mark.parametrize("trainer", ["SFT", "DPO", "GRPO"])
def test_trainers_of_patched_models(kind: str, trainer: str, tmp_path: Path) -> None:
    """The model is patched, the trainer is not."""
    family, options = functools.partial(tiny, kind), dict[str, Any](rows=DATA[trainer], patch=False)
    expected, log = trained(trainer, family, tmp_path / "a", **options)
    found, ours = trained(trainer, family, tmp_path / "b", layers="before" if Trial.patching else "", **options)
    start = tiny(kind).state_dict()
    for name, p in expected.items():
        moved = (p - start[name]).norm()
        assert (found[name] - p).norm() <= 1e-3 * moved + 1e-6 * p.norm(), name
    assert [row["loss"] for row in ours[:2]] == pytest.approx([row["loss"] for row in log[:2]], rel=1e-3, abs=1e-5)


def text(draw: random.Random, longest: int) -> str:
    return " ".join(f"w{draw.randint(3, VOCAB - 1)}" for _ in range(draw.randint(1, longest)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["SFT", "DPO", "GRPO"])
@pytest.mark.parametrize("shape", [{}, LLAMA], ids=["gpt2", "llama"])
def test_twenty_steps_on_an_exported_model(kind: str, shape: dict[str, Any], tmp_path: Path) -> None:
    """A model of fastgpt goes to transformers; its layers and TRL's trainer are patched."""
    size: dict[str, Any] = dict(n_layers=2, n_heads=4, width=32, vocab_size=VOCAB, block_size=32)
    save_pretrained(GPT(ModelConfig(**size, **shape), generator=torch.Generator().manual_seed(3)), tmp_path / "model")
    draw = random.Random(0)
    columns = dict(SFT=("prompt", "completion"), DPO=("prompt", "chosen", "rejected"), GRPO=("prompt",))[kind]
    rows = {name: [text(draw, 6) for _ in range(16)] for name in columns}
    more: dict[str, Any] = dict(rows=rows, max_steps=20, learning_rate=0.5)
    if kind == "GRPO":  # else the loss is 0, though its gradient is not
        more |= dict(num_iterations=2, beta=0.1)
    expected, log = trained(kind, tmp_path / "model", tmp_path / "a", patch=False, **more)
    with counted() as calls:
        found, ours = trained(kind, tmp_path / "model", tmp_path / "b", patch=True, layers="before", **more)
    assert len(calls) >= 20
    losses, wanted = (torch.tensor([row["loss"] for row in rows if "loss" in row]) for rows in (ours, log))
    assert len(wanted) == 20 and (losses - wanted).norm() <= LIMIT * wanted.norm()
    start = opened(tmp_path / "model").state_dict()
    for name, p in expected.items():
        moved = (p - start[name]).norm()
        assert moved > 0 and (found[name] - p).norm() <= 1e-3 * moved + 1e-6 * p.norm(), name


def test_metrics_that_need_logits_can_be_left_out(tmp_path: Path) -> None:
    expected, log = trained("DPO", "llama", tmp_path / "a", patch=False)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(patching, "_statistics", None)  # not called
        found, ours = trained("DPO", "llama", tmp_path / "b", patch=True, metrics=False)
    assert ours[0]["loss"] == pytest.approx(log[0]["loss"], rel=1e-4)
    assert log[0].keys() - ours[0].keys() == set(patching.METRICS) and ours[0].keys() < log[0].keys()


def test_the_op_is_restored_and_a_second_call_changes_nothing(tmp_path: Path) -> None:
    from trl.trainer import utils

    before = utils._ChunkedLogProbFunction, utils._use_triton

    class Trainer:
        args, ref_model, is_encoder_decoder = None, None, False

        class model:
            @staticmethod
            def forward(**kwargs: Any) -> Any:
                assert kwargs.get("fused_lm_head", False) == (utils._ChunkedLogProbFunction is not before[0])
                if kwargs.get("fail"):
                    raise KeyError("fails")

    patching.patch_trainer(Trainer)
    once = Trainer.model.forward
    patching.patch_trainer(Trainer)
    assert Trainer.model.forward is once
    once()
    once(fused_lm_head=True)
    with pytest.raises(KeyError):
        once(fused_lm_head=True, fail=True)
    assert (utils._ChunkedLogProbFunction, utils._use_triton) == before


def test_what_the_op_lacks_is_refused() -> None:
    class Args:
        top_entropy_quantile = 0.2

    class Trainer:
        args, _entropy_bonus_enabled = Args, False

    with pytest.raises(UserError, match="need metrics=True"):
        patching.patch_trainer(Trainer, metrics=False)
    Trainer._entropy_bonus_enabled = True
    with pytest.raises(UserError, match="entropy_coef"):
        patching.patch_trainer(Trainer)


def test_softcap_scale_and_temperature_are_those_of_the_op_of_trl() -> None:
    from trl.trainer import utils

    g = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(s, generator=g).requires_grad_() for s in ((5, 8), (11, 8), (11,)))
    target, up = torch.tensor([0, 10, 3, 3, 7]), torch.randn(5, generator=g)
    for softcap, scale, temperature in ((None, 1.0, 1.0), (2.0, 0.5, 0.7)):
        arguments = (x, w, b, target, temperature, 4, softcap, scale, ("log_probs", *patching.FIELDS))
        wanted, found = utils._ChunkedLogProbFunction.apply(*arguments), patching._log_probs(True, *arguments)
        for ours, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        gradients = [torch.autograd.grad(out[0], (x, w, b), up) for out in (found, wanted)]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    assert patching._log_probs(True, x[:0], w, b, target[:0], 1.0, 4)[0].shape == (0,)
