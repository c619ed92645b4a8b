"""Models with a task head in Hugging Face's form, in and out with the same scores.

The classes of transformers are ...ForSequenceClassification (a reward is a regression there) and
...ForTokenClassification.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgpt.core.errors import UserError
from fastgpt.core.folders import new_folder
from fastgpt.data import Tokenizer
from fastgpt.finetune.heads import HeadConfig, Kind, attach
from fastgpt.models.config import ModelConfig
from fastgpt.models.gpt import GPT
from fastgpt.models.weights.convert import Weights, exported, file_tensors, finite, parameters
from fastgpt.models.weights.families import family_for, family_of
from fastgpt.models.weights.files import SHARD_BYTES, FileTensor, open_folder, write_folder
from fastgpt.models.weights.huggingface import CONFIG, read_json
from fastgpt.models.weights.mup import folded
from fastgpt.models.weights.tokenizer import tokenizer_files

SEQUENCES, TOKENS = "ForSequenceClassification", "ForTokenClassification"
CLASSIFIERS = {"gpt2", "gpt_neo", "gpt_neox"}  # model types whose head for tokens is `classifier`; others': `score`
WITHOUT_TOKENS = {"gptj"}  # transformers has no class for these
PROBLEMS: dict[Kind, str] = {"classification": "single_label_classification", "regression": "regression"}


def write_pretrained(
    folder: Path,
    c: ModelConfig,
    read: Callable[[str], Tensor],
    head: HeadConfig,
    *,
    dtype: torch.dtype,
    model_type: str | None = None,
    extra: dict[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write config.json and the weights of a model with a task head into an existing folder.

    Arguments as in fastgpt.models.weights.write_pretrained. The pad_token_id is the head's, or else that of `extra`.

    Raises:
        UserError: as there, or transformers has no class for the head.
        OSError: the files cannot be written.
    """
    c, read = folded(c, read)
    family = family_for(c, model_type)
    module = _module(head, family.model_type)
    name = str(dtype).removeprefix("torch.")
    config = family.config(c) | {"dtype": name, "torch_dtype": name, "use_cache": True} | (extra or {})
    config |= _settings(head, family.architecture)
    if config.get("pad_token_id") is None and head.kind != "tags":
        raise UserError("export: the head has no pad_token_id, without which transformers scores one text at a time")
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    shapes = {"weight": (head.outputs, c.width)} | ({"bias": (head.outputs,)} if head.kind == "tags" else {})
    described = [
        (f, dtype, s) for p in parameters(family, c, lm_head=False) for f, s in zip(p.files, p.shapes, strict=True)
    ]
    described += [(f"{module}.{leaf}", dtype, shape) for leaf, shape in shapes.items()]

    def tensors() -> Any:
        yield from (t for _, t in file_tensors(family, c, read, dtype, lm_head=False))
        names = [f"head.{leaf}" for leaf in shapes]
        yield from (exported(name, read, dtype, names).contiguous() for name in names)

    write_folder(folder, described, tensors(), shard_bytes)


def save_pretrained(
    model: GPT, folder: str | Path, head: HeadConfig, *, dtype: torch.dtype | None = None, **options: Any
) -> None:
    """Write a model with a task head to a new folder; options as in write_pretrained.

    Raises:
        UserError: as write_pretrained, or the folder exists or cannot be written.
    """
    named = dict(model.named_parameters())
    dtype = dtype or next(iter(named.values())).dtype
    with new_folder(Path(folder)) as aside:
        write_pretrained(aside, model.config, lambda name: named[name], head, dtype=dtype, **options)


def write_tokenizer(folder: Path, tokenizer: Tokenizer, head: HeadConfig, max_length: int) -> None:
    """Write the tokenizer's files with a padding token, without which the pipelines of transformers take one text at a
    time.

    Args:
        max_length: positions of the model.
    """
    eos = tokenizer.decode_bytes([tokenizer.eot]).decode()
    pad = eos if head.pad_id is None else tokenizer.decode_bytes([head.pad_id]).decode()
    names: dict[str, Any] = dict(eos=eos, bos=tokenizer.bos or eos, settings={"pad_token": pad})
    plain = type(tokenizer) is Tokenizer
    for name, text in tokenizer_files(tokenizer.text, gpt2=plain, max_length=max_length, **names).items():
        (folder / name).write_text(text, encoding="utf-8")


def write_model(
    folder: Path,
    c: ModelConfig,
    read: Callable[[str], Tensor],
    head: HeadConfig,
    tokenizer: Tokenizer,
    *,
    dtype: torch.dtype,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a model with a task head and its tokenizer into an existing folder.

    Raises:
        UserError, OSError: as write_pretrained.
    """
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eot}
    write_pretrained(folder, c, read, head, dtype=dtype, extra=ids, shard_bytes=shard_bytes)
    write_tokenizer(folder, tokenizer, head, c.block_size or 0)


def load_pretrained(
    folder: str | Path, *, dtype: torch.dtype | None = None, device: Any = "cpu"
) -> tuple[GPT, HeadConfig]:
    """Load a model with a task head, in evaluation mode; `dtype` is by default that of its weights.

    Raises:
        UserError: the model has no head for sequences or tokens, or as fastgpt.models.weights.load_pretrained.
    """
    folder = Path(folder)
    where = str(folder / CONFIG)
    settings = read_json(folder / CONFIG)
    family = family_of(settings, where)
    head = head_of(settings, where)
    module = _module(head, family.model_type)
    found = open_folder(folder)
    parts = {leaf: found.pop(f"{module}.{leaf}", None) for leaf in ("weight", "bias")}
    weights = Weights(found, family, family.model_config(settings, where), str(folder), lm_head=False)
    with torch.device("meta"):
        model = GPT(weights.config)
        attach(model, head)
    model = model.to(dtype=dtype or weights.dtype).to_empty(device=device)
    with torch.no_grad():
        for name, p in model.named_parameters():
            kind, _, leaf = name.partition(".")
            p.copy_(_read(parts[leaf], f"{module}.{leaf}", p, folder) if kind == "head" else weights.read(name))
    return model.eval(), head


def head_of(config: dict[str, Any], where: str = CONFIG) -> HeadConfig:
    """Return the head of a config.json of transformers. Labels without names are LABEL_0, LABEL_1, as there.

    Raises:
        UserError: the architecture has no such head, or the problem type is another one.
    """
    architecture = (config.get("architectures") or [""])[0]
    if not architecture.endswith((SEQUENCES, TOKENS)):
        raise UserError(f"{where} has architecture {architecture!r}, expected ...{SEQUENCES} or ...{TOKENS}")
    names = config.get("id2label") or {i: f"LABEL_{i}" for i in range(config.get("num_labels", 2))}
    try:
        labels = tuple(str(names[key]) for key in sorted(names, key=int))
    except (TypeError, ValueError) as e:
        raise UserError(f"{where} is damaged: id2label has keys other than numbers ({e})") from e
    problem, pad_id = config.get("problem_type"), config.get("pad_token_id")
    if problem == "multi_label_classification":
        raise UserError(f"{where} has problem_type {problem!r}, expected {' or '.join(PROBLEMS.values())}")
    if architecture.endswith(TOKENS):
        return HeadConfig("tags", labels, pad_id=pad_id)
    if len(labels) == 1:
        return HeadConfig("regression", pad_id=pad_id)
    return HeadConfig("classification", labels, pad_id=pad_id)


def _module(head: HeadConfig, model_type: str) -> str:
    """Return the name of the head's module in transformers."""
    if head.pooling == "mean":
        raise UserError("export: the head pools by mean, expected last, the pooling of transformers")
    if head.kind == "tags" and model_type in WITHOUT_TOKENS:
        raise UserError(f"export: transformers has no token classification for {model_type}")
    return "classifier" if head.kind == "tags" and model_type in CLASSIFIERS else "score"


def _settings(head: HeadConfig, architecture: str) -> dict[str, Any]:
    """Return the keys of config.json that describe the head."""
    base = architecture.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
    names = dict(enumerate(head.labels or ("LABEL_0",)))
    settings: dict[str, Any] = {
        "architectures": [base + (TOKENS if head.kind == "tags" else SEQUENCES)],
        "id2label": {str(i): name for i, name in names.items()},
        "label2id": {name: i for i, name in names.items()},
    }
    if head.kind in PROBLEMS:
        settings["problem_type"] = PROBLEMS[head.kind]
    if head.kind == "tags":
        settings["classifier_dropout"] = 0.0
    if head.pad_id is not None:
        settings["pad_token_id"] = head.pad_id
    return settings


def _read(tensor: FileTensor | None, name: str, p: Tensor, folder: Path) -> Tensor:
    """Return a tensor of the head. Raises UserError if it is missing, of another shape, or not finite."""
    if tensor is None:
        raise UserError(f"{folder} misses {name}")
    if tensor.shape != tuple(p.shape):
        raise UserError(f"{folder} has in another shape {name} {list(tensor.shape)} for {list(p.shape)}")
    t = tensor.read()
    if not finite(t):
        raise UserError(f"{folder} has NaN or infinite values in {name}")
    return t
