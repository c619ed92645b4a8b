"""The version of fastgpt, in one place."""

__version__ = "0.1.0"
