"""Preference pairs that a model makes from a constitution: `fastgpt finetune make-pairs`."""
