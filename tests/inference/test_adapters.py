"""Adapters by name: each row as its adapter alone, the base to the bit without one, loading and unloading; in fp64.
tests/finetune/test_adapter.py compares with PEFT."""

from __future__ import annotations

import copy
import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from recorder import recording
from small_models import ROPE, model_of
from torch import Tensor

from fastgpt.core import tensorfile
from fastgpt.core.errors import UserError
from fastgpt.finetune.adapter import load_adapter, save_adapter
from fastgpt.finetune.lora import Lora, add_lora
from fastgpt.finetune.quantised import quantise_base
from fastgpt.inference import Generator, Request, Result, graphs
from fastgpt.inference import adapters as adapters_module
from fastgpt.models.gpt import GPT
from fastgpt.models.weights import load_pretrained, save_pretrained
from fastgpt.models.weights.fingerprint import fingerprint
from fastgpt.nn.lora_rows import RowsLora

SHAPE: dict[str, Any] = {**ROPE, "n_kv_heads": 2, "qkv_bias": False, "proj_bias": False, "mlp_bias": False}
KINDS: dict[str, Lora] = {
    "all": Lora(rank=3, alpha=5),
    "few": Lora(rank=8, alpha=4, rslora=True, targets=(r"layers\.1\.", "q_proj")),
    "down": Lora(rank=2, alpha=8, targets=("down",)),
}


def base() -> GPT:
    return model_of(**SHAPE).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with adapters of the base; "down" is in the folder of a run."""
    found = tmp_path_factory.mktemp("adapters")
    for seed, (name, settings) in enumerate(KINDS.items()):
        model, g = base(), torch.Generator().manual_seed(seed)
        for m in add_lora(model, settings, generator=g).values():
            m.lora_B.data.normal_(0.0, 0.2, generator=g)
        save_adapter(model, found / name / "adapter" if name == "down" else found / name)
    return found


@pytest.fixture(scope="module")
def paths(folder: Path) -> dict[str, Path]:
    return {name: folder / name for name in KINDS}


def asked(*names: str | None, **options: Any) -> list[Request]:
    """Return requests with prompts of different lengths that end at different times."""
    g = torch.Generator().manual_seed(1)
    prompts = [torch.randint(50, (3 + i,), generator=g).tolist() for i in range(len(names))]
    settings: dict[str, Any] = dict(temperature=0.0, logprobs=4, seed=0) | options
    return [Request(p, 5 + i % 3, adapter=name, **settings) for i, (p, name) in enumerate(zip(prompts, names))]


def alone(request: Request, paths: dict[str, Path], change: Callable[[GPT], Any] = lambda model: None) -> Result:
    """Return the result of a model whose own layers have the adapter."""
    model = base()
    change(model)
    if request.adapter is not None:
        load_adapter(model, paths[request.adapter] / ("adapter" if request.adapter == "down" else ""))
    (result,) = Generator(model).generate([Request(request.prompt, request.max_new_tokens, temperature=0, logprobs=4)])
    return result


def assert_same(result: Result, expected: Result, rel: float = 1e-9) -> None:
    assert result.ids == expected.ids and result.logprobs == pytest.approx(expected.logprobs, rel=rel)


def test_each_row_is_as_its_adapter_alone(paths: dict[str, Path]) -> None:
    """Seven requests on four rows, so that rows move; ranks, scales and modules differ."""
    generator = Generator(base(), adapters=paths, max_batch=4)
    requests = asked("all", "few", None, "down", "all", "down", None)
    for request, result in zip(requests, generator.generate(requests)):
        assert_same(result, alone(request, paths))
        if request.adapter is not None:
            plain = alone(Request(request.prompt, request.max_new_tokens), paths)
            assert result.logprobs != pytest.approx(plain.logprobs, rel=1e-3), "the adapter changes nothing"


def test_equal_prompts_are_read_for_each_adapter(paths: dict[str, Path]) -> None:
    """Keys and values depend on the adapter. The name of an unloaded one may mean another, later."""
    model = model_of(**{**SHAPE, "block_size": 128}).eval()
    generator = Generator(model, adapters={**paths, "name": paths["all"]})
    prompt = torch.randint(50, (80,), generator=torch.Generator().manual_seed(2)).tolist()

    def logprobs(*names: str | None) -> list[Any]:
        asked = [Request(prompt, 4, temperature=0, seed=0, logprobs=0, adapter=name) for name in names]
        return [result.logprobs for result in generator.generate(asked)]

    base, every, few, named, again = logprobs(None, "all", "few", "name", "all")
    assert every == pytest.approx(again, rel=1e-9) and every == pytest.approx(named, rel=1e-9)
    for one, other in ((base, every), (every, few), (base, few)):
        assert one != pytest.approx(other, rel=1e-3)
    generator.adapters.unload("name")
    generator.adapters.load("name", paths["few"])
    assert logprobs("name", None, "all") == [pytest.approx(values, rel=1e-9) for values in (few, base, every)]


def test_texts_with_different_adapters_share_no_keys(paths: dict[str, Path]) -> None:
    generator = Generator(base(), adapters=paths, page_size=8)
    generator.reserve()
    requests = [Request([5] * 12, 3, temperature=0, logprobs=4, adapter=name) for name in (None, "all", "few", "all")]
    results = [generator.generate([request])[0] for request in requests]
    assert [r.cached_tokens for r in results] == [0, 0, 0, 8]
    for request, result in zip(requests, results):
        assert_same(result, alone(request, paths))


def test_an_adapter_knows_its_base(tmp_path: Path) -> None:
    """Whatever its dtype, also if its weights are converted first; a fingerprint is that of the weights alone."""
    model = model_of(**SHAPE).float().eval()
    own = fingerprint(model)
    assert own is not None and own == fingerprint(copy.deepcopy(model).bfloat16())
    assert fingerprint(model_of(**SHAPE).half()) is None
    save_pretrained(model, tmp_path / "exported", dtype=torch.bfloat16)
    assert fingerprint(load_pretrained(tmp_path / "exported")) == own, "without the rows that pad the vocabulary"
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_parameter("blocks.1.mlp.down.weight")[0, 0] += 0.1
    add_lora(trained := copy.deepcopy(model), Lora(rank=2))
    assert fingerprint(trained) is None
    save_adapter(trained, tmp_path / "own", base=own)
    save_adapter(trained, tmp_path / "unknown")
    for weights in (None, "bf16", "int8"):
        Generator(copy.deepcopy(model), adapters={"own": tmp_path / "own"}, weights=weights)
        generator = Generator(copy.deepcopy(other), adapters={"unknown": tmp_path / "unknown"}, weights=weights)
        message = rf"own was trained on another base, whose weights have sha256 {own[:12]}\.\.\., expected that of this"
        with pytest.raises(UserError, match=message):
            generator.adapters.load("own", tmp_path / "own")
    with pytest.raises(UserError, match="another base"):
        load_adapter(copy.deepcopy(other), tmp_path / "own", base=fingerprint(other))


def test_prompts_are_scored_with_the_adapter(paths: dict[str, Path]) -> None:
    (request,) = asked("all", prompt_logprobs=2)
    (result,) = Generator(base(), adapters=paths).generate([request])
    model = base()
    load_adapter(model, paths["all"])
    assert result.prompt_logprobs is not None
    assert result.prompt_logprobs[1:] == pytest.approx(Generator(model).score([request.prompt])[0], rel=1e-9)


def test_a_batch_without_adapters_is_the_base_to_the_bit(paths: dict[str, Path]) -> None:
    requests = asked(None, None, None, temperature=0.8, seed=3)
    expected = Generator(base().float()).generate(requests)
    generator = Generator(base().float(), adapters=paths)
    before = dict(generator.model.named_modules())
    assert generator.generate(requests) == expected
    generator.generate(asked("all", "down"))
    assert generator.generate(requests) == expected
    assert dict(generator.model.named_modules()) == before


def test_a_row_does_not_meet_the_numbers_of_other_adapters(paths: dict[str, Path]) -> None:
    """Not even where another one's products are infinite."""
    generator, ids = Generator(base(), adapters=paths), torch.tensor([[5, 7, 11, 13]])
    for name in ("few", "down"):
        for a, b in generator.adapters.find(name).layers.values():
            a.fill_(1e308)
            b.fill_(1e308)
    selection = generator.adapters.select([generator.adapters.find(name) for name in KINDS])
    assert selection is not None
    with torch.no_grad(), selection.on(torch.tensor([[1], [0], [2]])):
        together = generator.model(ids.expand(3, -1))
    model = base()
    with torch.no_grad():
        assert torch.equal(together[1], model(ids)[0])
        load_adapter(model, paths["all"])
        torch.testing.assert_close(together[0], model(ids)[0])
    assert not together[2].isfinite().all()


@pytest.mark.parametrize("kind", ["bf16", "int8", "int8 base"])
def test_adapters_on_narrow_weights(kind: str, paths: dict[str, Path]) -> None:
    """Each row is as on the same weights, made wide again, alone."""

    def narrow(model: GPT) -> None:
        for name, p in model.named_parameters():
            if p.dim() == 2 and (name.startswith("blocks") or kind == "bf16"):
                p.data = p.data.float().bfloat16().double() if kind == "bf16" else rounded(p.data)

    requests = asked("all", None, "few")
    model = base().float()
    if kind == "int8 base":
        generator = Generator(quantise_base(model, "int8"), adapters=paths)
    else:
        generator = Generator(model, adapters=paths, weights=kind)
    results = generator.generate(requests)
    if kind == "int8":  # the head is narrow, too
        expected = [Generator(base().float(), adapters=paths, weights=kind).generate([r])[0] for r in requests]
    else:
        expected = [alone(request, paths, narrow) for request in requests]
    for result, one in zip(results, expected):
        assert result.logprobs == pytest.approx(one.logprobs, abs=1e-3), "far below what an adapter changes"
    assert results[0].logprobs != pytest.approx(generator.generate(asked(None))[0].logprobs, abs=1e-2)


def rounded(weight: Tensor) -> Tensor:
    """Return a weight as 8 bits with a scale for each row hold it."""
    scale = weight.float().abs().amax(1, keepdim=True) / 127
    return ((weight.float() / scale).round() * scale).double()


def test_requests_on_an_unloaded_adapter_are_finished(paths: dict[str, Path]) -> None:
    """Its name may mean another adapter by then."""
    generator = Generator(base(), adapters={"one": paths["all"]}, max_batch=2)
    requests = asked("one", "one", "one")
    numbers = [generator.add(request) for request in requests]
    generator.step()
    generator.adapters.unload("one")
    with pytest.raises(ValueError, match="adapter is 'one', expected none: no adapter is loaded"):
        generator.add(requests[0])
    generator.adapters.load("one", paths["few"])
    numbers.append(generator.add(requests[0]))
    results: dict[int, Result] = {}
    while len(results) < 4:
        results |= {piece.number: piece.result for piece in generator.step() if piece.result is not None}
    for number, request in zip(numbers, requests):
        assert_same(results[number], alone(Request(request.prompt, request.max_new_tokens, adapter="all"), paths))
    assert_same(results[3], alone(Request(requests[0].prompt, requests[0].max_new_tokens, adapter="few"), paths))


def test_layers_are_made_when_a_batch_needs_others(paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    found = Generator(base(), adapters=paths).adapters
    few, every = found.find("few"), [found.find(name) for name in KINDS]
    first = found.select([few])
    assert first is not None and first.adapters == (few,) and found.select([]) is None
    second = found.select(every[:1])
    assert second is not None and second.adapters == tuple(every[:2]), "an adapter that may be needed again stays"
    assert found.select([few]) is second
    monkeypatch.setattr(adapters_module, "MOST_KEPT", 2)
    third = found.select(every[2:])
    assert third is not None and third.adapters == tuple(every[2:])
    found.unload("down")
    assert found._selection is None


def test_graphs_of_other_layers_are_dropped(paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps replayed with adapters generate what called ones do."""
    for op in ("attention", "embedding", "rope"):
        monkeypatch.setattr(importlib.import_module(f"fastgpt.ops.{op}"), "checks_values", lambda t: False)
    generator = Generator(base().float(), adapters=paths, max_batch=3)
    generator.reserve()
    rows = generator.schedule.rows
    assert rows is not None
    rows.graphs.enabled = True
    changed = [rows.cache.k, rows.cache.v, rows.pages, rows.lens, rows.tokens, rows.u, *rows.settings]
    monkeypatch.setattr(graphs, "record", recording(lambda: changed))
    requests = [Request(r.prompt, 12, temperature=0, seed=0, adapter=r.adapter) for r in asked("all", None, "few")]
    expected = Generator(base().float(), adapters=paths).generate(requests)
    for _ in range(2):
        assert generator.generate(requests) == expected
    held = [key for key in rows.graphs.recorded if rows.selection in key]
    assert held
    generator.generate(asked("down"))
    assert not any(key in rows.graphs.recorded for key in held)
    assert generator.generate(requests) == expected


def test_unknown_names_and_taken_ones(paths: dict[str, Path]) -> None:
    generator = Generator(base(), adapters=paths)
    with pytest.raises(ValueError, match="adapter is 'other', expected all, few, down"):
        generator.add(Request([1], adapter="other"))
    with pytest.raises(ValueError, match="adapter is 'other', expected all, few, down"):
        generator.adapters.unload("other")
    with pytest.raises(UserError, match="adapter all is loaded already, expected another name"):
        generator.adapters.load("all", paths["few"])
    model = base()
    load_adapter(model, paths["all"])
    with pytest.raises(UserError, match="adapter few: the model has adapters of its own"):
        Generator(model, adapters={"few": paths["few"]})


Change = Callable[[Path, dict[str, Any], dict[str, Tensor]], None]
DAMAGED: dict[str, tuple[Change, str]] = {
    "no files": (lambda f, c, s: shutil.rmtree(f), "has no adapter, expected adapter_config.json, or a finished run"),
    "pickled": (lambda f, c, s: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"), "has no adapter"),
    "whole modules": (lambda f, c, s: c.update(modules_to_save=["lm_head"]), "has modules_to_save"),
    "embeddings": (
        lambda f, c, s: s.update({"base_model.model.model.embed_tokens.weight": torch.ones(50, 32)}),
        "has beyond the model's base_model.model.model.embed_tokens.weight",
    ),
    "another shape": (lambda f, c, s: c.update(r=4), r"in another shape .*\[3, 32\] for \[4, 32\]"),
    "NaN": (lambda f, c, s: next(iter(s.values())).fill_(float("nan")), "NaN or infinite values in base_model"),
    "no JSON": (lambda f, c, s: c.clear(), "has peft_type None, expected 'LORA'"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_what_cannot_be_loaded(case: str, paths: dict[str, Path], tmp_path: Path) -> None:
    change, said = DAMAGED[case]
    place = tmp_path / "adapter_of_mine"
    shutil.copytree(paths["all"], place)
    config = json.loads((place / "adapter_config.json").read_text())
    state = tensorfile.load_file(place / "adapter_model.safetensors")
    change(place, config, state)
    if (place / "adapter_model.safetensors").is_file():
        (place / "adapter_config.json").write_text(json.dumps(config))
        tensorfile.save_file(state, place / "adapter_model.safetensors")
    generator = Generator(base(), adapters={"few": paths["few"]})
    with pytest.raises(UserError, match=said):
        generator.adapters.load("mine", place)
    assert list(generator.adapters.named) == ["few"]


def test_a_truncated_file_is_one_sentence(paths: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(paths["all"], tmp_path / "cut")
    file = tmp_path / "cut" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(UserError, match="adapter_model.safetensors"):
        Generator(base(), adapters={"cut": tmp_path / "cut"})


def test_layers_of_no_adapter_stay(paths: dict[str, Path]) -> None:
    generator = Generator(base(), adapters=paths)
    selection = generator.adapters.select([generator.adapters.find("down")])
    assert selection is not None
    with selection.on(torch.tensor([[3]])):
        replaced = [name for name, m in generator.model.named_modules() if isinstance(m, RowsLora)]
    assert replaced == ["blocks.0.mlp.down", "blocks.1.mlp.down"]
