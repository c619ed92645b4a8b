"""What a sweep tries: a dataclass, read from a YAML file and checked as a whole before anything runs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fastgpt.core import options
from fastgpt.core.errors import UserError
from fastgpt.models.config import require
from fastgpt.sweep import space
from fastgpt.sweep.settings import flat
from fastgpt.sweep.space import Dimension
from fastgpt.training.metric import Goal, goal_of

# The value of a setting, whose scalars are text: `fastgpt train` reads them as it reads its command line.
Value = str | None | list[str | None] | dict[str, str | None]
NAME = r"[A-Za-z0-9][A-Za-z0-9._+=-]*"


@dataclass(frozen=True)
class Spec:
    """The settings of a sweep.

    Attributes:
        config: configuration that every run starts with, a name or a file, as for fastgpt train.
        options: settings of every run, over those of the configuration.
        search: setting -> values to try, a list or a range {low, high} with step or log, as in
            {lr: {low: 1e-4, high: 1e-2, log: true}}.
        variants: name -> settings of a variant, over the options; for sampler grid.
        metric: figure of metrics.jsonl that decides, at the end of a run; val_ may be left out.
        goal: whether the metric should fall or rise; auto knows it of losses, accuracies and the like.
        sampler: how trials are proposed; grid runs every variant, or every combination of lists in search.
        pruner: ends a trial whose validations are worse than those of others at the same step.
        trials: number of trials, pruned and failed ones included; not for grid.
        seeds: seeds that each trial or variant is trained with; the mean of their metrics counts.
        parallel: runs at a time; 0 is one for each device.
        devices: devices that the runs are divided over; none is the device that train chooses.
        keep_checkpoints: keep the checkpoints of finished runs.
    """

    config: str = ""
    options: dict[str, Value] = field(default_factory=dict)
    search: dict[str, Any] = field(default_factory=dict)
    variants: dict[str, dict[str, Value] | None] = field(default_factory=dict)
    metric: str = "val_loss"
    goal: Goal = "auto"
    sampler: Literal["tpe", "random", "grid"] = "tpe"
    pruner: Literal["none", "median", "hyperband", "halving"] = "none"
    trials: int | None = None
    seeds: list[int] = field(default_factory=lambda: [1])
    parallel: int = 0
    devices: list[str] = field(default_factory=list)
    keep_checkpoints: bool = False

    def __post_init__(self) -> None:
        require(self.config != "", "config", "", "a YAML file or the name of a configuration")
        grid = self.sampler == "grid"
        require(bool(self.search) != bool(self.variants), "search", self.search, "settings to try, or else variants")
        require(grid or not self.variants, "sampler", self.sampler, "grid with variants")
        require(not grid or self.trials is None, "trials", self.trials, "no number with sampler grid, which runs all")
        require(grid or self.trials is not None, "trials", None, "a number of trials")
        require(self.trials is None or self.trials > 0, "trials", self.trials, "more than 0")
        require(not grid or self.pruner == "none", "pruner", self.pruner, "none with sampler grid")
        distinct = len(set(self.seeds)) == len(self.seeds) > 0 and min(self.seeds) >= 0
        require(distinct, "seeds", self.seeds, "different numbers of 0 or more")
        require(0 <= self.parallel <= 1024, "parallel", self.parallel, "0 to 1024")
        require("" not in self.devices, "devices", self.devices, "names of devices, as in [cuda:0, cuda:1]")
        known = goal_of(self.metric, self.goal) is not None
        require(known, "goal", self.goal, f"min or max: the name {self.metric!r} does not tell")
        for name in self.variants:
            require(bool(re.fullmatch(NAME, name)), "variants", name, "names of letters, digits, dots, _, -, + and =")

    @property
    def rises(self) -> bool:
        """Whether the metric should rise."""
        return goal_of(self.metric, self.goal) == "max"

    @property
    def dimensions(self) -> list[Dimension]:
        """The settings to search and their values."""
        return space.dimensions(self.search)

    def named(self) -> dict[str, dict[str, str]]:
        """Return the variants of a grid by name: dotted setting -> value as text."""
        if self.variants:
            return {name: flat(given or {}, f"variants.{name}") for name, given in self.variants.items()}
        points = list(space.grid(self.dimensions))
        found = {space.name_of(point): point for point in points}
        if len(found) < len(points):
            raise UserError("search has values whose names are equal as names of folders, expected variants with names")
        return found

    def arguments(self, given: Mapping[str, str]) -> list[str]:
        """Return the arguments of fastgpt train for the settings `given` over those of all runs."""
        settings = {**flat(self.options, "options"), **given}
        return [f"--config={self.config}", *(f"--{key}={text}" for key, text in settings.items())]


def load(path: Path) -> Spec:
    """Read a sweep from a YAML file. `fastgpt.sweep.check` checks the settings of its runs.

    Raises:
        UserError: the file cannot be read, an unknown key, a wrong type or value; each names the file.
    """
    try:
        return Spec(**options.from_file(Spec, path))
    except UserError as e:
        raise e if str(path) in str(e) else UserError(f"{path}: {e}") from None
