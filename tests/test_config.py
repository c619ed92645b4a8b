"""Settings: what the configurations contain, how options override them, and one sentence for every error."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgpt.core import options
from fastgpt.core.errors import UserError
from fastgpt.models.config import ModelConfig, model_from_dict
from fastgpt.models.gpt import GPT
from fastgpt.training.config import TrainConfig, from_dict, load_config, to_dict

SIZES = {  # layers, width, heads, parameters: padded vocabulary rows included
    "tiny": (4, 192, 6, 2_590_848),  # with a vocabulary of 4096
    "gpt2-124m": (12, 768, 12, 124_475_904),
    "gpt2-350m": (24, 1024, 16, 354_871_296),
    "gpt2-774m": (36, 1280, 20, 774_090_240),
    "gpt2-1.5b": (48, 1600, 25, 1_557_686_400),
    "llama-125m": (12, 768, 12, 134_105_856),
}


def gpt2_size(layers: int, width: int, vocab: int, block: int) -> int:
    """Return a GPT-2's parameters: per block 12 C^2 weights, 9 C biases, 4 C in norms; embeddings; the last norm."""
    return layers * (12 * width**2 + 13 * width) + (vocab + block) * width + 2 * width


@pytest.mark.parametrize("name", SIZES)
def test_configurations_are_the_known_shapes(name: str) -> None:
    layers, width, heads, parameters = SIZES[name]
    cfg = load_config(["--config", name])
    m = cfg.model
    assert (m.n_layers, m.width, m.n_heads) == (layers, width, heads)
    assert cfg.out == f"runs/{name}" and m.block_size == cfg.block_size
    if name.startswith("gpt2"):
        assert (m.vocab_size, m.padded_vocab_size, m.block_size) == (50257, 50304, 1024)
        assert parameters == gpt2_size(layers, width, 50304, 1024)
    with torch.device("meta"):
        model = GPT(dataclasses.replace(m, vocab_size=m.vocab_size or 4096))
    assert model.num_params() == parameters


@pytest.mark.parametrize("name", options.names())
def test_every_configuration_loads(name: str) -> None:
    assert load_config(["--config", name]).out == f"runs/{name}"
    assert set(SIZES) <= set(options.names())


def test_gpt2_124m_follows_llm_c() -> None:
    cfg = load_config(["--config", "gpt2-124m"])
    assert (cfg.batch_tokens, cfg.lr, cfg.warmup_steps, cfg.max_steps) == (524288, 6e-4, 700, 18865)
    assert cfg.accumulation * cfg.micro_batch * cfg.block_size == 524288


def test_tiny_is_the_default_and_options_override_it() -> None:
    assert load_config([]) == load_config(["--config", "tiny"]) == load_config(["--config=tiny"])
    assert load_config([], default="gpt2-124m").model.n_layers == 12
    cfg = load_config(["--max-steps", "7", "--model.n-layers", "6", "--lr=1e-4", "--data", "123", "--out", "x"])
    same = load_config(["--max_steps=7", "--model.n_layers=6", "--lr", "1e-4", "--data=123", "--out=x"])
    assert cfg == same
    assert (cfg.max_steps, cfg.model.n_layers, cfg.lr, cfg.data, cfg.out) == (7, 6, 1e-4, "123", "x")
    assert cfg.model.width == 192, "what was not overridden stays the configuration's"


def test_options_count_wherever_they_stand(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Configurations apply first, in their order; then options: the last one of a key counts, and a message says so."""
    file = tmp_path / "mine.yaml"
    file.write_text("lr: 6e-4\nclip: 2.0\n", encoding="utf-8")
    config = ["--config", "tiny"]
    for option in (["--lr=1e-4"], ["--micro-batch", "8"], ["--model.n-layers", "1"], ["--compile"]):
        expected = load_config([*config, *option])
        assert expected != load_config(config)
        assert load_config([*option, *config]) == load_config(option) == expected
    both = load_config(["--lr", "1e-4", "--config", str(file), *config, "--config=" + str(file)])
    assert (both.lr, both.clip, both.model.n_layers) == (1e-4, 2.0, 4)
    assert not caplog.messages
    assert load_config(["--lr", "1", *config, "--lr=2", "--seed", "3", "--seed", "3"]).lr == 2
    assert caplog.messages == ["--lr is given twice: using the last value, 2, not 1"]


def test_a_limit_on_the_command_line_wins_over_the_packages() -> None:
    def limits(*argv: str) -> tuple[int | None, float | None]:
        cfg = load_config(argv)
        return cfg.max_steps, cfg.max_minutes

    assert limits() == limits("--config", "gpt2-124m-demo") == (None, 4.0)
    assert limits("--max-steps", "2000") == limits("--max-steps=2000", "--config", "tiny") == (2000, None)
    assert limits("--max-minutes", "90") == (None, 90.0)
    assert limits("--max-steps", "9", "--max-minutes", "1") == (9, 1.0)


def test_a_limit_in_ones_own_file_holds(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("max_minutes: 7\n", encoding="utf-8")
    cfg = load_config(["--config", str(file), "--max-steps", "2000"])
    assert (cfg.max_steps, cfg.max_minutes) == (2000, 7.0)


@pytest.mark.parametrize(
    "option, where, counts",
    [
        ("momentum 0.9", "optimizer muon", "optimizer muon"),
        ("decay-fraction 0.1", "schedule wsd", "schedule wsd"),
        ("min-lr-ratio 0.2", "a schedule other than constant", "schedule linear"),
        ("vocab-size 300", "text data and no tokenizer (model.vocab_size sets the size for the model)", "data a.txt"),
        ("val-fraction 0.1", "no val_data", "val-data null"),
        ("profiler nsys", "profile", "profile 1:2"),
        ("graphs true", "optimizer adamw on a GPU", "device cuda"),
        ("master none", "a dtype other than fp32", "dtype bf16"),
        ("patience 2", "eval_every above 0", "eval-every 1"),
        ("metric val_loss", "patience above 0", "patience 1"),
        ("metric-goal min", "patience above 0", "patience 1"),
        ("model.norm-bias false", "model.norm layer", "model.norm layer"),
        ("model.rope-theta 5", "model.positions rope", "model.positions rope"),
    ],
)
def test_an_option_that_changes_nothing_is_said(
    option: str, where: str, counts: str, caplog: pytest.LogCaptureFixture
) -> None:
    idle = "--schedule constant --data a.bin --val-data b.bin --device cpu --dtype fp32 --eval-every 0 --model.norm rms"
    idle += " --optimizer adamw"
    argv = ["--" + option.split()[0], option.split()[1]]
    load_config([*idle.split(), *argv])
    name = option.split()[0].replace("-", "_")
    assert caplog.messages == [f"--{name} has no effect here: it only applies with {where}"]
    caplog.clear()
    adamw = "" if counts.startswith("optimizer") else "--optimizer adamw "
    load_config([*argv, *f"{adamw}--{counts}".split()])
    assert not caplog.messages


def test_values_of_every_kind() -> None:
    argv = ["--model.window", "[null, 256]", "--model.head-dim", "null", "--max-minutes", "null", "--compile"]
    argv += ["--max-steps", "9"]
    argv += ["--prompt", "a-b --c=1".replace(" --", " - "), "--check-baseline", "false", "--data", "shards_*.bin"]
    argv += ["--model.positions", "rope", "--model.rope-scaling", "{rope_type: linear, factor: 2}"]
    cfg = load_config(argv)
    assert cfg.model.window == [None, 256] and cfg.model.window_of(3) == 256 and cfg.model.window_of(2) is None
    assert (cfg.max_minutes, cfg.compile, cfg.prompt, cfg.check_baseline) == (None, True, "a-b - c=1", False)
    assert load_config(["--no-graphs"]).graphs is False and load_config(["--no-compile", "--lr", "1"]).graphs is True
    with pytest.raises(UserError, match="no_lr is not a setting"):
        load_config(["--no-lr"])
    assert cfg.data == "shards_*.bin" and cfg.model.rope_scaling == {"rope_type": "linear", "factor": 2}


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("lr: 6e-4\nmodel:\n  n_layers: 3\n", encoding="utf-8")
    cfg = load_config(["--config", str(file), "--model.width", "384"])
    assert (cfg.lr, cfg.model.n_layers, cfg.model.width, cfg.out) == (6e-4, 3, 384, "runs/mine")
    both = load_config(["--config", "tiny", "--config", str(file)])
    assert (both.model.n_layers, both.model.width, both.out) == (3, 192, "runs/mine")


def test_a_files_values_are_read_by_their_settings_type(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    text = (
        "data: 0123\nout: yes\nprompt: 2026-11-29\nval_data: 'null'\ntokenizer: ~\nlr: 1e-4\nclip: 2\ncompile: True\n"
    )
    file.write_text(
        text + "max_steps:\nmax_minutes: 1\nlr_ratios: {wte: 3}\nmodel: {window: [8, null]}\n", encoding="utf-8"
    )
    cfg = load_config(["--config", str(file), "--model.rope-scaling={rope_type: linear, factor: 2}"])
    assert (cfg.data, cfg.out, cfg.prompt, cfg.val_data, cfg.tokenizer) == ("0123", "yes", "2026-11-29", "null", None)
    assert (cfg.lr, cfg.clip, cfg.compile, cfg.max_steps, cfg.lr_ratios) == (1e-4, 2.0, True, None, {"wte": 3.0})
    assert cfg.model.window == [8, None] and cfg.model.rope_scaling == {"rope_type": "linear", "factor": 2}


def test_block_size_of_the_model_is_the_trainers_unless_set() -> None:
    assert load_config(["--block-size", "64"]).model.block_size == 64
    cfg = load_config(["--block-size", "64", "--model.block-size", "256"])
    assert (cfg.block_size, cfg.model.block_size) == (64, 256)


def test_derived_sizes() -> None:
    gated = ModelConfig(activation="swiglu", vocab_size=50257)
    assert (gated.d_mlp, gated.padded_vocab_size, ModelConfig().d_mlp) == (2048, 50304, 3072)
    assert ModelConfig(vocab_size=50304).padded_vocab_size == 50304
    assert (ModelConfig().d_head, ModelConfig(head_dim=96).d_head, ModelConfig(n_kv_heads=4).kv_heads) == (64, 96, 4)
    with pytest.raises(ValueError, match="vocab_size is None"):
        _ = ModelConfig().padded_vocab_size


def test_round_trip_through_json() -> None:
    cfg = load_config(["--config", "llama-125m", "--model.window", "[null, 8]", "--max-minutes", "2"])
    stored = json.loads(json.dumps(to_dict(cfg)))
    assert from_dict(stored) == cfg
    assert model_from_dict(stored["model"]) == cfg.model
    assert from_dict({}) == TrainConfig()


WRONG_OPTIONS: list[tuple[list[str], str]] = [
    (["--lr", "abc"], "lr is 'abc', expected a number"),
    (["--lr="], "lr is '', expected a number"),
    (["--lr", "0"], "lr is 0.0, expected more than 0"),
    (["--lr", ".inf"], "lr is inf, expected more than 0"),
    (["--seed", "1.5"], "seed is '1.5', expected a whole number"),
    (["--max-steps", "-3"], "max_steps is -3, expected more than 0"),
    (["--max-steps"], "max_steps got no value, expected a whole number or null"),
    (["--max-minutes", "x"], "max_minutes is 'x', expected a number or null"),
    (["--compile", "maybe"], "compile is 'maybe', expected true or false"),
    (["--dtype", "fp8"], "dtype is 'fp8', expected one of auto, fp32, bf16, fp16"),
    (["--max-stps", "3"], "max_stps is not a setting (did you mean max_steps?)"),
    (["--max", "3"], "max is not a setting (--help lists them)"),
    (["zzz"], "zzz is not a setting (--help lists them)"),
    (["--model.widht", "3"], "model.widht is not a setting (did you mean model.width?)"),
    (["--model", "3"], "model is '3', expected a mapping"),
    (["--model.n-layers", "x"], "model.n_layers is 'x', expected a whole number"),
    (["--model.n-layers", "0"], "model.n_layers is 0, expected more than 0"),
    (
        ["--model.activation", "tanh"],
        "model.activation is 'tanh', expected one of gelu_tanh, gelu, relu2, swiglu, geglu, geglu_tanh, reglu2",
    ),
    (
        ["--model.window", "wide"],
        "model.window is 'wide', expected a whole number or a list of (a whole number or null) or null",
    ),
    (["--model.window", "{a: 1, a: 2}"], "model.window sets a twice, expected each setting once"),
    (["--model.window", "0"], "model.window is 0, expected more than 0"),
    (
        ["--model.window", "[1, 2, 3, 4, 5]"],
        "model.window is [1, 2, 3, 4, 5], expected 1 to 4 (model.n_layers) entries, each null or above 0",
    ),
    (["--model.n-heads", "5"], "model.n_heads is 5, expected a divisor of model.width 192 (or model.head_dim set)"),
    (["--model.n-kv-heads", "4"], "model.n_kv_heads is 4, expected a divisor of model.n_heads 6"),
    (["--model.resid-dropout", "1"], "model.resid_dropout is 1.0, expected 0 to less than 1"),
    (["--model.logit-softcap", "-1"], "model.logit_softcap is -1.0, expected 0 (off) or more"),
    (
        ["--model.positions", "rope", "--model.rotary-dim", "7"],
        "model.rotary_dim is 7, expected an even number from 2 to the head dimension 32",
    ),
    (
        ["--model.rope-scaling", "{rope_type: longrope}"],
        "model.rope_scaling.rope_type is 'longrope', expected linear or dynamic or yarn or llama3",
    ),
    (
        ["--model.rope-scaling", "{rope_type: linear, by: 2}"],
        "model.rope_scaling is ['by'], expected the keys factor in addition to rope_type",
    ),
    (
        ["--model.rope-scaling", "{rope_type: linear, factor: two}"],
        "model.rope_scaling.factor is 'two', expected a number more than 0",
    ),
    (
        ["--model.parallel", "shared", "--model.norm-placement", "post"],
        "model.parallel is 'shared', expected none with model.norm_placement post",
    ),
    (["--block-size", "0"], "block_size is 0, expected more than 0"),
    (["--model.block-size", "64"], "block_size is 128, expected at most model.block_size 64"),
    (["--batch-tokens", "1000"], "batch_tokens is 1000, expected a multiple of micro_batch * block_size = 2048"),
    (["--batch-tokens", "0"], "batch_tokens is 0, expected a multiple of micro_batch * block_size = 2048"),
    (["--vocab-size", "100"], "vocab_size is 100, expected at least 257 (the bytes and an end-of-text token)"),
    (["--val-fraction", "1"], "val_fraction is 1.0, expected 0 to less than 1"),
    (["--beta2", "1"], "beta2 is 1.0, expected 0 to less than 1"),
    (["--min-lr-ratio", "2"], "min_lr_ratio is 2.0, expected 0 to 1"),
    (["--clip", "-1"], "clip is -1.0, expected 0 or more"),
    (["--sample-tokens", "-1"], "sample_tokens is -1, expected 0 or more"),
    (["--max-minutes", "null"], "max_steps is None, expected a number, or one for max_minutes"),
    (["--max-minutes", "1:30"], "max_minutes is '1:30', expected a number or null"),
    (["--data", ""], "data is '', expected a path or null"),
    (["--resume="], "resume is '', expected auto, never or a path"),
    (["--config"], "config got no value, expected text"),
    (
        ["--config", "nope"],
        "config is 'nope', expected a YAML file or one of " + ", ".join(options.names()),
    ),
]


@pytest.mark.parametrize("argv, message", WRONG_OPTIONS, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_wrong_options_are_one_sentence(argv: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(argv)
    assert str(caught.value) == message


WRONG_FILES: list[tuple[bytes, str]] = [
    (
        b"lr: [\n",
        "config {file} is not valid YAML (while parsing a flow node expected the node content",
    ),
    (b"- 1\n- 2\n", "config {file} holds '- 1 - 2', expected a mapping of settings"),
    (b"lr: 1\nleraning_rate: 2\n", "config {file}: leraning_rate is not a setting (--help lists them)"),
    (b"modle:\n  n_layers: 2\n", "config {file}: modle is not a setting (did you mean model?)"),
    (b"model:\n  layers: 2\n", "config {file}: model.layers is not a setting (did you mean model.n_layers?)"),
    (b"model: 3\n", "model is '3', expected a mapping"),
    (b"lr: fast\n", "lr is 'fast', expected a number"),
    (b"lr:\n  a: 1\n", "lr is '{{a: 1}}', expected a number"),
    (b"lr:\n", "lr is 'null', expected a number"),
    (b"lr: 1\nclip: 1\nlr: 2\n", "config {file} sets lr twice, expected each setting once"),
    (b"model:\n  width: 64\n  width: 32\n", "config {file} sets width twice, expected each setting once"),
    (b"max_minutes: 1:30\n", "max_minutes is '1:30', expected a number or null"),
    (b"seed: 0x10\n", "seed is '0x10', expected a whole number"),
    (b"compile: on\n", "compile is 'on', expected true or false"),
    (b"a: &a [*a]\n", "config {file} is not valid YAML"),
    (b"model:\n  n_heads: 7\n", "model.n_heads is 7, expected a divisor of model.width 768"),
    (b"\xff\xfe\x00lr: 1", "config {file}"),
]


@pytest.mark.parametrize("content, message", WRONG_FILES, ids=[repr(c) for c, _ in WRONG_FILES])
def test_wrong_files_are_one_sentence(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_config(["--config", str(file)])
    assert str(caught.value).startswith(message.format(file=file)) and "\n" not in str(caught.value)


def test_an_empty_file_and_a_folder(tmp_path: Path) -> None:
    empty = tmp_path / "empty.yaml"
    empty.write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="expected a mapping of settings"):
        load_config(["--config", str(empty)])
    with pytest.raises(UserError, match="expected a YAML file or one of"):
        load_config(["--config", str(tmp_path)])


@pytest.mark.parametrize(
    "stored, message",
    [
        ({"lrr": 1}, "the stored settings: lrr is not a setting (did you mean lr?)"),
        (
            {"model": {"n_layer": 1}},
            "the stored settings: model.n_layer is not a setting (did you mean model.n_layers?)",
        ),
        ({"lr": "x"}, "lr is 'x', expected a number"),
        (
            {"model": {"n_heads": 5}},
            "model.n_heads is 5, expected a divisor of model.width 768 (or model.head_dim set)",
        ),
    ],
)
def test_wrong_stored_settings(stored: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        from_dict(stored)
    assert str(caught.value) == message


def test_help_explains_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        load_config(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert done.value.code == 0
    for key in options.key_types(TrainConfig):
        assert f"--{key.replace('_', '-')}" in text, key
    for cls in (TrainConfig, ModelConfig):
        documented = options.descriptions(cls)
        for f in dataclasses.fields(cls):
            assert f.name in documented, f"{cls.__name__}.{f.name} has no help"
    assert "default 0.0006" in text and "default remainder" not in text and "one of fp32, remainder" in text
    assert "steps of linear warm-up" in text and "shape of the model" in text
