"""Cleaning: text to cleaned text, or dropped by a named rule."""

from fastgpt.data.clean.cleaner import Cleaner, Outcome, Tally, clean_all
from fastgpt.data.clean.settings import PRESETS, STEPS, SettingError, located

__all__ = ["PRESETS", "STEPS", "Cleaner", "Outcome", "SettingError", "Tally", "clean_all", "located"]
