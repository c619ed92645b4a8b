"""Rows of the model: for each chip, model and choice of backends the kernels of a step, their sums, and single ops."""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
from typing import Any

import torch

from fastgpt.bench._harness import provenance
from fastgpt.bench.model import peers
from fastgpt.bench.model.step import Modeller, Row, Step, chip_named, config_of, record, total
from fastgpt.core import backend

# What is chosen where nothing was measured; kernels of our own alone; PyTorch's operators, by bytes, with our AdamW.
CHOICES = ("auto", "attention=triton", "all=torch,adamw=cuda")


def run(args: argparse.Namespace, models: list[str], size: tuple[int, int] | None, given: dict[str, Any]) -> list[Row]:
    """Return the rows of all steps that were asked for, with these settings of the trainer; what they have in common is
    in each of them."""
    rows: list[Row] = []
    modeller = functools.cache(lambda chip: Modeller(chip_named(chip)))
    for chip, model in itertools.product(args.chip, models):
        for choice in args.kernels or CHOICES:
            rows += rows_of(modeller(chip), model, size, choice, given)
        if args.peers:
            step = Step(model, config_of(model, *(size or (None, None))), chip_named(chip), {})
            about = {"bench": "model", "chip": chip, "model": model, "figure": "op", "machine": _machine()}
            rows += [{**about, **row} for row in peers.rows(step, modeller(chip))]
        if why := modeller(chip).missing:
            print(f"CUDA kernels on {chip}: by their bytes alone: {why}", file=sys.stderr)
    return rows


def rows_of(
    modeller: Modeller, model: str, size: tuple[int, int] | None, choice: str, given: dict[str, Any]
) -> list[Row]:
    """Return the kernels of one step and its sums."""
    kernels = {} if choice == "auto" else {op: str(name) for op, name in backend.parse_choices(choice).items()}
    step = Step(model, config_of(model, *(size or (None, None)), **given), modeller.chip, kernels)
    found = modeller.rows(record(step, modeller.planner))
    about: dict[str, Any] = {"bench": "model", "chip": modeller.chip.name, "model": model, "kernels": choice}
    about |= {"settings": ", ".join(f"{name}={value}" for name, value in given.items())}
    about |= {"batch": step.cfg.sequences, "block": step.cfg.block_size, "machine": _machine()}
    return [*({**about, "figure": "kernel", **row} for row in found), {**about, **total(found, step)}]


def swept(chips: list[str]) -> list[Row]:
    """Return the rows of the launch shapes of attention's Triton kernels (sweep.py)."""
    from fastgpt.bench.model import sweep

    return [{"bench": "model", "machine": _machine(), **row} for row in sweep.sweep(chips)]


@functools.cache
def _machine() -> dict[str, Any]:
    """Return where the rows are from: the commit or the digest of the kernels' sources, versions of compilers."""
    return provenance(torch.device("cpu"))
