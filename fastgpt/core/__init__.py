"""Foundations of the rest of fastgpt: backend selection, facts about the machine, settings, errors."""
