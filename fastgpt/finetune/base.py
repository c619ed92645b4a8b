"""The models that a run starts from and learns from: runs, checkpoints, folders, or models of the hub.

The hub's are named org/name or org/name@revision. The commit is recorded in the run's checkpoints, and a resumed run
takes that commit even if the branch has moved on.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

from fastgpt.convert.importing import locate
from fastgpt.core.errors import UserError
from fastgpt.data.load import load_tokenizer
from fastgpt.data.tokenizer import Tokenizer
from fastgpt.finetune.config import FinetuneConfig
from fastgpt.models.config import ModelConfig
from fastgpt.models.weights.families import family_of
from fastgpt.models.weights.huggingface import CONFIG, read_settings
from fastgpt.training import checkpoint
from fastgpt.training.initial import Initial, open_initial

Setting = Literal["base", "teacher"]
RECORDED = {"base": "init", "teacher": "teacher"}  # keys of state.json with a model's origin


def open_base(cfg: FinetuneConfig, setting: Setting = "base") -> Initial:
    """Open the model that a setting names, at the commit with which the run began.

    Raises:
        UserError: there is none, it is damaged, or the revision is not the one that the run began with.
    """
    name = getattr(cfg, setting)
    if Path(name).exists():
        return open_initial(name)
    folder, commit = _located(cfg, setting)
    return dataclasses.replace(open_initial(folder), origin={"name": name.partition("@")[0], "revision": commit})


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


def open_teacher(cfg: FinetuneConfig, tokenizer: Tokenizer) -> Initial | None:
    """Open the model that cfg.teacher names; None without a teacher.

    Raises:
        UserError: it has another tokenizer, or cannot be read.
    """
    if not cfg.teacher:
        return None
    start = open_base(cfg, "teacher")
    if start.tokenizer is None or load_tokenizer(start.tokenizer).fingerprint != tokenizer.fingerprint:
        raise UserError(f"teacher: {cfg.teacher} has another tokenizer than the base, expected the same")
    return start
