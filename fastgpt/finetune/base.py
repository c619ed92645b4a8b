"""The models that a run starts from and learns from: runs, checkpoints, folders, or models of the hub.

The hub's are named org/name or org/name@revision. The commit is recorded in the run's checkpoints, and a resumed run
takes that commit even if the branch has moved on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from fastgpt.convert.importing import locate
from fastgpt.core.errors import UserError
from fastgpt.data.load import has_tokenizer, load_tokenizer
from fastgpt.data.tokenizer import Tokenizer
from fastgpt.finetune.config import FinetuneConfig
from fastgpt.finetune.teacher import GPTTeacher, Teacher, TransformersTeacher
from fastgpt.models.config import ModelConfig
from fastgpt.models.weights.families import FAMILIES, family_of
from fastgpt.models.weights.huggingface import CONFIG, read_settings
from fastgpt.training import checkpoint
from fastgpt.training.initial import Initial, load_start, open_initial

Setting = Literal["base", "teacher"]
RECORDED = {"base": "init", "teacher": "teacher"}  # keys of state.json with a model's origin


def open_base(cfg: FinetuneConfig, setting: Setting = "base") -> Initial:
    """Open the model that a setting names, at the commit with which the run began.

    Raises:
        UserError: there is none, it is damaged, or the revision is not the one that the run began with.
    """
    folder, origin = _place(cfg, setting)
    start = open_initial(folder)
    return start if origin is None else dataclasses.replace(start, origin=origin)


def _place(cfg: FinetuneConfig, setting: Setting) -> tuple[Path, dict[str, Any] | None]:
    """Return the folder that a setting names; of a model of the hub also its name and commit."""
    name = getattr(cfg, setting)
    if Path(name).exists():
        return Path(name), None
    folder, commit = _located(cfg, setting)
    return folder, {"name": name.partition("@")[0], "revision": commit}


def named(cfg: FinetuneConfig, start: Initial) -> tuple[str, str | None]:
    """Return the base's path and None, or its name on the hub and the commit."""
    return (cfg.base, None) if Path(cfg.base).exists() else (start.origin["name"], start.origin["revision"])


def base_config(cfg: FinetuneConfig) -> ModelConfig:
    """Return the shape of the base; of a model of the hub only config.json is downloaded.

    Raises:
        UserError: as open_base.
    """
    if Path(cfg.base).exists():
        return open_initial(cfg.base).config
    folder, _ = _located(cfg, "base", weights=False)
    settings, where = read_settings(folder), str(folder / CONFIG)
    return family_of(settings, where).model_config(settings, where)


def _located(cfg: FinetuneConfig, setting: Setting, weights: bool = True) -> tuple[Path, str | None]:
    """Return the folder of a model of the hub and its commit."""
    name, _, revision = getattr(cfg, setting).partition("@")
    origin = _recorded(cfg, setting)
    pinned = origin["revision"] if origin and origin["name"] == name else None
    folder, commit = locate(name, revision or pinned or "main", what=setting, weights=weights)
    if pinned and commit != pinned:
        raise UserError(f"{setting}: {name}@{revision} is commit {commit}, but the run began with {pinned}")
    return folder, commit


def _recorded(cfg: FinetuneConfig, setting: Setting) -> dict[str, Any] | None:
    """Return the origin of a model in the checkpoint that cfg resumes from."""
    folder = Path(cfg.out)
    if cfg.resume == "never" or (cfg.resume == "auto" and not checkpoint.checkpoints(folder)):
        return None
    path = checkpoint.find(folder if cfg.resume == "auto" else cfg.resume)
    return checkpoint.read_state(path).get(RECORDED[setting])


@dataclass(frozen=True)
class Teaching:
    """The model that cfg.teacher names, not loaded yet.

    Attributes:
        origin: its name and revision.
        start: its weights; None if only transformers has the model.
        load: returns the teacher in a dtype on a device.
    """

    origin: dict[str, Any]
    start: Initial | None
    load: Callable[[torch.dtype, torch.device], Teacher]


def open_teacher(cfg: FinetuneConfig, tokenizer: Tokenizer) -> Teaching | None:
    """Open the model that cfg.teacher names; None without a teacher.

    Raises:
        UserError: it has another tokenizer, or cannot be read.
    """
    if not cfg.teacher:
        return None
    folder, origin = _place(cfg, "teacher")
    foreign = (folder / CONFIG).is_file() and read_settings(folder).get("model_type") not in FAMILIES
    start = None if foreign else open_initial(folder)
    files = start.tokenizer if start is not None else folder if has_tokenizer(folder) else None
    if files is None or load_tokenizer(files).fingerprint != tokenizer.fingerprint:
        raise UserError(f"teacher: {cfg.teacher} has another tokenizer than the base, expected the same")
    if start is None:
        if cfg.written:
            raise UserError(f"teacher: fastgpt cannot generate with {cfg.teacher}, expected level token or a run")
        return Teaching(origin or {"name": folder.resolve().name, "revision": None}, None, partial(_foreign, folder))
    return Teaching(origin or start.origin, start, partial(_own, start))


def _own(start: Initial, dtype: torch.dtype, device: torch.device) -> Teacher:
    return GPTTeacher(load_start(start, start.config, dtype, device))


def _foreign(folder: Path, dtype: torch.dtype, device: torch.device) -> Teacher:
    """Load a model with transformers.

    Raises:
        UserError: transformers is not installed or cannot load it, or its head cannot be distilled.
    """
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        raise UserError(f"teacher: {folder} needs transformers, expected `pip install transformers`") from None
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    except Exception as e:  # the errors of transformers and safetensors have no common class
        raise UserError(f"teacher: transformers cannot load {folder} ({' '.join(str(e).split())[:200]})") from e
    teacher: Any = TransformersTeacher(model.to(device))
    return teacher
