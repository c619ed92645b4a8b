"""Rotary settings of a config.json, in transformers 5's style (rope_parameters) and in the one before."""

from __future__ import annotations

from typing import Any

from fastgpt.core.errors import UserError
from fastgpt.models.config import ModelConfig
from fastgpt.ops._rope_scaling import ROPE_TYPES


def read_rope(config: dict[str, Any], where: str, *, theta_key: str = "rope_theta") -> dict[str, Any]:
    """Return rope_theta, rope_scaling and partial_rotary_factor (None where it is not set); rope_parameters wins.

    Raises:
        UserError: a rope_type that the model does not have, or one without its numbers.
    """
    old = config.get("rope_scaling") or {}
    given = dict(config.get("rope_parameters") or old)
    if nested := sorted(key for key, value in given.items() if isinstance(value, dict)):
        raise UserError(f"{where} has rope_parameters by kind of layer ({', '.join(nested)}), expected one for all")
    kind = given.get("rope_type", given.get("type", "default"))
    fraction = given.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    theta = given.get("rope_theta") or config.get(theta_key) or 10000.0
    found: dict[str, Any] = {"rope_theta": theta, "rope_scaling": None, "partial_rotary_factor": fraction}
    if kind == "default":
        return found
    if kind not in ROPE_TYPES:
        raise UserError(f"{where} has rope_type {kind!r}, expected default, {', '.join(ROPE_TYPES)}")
    need, may = ROPE_TYPES[kind]
    most = config.get("max_position_embeddings")
    if kind == "dynamic":
        given["original_max_position_embeddings"] = most
    elif "original_max_position_embeddings" in need:
        given["original_max_position_embeddings"] = (
            config.get("original_max_position_embeddings") or given.get("original_max_position_embeddings") or most
        )
    if kind == "yarn" and given.get("factor") is None and most:
        given["factor"] = most / given["original_max_position_embeddings"]
    if missing := sorted(key for key in need if given.get(key) is None):
        raise UserError(f"{where} has rope_type {kind!r} without {', '.join(missing)}")
    kept = {key: given[key] for key in given if key in need | may and given[key] is not None}
    return found | {"rope_scaling": {"rope_type": kind, **kept}}


def write_rope(c: ModelConfig, fraction: float | None = None) -> dict[str, Any]:
    """Return both styles of the settings, with equal values."""
    scaling = dict(c.rope_scaling or {})
    kind = scaling.pop("rope_type", "default")
    if kind == "dynamic":
        del scaling["original_max_position_embeddings"]  # it is max_position_embeddings, which `context` returns
    parameters: dict[str, Any] = {"rope_type": kind, **scaling, "rope_theta": c.rope_theta}
    if fraction is not None:
        parameters["partial_rotary_factor"] = fraction
    old = None if kind == "default" else {"rope_type": kind, "type": kind, **scaling}
    return {"rope_parameters": parameters, "rope_theta": c.rope_theta, "rope_scaling": old}


def context(c: ModelConfig) -> int | None:
    """Return max_position_embeddings: the positions of the model; with dynamic scaling, those without scaling."""
    if c.rope_scaling is not None and c.rope_scaling["rope_type"] == "dynamic":
        return int(c.rope_scaling["original_max_position_embeddings"])
    return c.block_size


def positions(max_position_embeddings: int, scaling: dict[str, Any] | None) -> int:
    """Return block_size: as many positions as the configuration means the model to reach."""
    if scaling is not None and scaling["rope_type"] == "dynamic":
        return int(max_position_embeddings * max(1.0, scaling["factor"]))
    return max_position_embeddings
