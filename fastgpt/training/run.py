"""The state of a training run, saved in checkpoints and restored from them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgpt.core.errors import UserError
from fastgpt.data.batch import Loader
from fastgpt.data.shards import Tokens
from fastgpt.data.source import Source
from fastgpt.distributed.mesh import ALONE, Mesh
from fastgpt.distributed.parallelize import Spread
from fastgpt.distributed.shards import whole
from fastgpt.models.config import model_from_dict
from fastgpt.models.gpt import GPT
from fastgpt.optim import AdamW
from fastgpt.optim.muon import MuonAdamW
from fastgpt.optim.state import is_sharded
from fastgpt.training import checkpoint
from fastgpt.training.config import TrainConfig, to_dict
from fastgpt.training.graphs import Graphs
from fastgpt.training.initial import load_initial
from fastgpt.training.stability import LossScale, SpikeGuard
from fastgpt.training.task import NextToken, Task

METRIC = {"metric": "val_loss", "metric_goal": "auto"}  # settings that a run of an earlier release does not record


@dataclasses.dataclass
class Progress:
    """Progress of a run; part of every checkpoint."""

    step: int = 0  # optimizer steps done
    tokens: int = 0
    seconds: float = 0.0  # of training, without evaluations and checkpoints
    last_step: int = 0  # the run's length; with max_minutes an upper bound until enough steps are timed
    length_known: bool = True
    skipped: int = 0  # steps skipped in a row: a loss spike, or gradients that were not finite
    best: float | None = None  # value of the metric in the validations so far
    best_step: int = -1
    waited: int = 0  # validations since then
    ended: bool = False  # ended by patience

    def due(self, every: int) -> bool:
        """Return whether a task with period `every` steps (0: never) is due; at the last step it runs anyway."""
        return every > 0 and self.step % every == 0 and self.step < self.last_step

    @classmethod
    def of_state(cls, values: dict[str, Any]) -> Progress:
        """Return the progress that a checkpoint holds; `best` was once called best_loss."""
        return cls(**{"best" if name == "best_loss" else name: value for name, value in values.items()})

    def record_validation(self, value: float, rises: bool, patience: int) -> bool:
        """Record the metric of a validation, which should rise or else fall; return whether it is the best so far (NaN
        never is). End the run after `patience` (0: never) others."""
        if math.isfinite(value) and (self.best is None or (value > self.best if rises else value < self.best)):
            self.best, self.best_step, self.waited = value, self.step, 0
            return True
        self.waited += 1
        if 0 < patience <= self.waited:
            self.last_step, self.ended = self.step, True
        return False


class Run:
    """A training run: everything that a checkpoint holds, and the folder of the run."""

    def __init__(
        self,
        cfg: TrainConfig,
        device: torch.device,
        data: Source,
        val_sources: dict[str, Tokens],
        model: GPT,
        optimizer: AdamW | MuonAdamW,
        loader: Loader,
        task: Task | None = None,
        mesh: Mesh = ALONE,
    ) -> None:
        self.cfg, self.folder, self.device = cfg, Path(cfg.out or "runs/train"), device
        self.data, self.val_sources, self.loader = data, val_sources, loader
        self.model, self.optimizer, self.task = model, optimizer, task or NextToken()
        self.mesh = mesh
        self.guard = SpikeGuard(cfg.spike_sigmas, device) if cfg.spike_sigmas > 0 else None
        self.scaling = LossScale(device) if cfg.dtype == "fp16" else None
        self.graphs = Graphs.of_run(cfg, model, device, mesh)
        self.progress = Progress(last_step=cfg.most_steps, length_known=cfg.max_minutes is None)
        self.fsdp = isinstance(self.task, Spread) and self.task.parallel == "fsdp"
        self.sharded = self.fsdp and cfg.checkpoint != "whole"
        self.writer = self._writer()
        # preset -> evaluation(run, log), which returns its figures by name, none if it is not due
        self.evaluations: dict[str, Callable[[Run, Any], dict[str, float]]] = {}
        self.origin: dict[str, Any] | None = None  # name and revision of the weights that the run started with

    def _writer(self) -> checkpoint.Writer:
        if not self.sharded:
            return checkpoint.Writer()
        from fastgpt.training.sharded import ShardedWriter  # torch.distributed.checkpoint takes long to import

        return ShardedWriter(self.mesh)

    def device_parts(self) -> list[tuple[str, SpikeGuard | LossScale]]:
        """Return the guards whose state lives on the device and belongs in a checkpoint."""
        parts: list[tuple[str, SpikeGuard | LossScale | None]] = [("guard", self.guard), ("scaling", self.scaling)]
        return [(name, part) for name, part in parts if part is not None]

    def settings(self) -> dict[str, Any]:
        """Return the settings that a checkpoint records, as plain values."""
        return to_dict(self.cfg)

    def weights(self) -> dict[str, Tensor]:
        """Return the tensors of the model that a checkpoint holds."""
        return whole(self.own_weights())

    def own_weights(self) -> dict[str, Tensor]:
        """Return this process's tensors of the model: with FSDP2 shards."""
        if isinstance(self.task, Spread):
            self.task.reshard()
        return self.model.state_dict()

    def load_weights(self, tensors: dict[str, Tensor]) -> None:
        """Load what `weights` or `own_weights` returned."""
        self.own_weights()  # lets parameters be shards again
        self.model.load_state_dict(tensors)

    def whole_model(self) -> GPT | None:
        """Return the model with all its parameters; where they are shards, a copy in the main process, and None in the
        others. Every process calls it."""
        if not any(map(is_sharded, self.own_weights().values())):
            return self.model if self.mesh.main else None
        weights = self.weights()
        if not self.mesh.main:
            return None
        model = GPT(self.model.config).to(device=self.device, dtype=next(iter(weights.values())).dtype)
        model.load_state_dict(weights)
        return model

    def begin(self) -> None:
        """Load the weights that a new run starts with, if there are any."""
        if self.cfg.init:
            self.origin = load_initial(self.model, self.cfg.init)

    def more_state(self) -> dict[str, Any]:
        """Return what else state.json of a checkpoint records, as plain values."""
        return {}

    def save(self) -> None:
        """Start writing a checkpoint in the background; `writer.finished()` returns its path once it is complete."""
        state = {
            "progress": dataclasses.asdict(self.progress),
            "config": self.settings(),
            "model": dataclasses.asdict(self.model.config),
            "loader": self.loader.state_dict(),
            "tokenizer": self.data.fingerprint,
            "init": self.origin,
            **self.more_state(),
        }
        weights = self.own_weights() if self.sharded else self.weights()
        moments = checkpoint.flatten_optimizer(self.optimizer, self.model.named_parameters())
        extra = {**(moments if self.sharded else whole(moments)), **checkpoint.random_states(self.device, self.mesh)}
        if not (self.mesh.main or self.sharded):
            return
        extra.update({name: part.state for name, part in self.device_parts()})
        cfg, step = self.cfg, self.progress.step
        stays = {self.progress.best_step} if cfg.patience else set()
        stays |= set(range(0, step, cfg.keep_every)) if cfg.keep_every else set()
        self.writer.save(self.folder, step, weights, extra, state, cfg.keep, stays)

    def resume(self) -> list[str]:
        """Resume from the newest checkpoint of the run folder, or from cfg.resume; in a new folder load cfg.init.

        Returns:
            The settings that differ from those in the checkpoint, each with both values; the new ones apply from here.

        Raises:
            UserError: the folder already holds a run (resume never), or the checkpoint is damaged or does not fit.
        """
        path = self.mesh.share(self._checkpoint() if self.mesh.main else None)
        if path is None:
            self.begin()
            return []
        cfg, state = self.cfg, checkpoint.read_state(path)
        self._check(path, state)
        self.load_weights(self._read(path, checkpoint.MODEL, state))
        if "source" in state:  # imported weights, with which a new run starts
            self.origin = {key: state["source"][key] for key in ("name", "revision")}
            return []
        self.origin = state.get("init")
        extra = self._read(path, checkpoint.OPTIMIZER, state)
        rng = {name: extra.pop(name) for name in list(extra) if name.startswith("rng.")}
        seen: dict[str, Tensor] = {name: extra.pop(name) for name in ("guard", "scaling") if name in extra}
        for name, part in self.device_parts():
            part.state.copy_(seen.get(name, part.state))
        checkpoint.unflatten_optimizer(self.optimizer, extra, self.model.named_parameters())
        checkpoint.restore_random_states(rng, self.device, self.mesh)
        try:
            self.loader.load_state_dict(state["loader"])
        except UserError as e:
            raise UserError(f"{path}: {e}; expected the settings of that run, or another --out") from None
        self.progress = p = Progress.of_state(state["progress"])
        before, now = state["config"], self.settings()
        if any(before.get(name, default) != now[name] for name, default in METRIC.items()):
            p.best, p.best_step, p.waited, p.ended = None, -1, 0, False  # values of another metric do not compare
        if not (p.ended and cfg.patience):  # a longer max_steps continues the run
            if cfg.max_minutes is None:
                p.last_step, p.length_known = cfg.most_steps, True
            elif any(before.get(k) != now[k] for k in ("max_minutes", "max_steps")):
                p.last_step, p.length_known = cfg.most_steps, False
        others = [k for k in now if before.get(k, now[k]) != now[k] and k not in ("model", "resume", "out")]
        return [f"{key} {before[key]!r} -> {now[key]!r}" for key in others]

    def _read(self, path: Path, name: str, state: dict[str, Any]) -> dict[str, Tensor]:
        """Return the weights or the optimizer's state of a checkpoint; with FSDP2 this process's part of each."""
        found = checkpoint.open_tensors(path, name, state, self.mesh)
        if not self.fsdp:
            return {key: pieces.read() for key, pieces in found.items()}
        from fastgpt.training import sharded

        own = self.own_weights()
        if name == checkpoint.MODEL:
            sharded.require_fit(path, found, own)
            return sharded.load(found, own)
        owners = dict(self.model.named_parameters())  # state 'wte.weight.exp_avg' is spread like wte.weight
        return sharded.load(found, {key: owners[o] for key in found if (o := key.rpartition(".")[0]) in owners})

    def _checkpoint(self) -> Path | None:
        """Return the checkpoint that cfg.resume means; None for a new run."""
        cfg, old = self.cfg, checkpoint.checkpoints(self.folder)
        if cfg.resume == "never" and old:
            raise UserError(f"out: {self.folder} already holds a run; choose another --out, or delete that folder")
        if cfg.resume == "never" or (cfg.resume == "auto" and not old):
            return None
        return checkpoint.find(self.folder if cfg.resume == "auto" else cfg.resume)

    def _check(self, path: Path, state: dict[str, Any]) -> None:
        """Refuse a checkpoint of another tokenizer, model or optimizer."""
        if state["tokenizer"] != self.data.fingerprint:
            raise UserError(f"checkpoint {path} was trained with another tokenizer than that of {self.data.name}")
        there = dataclasses.asdict(model_from_dict(state["model"]))  # with defaults for settings that came later
        for name, value in dataclasses.asdict(self.model.config).items():
            if there[name] != value:
                raise UserError(f"checkpoint {path} has model.{name} {there[name]!r}, expected {value!r}")
        if "source" in state:
            return
        fixed = ("optimizer", "lr_ratios") if state["format"] == 1 else ("optimizer",)  # format 1: groups set the order
        for name in fixed:
            if state["config"].get(name) != (value := self.settings()[name]):
                raise UserError(f"checkpoint {path} has {name} {state['config'].get(name)!r}, expected {value!r}")

    def best(self) -> str:
        """Return a sentence on the checkpoint with the best metric, if patience keeps it."""
        p, metric = self.progress, self.cfg.metric
        kept = [c for c in checkpoint.checkpoints(self.folder) if c.name == f"step_{p.best_step:08d}"]
        return f"best {metric}: {p.best:.4f}, of {kept[0]}" if self.cfg.patience and kept else ""

    def ends(self) -> str:
        """Return a sentence on what will end the run."""
        p, minutes = self.progress, self.cfg.max_minutes
        if p.length_known or minutes is None:
            return f"the run ends with step {p.last_step}"
        steps = "" if self.cfg.max_steps is None else f" or with step {p.last_step} (max_steps), whichever comes first"
        return f"the run ends after {minutes:g} minutes (max_minutes){steps}"

    def fix_length(self, step: int, seconds: float) -> str:
        """Set the last step of a run limited by minutes, at step `step`, from `seconds` per step; return a sentence.

        The last step is set only once, so a resumed run has the same length.
        """
        p, minutes = self.progress, self.cfg.max_minutes
        assert minutes is not None
        fits = step + int((60 * minutes - p.seconds) / seconds)
        limit = "max_steps" if p.last_step <= fits else f"max_minutes {minutes:g} at {seconds:.3g} s a step"
        p.last_step, p.length_known = max(p.step + 1, min(p.last_step, fits)), True
        return f"the run ends with step {p.last_step} ({limit})"

    def too_slow(self) -> bool:
        """Return whether a run exceeds its max_minutes by 10 %, which happens if its steps become slower."""
        minutes = self.cfg.max_minutes
        return minutes is not None and self.progress.seconds >= minutes * 60 * 1.1
