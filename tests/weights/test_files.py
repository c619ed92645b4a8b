"""Files of weights: every form that is read, and one sentence for each that is not."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import OLD_SIZES, distance, ids, logits, make
from safetensors.torch import load_file, save_file

from fastgpt.core.errors import UserError
from fastgpt.models.weights import load_pretrained, open_pretrained, save_pretrained
from fastgpt.models.weights.files import FILE, INDEX, OLD_FILE

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a GPT-2 of transformers."""
    folder = tmp_path_factory.mktemp("gpt2")
    make("gpt2").save_pretrained(folder)
    return folder


@pytest.fixture
def copy(gpt2: Path, tmp_path: Path) -> Path:
    """A copy of that folder, to change."""
    return Path(shutil.copytree(gpt2, tmp_path / "copy"))


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE)


def without_prefix(tensors: dict[str, Any]) -> None:
    for name in list(tensors):
        tensors[name.removeprefix("transformer.")] = tensors.pop(name)
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 32, 32)
    tensors["h.1.attn.masked_bias"] = torch.tensor(-1e4)


def test_old_names_and_mask_buffers_are_read(copy: Path, gpt2: Path) -> None:
    rewrite(copy, without_prefix)
    assert torch.equal(logits(load_pretrained(copy), ids()), logits(load_pretrained(gpt2), ids()))


def test_a_tied_head_may_be_in_the_file_if_it_is_the_embedding(copy: Path) -> None:
    rewrite(copy, lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"].clone()}))
    load_pretrained(copy)
    rewrite(copy, lambda t: t["lm_head.weight"].add_(1))
    with pytest.raises(UserError, match="has a lm_head.weight other than transformer.wte.weight"):
        load_pretrained(copy)


def test_the_memory_name_of_neox_head_is_read(tmp_path: Path) -> None:
    model = make("gpt_neox")
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": t.pop("embed_out.weight")}))
    assert distance(logits(load_pretrained(tmp_path), ids()), logits(model, ids())) < 1e-5


def test_a_pickle_is_read_as_weights_only(copy: Path, gpt2: Path) -> None:
    torch.save(load_file(copy / FILE), copy / OLD_FILE)
    (copy / FILE).unlink()
    assert torch.equal(logits(load_pretrained(copy), ids()), logits(load_pretrained(gpt2), ids()))
    torch.save({"transformer.wte.weight": Path("x")}, copy / OLD_FILE)
    with pytest.raises(UserError, match="holds more than weights"):
        load_pretrained(copy)


def test_metas_llama_rotates_adjacent_pairs(tmp_path: Path) -> None:
    """A Llama of transformers, renamed and reordered as Meta publishes it, has the same logits, and goes out again."""
    model = make("llama")
    names = {"self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv"}
    names |= {
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.down_proj": "feed_forward.w2",
    }
    names |= {"mlp.up_proj": "feed_forward.w3", "input_layernorm": "attention_norm", "lm_head": "output"}
    names |= {"post_attention_layernorm": "ffn_norm", "embed_tokens": "tok_embeddings", "model.": ""}
    tensors = {"rope.freqs": torch.ones(4)}
    for name, t in model.state_dict().items():
        if "q_proj" in name or "k_proj" in name:
            t = t.view(-1, 2, 4, 32).transpose(1, 2).reshape(t.shape)
        for theirs, metas in names.items():
            name = name.replace(theirs, metas)
        tensors[name] = t
    torch.save(tensors, tmp_path / "consolidated.00.pth")
    params = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, norm_eps=1e-6, rope_theta=500.0, vocab_size=-1)
    (tmp_path / "params.json").write_text(json.dumps(params))
    ours = load_pretrained(tmp_path)
    assert distance(logits(ours, ids()), logits(model, ids())) < 1e-5
    save_pretrained(ours, tmp_path / "out")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(p, model.state_dict()[key]) for key, p in back.state_dict().items())


def test_shards_are_read_and_written(gpt2: Path, tmp_path: Path) -> None:
    ours = load_pretrained(gpt2)
    save_pretrained(ours, tmp_path / "out", shard_bytes=20_000)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    shards = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 3 and set(index["weight_map"].values()) == set(shards)
    count = sum(p.numel() for p in make("gpt2").parameters())
    assert index["metadata"] == {"total_parameters": count, "total_size": 4 * count}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert distance(logits(theirs, ids()), logits(ours, ids())) < 1e-5
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert torch.equal(logits(load_pretrained(tmp_path / "theirs"), ids()), logits(ours, ids()))


def test_mixed_dtypes_come_in_as_the_wider_one(copy: Path) -> None:
    rewrite(copy, lambda t: t.update({"transformer.wpe.weight": t["transformer.wpe.weight"].bfloat16()}))
    assert load_pretrained(copy).wpe.weight.dtype == torch.float32


def edit(folder: Path, **settings: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))


def cut(folder: Path, file: str = FILE) -> None:
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(content[:-100])


def shard(folder: Path, change: Callable[[dict[str, str]], Any], first: int = 9) -> None:
    """Make two shards with an index that `change` spoils: nine tensors, and those from `first` on."""
    tensors = load_file(folder / FILE)
    (folder / FILE).unlink()
    names = sorted(tensors)
    halves = {"a.safetensors": names[:9], "b.safetensors": names[first:]}
    for file, some in halves.items():
        save_file({name: tensors[name] for name in some}, folder / file)
    places = {name: file for file, some in halves.items() for name in some}
    change(places)
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))


def three_faults(tensors: dict[str, Any]) -> None:
    tensors["transformer.more.weight"] = tensors.pop("transformer.ln_f.bias")
    tensors["transformer.wpe.weight"] = tensors["transformer.wpe.weight"][:5].clone()
    tensors["transformer.ln_f.weight"] = torch.ones(32, dtype=torch.int32)


def two_not_finite(tensors: dict[str, Any]) -> None:
    tensors["transformer.ln_f.bias"][3] = float("nan")
    tensors["transformer.h.1.mlp.c_fc.weight"][3, 4] = float("inf")


def misplace(places: dict[str, str]) -> None:
    places[min(places)] = "b.safetensors"


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "tensors": (
        lambda f: rewrite(f, three_faults),
        r"misses transformer.ln_f.bias; has beyond the model's transformer.more.weight; has in another shape "
        r"transformer.wpe.weight \[5, 32\] for \[32, 32\]; has in another type than .* transformer.ln_f.weight \(I32\)",
    ),
    "truncated": (cut, r"model.safetensors is truncated: it has \d+ bytes, its header describes \d+"),
    "header": (lambda f: (f / FILE).write_bytes(b"\x05\0\0\0\0\0\0\0hello"), "header is not that of a tensor file"),
    "empty": (lambda f: (f / FILE).write_bytes(b""), "truncated or no tensor file"),
    "none": (lambda f: (f / FILE).unlink(), "has no weights, expected model.safetensors"),
    "absent shard": (lambda f: shard(f, lambda p: p.update(x="c.safetensors")), "c.safetensors, which is not there"),
    "two shards": (lambda f: shard(f, len, 8), r"has transformer\S+ in two shards, a.safetensors and b.safetensors"),
    "outside": (lambda f: shard(f, lambda p: p.update(x="../a.safetensors")), "no weight_map of tensors to files"),
    "truncated shard": (
        lambda f: shard(f, len) or cut(f, "b.safetensors"),
        r"b.safetensors is truncated: it has \d+ bytes, its header describes \d+",
    ),
    "misplaced": (lambda f: shard(f, misplace), r"places .* in b.safetensors, which does not have it"),
    "broken index": (lambda f: shard(f, len) or (f / INDEX).write_text("{"), "index.json is damaged"),
    "truncated pickle": (
        lambda f: torch.save(load_file(f / FILE), f / OLD_FILE) or cut(f, OLD_FILE) or (f / FILE).unlink(),
        "pytorch_model.bin is damaged, or holds more than weights",
    ),
    "nan": (
        lambda f: rewrite(f, two_not_finite),
        "has NaN or infinite values in transformer.h.1.mlp.c_fc.weight, transformer.ln_f.bias$",
    ),
    "model_type": (lambda f: edit(f, model_type="gemma2"), "has model_type 'gemma2', expected one of gpt2, gpt_neo"),
    "activation": (lambda f: edit(f, activation_function="mish"), "has activation_function 'mish'"),
    "quantized": (lambda f: edit(f, quantization_config={"bits": 4}), "has quantization_config"),
    "values": (lambda f: edit(f, n_head="many"), "config.json is damaged"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json does not exist"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "config.json is damaged"),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_file_is_one_sentence(fault: str, copy: Path) -> None:
    spoil, message = BAD[fault]
    spoil(copy)
    with pytest.raises(UserError, match=message) as error:
        load_pretrained(copy)
    assert "\n" not in str(error.value)


def test_a_file_that_cannot_be_read_is_one_sentence(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, or while its tensors are read."""
    weights, plain = open_pretrained(copy), Path.open

    def refuse(self: Path, *args: Any, **kwargs: Any) -> Any:
        if self.name == FILE:
            raise PermissionError(13, "Permission denied")
        return plain(self, *args, **kwargs)

    (copy / FILE).write_bytes((copy / FILE).read_bytes()[:-100])
    with pytest.raises(UserError, match="model.safetensors was truncated while it was read"):
        weights.read("wte.weight"), weights.read("norm_f.weight")
    monkeypatch.setattr(Path, "open", refuse)
    for read in (lambda: load_pretrained(copy), lambda: weights.read("wte.weight")):
        with pytest.raises(UserError, match="model.safetensors cannot be read .Permission denied."):
            read()


def test_an_export_lists_all_parameters_that_are_not_finite(gpt2: Path, tmp_path: Path) -> None:
    model = load_pretrained(gpt2)
    with torch.no_grad():
        model.wte.weight[3, 3] = model.blocks[1].mlp.up.bias[0] = float("nan")
    with pytest.raises(UserError, match="NaN or infinite values in blocks.1.mlp.up.bias, wte.weight$"):
        save_pretrained(model, tmp_path / "out")


def test_rope_types_that_the_model_lacks_are_refused_by_name(tmp_path: Path) -> None:
    make("llama").save_pretrained(tmp_path)
    for parameters, message in [
        ({"rope_type": "longrope", "factor": 2.0}, "rope_type 'longrope', expected default, linear, dynamic"),
        ({"rope_type": "linear"}, "rope_type 'linear' without factor"),
        ({"full_attention": {"rope_type": "default"}}, "rope_parameters by kind of layer"),
    ]:
        edit(tmp_path, rope_parameters=parameters)
        with pytest.raises(UserError, match=message):
            open_pretrained(tmp_path)


def test_weights_that_a_dtype_cannot_hold_are_not_written(gpt2: Path, tmp_path: Path) -> None:
    model = load_pretrained(gpt2)
    with torch.no_grad():
        model.wte.weight[3, 3] = 1e30
    with pytest.raises(UserError, match="wte.weight has values that float16 cannot hold"):
        save_pretrained(model, tmp_path / "out", dtype=torch.float16)
    assert not list(tmp_path.iterdir())


MEASURE = """
import re, sys
from pathlib import Path
from fastgpt.convert import exporting, importing
small, large, out, *formats = sys.argv[1:]
def status(name): return 1024 * int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
def grown(convert, *arguments):
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is in use now
    before = status("VmRSS")
    convert(*arguments)
    return status("VmHWM") - before
def conversions(source, run):
    yield grown(importing.import_model, Path(source), Path(run))
    for form in formats:
        yield grown(exporting.main, [run, "--format", form, "--out", f"{run}-{form}", "--max-shard-size", "32MB"])
list(conversions(small, out + "/small"))  # loads every module
print(list(conversions(large, out + "/large")))
"""


@pytest.mark.slow
def test_a_conversion_holds_a_shard_and_a_tensor_at_most(gpt2: Path, tmp_path: Path) -> None:
    """Import and every export of 100 MB of weights in shards of 32 MB: memory grows by less than 1.2 times a shard and
    the largest tensor."""
    pytest.importorskip("gguf")
    config = transformers.GPT2Config(**OLD_SIZES | dict(n_embd=512, n_layer=7, vocab_size=4000))
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "in", max_shard_size="32MB")
    shards = [p.stat().st_size for p in (tmp_path / "in").glob("*.safetensors")]
    assert sum(shards) > 90_000_000 and len(shards) > 2
    folders = [str(gpt2), str(tmp_path / "in"), str(tmp_path)]
    command = [sys.executable, "-c", MEASURE, *folders, "hf", "llmc"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    grown = json.loads(done.stdout.splitlines()[-1])
    assert max(grown) < 1.2 * max(shards) + 4 * 4000 * 512, [f"{n / 1e6:.1f} MB" for n in grown]
    assert len(list((tmp_path / "large-hf").glob("*.safetensors"))) > 2
