"""Benchmarks, one file per op and one for training throughput; installed as fastgpt.bench."""

from pathlib import Path as _Path

# Every op of the registry, named after its file here. It is a literal because bench.gpu reads it before anything is
# built.
OPS = tuple(sorted(p.stem for p in _Path(__file__).parent.glob("[a-z]*.py") if "\nBENCH = " in p.read_text("utf-8")))
