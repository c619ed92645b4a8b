"""The base of all bodies that clients send."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Strict(BaseModel):
    """A body in which every field is known."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
