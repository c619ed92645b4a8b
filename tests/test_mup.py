"""µP: nothing changes at the base width; at others initial values, rates, logits and scores scale as the table says."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import ROPE, model_of

from fastgpt import train
from fastgpt.bench import coordinates
from fastgpt.core.backend import use
from fastgpt.core.errors import UserError
from fastgpt.finetune.adapter import adapter_config
from fastgpt.finetune.lora import Lora, add_lora
from fastgpt.models.cache import KVCache
from fastgpt.models.config import ModelConfig
from fastgpt.models.gpt import GPT
from fastgpt.models.weights import load_pretrained, save_pretrained
from fastgpt.models.weights.mup import folded
from fastgpt.optim import AdamW, MuonAdamW
from fastgpt.training import initial
from fastgpt.training.config import load_config

BASE = ModelConfig(n_layers=2, n_heads=2, width=32, vocab_size=50, vocab_multiple=32, block_size=16)
WIDE = dataclasses.replace(BASE, width=128, n_heads=8, mup_base_width=32)
IDS = torch.randint(50, (2, 16), generator=torch.Generator().manual_seed(1))
MATRICES = ("qkv.weight", "attn.proj.weight", "mlp.up.weight", "mlp.down.weight")


def seeded(config: ModelConfig) -> GPT:
    return GPT(config, generator=torch.Generator().manual_seed(0))


def groups_of(model: GPT, **options: Any) -> dict[str, tuple[float, float]]:
    """Return learning rate ratio and weight decay of each parameter by name."""
    names = {p: name for name, p in model.named_parameters()}
    groups = model.param_groups(0.1, **options)
    return {names[p]: (g["lr_ratio"], g["weight_decay"]) for g in groups for p in g["params"]}


@pytest.mark.parametrize("muon", [False, True], ids=["adamw", "muon"])
def test_the_base_width_has_the_bits_of_no_mup(muon: bool) -> None:
    found = []
    every: list[dict[str, Any]] = [{}, dict(mup_base_width=32), dict(mup_base_width=32, mup_base_head_dim=16)]
    for options in every:
        model = seeded(dataclasses.replace(BASE, **options))
        optimizer = (MuonAdamW if muon else AdamW)(model.param_groups(0.1, muon=muon), lr=1e-2)
        for _ in range(3):
            loss = model(IDS[:, :-1], IDS[:, 1:])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append((loss, model.state_dict(), groups_of(model, muon=muon)))
    for loss, state, groups in found[1:]:
        assert torch.equal(loss, found[0][0]) and groups == found[0][2]
        assert all(torch.equal(t, found[0][1][name]) for name, t in state.items())


def test_hidden_matrices_begin_smaller() -> None:
    plain = dict(seeded(dataclasses.replace(WIDE, mup_base_width=None)).named_parameters())
    for name, p in seeded(WIDE).named_parameters():
        factor = math.sqrt(32 / 128) if name.endswith(MATRICES) else 1.0
        torch.testing.assert_close(p, factor * plain[name])


@pytest.mark.parametrize(("muon", "factor"), [(False, 1 / 4), (True, 1 / 2)], ids=["adamw", "muon"])
def test_rates_of_hidden_matrices_fall_with_the_width(muon: bool, factor: float) -> None:
    model = seeded(dataclasses.replace(WIDE, tied=False))
    for name, (ratio, decay) in groups_of(model, muon=muon, lr_ratios={"wte": 3.0, "up": 2.0}).items():
        own = 3.0 if "wte" in name else 2.0 if "up" in name else 1.0
        share = factor if name.endswith(MATRICES) else 1.0
        assert ratio == own * share, name
        assert decay * share == (0.0 if "norm" in name or name.endswith("bias") else 0.1), name


@pytest.mark.parametrize("tied", [True, False])
def test_logits_scale_with_the_base(tied: bool) -> None:
    """Loss, logits, and logits from a cache agree with those of the formula."""
    options: dict[str, Any] = dict(tied=tied, head_bias=not tied, width=64)
    model, plain = model_of(mup_base_width=16, **options).eval(), model_of(**options).eval()
    h = plain.hidden(IDS)
    bias = 0.0 if tied else plain.head.bias[:50]
    expected = h @ plain.head_weight[:50].t() / 4 + bias
    torch.testing.assert_close(model(IDS), expected)
    loss = torch.nn.functional.cross_entropy(expected[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    torch.testing.assert_close(model(IDS[:, :-1], IDS[:, 1:]), loss, check_dtype=False)
    cache = KVCache(model.config, 2, 16, model.wte.weight)
    parts = [model(IDS[:, i : i + 4], kv_cache=cache) for i in range(0, 16, 4)]
    torch.testing.assert_close(torch.cat(parts, 1), expected)


def test_scores_scale_with_the_size_of_a_head() -> None:
    heads: dict[str, Any] = dict(width=64, n_heads=2, mup_base_width=16, mup_base_head_dim=8)
    assert ModelConfig(**heads).score_scale == math.sqrt(8) / 32
    scaled = model_of(**heads)
    explicit = model_of(width=64, n_heads=2, mup_base_width=16, attn_scale=math.sqrt(8) / 32)
    default = model_of(width=64, n_heads=2, mup_base_width=16)
    assert torch.equal(scaled(IDS), explicit(IDS)) and not torch.allclose(scaled(IDS), default(IDS))


FOLDED: dict[str, dict[str, Any]] = {
    "learned, tied": {},
    "heads of another size": dict(mup_base_head_dim=2),
    "rope, grouped heads": dict(**ROPE, n_kv_heads=2, mup_base_head_dim=2),
    "head norm": dict(**ROPE, qk_norm=True, mup_base_head_dim=2),
    "offset, head bias": dict(
        norm="rms", norm_offset=1.0, tied=False, head_bias=True, qk_norm=True, mup_base_head_dim=2
    ),
}


@pytest.mark.parametrize("name", FOLDED)
def test_weights_without_mup_give_the_same_logits(name: str) -> None:
    model = model_of(mup_base_width=8, **FOLDED[name])
    before = {n: p.clone() for n, p in model.named_parameters()}
    config, read = folded(model.config, lambda n: dict(model.named_parameters())[n])
    assert config.mup_base_width is config.mup_base_head_dim is config.attn_scale is None
    plain = model_of(**dataclasses.asdict(config))
    plain.load_state_dict({n: read(n) for n in before}, strict=False)
    torch.testing.assert_close(plain(IDS), model(IDS))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters()), "the model itself has changed"


def test_a_model_goes_out_without_mup(tmp_path: Path) -> None:
    model = model_of(mup_base_width=8, mup_base_head_dim=2).eval()
    save_pretrained(model, tmp_path / "out", dtype=torch.float64)
    back = load_pretrained(tmp_path / "out")
    assert back.config.mup_base_width is None
    torch.testing.assert_close(back(IDS), model(IDS))
    post = model_of(mup_base_width=8, norm_placement="post")
    with pytest.raises(UserError, match=r"^export: model.mup_base_width needs a final norm to go into, expected model"):
        save_pretrained(post, tmp_path / "post")


def test_adapters_name_the_modules_of_the_family() -> None:
    """They belong to the exported weights, unless these have other queries."""
    model = model_of(mup_base_width=8)
    add_lora(model, Lora(rank=2))
    assert set(groups_of(model).values()) == {(1.0, 0.1)}
    assert adapter_config(model)["target_modules"] == ["c_attn", "c_fc", "c_proj"]
    model.config = dataclasses.replace(model.config, mup_base_head_dim=2)
    with pytest.raises(UserError, match=r"^adapter: model.mup_base_head_dim scales the base's queries"):
        adapter_config(model)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (dict(mup_base_width=0), "model.mup_base_width is 0, expected more than 0"),
        (dict(mup_base_head_dim=16), "model.mup_base_head_dim is 16, expected null without model.mup_base_width"),
        (
            dict(mup_base_width=64, mup_base_head_dim=16, attn_scale=1.0),
            "model.attn_scale is 1.0, expected null with model.mup_base_head_dim",
        ),
    ],
)
def test_settings_without_effect_are_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as e:
        ModelConfig(**settings)
    assert str(e.value) == sentence


def test_a_run_resumes_with_its_base_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("".join(f"{i} plus {i} is {2 * i}.\n" for i in range(2000)), encoding="utf-8")
    sizes = "--model.n-layers 1 --model.n-heads 2 --model.width 32 --block-size 16 --micro-batch 2 --batch-tokens 32"
    more = "--vocab-size 300 --data text.txt --device cpu --eval-batches 1 --max-minutes null --warmup-steps 0"
    more += " --optimizer adamw"

    def settings(*own: str) -> Any:
        return load_config([*sizes.split(), *more.split(), *own])

    mup = ("--model.mup-base-width", "8", "--out", "run")
    with use():
        assert train.train(settings(*mup, "--max-steps", "2")) == 0
        run = train.prepare(settings(*mup, "--max-steps", "3"))
        run.resume()
        rates = {g["lr_ratio"] for g in run.optimizer.param_groups}
        assert rates == {1.0, 0.25} and run.progress.step == 2
        with pytest.raises(UserError, match=r"has model.mup_base_width 8, expected None$"):
            train.prepare(settings("--out", "run", "--max-steps", "3")).resume()
        started = initial.settle(settings("--out", "other", "--init", "run", "--max-steps", "3"))
        assert started.model.mup_base_width == 8


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_changes_activations_alike_at_any_width(optimizer: str) -> None:
    """In the limit of wide models the slopes are 0 with µP. Without, the sum of a step's moves over the inputs of a
    matrix grows with the width: AdamW's in proportion (slope 1), Muon's with its root. The bounds lie half-way between
    the two. Attention is left out there: it averages over positions first, so that narrow models are far from the
    limit. Logits with µP have a part besides, of the initial values, that falls with the root of the width."""
    limit = {"adamw": 1.0, "muon": 0.5}[optimizer]
    sizes: dict[str, Any] = dict(base=32, layers=2, lr=1e-3, steps=2, seeds=2, optimizer=optimizer, device="cpu")
    found = coordinates.rows([32, 128], **sizes)
    slopes = {(r["kind"], r["layer"]): r["slope"] for r in found if r["step"] == 2}
    for (kind, layer), slope in slopes.items():
        if kind == "mup":
            assert (-0.5 if layer == "logits" else -limit / 2) < slope < limit / 2, (layer, slope)
        elif layer.endswith(("mlp", "logits")):
            assert slope > limit / 2, (layer, slope)


def test_the_command_prints_a_table_and_draws_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot, file = tmp_path / "plot.png", tmp_path / "rows.jsonl"
    arguments = "--widths 16,32 --layers 1 --steps 1 --seeds 1 --device cpu".split()
    assert coordinates.main([*arguments, "--plot", str(plot), "--json", str(file)]) == 0
    out = capsys.readouterr().out
    assert out.count("\nmup ") == out.count("\nstandard ") == 4 and plot.read_bytes().startswith(b"\x89PNG")
    assert len(file.read_text().splitlines()) == 8
    with pytest.raises(UserError, match="--widths is '16,17', expected two widths at least, multiples of 16"):
        coordinates.main(["--widths", "16,17"])


def test_the_slope_is_that_of_a_power() -> None:
    assert coordinates.slope([2, 4, 8], [3 * w**0.5 for w in (2, 4, 8)]) == pytest.approx(0.5)
